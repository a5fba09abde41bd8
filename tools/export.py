"""Write a pre-trained backbone for another library, and prove that it loads there with equal features."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from simipu3d.command_line import add_plugins_argument, run

EXAMPLES = """targets:
  torchvision   flat weights for torchvision.models.resnet*, .pth or .safetensors
  timm          a folder for timm.create_model('local-dir:DIR', pretrained=True) and the Hub; any backbone
  mmdet3d       {meta, state_dict} for init_cfg or load_from
  openpcdet     one file for CaDDN and Focals Conv; with --prefix a part of a whole detector for --pretrained_model

examples:
  python tools/export.py --ckpt runs/kitti/checkpoints/last.ckpt --branch image --to torchvision --out resnet50.pth
  python tools/export.py --ckpt runs/demo/checkpoints/last.ckpt --branch image --to timm --out exports/demo
  python tools/export.py --ckpt CKPT --branch image --to openpcdet --prefix vfe.ffn.ddn.model.backbone. --out caddn.pth

Every file is read back and its features compared with the trained network's before it gets its name.
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    parser = argparse.ArgumentParser(
        prog="export", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", type=Path, required=True, metavar="CKPT", help="checkpoint of a pre-training run")
    parser.add_argument("--branch", required=True, choices=["image"], help="which encoder")
    parser.add_argument("--to", required=True, metavar="TARGET", help="openpcdet, mmdet3d, torchvision or timm")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write (timm: folder)")
    parser.add_argument(
        "--prefix",
        metavar="P",
        help="what goes before the names: mmdet3d (default img_backbone.), openpcdet (default: none)",
    )
    parser.add_argument(
        "--input",
        choices=["imagenet_rgb", "caffe_bgr"],
        default="imagenet_rgb",
        help="normalisation the file expects; caffe_bgr for mmdet3d configurations with std 1 (default: %(default)s)",
    )
    add_plugins_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    return parser


def body(args: argparse.Namespace) -> None:
    """Export, and print what was written and how to use it."""
    from simipu3d.engine.plugins import load_plugins
    from simipu3d.export.image import export_image

    load_plugins(args.plugins, "--plugins")
    logging.getLogger("simipu3d.encoders").setLevel(logging.WARNING)  # the networks built here are for the check only
    report = export_image(args.ckpt, args.to, args.out, prefix=args.prefix, input=args.input, overwrite=args.overwrite)
    print(report.summary())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(build_parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
