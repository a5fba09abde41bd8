"""The downstream benchmark runs; nothing here times anything."""

from simipu3d.benchmark.downstream import measure


def test_every_row_runs():
    rows = measure(None, quick=True)
    assert len({row["case"] for row in rows}) == len(rows) == 13
    assert all(row["seconds"] > 0 for row in rows)
