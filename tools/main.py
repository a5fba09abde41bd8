"""`simipu3d COMMAND ...`: the tools of this folder, for those who install instead of cloning."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "pretrain": "pre-train backbones from a configuration",
    "finetune": "train a downstream head, from a checkpoint or from scratch",
    "evaluate": "score checkpoints on held-out frames, draw and write their predictions",
    "demo": "the whole way on the embedded data set: pre-train, probe, pictures, export",
    "prepare_data": "write a data set as shards, on one disk or behind a URL, and prove them whole",
    "inspect_data": "draw what a configuration reads: projected points, boxes, views and their matches",
    "benchmark": "time parts of the package against each other",
    "keys": "every key of a configuration: type, range, default, meaning, source",
    "score": "score detections or depth maps by a benchmark's official rules; needs no model",
    "export": "write a pre-trained backbone for another library, and prove that it loads",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the tools."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        known = "\n".join(f"  {name:14} {what}" for name, what in COMMANDS.items())
        asked_for_help = arguments[:1] in (["-h"], ["--help"])
        usage = f"usage: simipu3d COMMAND [arguments]; COMMAND --help says more\n{known}"
        print(usage, file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    tool = importlib.import_module(f"simipu3d.tools.{arguments[0]}")
    return tool.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
