"""Laws of the loading: batches depend on (seed, epoch, rank) alone, not on workers, neighbours or interruptions."""

from dataclasses import fields, is_dataclass, replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch

from simipu3d.config import parse_part
from simipu3d.contracts.batch import move_tensors
from simipu3d.contracts.frame import Boxes, Camera, Frame, FrameReader
from simipu3d.contracts.method import Needs
from simipu3d.data.config import AugmentConfig, DataConfig, ImageAugmentConfig, PointAugmentConfig
from simipu3d.data.loading.collate import Collate, NoSample
from simipu3d.data.loading.evaluation import make_evaluation_loader
from simipu3d.data.loading.loader import (
    Augments,
    BadFrameLimit,
    SampleDataset,
    check_seen,
    example_batch,
    make_loader,
    wants_of,
)
from simipu3d.data.loading.order import EpochSampler, EvaluationSampler, epoch_order
from simipu3d.errors import BadFrameError, UserError
from simipu3d.registry import READERS

IMAGE_FROM_CAMERA = np.array([[60, 0, 40, 3], [0, 60, 20, 0.2], [0, 0, 1, 0.003]], dtype=np.float64)
CAMERA_FROM_LIDAR = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)


class ToyReader(FrameReader):
    """Synthetic frames: sizes differ, points lie ahead; some frames can be declared bad. Frame i has i % 3 boxes."""

    gives = frozenset({"boxes", "pixel_class", "point_class", "point_instance"})

    def __init__(self, num_frames: int, bad: tuple[int, ...] = (), num_cameras: int = 1):
        self.num_frames, self.bad, self.num_cameras = num_frames, bad, num_cameras

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> Frame:
        if index in self.bad:
            raise BadFrameError(f"toy/{index:03d}.bin: the file is empty; set data.on_bad_frame=skip")
        rng = np.random.default_rng(index)
        points = rng.normal(size=(80 + index, 4)) * [6, 4, 1, 0.1] + [25, 0, 0, 0.5]
        cameras = tuple(
            Camera(
                name=f"camera {number}",
                image=rng.integers(1, 255, (40 + 3 * index, 80 - index - number, 3), dtype=np.uint8),
                image_from_camera=IMAGE_FROM_CAMERA,
                camera_from_lidar=CAMERA_FROM_LIDAR,
                distortion=np.array([0.01, 0, 0, 0, 0]) if number else None,
            )
            for number in range(self.num_cameras)
        )
        labels = [replace(camera, pixel_class=camera.image[..., 0] % 9) for camera in cameras]
        number = index % 3
        boxes = Boxes(
            rng.normal(size=(number, 3)), rng.uniform(1, 4, (number, 3)), rng.normal(size=number), ["Car"] * number
        )
        return Frame(
            points.astype(np.float32),
            self.point_columns,
            tuple(labels),
            frame_id=f"{index:03d}",
            boxes=boxes,
            point_class=rng.integers(0, 9, len(points), dtype=np.uint8),
            point_instance=rng.integers(0, 5, len(points), dtype=np.int32),
        )


AUGMENT = AugmentConfig(
    points=PointAugmentConfig(num_points=70),
    images=ImageAugmentConfig(resize="long_short", long_edge=(60, 140), short_edge=(30, 90), hue=0.2, pad_multiple=16),
)
TWO_AND_ONE = Needs(point_views=2, image_views=1)
LABELLED = Needs(2, 2, truth=("boxes", "depth", "pixel_class", "point_class", "point_instance"))
collate = Collate(TWO_AND_ONE, 4)


def toy_config(**keys) -> DataConfig:
    return DataConfig(**{"name": "toy", "batch_size": 3, "num_workers": 0, **keys})


def same(first, second) -> bool:
    """Are two records equal bit for bit, tensors, tuples and dataclasses alike? Unknown is unknown."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first.nan_to_num(-1), second.nan_to_num(-1))
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if is_dataclass(first):
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    return first == second


def load(reader, config, *, needs=TWO_AND_ONE, epochs=1, seed=7, rank=0, world_size=1, start=None):
    loader = make_loader(config, AUGMENT, needs, seed, rank, world_size, reader=reader)
    if start is not None:
        loader.batch_sampler.start(*start)
    return [list(loader) for _ in range(epochs)]


# Order


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_an_epoch_without_loss_or_repetition(world_size):
    samplers = [EpochSampler(31, 4, rank, world_size) for rank in range(world_size)]
    for epoch in range(2):
        keys = [key for sampler in samplers for batch in sampler for key in batch]
        num_batches = 31 // (4 * world_size)
        assert [len(sampler) for sampler in samplers] == [num_batches] * world_size
        assert sorted(keys) == [(epoch, position) for position in range(num_batches * 4 * world_size)]


def test_a_rank_takes_every_world_size_th_position():
    assert list(EpochSampler(12, 2, rank=1, world_size=3)) == [[(0, 1), (0, 4)], [(0, 7), (0, 10)]]


def test_the_order_of_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch():
    orders = {(seed, epoch): tuple(epoch_order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    assert all(sorted(order) == list(range(50)) for order in orders.values())


def test_the_global_batch_is_the_same_for_any_number_of_processes():
    """Which frames make step s depends on the global batch size, not on how many processes share it."""
    for step in range(3):
        alone = {key for key in list(EpochSampler(40, 6))[step]}
        shared = {key for rank in range(3) for key in list(EpochSampler(40, 2, rank, 3))[step]}
        assert alone == shared


def test_frames_come_in_the_order_of_the_epoch():
    batches = load(ToyReader(10), toy_config(), epochs=2)
    for epoch in range(2):
        names = [name for batch in batches[epoch] for name in batch.frame_ids]
        assert names == [f"{index:03d}" for index in epoch_order(7, epoch, 10)[:9]]


# Batches


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    alone = load(ToyReader(14, num_cameras=2), toy_config(), needs=LABELLED, epochs=3)
    helped = load(ToyReader(14, num_cameras=2), toy_config(num_workers=workers), needs=LABELLED, epochs=3)
    assert len(alone[0]) == 4
    assert same(tuple(map(tuple, alone)), tuple(map(tuple, helped)))
    assert not same(alone[0][0], alone[1][0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch", [0, 1, 3, 4])
def test_loading_goes_on_at_any_batch(workers, batch):
    config = toy_config(num_workers=workers)
    whole = load(ToyReader(14), config, epochs=3)
    resumed = load(ToyReader(14), config, epochs=2, start=(1, batch))
    assert same(tuple(resumed[0]), tuple(whole[1][batch:]))
    assert same(tuple(resumed[1]), tuple(whole[2]))
    sampler = EpochSampler(14, 3)
    sampler.start(1, batch)
    assert len(sampler) == 4, "len is that of a full epoch"
    with pytest.raises(ValueError, match="batches 0 to 4"):
        sampler.start(0, 5)


def test_stopping_early_does_not_shift_the_next_epoch():
    """What was fetched ahead but not consumed does not count."""
    loader = make_loader(toy_config(num_workers=2), AUGMENT, TWO_AND_ONE, 7, reader=ToyReader(14))
    whole = load(ToyReader(14), toy_config(), epochs=2)
    first = iter(loader)
    assert same(next(first), whole[0][0])
    loader.batch_sampler.start(0, 1)
    assert same(tuple(loader), tuple(whole[0][1:]))
    assert same(tuple(loader), tuple(whole[1]))


def test_loading_leaves_the_global_random_states_alone():
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(2), np.random.rand(2)  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    load(ToyReader(6), toy_config(), epochs=2)
    assert torch.equal(torch.rand(2), expected[0])
    assert np.array_equal(np.random.rand(2), expected[1])  # noqa: NPY002


def test_frozen_draws_repeat_epoch_0_in_every_epoch():
    reader = ToyReader(12)
    by_name = []
    for epoch in load(reader, toy_config(freeze_draws=True, batch_size=1), epochs=2):
        by_name.append({batch.frame_ids[0]: batch for batch in epoch})
    assert list(by_name[0]) != list(by_name[1]), "the order still changes"
    assert all(same(by_name[0][name], by_name[1][name]) for name in by_name[0])
    thawed = {batch.frame_ids[0]: batch for batch in load(reader, toy_config(batch_size=1), epochs=2)[1]}
    assert not same(by_name[0]["003"], thawed["003"])


def test_a_batch_of_different_sizes_holds_what_its_frames_hold_one_by_one():
    dataset = SampleDataset(ToyReader(6, num_cameras=2), toy_config(), AUGMENT, LABELLED, seed=0)
    samples, pack = [dataset[0, position] for position in range(6)], Collate(LABELLED, 4)
    batch = pack(samples)
    assert len(batch.views) == len(batch.images) == 2
    assert batch.frame_ids == tuple(sample.frame_id for sample in samples)
    for frame, sample in enumerate(samples):
        single = pack([sample])
        check_points(batch, single, frame)
        check_images(batch, single, frame)
        check_boxes(batch.truth.boxes, single.truth.boxes, frame)
    assert sorted(batch.truth.boxes.batch_index.tolist()) == batch.truth.boxes.batch_index.tolist()
    assert len(batch.truth.boxes) == len(batch.truth.boxes.names) == 6


def check_points(batch, single, frame):
    for number, (view, own) in enumerate(zip(batch.views, single.views, strict=True)):
        rows = view.batch_index == frame
        assert torch.equal(view.points[rows], own.points)
        assert torch.equal(view.source_index[rows], own.source_index)
        assert torch.equal(view.augmented_from_lidar[frame], own.augmented_from_lidar[0])
        for kind in ("point_class", "point_instance"):
            assert torch.equal(getattr(batch.truth, kind)[number][rows], getattr(single.truth, kind)[number])


def check_images(batch, single, frame):
    for (number, images), camera in product(enumerate(batch.images), range(2)):
        assert len({tuple(size) for size in images.image_size.tolist()}) > 6
        assert images.images.shape[2] % 16 == images.images.shape[3] % 16 == 0
        row, alone = 2 * frame + camera, single.images[number]
        assert images.batch_index[row] == frame
        assert images.camera_index[row] == camera
        height, width = images.image_size[row].tolist()
        assert torch.equal(images.images[row, :, :height, :width], alone.images[camera, :, :height, :width])
        assert int(images.images[row, :, height:].sum() + images.images[row, :, :, width:].sum()) == 0
        assert (images.own_padded_size[row] == -(-images.image_size[row] // 16) * 16).all()
        for name in ("own_padded_size", "augmented_from_image", "distortion", "raw_size", "image_from_camera"):
            assert torch.equal(getattr(images, name)[row], getattr(alone, name)[camera]), name
        assert images.distortion[row, 0] == 0.01 * camera
        for kind, padding in (("depth", 0), ("pixel_class", 255)):
            maps, own = getattr(batch.truth, kind)[number], getattr(single.truth, kind)[number]
            assert maps.shape == (len(images.images), *images.images.shape[2:])
            assert torch.equal(maps[row, :height, :width], own[camera, :height, :width])
            assert (maps[row, height:] == padding).all()
            assert (maps[row, :, width:] == padding).all()
            assert (maps[row, :height, :width] != padding).any()


def check_boxes(boxes, own, frame):
    rows = boxes.batch_index == frame
    for name in ("center", "size", "yaw", "source_index", "num_points", "difficulty"):
        assert torch.equal(getattr(boxes, name)[rows], getattr(own, name)), name
    assert torch.equal(boxes.velocity[rows].isnan(), own.velocity.isnan())


POSSIBLE = [(), ("boxes",), ("depth", "pixel_class", "pixel_instance"), ("point_class", "point_instance", "boxes")]


@pytest.mark.parametrize("truth", POSSIBLE)
@pytest.mark.parametrize("views", list(product((0, 1, 2), (0, 1, 2))))
def test_an_empty_batch_has_the_fields_of_a_full_one(views, truth):
    """Types and trailing shapes of everything, whatever is needed; points have the data set's number of columns."""
    needs = Needs(*views, truth=truth)
    frame = ToyReader(3)[2]
    camera = replace(frame.cameras[0], pixel_instance=np.zeros(frame.cameras[0].image.shape[:2], np.int32))
    frame = replace(frame, cameras=(camera,), points=np.repeat(frame.points, 2, axis=1)[:, :6])
    reader = ToyReader(3)
    full = example_batch(reader, frame, toy_config(), AUGMENT, needs, 2)
    empty = Collate(needs, 6)([])
    assert empty.num_frames == 0
    assert (empty.truth is None) == (truth == ())
    compared = compare_layout(empty, full)
    assert compared == 4 * views[0] + 10 * views[1] + sum(
        {"boxes": 8}.get(kind, views[0] if kind.startswith("point") else views[1]) for kind in truth
    )


def compare_layout(empty, full) -> int:
    """Compare two records field by field; how many tensors there were."""
    if isinstance(empty, torch.Tensor):
        assert empty.dtype == full.dtype
        assert empty.dim() == full.dim()
        assert len(empty) == 0
        if empty.dim() == 2:
            assert empty.shape[1] == full.shape[1]
        return 1
    if is_dataclass(empty):
        return sum(compare_layout(getattr(empty, f.name), getattr(full, f.name)) for f in fields(empty))
    if isinstance(empty, tuple) and empty and not isinstance(empty[0], str):
        return sum(compare_layout(one, other) for one, other in zip(empty, full, strict=True))
    return 0


def test_frames_without_cameras_make_a_batch_without_images():
    batch = load(ToyReader(3, num_cameras=0), toy_config(), needs=Needs(point_views=2))[0][0]
    assert batch.num_frames == 3
    assert batch.images == ()
    with_images = load(ToyReader(3, num_cameras=0), toy_config(), needs=Needs(image_views=1))[0][0]
    assert with_images.bad_frames[0].startswith(
        f"frame {epoch_order(7, 0, 3)[0]:03d}: has no image, which the method needs"
    )


def test_a_batch_moves_between_devices_and_types():
    batch = load(ToyReader(3), toy_config())[0][0]
    assert same(move_tensors(batch, "cpu"), batch)
    meta = batch.to("meta")
    assert meta.images[0].images.device.type == meta.views[1].source_index.device.type == "meta"


def test_too_few_frames_for_one_step_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"data\.batch_size: one step takes 3 frames, .* has 2; lower") as error:
        make_loader(toy_config(), AUGMENT, TWO_AND_ONE, 0, reader=ToyReader(2))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="3 x 2 processes"):
        make_loader(toy_config(), AUGMENT, TWO_AND_ONE, 0, rank=1, world_size=2, reader=ToyReader(5))
    make_loader(toy_config(), AUGMENT, TWO_AND_ONE, 0, rank=1, world_size=2, reader=ToyReader(6))


# Bad frames


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_frame_stops_the_run_with_its_own_words(workers):
    config = toy_config(num_workers=workers)
    limit = BadFrameLimit(config, 9)
    messages = [message for batch in load(ToyReader(9, bad=(4,)), config)[0] for message in batch.bad_frames]
    with pytest.raises(BadFrameError) as error:
        limit.add(messages)
    assert str(error.value) == "toy/004.bin: the file is empty; set data.on_bad_frame=skip"


def test_a_batch_of_bad_frames_only_is_empty_but_sound():
    batch = collate([NoSample(("a",)), NoSample(("b", "c"))])
    assert batch.num_frames == len(batch.views[0].points) == len(batch.images[0].images) == 0
    assert batch.bad_frames == ("a", "b", "c")


@pytest.mark.parametrize("workers", [0, 2])
def test_the_ranks_next_frame_takes_the_place_of_a_bad_one(workers, caplog):
    config = toy_config(num_workers=workers, on_bad_frame="skip", max_bad_fraction=0.2)
    order = epoch_order(7, 0, 12)
    bad = (int(order[2]), int(order[4]))
    batches = [load(ToyReader(12, bad), config, rank=rank, world_size=2)[0] for rank in range(2)]
    names = [[int(name) for batch in own for name in batch.frame_ids] for own in batches]
    # Both stand-ins come from behind the batch, and are two: equal samples would be each other's false negatives.
    assert names[0] == [order[0], order[8], order[10], order[6], order[8], order[10]]
    assert names[1] == order[1::2].tolist()
    limit = BadFrameLimit(config, 12)
    for _ in range(2):
        for batch in batches[0]:
            limit.add(batch.bad_frames)
    assert len(limit.messages) == 2, "a frame counts once"
    assert sum("skipped a bad frame" in record.message for record in caplog.records) == 2
    restored = BadFrameLimit(config, 12)
    restored.load_state_dict(limit.state_dict())
    restored.add(batches[0][0].bad_frames)
    with pytest.raises(UserError, match=r"3 of 12 frames .* allows 2; the last one: other"):
        restored.add(("other",))


def test_the_last_frame_of_a_rank_is_replaced_by_its_first():
    order = epoch_order(7, 0, 6)
    config = toy_config(on_bad_frame="skip")
    batches = load(ToyReader(6, bad=(int(order[5]),)), config, rank=1, world_size=2)[0]
    assert [int(name) for name in batches[0].frame_ids] == [order[1], order[3], order[1]]


def test_nothing_but_bad_frames_comes_to_an_end():
    config = toy_config(on_bad_frame="skip", max_bad_fraction=0.5)
    batches = load(ToyReader(6, bad=tuple(range(6))), config)[0]
    limit = BadFrameLimit(config, 6)
    with pytest.raises(UserError, match="4 of 6 frames"):
        limit.add(batches[0].bad_frames)


def test_other_errors_of_a_reader_are_bugs_and_go_through():
    class Broken(ToyReader):
        def __getitem__(self, index):
            raise KeyError("bug")

    with pytest.raises(KeyError):
        load(Broken(3), toy_config(on_bad_frame="skip"))


def test_a_scan_that_no_camera_sees_is_a_bad_frame():
    frame = ToyReader(1)[0]
    behind = Frame(frame.points * np.array([-1, 1, 1, 1], np.float32), frame.point_columns, frame.cameras, "behind")
    check_seen(frame)
    with pytest.raises(BadFrameError, match="frame behind: no camera sees any of its 80 points"):
        check_seen(behind)
    check_seen(Frame(behind.points, frame.point_columns, (), "no cameras"))


def test_frames_that_no_camera_sees_are_fine_where_points_and_images_never_meet():
    class Behind(ToyReader):
        def __getitem__(self, index):
            frame = super().__getitem__(index)
            return replace(frame, points=frame.points * np.array([-1, 1, 1, 1], np.float32))

    for needs in (Needs(2), Needs(0, 1), Needs(0, 2, truth=("pixel_class",))):
        assert load(Behind(3), toy_config(), needs=needs)[0][0].bad_frames == ()
    for needs in (Needs(1, 1), Needs(0, 1, truth=("depth",))):
        assert "no camera sees any" in load(Behind(3), toy_config(), needs=needs)[0][0].bad_frames[0]


# Needs


def test_a_reader_is_asked_for_what_is_needed():
    assert wants_of(Needs(2, 1)).truth == frozenset()
    one = wants_of(Needs(image_views=2))
    assert (one.points, one.images) == (False, True)
    two = wants_of(Needs(point_views=1, truth=("point_class",)))
    assert (two.points, two.images, two.truth) == (True, False, {"point_class"})
    assert wants_of(Needs(image_views=1, truth=("depth",))).points, "they make the depth where there is no map"


@pytest.mark.parametrize(
    ("needs", "words"),
    [
        (Needs(0, 1, truth=("pixel_instance", "boxes")), "has no pixel_instance, which"),
        (Needs(2, frames=2), "has no samples of 2 scans, which"),
    ],
)
@pytest.mark.parametrize("make", [partial(make_loader, seed=0), make_evaluation_loader])
def test_needs_that_a_data_set_cannot_meet_are_refused_in_one_line(needs, words, make):
    with pytest.raises(UserError, match=f"data.name: toy, split train, {words}") as error:
        make(toy_config(), AUGMENT, needs, reader=ToyReader(6))
    assert "\n" not in str(error.value)


def test_a_reader_changes_the_augmentation_of_single_frames():
    class Own(ToyReader):
        def augment_of(self, index):
            return {"points": {"num_points": 10 + index, "scale_centre": [1, 2, 3]}} if index % 2 else {}

    class RangedConfig(DataConfig):
        point_range: tuple[float, float, float, float, float, float] = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)

    augments = Augments(Own(4), RangedConfig(name="toy"), AUGMENT)
    assert augments.of(0) == AUGMENT.model_copy(update={"points": AUGMENT.points.centred((0, -40, -3, 70.4, 40, 1))})
    assert augments.of(3).points.num_points == 13
    assert augments.of(3).points.scale_centre == (1.0, 2.0, 3.0)
    assert augments.of(3).points.rotation_centre == (35.2, 0.0, -1.0)
    assert augments.of(3).images == AUGMENT.images
    for batch in load(Own(6), toy_config(batch_size=1))[0]:
        index = int(batch.frame_ids[0])
        assert len(batch.views[1].points) == (10 + index if index % 2 else 70)


# Evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_frames", [1, 4, 13, 15])
def test_the_batches_of_one_process_are_dealt_out_whole(num_frames, world_size):
    alone = list(EvaluationSampler(num_frames, 3))
    assert [index for batch in alone for index in batch] == list(range(num_frames))
    ranks = [list(EvaluationSampler(num_frames, 3, rank, world_size)) for rank in range(world_size)]
    assert len({len(own) for own in ranks}) == 1, "all ranks take the same number of steps"
    assert all(len(own) == len(EvaluationSampler(num_frames, 3, 0, world_size)) for own in ranks)
    dealt = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert dealt[: len(alone)] == alone
    assert not any(dealt[len(alone) :])


def evaluate(reader, config, needs=LABELLED, **keys):
    return list(make_evaluation_loader(config, AUGMENT, needs, reader=reader, **keys))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_evaluation_depends_on_neither_workers_nor_processes_nor_the_pass(workers):
    reader, config = ToyReader(7, num_cameras=2), toy_config(batch_size=2, num_workers=workers)
    alone = evaluate(reader, toy_config(batch_size=2))
    loader = make_evaluation_loader(config, AUGMENT, LABELLED, reader=reader)
    assert [name for batch in alone for name in batch.frame_ids] == [f"{index:03d}" for index in range(7)]
    for _ in range(2):
        assert all(same(one, other) for one, other in zip(loader, alone, strict=True))
    shared = [evaluate(reader, config, rank=rank, world_size=3) for rank in range(3)]
    dealt = [batch for step in zip(*shared, strict=True) for batch in step]
    assert all(same(one, other) for one, other in zip(dealt, alone, strict=False))
    assert [batch.num_frames for batch in dealt] == [2, 2, 2, 1, 0, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_frame_ends_an_evaluation_with_its_own_words(workers):
    config = toy_config(num_workers=workers, on_bad_frame="skip")
    with pytest.raises(BadFrameError) as error:
        evaluate(ToyReader(9, bad=(4,)), config)
    assert str(error.value) == "toy/004.bin: the file is empty; set data.on_bad_frame=skip"


def test_an_evaluation_may_be_smaller_than_a_batch_but_not_empty():
    assert [batch.num_frames for batch in evaluate(ToyReader(1), toy_config())] == [1]
    with pytest.raises(UserError, match="split train of toy has no frames to evaluate on"):
        evaluate(ToyReader(0), toy_config())


def test_busy_thread_pools_in_the_parent_do_not_block_the_workers():
    """Workers are forked; threads that torch has started by then must not matter to them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.rand(600, 600) @ torch.rand(600, 600)
        torch.rand(200_000).exp().sum()
        assert len(load(ToyReader(6), toy_config(num_workers=2))[0]) == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [0, 2])
def test_real_frames_make_a_batch(samples, workers):
    block = {"name": "kitti", "root": str(samples / "kitti"), "split": "paper", "batch_size": 2, "num_workers": workers}
    batches = list(make_loader(parse_part("data", READERS, block), AugmentConfig(), TWO_AND_ONE, seed=0))
    assert len(batches) == 2
    for batch in batches:
        assert batch.bad_frames == ()
        assert [int(count) for count in torch.bincount(batch.views[0].batch_index)] == [16384, 16384]
        assert not torch.equal(batch.views[0].source_index, batch.views[1].source_index)
        assert batch.images[0].images.dtype == torch.uint8
