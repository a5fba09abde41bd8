"""How are the rows of a nuScenes table read, one after the other, without holding the table?

A table is a JSON list of objects, of up to two gigabytes. What is wrong with one is reported in one line: file, row, column.
"""

import json
import re
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from simipu3d.data.readers.files import bounded_int, check_plain_file, has_surrogate_escapes
from simipu3d.errors import UserError

CHUNK = 1 << 22
"""Characters of a table that are in memory at a time; no row is nearly as long."""
SEPARATORS = re.compile(r"[\s,]*")
WAY_OUT = "unpack the release's metadata archive again"

_WORD, _NOTHING = (str,), type(None)
_NAMES = {str: "text", int: "an integer", bool: "true or false", list: "a list", _NOTHING: "null"}
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "channel", "filename"), _WORD),
    **dict.fromkeys(("prev", "next"), (str, _NOTHING)),
    **dict.fromkeys(("height", "width"), (int, _NOTHING)),
    **dict.fromkeys(("attribute_tokens", "size"), (list,)),
    "is_key_frame": (bool,),
    "num_lidar_pts": (int,),
}
"""Types of the values of a column, beside tokens, which are text. Times and poses are checked where they are read, for
their values matter too."""


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """The values of at least two `columns`, row after row of one table, without holding the table.

    Raises:
        UserError: the file is missing, is no table, ends too early, or a row lacks a column or has a value of another
            type in it than `TYPES` says.
    """
    pick = itemgetter(*columns)
    allowed = [TYPES.get(column, _WORD if column.endswith("token") else ()) for column in columns]
    sound: set[tuple[type, ...]] = set()  # few combinations occur: each is looked at once, not in every row
    for number, row in enumerate(_objects(path)):
        try:
            values = pick(row)
        except (KeyError, TypeError):
            found = ", ".join(row) if isinstance(row, dict) else repr(row)[:60]
            raise UserError(
                f"{path}: row {number} lacks a column of {', '.join(columns)} (it has {found}); {WAY_OUT}"
            ) from None
        kinds = tuple(map(type, values))
        if kinds not in sound:
            for column, kind, right, value in zip(columns, kinds, allowed, values, strict=True):
                if right and kind not in right:
                    words = " or ".join(_NAMES[each] for each in right)
                    raise UserError(
                        f"{path}: row {number}: {column} is {json.dumps(value)[:60]}, must be {words}; {WAY_OUT}"
                    )
            sound.add(kinds)
        yield values


def _check_text(path: Path, number: int, row: Any) -> None:
    """Raise `UserError` when a row holds half of a surrogate pair, which is no text."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: row {number} holds half of a surrogate pair, which is no text; {WAY_OUT}") from None


def _objects(path: Path) -> Iterator[Any]:
    """The elements of the JSON list that a file holds."""
    decode = json.JSONDecoder(parse_int=bounded_int).raw_decode
    number = 0
    try:
        check_plain_file(path)
        with path.open(encoding="utf-8-sig") as file:
            text, place, is_last = file.read(CHUNK), 0, False
            start = text.find("[")
            if start < 0 or text[:start].strip():
                raise UserError(f"{path}: is no nuScenes table, which is a JSON list of rows; {WAY_OUT}")
            place, has_escapes = start + 1, has_surrogate_escapes(text)
            while True:
                place = SEPARATORS.match(text, place).end()
                if text[place : place + 1] == "]":
                    return
                try:
                    row, place = decode(text, place)
                except json.JSONDecodeError as error:
                    if is_last or len(text) - place > CHUNK:
                        raise UserError(
                            f"{path}: ends too early or is damaged near {text[place : place + 50].split()} "
                            f"({error.msg}); {WAY_OUT}"
                        ) from None
                    more = file.read(CHUNK)
                    text, place, is_last = text[place:] + more, 0, not more
                    has_escapes = has_surrogate_escapes(text)  # once a chunk: it is looked through as a whole
                    continue
                except RecursionError:
                    raise UserError(f"{path}: row {number} is nested too deep; {WAY_OUT}") from None
                if has_escapes:
                    _check_text(path, number, row)
                yield row
                number += 1
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such table; data.root and data.version must name a folder of the nuScenes download, like "
            f"v1.0-trainval; {WAY_OUT}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {WAY_OUT}") from error
