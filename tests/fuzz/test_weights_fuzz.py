"""Whatever stands in a weights file, reading it raises nothing but the project's own error.

The inputs are a function of their number. `FUZZ=100000` runs as many; the default is small.
"""

import io
import os
import pickletools
import random
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save

from simipu3d.errors import UserError
from simipu3d.weights.files import RUN_KEYS, read_checkpoint, read_file

COUNT = int(os.environ.get("FUZZ", "300"))


def small_files():
    """A checkpoint of ours, a foreign one with numpy's scalars, an old torch file, and safetensors."""
    tensors = {"method.a.weight": torch.arange(6.0).view(2, 3), "method.a.running_var": torch.ones(2)}
    run = {"config": {"name": "x"}, "point_columns": ["x", "y"]} | dict.fromkeys(RUN_KEYS - {"config"}, 1)
    contents = [
        {"state_dict": tensors, "simipu3d": run, "loops": {"epoch": 1, "none": None}},
        {"model": tensors, "best": np.float64(0.5), "half": torch.zeros(2, dtype=torch.float16)},
    ]
    files = []
    for content, new in ((contents[0], True), (contents[1], True), (contents[1], False)):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=new)
        files.append(("x.ckpt", buffer.getvalue()))
    return [*files, ("x.safetensors", save(tensors))]


def change_bytes(content, draw):
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


def change_pickle(content, draw):
    """An operation of the pickle inside set to another, moved, dropped or doubled; the archive's check sums fit."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    starts = [place for _, _, place in pickletools.genops(members[name])]
    ends = [*starts[1:], len(members[name])]
    parts = [members[name][a:b] for a, b in zip(starts, ends, strict=True)]
    for _ in range(draw.randint(1, 3)):
        i, j = draw.randrange(len(parts)), draw.randrange(len(parts))
        kind = draw.randrange(4)
        if kind == 0:
            parts[i], parts[j] = parts[j], parts[i]
        elif kind == 1:
            parts[i] = b""
        elif kind == 2:
            parts[i] = parts[i] + parts[j]
        else:
            parts[i] = draw.choice(pickletools.opcodes).code.encode("latin1") + parts[i][1:]
    members[name] = b"".join(parts)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return buffer.getvalue()


@pytest.mark.parametrize("part", range(4))
def test_reading_damaged_weights_is_one_line(tmp_path, part):
    files = small_files()
    refused = 0
    for number in range(part, COUNT, 4):
        draw = random.Random(number)
        name, content = draw.choice(files)
        inside = zipfile.is_zipfile(io.BytesIO(content)) and draw.random() < 0.6
        path = tmp_path / name
        path.write_bytes((change_pickle if inside else change_bytes)(content, draw))
        for read, more in ((read_file, ("--init",)), (read_checkpoint, ())):
            try:
                read(path, *more)
            except UserError as error:
                refused += 1
                assert str(path) in str(error), number  # noqa: PT017
                assert "\n" not in str(error), number  # noqa: PT017
            except Exception as error:
                pytest.fail(f"input {number}: {type(error).__name__}: {error}")
    assert refused > COUNT / 8


def test_the_files_are_sound_before_they_are_changed(tmp_path):
    for number, (name, content) in enumerate(small_files()):
        path = tmp_path / f"{number}{name}"
        path.write_bytes(content)
        assert set(read_file(path, "--init").tensors) >= {"method.a.weight", "method.a.running_var"}
    assert read_checkpoint(tmp_path / "0x.ckpt")["loops"] == {"epoch": 1, "none": None}
