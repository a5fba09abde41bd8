"""How are sound files damaged for the fuzz tests? Every damage is a function of a `random.Random`."""

import io
import json
import random
from typing import Any

import numpy as np

ODD = (
    *(
        None,
        True,
        -1,
        0,
        1,
        7.5,
        1e-320,
        1e308,
        -1e308,
        float("nan"),
        float("inf"),
        2**31,
        2**40,
        2**63,
        -(2**70),
        2**70,
    ),
    *("", "x", ".", "\ud800", "a\0b", "é" * 300, "x" * 5000, "/dev/zero", "../../../etc/passwd", "1e5", "@DEEP@"),
    *([], {}, [[]], [0, 0, 0], [None], [1e200] * 16, {"a": 1}, "@DIGITS@"),
)
"""Values that stand where others are expected."""
DEEP, DIGITS = "[" * 20_000 + "]" * 20_000, "9" * 5000


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Some bytes set, cut out, doubled or cut off."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(changed)), draw.choice((1, 1, 2, 8, 40))
        kind = draw.randrange(4)
        if kind == 0:
            changed[place : place + length] = draw.randbytes(length)
        elif kind == 1:
            del changed[place : place + length]
        elif kind == 2:
            changed[place:place] = changed[place : place + length]
        else:
            del changed[max(place, 1) :]
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def change_words(content: bytes, draw: random.Random) -> bytes:
    """A word of a text set to another, moved or dropped; a byte order mark, other line ends."""
    words = content.decode().split(" ")
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(words))
        odd = draw.choice(("nan", "inf", "1e999", "-1", "x", "", "\n", "é", "0", DIGITS, "P2:", "/", ".."))
        words[place : place + draw.randint(0, 1)] = [odd]
    return (draw.choice(("", "", "\ufeff")) + " ".join(words)).encode("utf-8", "surrogatepass")


def change_value(value: Any, draw: random.Random) -> Any:
    """A JSON value with one of the values in it set to an odd one, dropped or doubled."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    changed, key = (dict(value) if isinstance(value, dict) else list(value)), draw.choice(keys)
    if draw.random() < 0.1:
        del changed[key]
    elif draw.random() < 0.05 and isinstance(changed, list):
        changed.insert(key, changed[key])
    else:
        changed[key] = change_value(value[key], draw)
    return changed


def dump(value: Any) -> bytes:
    """JSON text; what Python cannot dump stands in it as a word."""
    return json.dumps(value).replace('"@DEEP@"', DEEP).replace('"@DIGITS@"', DIGITS).encode()


def change_json(content: bytes, draw: random.Random) -> bytes:
    """A value of a JSON text changed."""
    return dump(change_value(json.loads(content), draw))


def change_npy(content: bytes, draw: random.Random) -> bytes:
    """The header of a .npy file changed, its length right; or another array."""
    if draw.random() < 0.3:
        shape = draw.choice(((0,), (0, 4), (3,), (3, 4), (3, 4, 1), ()))
        kind = draw.choice(("f4", "f8", "i8", "u1", "?", "U3", "c8", "M8[s]", "f4,i4"))
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(shape, np.dtype(kind)))
        return buffer.getvalue()
    end = 10 + int.from_bytes(content[8:10], "little")
    header = bytearray(content[10:end])
    for _ in range(draw.randint(1, 3)):
        header[draw.randrange(len(header))] = draw.choice(b"(){}[]',:<>f48iO 09\n\\\"xe-\xff")
    return content[:10] + bytes(header) + content[end:]
