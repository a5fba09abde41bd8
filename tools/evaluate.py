"""Score checkpoints on held-out frames: `python tools/evaluate.py --cfg configs/depth/kitti.yaml --ckpt runs/depth`"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from simipu3d.command_line import add_config_arguments, print_table, run
from simipu3d.engine.evaluate import evaluate

EXAMPLES = """examples:
  python tools/evaluate.py --cfg configs/depth/drive_world.yaml --ckpt runs/depth
  python tools/evaluate.py --cfg configs/depth/kitti.yaml --ckpt runs/depth/checkpoints/last.ckpt --out runs/depth \\
      --predict runs/depth/predictions --set data.root=/path/to/kitti_raw data.depth_root=/path/to/kitti_depth

frames are those of validate.data, or of data where there is no such block; --set validate.data.split=... chooses others
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    parser = argparse.ArgumentParser(
        prog="evaluate", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--ckpt",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="checkpoints, or folders of runs: those give a row for last, best and every kept epoch, and their mean",
    )
    parser.add_argument(
        "--last", type=int, default=5, metavar="N", help="kept epochs that the mean is over (default: 5)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write metrics.json there")
    parser.add_argument(
        "--predict", type=Path, metavar="DIR", help="draw predictions beside the truth and write submission files there"
    )
    return parser


def body(args: argparse.Namespace) -> None:
    """Score, and print the table."""
    rows = evaluate(args.cfg, args.ckpt, args.set, last=args.last, out=args.out, predictions=args.predict)
    columns = list(dict.fromkeys(name for _, numbers in rows for name in numbers))
    cells = (
        [name, *(f"{numbers[column]:.4f}" if column in numbers else "" for column in columns)] for name, numbers in rows
    )
    print_table(["checkpoint", *columns], cells, title=f"held-out frames of {args.cfg}")
    for folder in (args.out, args.predict):
        if folder is not None:
            logging.getLogger("simipu3d").info("written: %s", folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(build_parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
