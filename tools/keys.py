"""Every key of a configuration with type, range, default, meaning and source: `simipu3d keys contrast`, `simipu3d keys data`"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from simipu3d.command_line import print_table, run
from simipu3d.engine.keys import as_markdown, blocks, keys_of
from simipu3d.engine.plugins import load_plugins
from simipu3d.errors import UserError


def body(args: argparse.Namespace) -> None:
    """Print the asked blocks, or write all of them."""
    load_plugins(args.plugins, "--plugins")
    if args.write is not None:
        args.write.write_text(as_markdown(), encoding="utf-8")
        print(f"written: {args.write}")
        return
    known = blocks()
    asked = (args.block or "").rstrip(":")
    chosen = {place: model for place, model in known.items() if not asked or asked in (place, place.split(":")[0])}
    if not chosen:
        names = ", ".join(dict.fromkeys(place.split(":")[0] for place in known))
        raise UserError(f"keys: no block is called {args.block}; there are {names}")
    for place, model in chosen.items():
        print_table(("key", "type", "default", "meaning and source"), keys_of(model), place)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="keys", description=__doc__)
    parser.add_argument("block", nargs="?", metavar="BLOCK", help='like contrast, data, "data: kitti" (default: all)')
    parser.add_argument("--write", type=Path, metavar="FILE", help="write all of them as Markdown instead")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="MODULE", help="modules whose parts are wanted too")
    return run(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
