"""`python tools/inspect_data.py --cfg FILE`: what does a configuration read? Pages to look at, or a check of every frame.

Only the `data:` and `augment:` blocks are read. Of each frame two pages are written: the frame as it was read (projected points and
boxes in all cameras, the scan from above) and what augmentation makes of it (two views with matches, the augmented images
with their points). `--check N` reports every problem that it finds in N frames, and draws how depth edges meet the pictures
where a calibration seems off (with --out: of every camera).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from simipu3d.command_line import add_config_arguments, print_table, run
from simipu3d.contracts.method import Needs
from simipu3d.data.calibration_picture import write_calibrations
from simipu3d.data.check import as_on_disk, check_frames, collect, frame_count, spread_indices, summary
from simipu3d.data.complete import write_complete
from simipu3d.data.loading import loader
from simipu3d.engine.settings import load_data_settings
from simipu3d.errors import BadFrameError, UserError
from simipu3d.pictures.frames import FrameFacts, write_pages


def inspect(args: argparse.Namespace) -> None:
    """Write the pages and print the table, or check frames."""
    settings = load_data_settings(args.cfg, args.set)
    config = settings.data
    if args.list_complete is not None:
        number = write_complete(config, Path(args.list_complete))
        print(f"{args.list_complete}: {number} names of which every file is there; read them with data.split_file")
        return
    reader = loader.build_reader(config if args.check is None else as_on_disk(config))
    title = f"{config.name}, split {config.split}: {len(reader)} frames"
    out, facts = Path(args.out or Path("runs") / f"inspect-{Path(args.cfg).stem}"), []
    if args.num < 1 or len(reader) == 0:
        raise UserError(f"nothing to read: --num is {args.num}, and split {config.split} has {len(reader)} frames")
    if args.check is not None:
        check(reader, args.check, config.num_workers, title, out, draw=args.out is not None)
        return
    for index in spread_indices(args.num, len(reader)):
        try:
            frame = reader[index]
            if len(frame.points):  # none where a reader is asked for images and boxes alone
                loader.check_seen(frame)
        except BadFrameError as error:
            if config.on_bad_frame == "raise":
                raise
            print(f"skipped: {error}", file=sys.stderr)
            continue
        truth: tuple[Literal["boxes"], ...] = () if frame.boxes is None else ("boxes",)
        needs = Needs(point_views=2, image_views=1 if frame.cameras else 0, truth=truth)
        batch = (
            loader.example_batch(reader, frame, config, settings.augment, needs, index) if len(frame.points) else None
        )
        facts.append(write_pages(out, frame, batch))
    print_table(FrameFacts._fields, facts, title)
    print(f"pages of {len(facts)} frames in {out}")


def check(reader: loader.FrameReader, number: int, num_workers: int, title: str, out: Path, draw: bool) -> None:
    """Read frames, print every problem and a summary; `draw`: write pictures of the calibration even where it agrees."""
    indices = spread_indices(number, len(reader))
    checks, console = check_frames(reader, indices, num_workers), Console(stderr=True)
    report = collect(list(track(checks, "checking", len(indices), console=console, disable=not console.is_terminal)))
    print("\n".join(report.problems), end="\n" if report.problems else "")
    print_table(("what", "found"), summary(report), title)
    if draw or any(calibration.is_problem for calibration in report.calibrations):
        print(f"depth edges on pictures: {', '.join(map(str, write_calibrations(out, reader, report)))}")
    if report.problems:
        raise UserError(f"{len(report.problems)} problems in {len(indices)} frames, listed above")
    print(f"no problem in {len(indices)} frames")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="inspect_data", description=__doc__.partition("\n")[0])
    add_config_arguments(parser)
    parser.add_argument("--num", type=int, default=8, metavar="N", help="frames, spread over the split (default: 8)")
    what = "read N frames, spread over the split (all or 0: every frame), and report every problem"
    parser.add_argument("--check", type=frame_count, metavar="N", help=what)
    what = "write the sequences or frames of which every file is there, for data.split_file, and read nothing"
    parser.add_argument("--list-complete", metavar="FILE", help=what)
    parser.add_argument("--out", metavar="DIR", help="folder for the pages (default: runs/inspect-<configuration>)")
    return run(parser, inspect, argv)


if __name__ == "__main__":
    sys.exit(main())
