"""A small shard set that several test modules share: a pytest plugin."""

import pytest
from shard_sets import SMALL, WORLD, parse

from simipu3d.data.loading.loader import build_reader
from simipu3d.data.shards.writer import prepare_shards


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A made data set of 11 frames with two cameras and every kind of ground truth, cached."""
    config = parse(**WORLD, root=str(tmp_path_factory.mktemp("world")))
    build_reader(config).prepare(progress=False)
    return config


@pytest.fixture(scope="session")
def whole(world, tmp_path_factory):
    """Its shards, which tests only read: 3 + 3 + 3 + 2 frames."""
    out = tmp_path_factory.mktemp("shards") / "set"
    prepare_shards(world, SMALL, str(out))
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """The shards, for a test to damage."""
    out = tmp_path / "copy"
    out.mkdir()
    for path in whole.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out
