"""Write a data set as WebDataset shards, which `data.name: shards` reads back; or prove such a set whole."""

import argparse
import os
import sys
from collections.abc import Sequence

from simipu3d.command_line import add_config_arguments, run
from simipu3d.data.shards.verify import verify_shards
from simipu3d.data.shards.writer import prepare_shards
from simipu3d.engine.settings import load_data_settings
from simipu3d.errors import UserError

EXAMPLES = """examples:
  python tools/prepare_data.py --cfg configs/simipu/kitti.yaml --set data.root=/path/to/kitti --out /path/to/shards
  python tools/prepare_data.py --cfg configs/simipu/nuscenes.yaml --set data.root=/path/to/nuscenes \\
      prepare.images=jpeg prepare.points=int32_mm --out s3://bucket/nuscenes --workers 16
  python tools/prepare_data.py --out /path/to/shards --verify
  python tools/pretrain.py --cfg configs/simipu/kitti.yaml --set data.name=shards data.root=/path/to/shards

the block prepare: of a configuration says how: points, images, jpeg_quality, shard_megabytes, shard_frames.
A call that was stopped goes on when it is made again; finished shards are kept.
"""


def body(args: argparse.Namespace) -> None:
    """Write, or verify."""
    if args.workers < 1:
        raise UserError(f"--workers: at least 1, got {args.workers}")
    if args.verify:
        verify(args)
        return
    if args.cfg is None:
        raise UserError("--cfg: which configuration says what to read? Only --verify goes without")
    settings = load_data_settings(args.cfg, args.set)
    data, prepare = settings.data, settings.prepare
    manifest = prepare_shards(data, prepare, args.out, args.workers)
    size = sum(shard.bytes for shard in manifest.shards)
    print(
        f"{manifest.frames} frames in {len(manifest.shards)} shards, {size / 1e6:.1f} MB, {len(manifest.skipped)} frames "
        f"skipped: {args.out}"
    )


def verify(args: argparse.Namespace) -> None:
    """Name everything that is damaged; nothing is written."""
    reader, problems = verify_shards(args.out, args.workers)
    for line in problems:
        print(line)
    if problems:
        raise UserError(
            f"{args.out}: {len(problems)} problems, named above; delete the damaged shards and run prepare_data again, it "
            "writes what is missing"
        )
    print(f"whole: {len(reader)} frames in {len(reader.manifest.shards)} shards, every one decoded: {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare_data", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser, needed=False)
    parser.add_argument("--out", required=True, metavar="URL", help="folder or fsspec URL of the shards")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help=f"processes (default: {cores})")
    parser.add_argument("--verify", action="store_true", help="only prove the set at --out whole; needs no --cfg")
    return run(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
