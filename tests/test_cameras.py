"""Many cameras through the method: any number a frame, of any size, and tokens that several of them see."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from helpers import AUGMENT, CAMERA_FROM_LIDAR, COLUMNS, batch_of, small_method, street

from simipu3d.contracts.batch import Batch, ImageView, map_tensors
from simipu3d.contracts.frame import Camera, Frame
from simipu3d.contrast.info_nce import info_nce
from simipu3d.data.config import ImageAugmentConfig
from simipu3d.data.loading.augment import Sample, augment_frame
from simipu3d.data.loading.collate import Collate
from simipu3d.engine.callbacks import pictures_of
from simipu3d.engine.pretrain import pretrain
from simipu3d.methods.drawing import draw_features, draw_pixel_pairs
from simipu3d.methods.simipu import SimIPU
from simipu3d.pictures import mosaic
from simipu3d.pictures.frames import frame_facts, frame_page, views_page

YAWS = {"front": 0.0, "left": 0.5, "right": -0.5, "far_left": 1.0}
MIXED = AUGMENT.model_copy(
    update={"images": ImageAugmentConfig(resize="factor", resize_factor=(0.7, 1.4), pad_multiple=8)}
)


def rig_frame(seed: int, names=("front", "left", "right")) -> Frame:
    """A street scene seen by cameras whose views overlap and whose images differ in size."""
    frame, rng = street(seed), np.random.default_rng(100 + seed)
    cameras = []
    for name in names:
        number, yaw = list(YAWS).index(name), YAWS[name]
        height, width = 40 + 8 * number, 72 + 16 * number
        turn = np.eye(4)
        turn[:2, :2] = [[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]]
        image_from_camera = np.array([[60, 0, width / 2, 0], [0, 60, height / 2, 0], [0, 0, 1.0, 0]])
        image = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        distortion = np.array([-0.05, 0.01, 0, 0, 0]) if number == 1 else None
        cameras.append(Camera(name, image, image_from_camera, CAMERA_FROM_LIDAR @ turn, distortion=distortion))
    return replace(frame, cameras=tuple(cameras))


collate = Collate(SimIPU.NEEDS, len(COLUMNS))


def augmented(frames, augment=MIXED) -> list[Sample]:
    return [augment_frame(frame, augment, SimIPU.NEEDS, np.random.SeedSequence(n)) for n, frame in enumerate(frames)]


def collate_frames(frames, augment=MIXED) -> Batch:
    return collate(augmented(frames, augment))


def ragged() -> list[Frame]:
    """Three cameras, one, none, four."""
    return [
        rig_frame(1),
        rig_frame(2, ("left",)),
        rig_frame(3, ()),
        rig_frame(4, ("far_left", "right", "front", "left")),
    ]


def permuted_images(images: ImageView, order: list[int]) -> ImageView:
    changed = {}
    for field in fields(images):
        value = getattr(images, field.name)
        changed[field.name] = value[order] if isinstance(value, torch.Tensor) else tuple(value[row] for row in order)
    return ImageView(**changed)


def pair_set(used, names, batch_index, tokens):
    """Every pair as (frame, row of the token in its frame, camera, pixel)."""
    first = [int((tokens.batch_index < frame).sum()) for frame in range(8)]
    return {
        (frame, token - first[frame], names[image]): pixel
        for token, image, pixel in zip(used.token.tolist(), used.image.tolist(), used.pixels, strict=True)
        for frame in [int(batch_index[image])]
    }


def test_names_go_with_the_images():
    batch = collate_frames(ragged())
    (images,) = batch.images
    assert images.camera_names == ("front", "left", "right", "left", "far_left", "right", "front", "left")
    assert images.batch_index.tolist() == [0, 0, 0, 1, 3, 3, 3, 3]
    assert images.camera_index.tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert len({tuple(size) for size in images.image_size.tolist()}) > 4
    moved = map_tensors(batch, torch.clone)
    assert moved.images[0].camera_names == images.camera_names
    assert batch.to("meta").images[0].camera_names == images.camera_names
    assert collate([]).images[0].camera_names == ()


def test_a_mixed_batch_pairs_like_its_frames_one_by_one():
    method, frames = small_method().eval(), ragged()
    samples = augmented(frames)
    batch = collate(samples)
    whole, images = method.embed(batch), batch.images[0]
    together = pair_set(whole.inter.used, images.camera_names, images.batch_index, whole.first.tokens)
    found = 0
    for number, sample in enumerate(samples):
        single = collate([sample])
        own, images = method.embed(single), single.images[0]
        alone = pair_set(own.inter.used, images.camera_names, images.batch_index, own.first.tokens)
        mine = {key[1:]: pixel for key, pixel in together.items() if key[0] == number}
        assert mine.keys() == {key[1:] for key in alone}
        for (_, token, camera), pixel in alone.items():
            torch.testing.assert_close(mine[token, camera], pixel)
        found += len(alone)
    assert found == len(together) > 60


def test_the_order_of_the_cameras_does_not_matter():
    """Images of a batch in another order: the same pairs, losses and metrics."""
    batch = collate_frames(ragged())
    order = [2, 0, 1, 3, 7, 4, 6, 5]
    other = replace(batch, images=(permuted_images(batch.images[0], order),))
    method = small_method(contrast={"dim": 8, "inter_direction": "symmetric"}).eval()
    one, two = method(batch), method(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, msg=name)
    assert float(one["inter_rows"]) > 60


def test_shares_of_tokens_by_the_number_of_cameras_that_see_them():
    batch = collate_frames(ragged())
    method = small_method().eval()
    embedded, metrics = method.embed(batch), method(batch)
    counts = torch.bincount(embedded.inter.used.token, minlength=len(embedded.first.xyz))
    assert set(counts.tolist()) >= {0, 1, 2}
    assert float(metrics["visible_tokens"]) == pytest.approx(float((counts > 0).float().mean()))
    assert float(metrics["overlap_tokens"]) == pytest.approx(float((counts > 1).float().mean()))
    assert float(metrics["inter_rows"]) == counts.sum()
    assert float(small_method()(batch_of([1, 2]))["overlap_tokens"]) == 0


@pytest.mark.parametrize("mask_duplicates", [True, False])
@pytest.mark.parametrize("negatives", ["batch", "scene"])
def test_the_pairs_of_one_token_are_no_negatives_of_each_other(mask_duplicates, negatives):
    """Against a slow loop: row i chooses among its own key and those of other tokens."""
    contrast = {"dim": 8, "mask_duplicates": mask_duplicates, "negatives": negatives}
    method, batch = small_method(contrast=contrast).eval(), collate_frames([rig_frame(1), rig_frame(2)])
    embedded = method.embed(batch)
    used, image, points = embedded.inter.used, embedded.inter.image_rows, embedded.inter.point_rows
    assert len(used.token) > len(used.token.unique()) + 5
    image, points = (torch.nn.functional.normalize(rows, dim=1) for rows in (image, points))
    copies, frame = embedded.first.copies[used.token], embedded.first.tokens.batch_index[used.token]
    losses = []
    for row in range(len(image)):
        keys = []
        for other in range(len(points)):
            same = used.token[other] == used.token[row] or (mask_duplicates and copies[other] == copies[row])
            elsewhere = negatives == "scene" and frame[other] != frame[row]
            if other == row or not (same or elsewhere):
                keys.append(other)
        logits = image[row] @ points[keys].T / 0.07
        losses.append(logits.logsumexp(0) - logits[keys.index(row)])
    torch.testing.assert_close(method(batch)["inter_loss"], torch.stack(losses).mean())
    # With each other as negatives the loss would be higher: the point side of both is the same.
    assert float(info_nce(embedded.inter.image_rows, embedded.inter.point_rows, 0.07).loss) > float(
        torch.stack(losses).mean()
    )


def test_kept_tokens_that_nothing_shows_stand_in_one_row_each():
    """`invisible: keep` with many cameras: visible pairs, and one row of a zero feature for every token without any."""
    batch = collate_frames(ragged())
    masked = small_method().eval().embed(batch).inter
    whole = small_method(matching={"invisible": "keep"}).eval().embed(batch)
    kept = whole.inter
    assert masked.pixels.visible.sum() == len(masked.used.token) == kept.used.visible.sum()
    unseen = kept.used.token[~kept.used.visible]
    assert len(unseen) == len(unseen.unique()) > 5
    with_images = torch.isin(whole.first.tokens.batch_index, batch.images[0].batch_index).nonzero().squeeze(1)
    assert sorted({*kept.used.token.tolist()}) == with_images.tolist()
    assert not set(unseen.tolist()) & set(masked.used.token.tolist())


def test_a_camera_beside_the_others_changes_no_pixel_of_theirs():
    frame = rig_frame(5, ("front", "left"))
    still = AUGMENT.model_copy(update={"images": ImageAugmentConfig(resize=None, flip_probability=0)})
    alone = collate_frames([replace(frame, cameras=frame.cameras[:1])], still)
    both = collate_frames([frame], still)
    method = small_method().eval()
    one, two = method.embed(alone).inter.used, method.embed(both).inter.used
    assert torch.equal(one.token, two.token[two.image == 0])
    assert torch.equal(one.pixels, two.pixels[two.image == 0])


def test_a_frame_may_have_no_camera_at_all():
    batch = collate_frames([rig_frame(3, ()), rig_frame(4, ())])
    metrics = small_method()(batch)
    assert float(metrics["inter_loss"]) == float(metrics["visible_tokens"]) == float(metrics["overlap_tokens"]) == 0
    metrics["loss"].backward()


def test_every_parameter_gets_a_gradient_from_a_ragged_batch():
    method = small_method()
    method(collate_frames(ragged()))["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters() if parameter.requires_grad)


# Pictures


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7])
def test_a_mosaic_holds_every_image_where_it_says(number):
    rng = np.random.default_rng(number)
    images = [rng.integers(0, 256, (20 + 5 * n, 60 - 4 * n, 3), dtype=np.uint8) for n in range(number)]
    picture, places = mosaic(images, [f"camera {n}" for n in range(number)], scale=2)
    covered = np.zeros(picture.shape[:2], dtype=int)
    for image, (left, top) in zip(images, places, strict=True):
        rows, columns = slice(top, top + 2 * image.shape[0]), slice(left, left + 2 * image.shape[1])
        assert np.array_equal(picture[rows, columns], image.repeat(2, axis=0).repeat(2, axis=1))
        covered[rows, columns] += 1
    assert covered.max() == 1


def test_training_pictures_show_all_cameras_of_a_frame():
    method, batch = small_method(), collate_frames(ragged())
    drawn = pictures_of(method, batch)
    widths = [int(width) for _, width in batch.images[0].image_size[:3].tolist()]
    assert drawn["projected_tokens"].shape[1] >= 3 * max(widths)
    embedded = method.eval().embed(batch)
    for frame in (0, 1, 3):
        assert draw_pixel_pairs(batch, embedded.first.tokens, embedded.inter.used, frame).ndim == 3
    # Frame 0 and 1 make four images; the fourth frame's four would be too many.
    assert draw_features(batch, embedded.inter.feature_map).shape[1] < 2.5 * max(widths)
    first_without = collate_frames([rig_frame(3, ()), rig_frame(1)])
    assert set(pictures_of(method, first_without)) == {"matches", "projected_tokens", "features"}


def test_pages_name_the_cameras():
    frame = rig_frame(1, ("far_left", "right", "front", "left"))
    assert frame_page(frame).shape[1] == views_page(collate_frames([frame])).shape[1] == 1800
    lines = frame_facts(replace(frame, timestamp=2.0)).in_image.splitlines()
    assert [line.split()[0] for line in lines] == ["far_left", "right", "front", "left"]
    timed = replace(frame, timestamp=2.0, cameras=tuple(replace(c, timestamp=1.96) for c in frame.cameras))
    assert frame_facts(timed).camera_time == "-40 to -40 ms"
    assert frame_facts(frame).camera_time == "unknown"


@pytest.mark.slow  # a minute on one core
def test_frames_of_six_cameras_are_overfitted(tmp_path):
    import csv

    sets = [
        "data.name=drive_world",
        f"data.root={tmp_path}",
        "data.num_cameras=6",
        "data.num_frames=3",
        "data.frames_per_sequence=1",
        "data.batch_size=3",
        "data.num_workers=0",
        "data.freeze_draws=true",
        "augment.points.num_points=4096",
        "trainer.max_steps=40",
        "run.pictures_every_steps=0",
    ]
    out = pretrain("configs/simipu/kitti_overfit.yaml", sets, out=tmp_path / "run")
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    first, last = rows[0], rows[-1]
    assert float(last["loss"]) < 0.3 * float(first["loss"])
    assert float(last["inter_top1"]) > 0.9
    assert float(last["intra_top1"]) > 0.7
    assert float(last["overlap_tokens"]) > 0.1
