"""Laws of mixed data sets: weights hold in every epoch, and every frame of a set comes as often as the others."""

from collections import Counter
from typing import get_args

import numpy as np
import pytest
from test_kitti import write_frame

from simipu3d.benchmark.synthetic_waymo.drive import WaymoDrive
from simipu3d.benchmark.synthetic_waymo.files import write_waymo_v2
from simipu3d.benchmark.synthetic_waymo.rig import WaymoRigSettings
from simipu3d.config import parse_part, to_plain
from simipu3d.contracts.frame import FrameReader, TruthKind
from simipu3d.contracts.method import Needs
from simipu3d.data.config import AugmentConfig, DataConfig, ImageAugmentConfig, PointAugmentConfig
from simipu3d.data.loading.loader import build_reader, make_loader
from simipu3d.data.readers.mixed import MixedSet, _join_classes
from simipu3d.data.shards.frames import PrepareConfig
from simipu3d.data.shards.writer import prepare_shards
from simipu3d.engine.settings import load_settings
from simipu3d.errors import UserError
from simipu3d.registry import READERS

STREET = {
    "name": "drive_world",
    "frames_per_sequence": 1,
    "image_size": [16, 32],
    "beams": 8,
    "azimuth_step_deg": 4.0,
    "supersampling": 1,
}


def parse(*sets, **keys):
    return parse_part("data", READERS, {"name": "mixed", "sets": list(sets), **keys})


def street(num_frames: int, **keys) -> dict:
    return {**STREET, "num_frames": num_frames, **keys}


@pytest.fixture
def root(tmp_path) -> str:
    return str(tmp_path / "world")


def open_streets(root, *sizes_and_weights, **keys):
    sets = [street(size, weight=weight, root=root, seed=i) for i, (size, weight) in enumerate(sizes_and_weights)]
    return build_reader(parse(*sets, **keys))


# Order


@pytest.mark.parametrize("seed", range(5))
def test_weights_hold_and_frames_come_equally_often(seed, root):
    """Random sizes and weights: every epoch gives each set its share exactly; over epochs no frame of a set is drawn more
    than once more often than another, and the draws of an epoch are all different."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 30, 3)
    weights = rng.uniform(0.5, 4, 3)
    reader = open_streets(root, *[(int(size), float(weight)) for size, weight in zip(sizes, weights, strict=True)])
    total = int(sizes.sum())
    assert len(reader) == total
    exact = weights / weights.sum() * total
    first = np.cumsum([0, *sizes])
    counts = Counter()
    for epoch in range(9):
        order = reader.epoch_order(seed, epoch)
        assert len(order) == total == len(set(order.tolist())), "no draw is made twice"
        frames = order % total
        of_set = np.searchsorted(first, frames, side="right") - 1
        shares = np.bincount(of_set, minlength=3)
        assert (np.abs(shares - exact) < 1).all()
        assert np.array_equal(shares, reader.shares)
        counts.update(frames.tolist())
        for number in range(3):
            own = [counts[index] for index in range(first[number], first[number + 1])]
            assert max(own) - min(own) <= 1


def test_the_order_depends_on_seed_and_epoch_alone(root):
    reader, again = (open_streets(root, (7, 1.0), (5, 2.0)) for _ in range(2))
    orders = {(seed, epoch): tuple(reader.epoch_order(seed, epoch)) for seed in range(3) for epoch in (3, 0, 2, 1)}
    assert len(set(orders.values())) == 12
    assert all(tuple(again.epoch_order(*key)) == order for key, order in sorted(orders.items()))


def test_largest_remainders_by_hand(root):
    """10 frames at 1 : 1 : 1 are 3.33 each: the first gets the tenth; at 2 : 1 : 1 they are 5, 2.5 and 2.5."""
    sizes = (4, 3, 3)
    assert open_streets(root, *[(size, 1.0) for size in sizes]).shares.tolist() == [4, 3, 3]
    assert open_streets(root, *zip(sizes, (2.0, 1.0, 1.0), strict=True)).shares.tolist() == [5, 3, 2]


def test_the_sets_are_mixed_throughout_an_epoch(root):
    reader = open_streets(root, (40, 1.0), (40, 1.0))
    first_half = reader.epoch_order(0, 0)[:40] % 80 < 40
    assert 10 < first_half.sum() < 30


NEEDS = Needs(point_views=2, image_views=1)
FEW = AugmentConfig(points=PointAugmentConfig(num_points=20), images=ImageAugmentConfig(resize=None))


def loader_of(reader, config, augment=FEW, **keys):
    return make_loader(config, augment, NEEDS, 3, reader=reader, **keys)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_restarts_change_nothing(workers, root):
    sets = [street(9, weight=3.0, root=root), street(7, root=root, seed=1)]
    config = parse(*sets, batch_size=2, num_workers=workers)
    reader = build_reader(config)
    loader = loader_of(reader, config)
    whole = [[batch.frame_ids for batch in loader] for _ in range(2)]
    expected = [reader[int(index)].frame_id for index in reader.epoch_order(3, 0)]
    assert [name for batch in whole[0] for name in batch] == expected
    loader = loader_of(reader, config)
    loader.batch_sampler.start(0, 3)
    assert [[batch.frame_ids for batch in loader] for _ in range(2)] == [whole[0][3:], whole[1]]
    ranks = [
        [n for batch in loader_of(reader, config, rank=r, world_size=2) for n in batch.frame_ids] for r in range(2)
    ]
    assert ranks == [expected[0::2], expected[1::2]]


def test_a_frame_that_comes_again_in_an_epoch_is_drawn_anew(root):
    """A set of two frames with nine tenths of the weight."""
    config = parse(street(2, weight=9.0, root=root), street(8, root=root, seed=1), batch_size=1)
    config = config.model_copy(update={"num_workers": 0})
    views = {}
    for batch in loader_of(build_reader(config), config):
        views.setdefault(batch.frame_ids[0], []).append(batch.views[1].augmented_from_lidar)
    repeated = [own for own in views.values() if len(own) > 1]
    assert len(repeated) == 2
    for own in repeated:
        assert len({tuple(view.flatten().tolist()) for view in own}) == len(own)


def test_shards_in_a_mixture_keep_their_own_order(root, tmp_path):
    """A set of shards is walked a group of shards at a time inside the mixture too."""
    source = parse_part("data", READERS, street(12, root=root))
    prepare_shards(source, PrepareConfig(shard_frames=3), str(tmp_path / "shards"))
    shards = {"name": "shards", "root": str(tmp_path / "shards"), "shuffle_shards": 1}
    reader = build_reader(parse(shards, street(12, root=root, seed=1)))
    for epoch in range(3):
        frames = reader.epoch_order(0, epoch) % 24
        groups = (frames[frames < 12] // 3).reshape(4, 3)
        assert (groups == groups[:, :1]).all()


# Frames


def test_real_kitti_and_nuscenes_make_one_batch(samples, root):
    """Different columns, cameras and image sizes, each set with its own augmentation."""
    config = parse(
        {
            "name": "kitti",
            "root": str(samples / "kitti"),
            "split": "paper",
            "augment": {"images": {"pad_multiple": 16}},
        },
        {
            "name": "nuscenes",
            "root": str(samples / "nuscenes"),
            "version": "v1.0-mini",
            "split": "all",
            "features": ["ring", "intensity"],
            "weight": 0.5,
            "augment": {"points": {"num_points": 500}, "images": {"resize_factor": [0.25, 0.25]}},
        },
        batch_size=6,
        num_workers=0,
        on_bad_frame="skip",
        max_bad_fraction=1.0,
    )
    half = ImageAugmentConfig(resize="factor", resize_factor=(0.5, 0.5))
    augment = AugmentConfig(points=PointAugmentConfig(num_points=300), images=half)
    reader = build_reader(config)
    assert reader.point_columns == ("x", "y", "z", "intensity")
    assert reader[5].points.shape[1] == 4
    assert np.array_equal(reader[5].points, reader.readers[1][0].points[:, [0, 1, 2, 4]])
    names = [reader[index].frame_id for index in range(6)]
    assert names[0] == "kitti:training/000000"
    assert names[5].startswith("nuscenes:")
    assert reader[5].sequence_id.startswith("nuscenes:scene-")
    batch = next(iter(loader_of(reader, config, augment)))
    (images,) = batch.images
    assert batch.bad_frames == ()
    for frame, name in enumerate(batch.frame_ids):
        points = int((batch.views[0].batch_index == frame).sum())
        own = images.batch_index == frame
        if name.startswith("nuscenes:"):
            assert points == 500
            assert images.image_size[own].tolist() == [[225, 400]] * 6
        else:
            assert points == 300
            assert int(own.sum()) == 1


def test_the_shipped_configuration_mixes_kitti_nuscenes_and_waymo(samples, tmp_path):
    """Only places are set, one by one; the Waymo drive is of our own making."""
    drive = WaymoDrive(WaymoRigSettings(num_moments=2), 0)
    moments = [drive.moment(index) for index in range(2)]
    write_waymo_v2(tmp_path / "waymo", {moments[0][0].segment: moments})
    places = [f"data.sets.0.root={samples / 'kitti'}", f"data.sets.1.root={samples / 'nuscenes'}"]
    places += [f"data.sets.2.root={tmp_path / 'waymo'}", "data.sets.2.split=all", "data.sets.2.load_interval=1"]
    small = ["data.sets.1.version=v1.0-mini", "data.sets.1.split=all", "data.max_bad_fraction=1.0"]
    small += ["data.on_bad_frame=skip", "data.num_workers=0", "data.batch_size=1", "augment.points.num_points=512"]
    settings = load_settings("configs/simipu/mixed.yaml", [*places, *small])
    config, reader = settings.data, build_reader(settings.data)
    assert reader.point_columns == ("x", "y", "z", "intensity")
    assert len(set(reader.shares.tolist())) <= 2
    found = {}
    for batch in loader_of(reader, config, settings.augment):
        assert batch.bad_frames == ()
        assert len(batch.views[0].points) == 512
        found.setdefault(batch.frame_ids[0].partition(":")[0], set()).add(tuple(batch.images[0].camera_names))
    assert set(found) == {"kitti", "nuscenes", "waymo"}
    assert (found["kitti"], found["waymo"]) == ({("image_2",)}, {("FRONT",)})


def test_sets_of_one_kind_have_different_names(root):
    reader = open_streets(root, (2, 1.0), (3, 1.0))
    names = [reader[index].frame_id for index in range(5)]
    assert len(set(names)) == 5
    assert names[0] == "drive_world-1:train-000000"
    assert names[2] == "drive_world-2:train-000000"
    assert reader[5].frame_id == names[0], "len more is the same frame"
    with pytest.raises(IndexError):
        reader[-1]


def test_classes_are_joined_by_name(root):
    """Every pixel, point and box keeps its class, by whatever number and name the mixture has for it."""
    theirs = {"car": "vehicle", "van": "vehicle", "sky": "nothing", "Car": "vehicle"}
    reader = build_reader(parse(street(2, root=root), street(2, root=root, seed=1, classes=theirs)))
    own = reader.readers[0].class_names
    assert reader.class_names == (*own, "nothing", "vehicle")
    for index, names in ((1, {}), (3, theirs)):
        mixed, alone = reader[index], reader.readers[index // 2][index % 2]
        expected = [names.get(own[number], own[number]) for number in alone.point_class]
        assert [reader.class_names[number] for number in mixed.point_class] == expected
        pixels = [names.get(own[number], own[number]) for number in alone.cameras[0].pixel_class.flat]
        assert [reader.class_names[number] for number in mixed.cameras[0].pixel_class.flat] == pixels
        assert mixed.boxes.names == tuple(names.get(name, name) for name in alone.boxes.names)
        assert mixed.point_class.dtype == mixed.cameras[0].pixel_class.dtype == np.uint8


def test_a_set_without_classes_leaves_those_of_others(root, tmp_path):
    write_frame(tmp_path, "training/000000")
    kitti = {"name": "kitti", "root": str(tmp_path), "split": "all"}
    mixed = build_reader(parse(kitti, street(2, root=root)))
    assert mixed.class_names == mixed.readers[1].class_names
    assert mixed[0].point_class is None
    assert np.array_equal(mixed[1].point_class, mixed.readers[1][0].point_class)
    assert mixed.gives == set(get_args(TruthKind))
    assert mixed.frame_ids == ("kitti:training/000000", "drive_world:train-000000", "drive_world:train-000001")
    with pytest.raises(UserError, match=r"data\.sets\.0\.classes: acme has no class 'cra'; it has car, unknown"):
        _join_classes([MixedSet.model_construct(classes={"cra": "car"}, data=DataConfig(name="acme"))], [Labelled()])
    unlabelled = _join_classes([MixedSet.model_construct(classes={}, data=DataConfig(name="acme"))], [Labelled()])[1][0]
    assert unlabelled[[0, 1, 2, 255]].tolist() == [0, 1, 255, 255], "what has no name is unlabelled"


class Labelled(FrameReader):
    """A data set with classes and without boxes."""

    class_names = ("car", "unknown")
    gives = frozenset({"point_class"})


def test_augmentation_of_a_set_is_its_own_keys_and_the_middle_of_its_range(root):
    own = {"points": {"scale": [1.0, 1.0]}, "images": {"hue": 0.1}}
    ranged = {"point_range": [0, -20, -2, 40, 20, 4]}
    sets = [street(1, root=root, augment=own), street(1, root=root), street(1, root=root, **ranged)]
    sets += [street(1, root=root, augment={"points": {"scale_centre": [1, 2, 3]}}, **ranged)]
    reader = build_reader(parse(*sets))
    middle = [20.0, 0.0, 1.0]
    assert [reader.augment_of(index) for index in range(5)] == [
        own,
        {},
        {"points": {"rotation_centre": middle, "scale_centre": middle}},
        {"points": {"rotation_centre": middle, "scale_centre": [1, 2, 3]}},
        own,
    ]


# Configuration


def test_the_resolved_block_is_read_back_to_itself(root):
    config = parse(
        street(2, root=root, weight=2.0, augment={"points": {"num_points": 9}}, classes={"car": "vehicle"}),
        street(3),
        batch_size=5,
    )
    plain = to_plain(config)
    assert plain["sets"][0]["weight"] == 2.0
    assert plain["sets"][0]["augment"] == {"points": {"num_points": 9}}
    assert [entry["classes"] for entry in plain["sets"]] == [{"car": "vehicle"}, {}]
    assert "batch_size" not in plain["sets"][0]
    assert to_plain(parse_part("data", READERS, plain)) == plain


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            street(2, batch_size=3),
            r"data\.sets\.0\.batch_size: holds for all sets together; set data\.batch_size instead",
        ),
        (street(2, weight=0.0), r"data\.sets\.0\.weight: .*greater than 0"),
        (street(2, weight="2"), r"data\.sets\.0\.weight: "),
        (street(2, beems=3), r"data\.sets\.0\.beems: no such key; did you mean beams"),
        (
            street(2, augment={"points": {"num_pionts": 3}}),
            r"data\.sets\.0\.augment\.points\.num_pionts: no such key; did you mean num_points",
        ),
        (street(2, augment=3), r"data\.sets\.0\.augment: expected a block"),
        ({"name": "mixed", "sets": []}, r"data\.sets\.0\.name: this key chooses the data set; there are .*kitti"),
        ({"root": "x"}, r"data\.sets\.0\.name: this key chooses"),
        ({"name": "kitti"}, r"data\.sets\.0\.root: this key is needed"),
        (3, r"data\.sets\.0: expected a block of keys"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_key(entry, message):
    with pytest.raises(UserError, match=message):
        parse(entry, street(2))


def test_wrong_keys_of_the_mixture_are_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"data\.root"):
        parse(street(2), root="x")
    with pytest.raises(UserError, match=r"data\.sets"):
        parse()
    with pytest.raises(UserError, match=r"data\.sets\.1\.weight: 0\.01 of 1\.01 gives it none of the 4 frames"):
        build_reader(parse(street(2, root=root), street(2, root=root, weight=0.01)))
    with pytest.raises(UserError, match=r"data\.sets: expected a list of one data set or more"):
        parse_part("data", READERS, {"name": "mixed", "sets": {"name": "kitti"}})
    with pytest.raises(UserError, match=r"data\.sets\.1[.:].*nowhere"):
        build_reader(parse(street(2, root=root), {"name": "kitti", "root": str(tmp_path / "nowhere")}))
