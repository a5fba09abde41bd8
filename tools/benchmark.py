"""Time parts of the package against each other in one run: a table, and a JSON file with what it was measured on."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from simipu3d.command_line import print_table, run
from simipu3d.engine.run import environment, write_whole
from simipu3d.errors import UserError

SUITES = {
    "data": "every reader and the shards: frames a second and core, where the time goes, peak memory",
    "downstream": "rotated boxes and the scorers of KITTI, nuScenes and Waymo: seconds a call",
    "encoders": "every point encoder: time and memory of a training step by number of points",
}

EXAMPLES = """suites:
{suites}

examples:
  python tools/benchmark.py --suite data --samples /path/to/samples --json data.json
  python tools/benchmark.py --suite downstream --samples /path/to/samples --json downstream.json
  python tools/benchmark.py --suite encoders --json encoders.json
""".format(suites="\n".join(f"  {name:10} {about}" for name, about in SUITES.items()))


def body(args: argparse.Namespace) -> None:
    """Measure, show, write."""
    if args.samples is not None and not args.samples.is_dir():
        raise UserError(f"--samples: {args.samples}: no such folder")
    suite = importlib.import_module(f"simipu3d.benchmark.{args.suite}")
    rows = suite.measure(args.samples, args.quick)
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    print_table(list(rows[0]), cells, (suite.__doc__ or "").partition("\n")[0])
    if args.json is not None:
        text = json.dumps({"suite": args.suite, "environment": environment(), "rows": rows}, indent=1)
        write_whole(args.json, text + "\n")
        print(f"written: {args.json}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="benchmark", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", required=True, choices=sorted(SUITES), help="what to compare")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment there too")
    parser.add_argument(
        "--samples", type=Path, metavar="DIR", help="folder of real samples; without it synthetic data is used"
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats: does it run at all?")
    return run(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
