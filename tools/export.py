"""Write a pre-trained backbone for another library, and prove that it loads there with equal features."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from simipu3d.command_line import add_plugins_argument, run

EXAMPLES = """targets of --branch image:
  torchvision   flat weights for torchvision.models.resnet*, .pth or .safetensors
  timm          a folder for timm.create_model('local-dir:DIR', pretrained=True) and the Hub; any backbone
  mmdet3d       for init_cfg or load_from: ResNets, Swins
  openpcdet     for CaDDN and Focals Conv, with --prefix a part of a whole detector; Swins for BEVFusion
targets of --branch points: openpcdet, mmdet3d (voxel encoders, PointNet++), pointcept, minkowski (sparse U-Nets)

example:
  python tools/export.py --ckpt runs/kitti/checkpoints/last.ckpt --branch image --to torchvision --out resnet50.pth

Every file is read back and its features compared with the trained network's before it gets its name: docs/export.md
"""
# Options of one branch, and what they are when they are not given.
IMAGE_ONLY = {"input": None, "convert_weights": False, "calibrate": None}
POINTS_ONLY = {"network": None, "layout": None, "channels": None, "intensity_scale": 1.0, "partial": False}


def build_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="export", description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, metavar="CKPT", help="checkpoint of a pre-training run")
    add("--branch", required=True, choices=["image", "points"], help="which encoder")
    add("--to", required=True, metavar="TARGET", help="see below")
    add("--out", type=Path, required=True, metavar="FILE", help="file to write (timm: folder)")
    add("--prefix", metavar="P", help="what goes before the names (default: the target's usual one)")
    add("--overwrite", action="store_true", help="replace what is at --out")
    normalisation = "image: normalisation the file expects; caffe_bgr for std 1 in mmdet3d (default: imagenet_rgb)"
    add("--input", choices=["imagenet_rgb", "caffe_bgr"], help=normalisation)
    add("--convert-weights", action="store_true", help="image, Swin: Microsoft's names, for CONVERT_WEIGHTS: True")
    add("--calibrate", type=Path, metavar="CFG", help="image: measure BatchNorm statistics on the pictures of CFG")
    add("--network", metavar="N", help="points: which of the target's networks (default: the first that fits)")
    add("--layout", choices=["spconv1", "spconv2"], help="points: of sparse weights (default: what the target reads)")
    add("--channels", type=int, metavar="C", help="points: pad or cut the input columns to C (default: as trained)")
    add("--intensity-scale", type=float, default=1.0, metavar="S", help="points: the target's intensity is S x ours")
    add_plugins_argument(parser)
    add("--no-bias", action="store_true", help="points: for VoxelResBackBone8x with USE_BIAS: False")
    add("--partial", action="store_true", help="points, pointcept: write the part that fits")
    return parser


def body(args: argparse.Namespace) -> None:
    """Export, and print what was written and how to use it."""
    from simipu3d.engine.plugins import load_plugins
    from simipu3d.errors import UserError
    from simipu3d.export.image.write import export_image
    from simipu3d.export.points.write import export_points

    load_plugins(args.plugins, "--plugins")
    logging.getLogger("simipu3d.encoders").setLevel(logging.WARNING)  # networks built here are for the check only
    for key, default in (POINTS_ONLY | {"no_bias": False} if args.branch == "image" else IMAGE_ONLY).items():
        if getattr(args, key) != default:
            raise UserError(f"--{key.replace('_', '-')}: does not belong to --branch {args.branch}; leave it out")
    common = {"prefix": args.prefix, "overwrite": args.overwrite}
    if args.branch == "image":
        options = {"input": args.input or "imagenet_rgb", "convert_weights": args.convert_weights}
        print(export_image(args.ckpt, args.to, args.out, calibrate_on=args.calibrate, **common, **options).summary())
    else:
        options = {key: getattr(args, key) for key in POINTS_ONLY} | {"bias": not args.no_bias}
        print(export_points(args.ckpt, args.to, args.out, **common, **options).summary())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(build_parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
