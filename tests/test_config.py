"""YAML files, merging, --set and the errors that name a key."""

import pytest

from simipu3d.config import (
    PartConfig,
    apply_sets,
    changed_keys,
    dump_yaml,
    load_yaml,
    merge,
    parse_block,
    parse_part,
)
from simipu3d.errors import UserError
from simipu3d.registry import Registry


class Inner(PartConfig):
    temperature: float = 0.07
    """Sharpness."""
    span: tuple[float, float] = (0.0, 1.0)
    """A pair."""


class Outer(PartConfig):
    inner: Inner = Inner()
    """A nested block."""
    count: int = 3
    """A number."""


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def test_numbers_follow_yaml_1_2(tmp_path):
    path = write(tmp_path, "a.yaml", "a: 1e-3\nb: [.5, 2., +3e2, 7, -1]\nc: 2021-01-01\nd: 000010\ne: on\n")
    expected = {"a": 0.001, "b": [0.5, 2.0, 300.0, 7, -1], "c": "2021-01-01", "d": "000010", "e": "on"}
    assert load_yaml(path) == expected


def test_later_files_win_mappings_merge_and_lists_replace(tmp_path):
    write(tmp_path, "one.yaml", "block: {a: 1, b: [1, 2]}\nkeep: 5\n")
    write(tmp_path, "two.yaml", "block: {a: 2}\n")
    path = write(tmp_path, "three.yaml", "base: [one.yaml, two.yaml]\nblock: {b: [3]}\n")
    assert load_yaml(path) == {"block": {"a": 2, "b": [3]}, "keep": 5}


def test_another_name_drops_the_old_keys():
    old = {"encoder": {"name": "a", "width": 3}, "other": {"name": "b", "x": 1}}
    assert merge(old, {"encoder": {"name": "c"}, "other": {"name": "b", "y": 2}}) == {
        "encoder": {"name": "c"},
        "other": {"name": "b", "x": 1, "y": 2},
    }


@pytest.mark.parametrize("order", [1, -1])
def test_set_applies_names_first(order):
    sets = ["encoder.depth=[1, 2]", "encoder.name=c"][::order]
    assert apply_sets({"encoder": {"name": "a", "width": 3}}, sets) == {"encoder": {"name": "c", "depth": [1, 2]}}


def test_set_changes_entries_of_lists():
    raw = {"data": {"sets": [{"name": "a", "root": "x"}, {"name": "b", "sizes": [1, [2, 3]]}]}}
    sets = ["data.sets.1.sizes.1.0=9", "data.sets.0.root=y", "data.sets.0.more.deep=1", "data.sets.1.sizes.0=null"]
    expected = [{"name": "a", "root": "y", "more": {"deep": 1}}, {"name": "b", "sizes": [None, [9, 3]]}]
    assert apply_sets(raw, sets) == {"data": {"sets": expected}}
    assert raw["data"]["sets"][0]["root"] == "x", "what was read is left as it is"
    assert apply_sets(raw, ["data.sets.1.name=c"])["data"]["sets"][1] == {"name": "c"}, (
        "another part drops the old keys"
    )
    for key in ("data.sets.2.root", "data.sets.-1.root", "data.sets.x", "data.sets.1.sizes.1.2"):
        with pytest.raises(UserError, match=rf"--set {key}: data\.sets[.a-z0-9]* is a list with the entries 0 to 1"):
            apply_sets(raw, [f"{key}=1"])
    with pytest.raises(UserError, match=r"data\.sets\.0\.root is a value, not a block"):
        apply_sets(raw, ["data.sets.0.root.x=1"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\n", "not valid YAML"),
        ("a: 1\na: 2\n", "stands twice"),
        ("- 1\n", "mapping"),
        ("base: other.yaml\n", "base must be a list"),
        ("base: [absent.yaml]\n", "no such configuration"),
        ("base: [self.yaml]\n", "circle"),
        ("a: !!python/object/apply:os.system [echo]\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, words):
    path = write(tmp_path, "self.yaml", text)
    with pytest.raises(UserError, match=words):
        load_yaml(path)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"inner": {"temprature": 1.0}}, r"blk.inner.temprature: no such key; did you mean temperature\?"),
        ({"cuont": 1}, r"blk.cuont: no such key; did you mean count\?"),
        ({"count": "4"}, r"blk.count: .*integer.*'4'"),
        ({"count": True}, "blk.count"),
        ({"inner": {"span": [1.0]}}, "blk.inner.span"),
        ([1], "expected a block"),
    ],
)
def test_a_wrong_key_or_type_is_one_line_that_names_it(block, words):
    with pytest.raises(UserError, match=words) as caught:
        parse_block("blk", Outer, block)
    assert "\n" not in str(caught.value)


def test_lists_become_tuples_and_empty_blocks_defaults():
    assert parse_block("blk", Outer, {"inner": {"span": [2, 3]}}).inner.span == (2.0, 3.0)
    assert parse_block("blk", Outer, None) == Outer()


def test_an_unknown_part_lists_those_there_are():
    registry = Registry("toy")
    registry.register("one", config=Inner)(object)
    with pytest.raises(UserError, match="no toy is called 'two'; there are one"):
        parse_part("toy", registry, {"name": "two"})
    with pytest.raises(UserError, match=r"toy.name: this key chooses the toy"):
        parse_part("toy", registry, {})
    with pytest.raises(ValueError, match="twice"):
        registry.register("one", config=Inner)(object)


def test_dump_and_load_are_inverse(tmp_path):
    raw = {"a": {"b": 1e-05, "c": [1, 2.5, None, True, "x"]}, "d": float("inf"), "e": "1e-3", "f": 1e20}
    assert load_yaml(write(tmp_path, "x.yaml", dump_yaml(raw))) == raw


def test_changed_keys_are_dotted():
    assert changed_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == {"a.c": (2, 3), "d": (None, 4)}
