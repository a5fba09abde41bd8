"""The tool that shows what a configuration reads, on real KITTI frames."""

import numpy as np
from PIL import Image

from simipu3d.tools import inspect_data


def test_pages_and_table_of_real_frames(samples, tmp_path, capsys):
    """A `data:` block is enough; every frame gives two pages and a line."""
    config = tmp_path / "kitti.yaml"
    config.write_text(f"data:\n  name: kitti\n  root: {samples / 'kitti'}\n  split: all\n")
    out = tmp_path / "pages"
    assert inspect_data.main(["--cfg", str(config), "--num", "2", "--out", str(out)]) == 0
    pages = sorted(out.iterdir())
    assert len(pages) == 4
    assert {page.suffix for page in pages} == {".png"}
    assert all(np.array(Image.open(page)).std() > 10 for page in pages)
    printed = capsys.readouterr().out
    assert "000000" in printed
    assert "000002" in printed
    assert "370" in printed


def test_what_the_user_can_mend_is_one_line(tmp_path, capsys):
    config = tmp_path / "kitti.yaml"
    config.write_text(f"data:\n  name: kitti\n  root: {tmp_path / 'nowhere'}\n")
    assert inspect_data.main(["--cfg", str(config)]) == 2
    assert inspect_data.main(["--cfg", str(config), "--set", "data.name=kity"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2
    assert "nowhere" in errors[0]
    assert "data.name" in errors[1]


def test_a_folder_that_cannot_be_written_is_named(samples, tmp_path, capsys):
    config = tmp_path / "kitti.yaml"
    config.write_text(f"data:\n  name: kitti\n  root: {samples / 'kitti'}\n  split: all\n")
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert inspect_data.main(["--cfg", str(config), "--num", "1", "--out", str(taken)]) == 2
    assert inspect_data.main(["--cfg", str(config), "--num", "0"]) == 2
    errors = capsys.readouterr().err
    assert "taken" in errors
    assert "--num" in errors
