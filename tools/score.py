"""Score detections or depth maps by a benchmark's official rules; no model and no configuration is needed."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simipu3d.command_line import print_table, run
from simipu3d.engine.run import write_whole
from simipu3d.errors import UserError
from simipu3d.metrics.depth import CROPS

EXAMPLES = """examples:
  python tools/score.py --benchmark kitti --gt training/label_2 --pred results --frames ImageSets/val.txt
  python tools/score.py --benchmark nuscenes --gt nuscenes/v1.0-trainval --split val --pred results_nusc.json
  python tools/score.py --benchmark waymo --gt gt.bin --pred predictions.bin --json scores.json
  python tools/score.py --benchmark depth --gt gt --pred depth --crop garg --kb-crop
  python tools/score.py --benchmark depth --gt gt --pred depth --crop nyu --depth-scale 1000 --max-depth 10

The definitions, their sources and the file formats: docs/metrics.md
"""
# What each benchmark's `score` takes beside the two paths: option -> (its argument, default).
FRAMES = {"frames": ("frames", None)}
DEPTH = {"depth_scale": ("scale", 256.0), "min_depth": ("min_depth", 1e-3), "max_depth": ("max_depth", 80.0)}
CROP = {"crop": ("crop", "none"), "kb_crop": ("kb", False)}
OPTIONS: dict[str, dict[str, tuple[str, Any]]] = {
    "kitti": FRAMES,
    "nuscenes": {"split": ("split", None)},
    "waymo": {},
    "depth": FRAMES | DEPTH | CROP,
}


def build_parser() -> argparse.ArgumentParser:
    """The arguments of this tool."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="score", description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    add = parser.add_argument
    add("--benchmark", required=True, choices=sorted(OPTIONS), help="whose rules and files")
    add("--gt", type=Path, required=True, metavar="PATH", help="the truth: folder, tables, boxes file or Objects file")
    add("--pred", type=Path, required=True, metavar="PATH", help="the predictions: folder, submission or Objects file")
    add("--json", type=Path, metavar="FILE", help="write all numbers there")
    add(
        "--frames",
        type=Path,
        metavar="FILE",
        help="kitti, depth: names of the frames to score, one a line (default: all)",
    )
    add("--split", metavar="NAME", help="nuscenes: split of the tables (default: all their scenes)")
    add("--depth-scale", type=float, metavar="S", help="depth: PNG values a metre (default: 256, KITTI; NYU: 1000)")
    add("--min-depth", type=float, metavar="M", help="depth: nearest truth that counts, metres (default: 0.001)")
    add("--max-depth", type=float, metavar="M", help="depth: farthest truth that counts, metres (default: 80; NYU: 10)")
    add("--crop", choices=["none", *CROPS, "nyu"], help="depth: part of the image that counts (default: none)")
    add("--kb-crop", action="store_true", default=None, help="depth: cut the truth to KITTI's 352 x 1216 first")
    return parser


def body(args: argparse.Namespace) -> None:
    """Score, show, write."""
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json: {args.json.parent}: no such folder")
    own = OPTIONS[args.benchmark]
    for option in sorted({name for options in OPTIONS.values() for name in options} - set(own)):
        if getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} means nothing to --benchmark {args.benchmark}; leave it out")
    asked = {option: getattr(args, option) for option in own}
    given = {argument: default if asked[name] is None else asked[name] for name, (argument, default) in own.items()}
    scores = importlib.import_module(f"simipu3d.metrics.files.{args.benchmark}").score(args.gt, args.pred, **given)
    for table in scores.tables:
        print_table(table.columns, table.rows, table.title)
    if args.json is not None:
        content = {"benchmark": args.benchmark, "gt": str(args.gt), "pred": str(args.pred), **scores.values}
        write_whole(args.json, json.dumps(content, indent=1) + "\n")
        print(f"written: {args.json}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return run(build_parser(), body, argv)


if __name__ == "__main__":
    sys.exit(main())
