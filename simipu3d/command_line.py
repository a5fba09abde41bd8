"""What every tool does round its own work: `--traceback`, one-line errors, exit status, logging.

Exit status: 0 all of it worked, 2 something the user can mend, 130 interrupted, 143 stopped by a scheduler; our own bugs
keep their traceback.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table

from simipu3d.errors import Stopped, UserError


def add_config_arguments(parser: argparse.ArgumentParser, *, default: str | None = None, needed: bool = True) -> None:
    """`--cfg FILE` and `--set KEY=VALUE ...`, the same in every tool; `--cfg` is needed where it has no default."""
    about = "configuration (YAML)" if default is None else f"configuration (default: {default})"
    parser.add_argument("--cfg", required=needed and default is None, default=default, metavar="FILE", help=about)
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change keys of the configuration; values are YAML; a block's name is changed first, and drops its old keys",
    )


def add_plugins_argument(parser: argparse.ArgumentParser) -> None:
    """`--plugins MODULE ...` of tools that read a checkpoint: the modules it needs, which it may not import by itself."""
    parser.add_argument(
        "--plugins", nargs="+", default=[], metavar="MODULE", help="modules that register the parts the run was made of"
    )


def add_partial_argument(parser: argparse.ArgumentParser) -> None:
    """`--partial` of tools with `--init`."""
    parser.add_argument(
        "--partial",
        action="store_true",
        help="take --init also where it fills less than 95 %% of a network's trainable tensors",
    )


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str) -> None:
    """A table on standard output; the first column, the rows' names, is the last to be folded."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column.replace("_", " "), overflow="fold", min_width=None if number else 16)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)  # a file or a pipe has no width of its own


def run(
    parser: argparse.ArgumentParser, body: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None
) -> int:
    """Parse, do the work, and turn what the user can mend into one line.

    Args:
        parser: the tool's arguments; `--traceback` is added here.
        body: the tool's work. Raises `UserError` for what the user can mend.
        argv: command line without the program's name; None takes the process's own.

    Returns:
        The exit status.
    """
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised, not only its line")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for talkative in ("numba", "timm", "PIL"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    try:
        body(args)
    except UserError as error:
        if args.traceback:
            raise
        _speak(f"error: {error}")
        return 2
    except Stopped as stop:
        _speak(stop.message)
        return stop.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _speak(line: str) -> None:
    """Print one line; of several processes the first one does."""
    # In the order in which torchrun, Lightning and srun name a process.
    rank = next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0")
    if rank == "0":
        print(" ".join(line.split()), file=sys.stderr, flush=True)
