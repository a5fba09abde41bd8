"""`python tools/inspect_data.py --cfg FILE`: what does a configuration read? Pages to look at, and a table.

Only the `data:` block is read. For each frame two pages are written: the frame as it was read (projected points, boxes,
the scan from above) and what augmentation makes of it (two views with matches, the augmented images with their points).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from simipu3d.command_line import add_config_arguments, run
from simipu3d.data import module
from simipu3d.data.augment import augment_frame
from simipu3d.data.collate import collate
from simipu3d.data.order import sample_seeds
from simipu3d.engine.settings import load_data_config
from simipu3d.errors import BadFrameError, UserError
from simipu3d.pictures import save_png
from simipu3d.pictures.frames import FrameFacts, frame_facts, frame_page, views_page


def inspect(args: argparse.Namespace) -> None:
    """Write the pages and print the table."""
    config = load_data_config(args.cfg, args.set)
    reader = module.build_reader(config)
    if args.num < 1 or len(reader) == 0:
        raise UserError(f"nothing to draw: --num is {args.num}, and split {config.split} has {len(reader)} frames")
    out = Path(args.out or Path("runs") / f"inspect-{Path(args.cfg).stem}")
    facts = []
    for index in np.linspace(0, len(reader) - 1, min(args.num, len(reader))).round().astype(int).tolist():
        try:
            frame = reader[index]
            module.check_seen(frame)
        except BadFrameError as error:
            if config.on_bad_frame == "raise":
                raise
            print(f"skipped: {error}", file=sys.stderr)
            continue
        batch = collate([augment_frame(frame, module.augment_of(reader, config, index), sample_seeds(0, 0, index))])
        name = frame.frame_id.replace("/", "_")
        for kind, picture in (("frame", frame_page(frame)), ("views", views_page(batch))):
            try:
                save_png(out / f"{name}-{kind}.png", picture)
            except OSError as error:
                raise UserError(f"--out {out}: cannot be written: {error}") from error
        facts.append(frame_facts(frame))
    show(facts, f"{config.name}, split {config.split}: {len(reader)} frames")
    print(f"{2 * len(facts)} pages in {out}")


def show(facts: list[FrameFacts], title: str) -> None:
    """The table of the frames that were drawn."""
    table = Table(title=title)
    for column in FrameFacts._fields:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in facts:
        table.add_row(*row)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run."""
    parser = argparse.ArgumentParser(prog="inspect_data", description=__doc__.partition("\n")[0])
    add_config_arguments(parser)
    parser.add_argument("--num", type=int, default=8, metavar="N", help="frames, spread over the split (default: 8)")
    parser.add_argument("--out", metavar="DIR", help="folder for the pages (default: runs/inspect-<configuration>)")
    return run(parser, inspect, argv)


if __name__ == "__main__":
    sys.exit(main())
