"""One contract for every registered assignment and, as far as it goes without data, for every registered reader."""

import pytest
import torch

import simipu3d.methods  # noqa: F401  (fills the registry of assignments)
from simipu3d.config import PartConfig, parse_part
from simipu3d.contracts.frame import FrameReader
from simipu3d.contracts.tokens import PointTokens
from simipu3d.data.config import DataConfig
from simipu3d.data.loading.loader import build_reader
from simipu3d.errors import UserError
from simipu3d.matching.assignment import match_tokens
from simipu3d.registry import ASSIGNMENTS, READERS, REGISTRIES, Registry

ASSIGNMENT = pytest.mark.parametrize("name", ASSIGNMENTS.names())
READER = pytest.mark.parametrize("name", READERS.names())
ONE_FOLDER = pytest.mark.parametrize("name", [name for name in READERS.names() if name != "mixed"])
"""A mixed data set has no folder, split or cameras of its own; its sets are readers of this list."""


def two_draws(seed: int, n: int, m: int, size: int = 60) -> tuple[torch.Tensor, ...]:
    """Two draws from one scan, as float64; a few rows have no source."""
    generator = torch.Generator().manual_seed(seed)
    scan = torch.randn(size, 3, generator=generator, dtype=torch.float64) * 5
    source_a, source_b = (torch.randperm(size, generator=generator)[:num] for num in (n, m))
    a, b = scan[source_a], scan[source_b]
    source_a[::7] = -1
    source_b[::5] = -1
    return a, b, source_a, source_b


@ASSIGNMENT
@pytest.mark.parametrize("sizes", [(30, 30), (12, 40), (40, 12), (1, 5), (5, 1)])
def test_pairs_are_rows_of_both_sets(name, sizes):
    rule = ASSIGNMENTS[name].target
    a, b, source_a, source_b = two_draws(sum(sizes), *sizes)
    pairs = rule(a, b, source_a, source_b)
    assert pairs.dtype == torch.int64
    assert pairs.shape == (len(pairs), 2)
    assert 0 < len(pairs) <= sizes[0]
    assert (pairs >= 0).all()
    assert (pairs < torch.tensor(sizes)).all()
    assert (pairs[:, 0].diff() > 0).all(), "ascending, a row of the first set once"
    assert torch.equal(pairs, rule(a, b, source_a, source_b))


@ASSIGNMENT
def test_equal_sets_are_matched_to_themselves(name):
    a = two_draws(0, 25, 25)[0]
    none = torch.full((25,), -1)
    order = torch.randperm(25)
    pairs = ASSIGNMENTS[name].target(a, a[order], none, none)
    assert torch.equal(a[pairs[:, 0]], a[order][pairs[:, 1]])
    assert len(pairs) == 25


@ASSIGNMENT
def test_empty_sets_give_no_pair(name):
    a, _, source, _ = two_draws(0, 4, 4)
    for n, m in ((0, 0), (4, 0), (0, 4)):
        assert ASSIGNMENTS[name].target(a[:n], a[:m], source[:n], source[:m]).shape == (0, 2)


def tokens(seed: int, counts: list[int]) -> PointTokens:
    generator = torch.Generator().manual_seed(seed)
    num = sum(counts)
    xyz = (torch.randn(num, 3, generator=generator) * 5).requires_grad_()
    batch_index = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return PointTokens(xyz, torch.randn(num, 4), batch_index, torch.full((num,), -1))


@ASSIGNMENT
def test_a_ragged_batch_is_matched_frame_by_frame_within_the_gate_without_gradient(name):
    one, two = tokens(1, [6, 0, 9, 4]), tokens(2, [8, 3, 4, 0])
    everything = match_tokens((one, two), (one.xyz, two.xyz), 4, assignment=name)
    assert set(one.batch_index[everything.first].tolist()) == {0, 2}
    assert torch.equal(one.batch_index[everything.first], two.batch_index[everything.second])
    assert not any(values.requires_grad for values in everything)
    expected = (one.xyz[everything.first] - two.xyz[everything.second]).norm(dim=1)
    torch.testing.assert_close(everything.distance, expected.detach())
    gate = float(everything.distance.median())
    gated = match_tokens((one, two), (one.xyz, two.xyz), 4, assignment=name, max_distance=gate)
    assert torch.equal(gated.first, everything.first[everything.distance <= gate])
    assert 0 < len(gated.first) < len(everything.first)


@READER
def test_a_reader_says_what_it_reads_before_it_is_opened(name):
    """Networks are built from the columns; the configuration model is `DataConfig` and the reader's own keys."""
    entry = READERS[name]
    assert tuple(entry.target.point_columns[:3]) == ("x", "y", "z")
    assert issubclass(entry.config, DataConfig)
    assert issubclass(entry.target, FrameReader)
    for method in ("__len__", "__getitem__"):
        assert getattr(entry.target, method) is not getattr(FrameReader, method), method


@READER
@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"batchsize": 4}, "data.batchsize: no such key; did you mean batch_size"),
        ({"batch_size": 0}, "data.batch_size"),
        ({"batch_size": "four"}, "data.batch_size"),
        ({"cameras": []}, "data.cameras"),
        ({"augment": {"points": {"num_points": 3}}}, r"data\.augment: no such key"),
        ({"on_bad_frame": "ignore"}, r"data\.on_bad_frame"),
    ],
)
def test_a_wrong_key_of_the_data_block_is_named(name, block, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_part("data", READERS, {"name": name, "root": None if name == "mixed" else "anywhere", **block})
    assert "\n" not in str(caught.value)


@ONE_FOLDER
@pytest.mark.parametrize(
    "block", [{"split": "no such split"}, {"cameras": ["no such camera"]}, {"root": "no such folder"}]
)
def test_what_is_not_there_is_one_line_before_a_frame_is_read(name, block, tmp_path):
    """A split, a camera, a folder; a data set that is made, not read, may do without a folder."""
    (tmp_path / "empty").mkdir()
    block = {"root": str(tmp_path / "empty"), **block}
    message = None
    try:
        reader = build_reader(parse_part("data", READERS, {"name": name, **block}))
    except UserError as error:
        message = str(error)
    if message is None:
        assert block["root"] == "no such folder"
        assert len(reader) > 0
    else:
        assert "\n" not in message
        assert any(str(value if isinstance(value, str) else value[0]) in message for value in block.values())


class Keys(PartConfig):
    """Nothing but a name."""

    name: str


def test_a_registry_refuses_what_could_not_be_built():
    with_keys, without = Registry("wheel"), Registry("rule", has_keys=False)
    with_keys.register("round", config=Keys)(object)
    without.register("golden")(object)
    with pytest.raises(ValueError, match="wheel 'round' is registered twice"):
        with_keys.register("round", config=Keys)(object)
    with pytest.raises(ValueError, match=r"wheel 'square' needs config="):
        with_keys.register("square")(object)
    with pytest.raises(ValueError, match=r"wheel 'square' needs config="):
        with_keys.register("square", config=Keys(name="square"))(object)
    with pytest.raises(ValueError, match=r"rule 'iron' has no config="):
        without.register("iron", config=Keys)(object)
    with pytest.raises(UserError, match="no rule is called 'iron'; there are golden"):
        without["iron"]
    assert len({registry.kind for registry in REGISTRIES}) == len(REGISTRIES)
