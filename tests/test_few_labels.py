"""Few-label lists: nested, a function of the seed, by drive where drives are known."""

import numpy as np
import pytest

from simipu3d.config import parse_part
from simipu3d.contracts.frame import FrameReader
from simipu3d.data.config import DataConfig
from simipu3d.data.loading.few_labels import draw_frames, few_labels
from simipu3d.data.loading.loader import build_reader
from simipu3d.engine.settings import parse_settings
from simipu3d.errors import UserError
from simipu3d.registry import READERS

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
DRIVES = tuple(f"drive-{number}" for number in np.random.default_rng(0).integers(0, 12, 300))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drives", [DRIVES, ()], ids=["drives", "frames"])
def test_shares_are_nested_exact_and_whole_drives_but_for_the_last(seed, drives):
    before: set[int] = set()
    for share in SHARES:
        drawn = draw_frames(300, drives, share, seed)
        assert list(drawn) == sorted(set(drawn.tolist()))
        assert len(drawn) == round(300 * share)
        assert before <= set(drawn.tolist())
        before = set(drawn.tolist())
        if drives:
            touched = {drives[index] for index in drawn}
            whole = [name for name in touched if all(i in before for i, own in enumerate(drives) if own == name)]
            assert len(touched) - len(whole) <= 1


def test_the_draw_is_a_function_of_the_seed():
    one, again, other = (draw_frames(300, DRIVES, 0.2, seed) for seed in (3, 3, 4))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert {DRIVES[i] for i in one} != {DRIVES[i] for i in other}


def test_a_share_of_a_short_list_has_a_frame_and_of_none_has_none():
    assert len(draw_frames(3, (), 0.01, 0)) == 1
    assert len(draw_frames(0, (), 0.5, 0)) == 0


class Numbers(FrameReader):
    """Frames are their numbers; an epoch is read backwards, or as `order` says."""

    frame_ids = tuple(str(number) for number in range(20))
    sequence_ids = tuple(str(number // 5) for number in range(20))
    order: tuple[int, ...] = tuple(range(19, -1, -1))

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index

    def epoch_order(self, seed, epoch):
        return np.array(self.order)


def test_a_part_of_a_reader_reads_its_frames_in_the_readers_order():
    part = few_labels(Numbers(), DataConfig(name="numbers", label_fraction=0.25, label_seed=1))
    names = [part[index] for index in range(len(part))]
    assert len({number // 5 for number in names}) == 1
    assert len(names) == 5
    assert part.frame_ids == tuple(str(number) for number in names)
    assert [part[index] for index in part.epoch_order(0, 0)] == names[::-1]


def test_a_mixture_is_refused_and_its_sets_are_not():
    reader = Numbers()
    reader.order = (0,) * 20
    with pytest.raises(UserError, match=r"data\.sets"):
        few_labels(reader, DataConfig(name="mixed", label_fraction=0.5))
    inner = {"name": "drive_world", "num_frames": 8, "frames_per_sequence": 2, "label_fraction": 0.25}
    mixed = build_reader(
        parse_part("data", READERS, {"name": "mixed", "sets": [inner, {**inner, "label_fraction": 1.0}]})
    )
    assert len(mixed) == 2 + 8
    assert len(set(mixed.sequence_ids)) == 1 + 4


def test_held_out_frames_stay_all():
    raw = {
        "method": "depth",
        "data": {"name": "drive_world", "num_frames": 40, "label_fraction": 0.1},
        "validate": {"data": {"num_frames": 16, "split": "val"}},
        "trainer": {"max_steps": 1},
    }
    settings = parse_settings(raw, "test")
    assert len(build_reader(settings.data)) == 4
    assert len(build_reader(settings.validate_data)) == 16
    raw["validate"]["data"]["label_fraction"] = 0.5
    assert len(build_reader(parse_settings(raw, "test").validate_data)) == 8
