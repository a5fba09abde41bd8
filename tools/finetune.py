"""Train a downstream head: `python tools/finetune.py --cfg configs/depth/kitti.yaml --init runs/first/checkpoints/last.ckpt`"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from simipu3d.command_line import add_config_arguments, add_partial_argument, run
from simipu3d.engine.finetune import finetune

EXAMPLES = """examples:
  python tools/finetune.py --cfg configs/depth/drive_world.yaml --init scratch
  python tools/finetune.py --cfg configs/depth/kitti.yaml --init runs/first/checkpoints/last.ckpt \\
      --set data.root=/path/to/kitti_raw data.depth_root=/path/to/kitti_depth
  python tools/finetune.py --cfg configs/depth/kitti.yaml --init scratch --set data.label_fraction=0.1 data.label_seed=1
  python tools/finetune.py --cfg configs/depth/kitti.yaml --out runs/depth --resume

what a run leaves is what pretrain leaves; tools/evaluate.py scores it
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    parser = argparse.ArgumentParser(
        prog="finetune", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/<configuration>-<time>)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="CKPT",
        help="continue a run: from CKPT, or from last.ckpt of --out (starts afresh where there is none yet)",
    )
    parser.add_argument(
        "--init",
        metavar="CKPT",
        help="the weights to start from, as for pretrain, or the word scratch for random ones; needed without --resume",
    )
    add_partial_argument(parser)
    return parser


def body(args: argparse.Namespace) -> None:
    """Run, and say where the result is."""
    out = finetune(args.cfg, args.set, out=args.out, resume=args.resume, init=args.init, partial=args.partial)
    logging.getLogger("simipu3d").info("done: %s", out)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(build_parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
