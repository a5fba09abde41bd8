"""The whole way on the embedded data set: pre-train, probe on held-out streets, draw a page, export the image backbone.

`make demo` runs it. It needs minutes on two CPU cores, nothing to download and no GPU. An interrupted demo goes on where it was.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from simipu3d.command_line import add_config_arguments, run
from simipu3d.engine.pretrain import pretrain
from simipu3d.engine.run import write_whole
from simipu3d.engine.settings import load_settings
from simipu3d.errors import UserError
from simipu3d.export.image.write import export_image
from simipu3d.pictures import save_png
from simipu3d.probe.report import RunReport, report_run


def show(report: RunReport) -> None:
    """Print what was measured."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    tasks = Table("held-out streets", "loss", "ceiling ln(N)", "top-1", "chance", title="Contrastive tasks")
    words = {"intra": "intra-modal: token to token", "inter": "inter-modal: pixel to token"}
    for name, task in report.tasks.items():
        tasks.add_row(
            words.get(name, name), f"{task.loss:.2f}", f"{task.ceiling:.2f}", f"{task.top1:.2%}", f"{task.chance:.2%}"
        )
    heading, *rows = report.table.text_rows()
    table = report.table
    probe = Table(
        *heading,
        title=f"Frozen image backbone, linear probe: {table.num_labels} labelled frames, {table.num_held_out} held out, "
        f"{len(table.seeds)} seeds",
    )
    for row in rows:
        probe.add_row(*row)
    console.print(tasks)
    console.print(probe)


def body(args: argparse.Namespace) -> None:
    """All steps in order."""
    start = time.perf_counter()
    if load_settings(args.cfg, args.set).data.name != "drive_world":
        raise UserError(
            f"{args.cfg}: the demonstration needs depth and classes of every pixel, so data.name=drive_world"
        )
    out = pretrain(args.cfg, args.set, out=args.out, resume="")
    trained = time.perf_counter()
    logging.getLogger("simipu3d.encoders").setLevel(logging.WARNING)  # from here on networks are built for probes only
    report = report_run(out)
    show(report)
    picture = save_png(out / "demo.png", report.picture)
    folder = out / "backbone_timm"
    export_image(out / "checkpoints" / "last.ckpt", "timm", folder, overwrite=True)
    result = {"tasks": {name: task._asdict() for name, task in report.tasks.items()}, "probe": report.table.as_dict()}
    result |= {"seconds": {"pre-training": trained - start, "all": time.perf_counter() - start}}
    write_whole(out / "demo.json", json.dumps(result, indent=1))
    print(f"pre-training took {trained - start:.0f} s, everything {time.perf_counter() - start:.0f} s")
    print(f"page of pictures:   {picture}\nexported backbone:  {folder}\nnumbers:            {out / 'demo.json'}")
    print(f"training curves:    tensorboard --logdir {out / 'tensorboard'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    add_config_arguments(parser, default="configs/simipu/demo.yaml")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run directory (default: %(default)s)"
    )
    logging.captureWarnings(True)
    return run(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
