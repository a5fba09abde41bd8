"""Pre-train backbones from a configuration: `python tools/pretrain.py --cfg configs/simipu/kitti.yaml --set data.root=...`"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from simipu3d.command_line import add_config_arguments, add_partial_argument, run
from simipu3d.engine.pretrain import pretrain

EXAMPLES = """examples:
  python tools/pretrain.py --cfg configs/simipu/demo.yaml
  python tools/pretrain.py --cfg configs/simipu/kitti.yaml --set data.root=/path/to/kitti
  python tools/pretrain.py --cfg configs/simipu/kitti.yaml --set data.root=/path/to/kitti \\
      point_encoder.name=voxel_res_backbone8x matching.assignment=greedy trainer.devices=8
  python tools/pretrain.py --cfg configs/simipu/kitti.yaml --set data.root=/path/to/kitti --out runs/first --resume

what a run leaves: config.yaml, environment.json, metrics.csv, tensorboard/, pictures/, checkpoints/last.ckpt
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    parser = argparse.ArgumentParser(
        prog="pretrain", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
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
        type=Path,
        metavar="CKPT",
        help="start a new run from weights: of another run, or torchvision's, timm's, MoCo's, mmdetection3d's, SimIPU's, "
        "OpenPCDet's, PointContrast's (.pth, .safetensors)",
    )
    add_partial_argument(parser)
    return parser


def body(args: argparse.Namespace) -> None:
    """Run, and say where the result is."""
    out = pretrain(args.cfg, args.set, out=args.out, resume=args.resume, init=args.init, partial=args.partial)
    logging.getLogger("simipu3d").info("done: %s", out)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(build_parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
