"""The data benchmark: its rows hold what they say; nothing here times anything."""

import pytest

from simipu3d.benchmark.data import time_cases
from simipu3d.benchmark.made_data import Case, write_made_data
from simipu3d.config import parse_part
from simipu3d.data.loading.loader import build_reader
from simipu3d.registry import READERS


def test_rows_of_a_case_and_of_the_one_it_is_compared_with(tmp_path):
    made, augment = {"name": "drive_world", "root": str(tmp_path), "num_frames": 2}, {"images": {"resize": None}}
    cases = [Case("made", made, augment=augment), Case("again", made, against="made", augment=augment)]
    rows = time_cases(cases, rounds=1, frames=2, soak=4)
    assert [row["case"] for row in rows] == ["made", "again"]
    for row in rows:
        assert row["frames_read"] == 4
        assert row["frames_per_s"] == pytest.approx(1000 / row["read_ms"])
        assert row["read_ms"] == pytest.approx(row["decode_ms"] + row["geometry_ms"])
        assert row["peak_MB"] > 0
    assert (rows[0]["reading_speed"], rows[1]["reading_speed"][-4:]) == ("", "made")


@pytest.mark.slow
def test_every_case_can_be_read(tmp_path, samples):
    cases = write_made_data(tmp_path, samples, quick=True)
    names = {case.name for case in cases}
    assert {case.against for case in cases if case.against} <= names
    for case in cases:
        frame = build_reader(parse_part("data", READERS, case.data))[0]
        assert len(frame.points), case.name
        assert frame.cameras, case.name
