"""The depth head: its size, its loss against a slow loop, what is scored, and that it learns."""

import math

import numpy as np
import pytest
import torch
from helpers import COLUMNS, batch_of, street
from PIL import Image

import simipu3d.engine.parts  # noqa: F401  (fills the registries)
from simipu3d.config import merge, parse_block
from simipu3d.contracts.batch import Batch
from simipu3d.contracts.method import DataInfo
from simipu3d.contracts.tokens import FeatureMap, Level
from simipu3d.contracts.truth import Truth
from simipu3d.data.config import AugmentConfig, ImageAugmentConfig
from simipu3d.data.loading.augment import augment_frame
from simipu3d.data.loading.collate import Collate
from simipu3d.encoders.image import ImageEncoder, ImageEncoderConfig
from simipu3d.errors import UserError
from simipu3d.heads.depth import Depth
from simipu3d.heads.depth.decoder import DenseDecoder, default_channels
from simipu3d.heads.depth.loss import sig_loss

SMALL = {
    "image_encoder": {"name": "resnet18", "model_args": {"channels": [8, 12, 16, 20]}},
    "depth": {"crop": "none", "channels": [8, 8, 8, 16, 16]},
}
AS_IT_IS = AugmentConfig(images=ImageAugmentConfig(flip_probability=0.0, colour_probability=0.0))


def head(**changes) -> Depth:
    torch.manual_seed(0)
    return Depth(parse_block("", Depth.Config, merge(SMALL, changes)), DataInfo(COLUMNS))


def depth_batch(seeds: list[int], **kwargs) -> Batch:
    return batch_of(seeds, AS_IT_IS, Depth.NEEDS, **kwargs)


# ------------------------------------------------------------------------------------------------------------- size


def test_the_published_network_has_its_size():
    """Trunk 23.51 M, decoder 54.26 M parameters (the depth runs of SimIPU's authors)."""
    levels = [Level(2 << n, channels, 0.0) for n, channels in enumerate((64, 256, 512, 1024, 2048))]
    assert default_channels(levels) == (128, 256, 512, 1024, 2048)
    with torch.device("meta"):
        decoder = DenseDecoder(levels, None)
    assert sum(p.numel() for p in decoder.parameters()) == 54_262_657
    by_hand = 2048 * 2048 + 2048
    for coarse, fine, out in ((2048, 1024, 1024), (1024, 512, 512), (512, 256, 256), (256, 64, 128)):
        by_hand += 9 * (coarse + fine) * out + out + 9 * out * out + out
    assert by_hand + 9 * 128 + 1 == 54_262_657
    encoder = ImageEncoder(ImageEncoderConfig())
    assert sum(p.numel() for p in encoder.parameters()) == 23_508_032
    assert [level.channels for level in encoder.maps] == [64, 256, 512, 1024, 2048]


def test_the_decoder_reads_every_level_and_ends_at_the_finest():
    levels = [Level(2 << n, channels, 0.0) for n, channels in enumerate((4, 6, 8))]
    decoder = DenseDecoder(levels, None)
    maps = [torch.rand(2, level.channels, 24 >> n, 40 >> n, requires_grad=True) for n, level in enumerate(levels)]
    logits = decoder([FeatureMap(m, level.stride, 0.0) for m, level in zip(maps, levels, strict=True)])
    assert logits.shape == (2, 1, 24, 40)
    logits.square().sum().backward()
    assert all(float(m.grad.abs().sum()) > 0 for m in maps)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "efficientnet_lite0"])
def test_any_encoder_will_do(name):
    method = Depth(
        parse_block("", Depth.Config, {"image_encoder": {"name": name}, "depth": {"crop": "none"}}), DataInfo()
    )
    (record,) = method.eval().predict(depth_batch([1]))
    assert record["depth"][0].shape == record["truth"][0].shape == (64, 96)


def test_wrong_blocks_are_one_line():
    with pytest.raises(UserError, match=r"depth\.channels: 2 numbers for the 5 levels"):
        head(depth={"channels": [8, 8]})
    with pytest.raises(UserError, match=r"image_encoder\.neck"):
        head(image_encoder={"neck": "top_down", "map": 8})
    with pytest.raises(UserError, match="min_depth"):
        head(depth={"min_depth": 100.0})


# ------------------------------------------------------------------------------------------------------------- loss


def slow_loss(prediction, truth, mean_weight, offset, max_depth):
    g = []
    for p, d in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if d > 0 and (max_depth is None or d <= max_depth):
            g.append(math.log(p + offset) - math.log(d + offset))
    mean = sum(g) / len(g)
    variance = sum((value - mean) ** 2 for value in g) / (len(g) - 1)
    return math.sqrt(variance + mean_weight * mean**2)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_depth", [None, 30.0])
def test_the_loss_is_that_of_a_slow_loop(seed, max_depth):
    generator = torch.Generator().manual_seed(seed)
    prediction = 1 + 60 * torch.rand(2, 9, 13, generator=generator)
    truth = 60 * torch.rand(2, 9, 13, generator=generator) * (torch.rand(2, 9, 13, generator=generator) < 0.5)
    loss = sig_loss(prediction, truth, mean_weight=0.3, log_offset=0.05, max_depth=max_depth)
    assert float(loss) == pytest.approx(slow_loss(prediction, truth, 0.3, 0.05, max_depth), rel=1e-5)


def test_the_loss_as_a_scale_invariant_one():
    """lambda = 1 - mean_weight; a common factor costs sqrt(mean_weight) |ln factor| on top of nothing."""
    truth = torch.rand(4000) * 50 + 5
    assert float(sig_loss(truth * 2, truth, log_offset=0)) == pytest.approx(math.sqrt(0.15) * math.log(2), rel=1e-4)
    prediction = truth * (0.3 * torch.randn(4000)).exp() * 1.3
    g = (prediction / truth).log().double()
    expected = (g.square().mean() - 0.85 * g.mean().square()).sqrt()
    assert float(sig_loss(prediction, truth, log_offset=0)) == pytest.approx(float(expected), rel=1e-3)


def test_warm_up_finds_the_scale_first():
    truth = torch.rand(100) * 50 + 5
    shuffled = truth.flip(0)
    assert float(sig_loss(shuffled, truth, scale_only=True)) < 1e-3 < float(sig_loss(shuffled, truth))
    method, batch = head(depth={"warmup_steps": 2}).train(), depth_batch([1, 2])
    losses = []
    for step in range(3):
        method.before_step(step, 10)
        losses.append(float(method(batch)["loss"].detach()))
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)
    held_out = []
    for step in (0, 5):  # held-out losses have no warm-up
        method.before_step(step, 10)
        held_out.append(float(method.eval()(batch)["loss"].detach()))
    assert held_out[0] == held_out[1]


def test_no_truth_and_one_pixel_and_a_perfect_map_are_legal():
    for prediction, truth in (
        (torch.rand(5) + 1, torch.zeros(5)),
        (torch.rand(5) + 1, torch.tensor([0, 0, 3.0, 0, 0])),
        (torch.full((5,), 7.0), torch.full((5,), 7.0)),
    ):
        prediction.requires_grad_()
        loss = sig_loss(prediction, truth)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(prediction.grad).all()


# ----------------------------------------------------------------------------------------------------- what is scored


@pytest.mark.parametrize(("crop", "rows"), [("none", (0, 64)), ("garg", (26, 63)), ("eigen", (21, 58))])
def test_only_truth_inside_the_window_and_the_range_is_scored(crop, rows):
    """A prediction that is wrong everywhere else is scored as perfect."""
    method = head(depth={"crop": crop, "cap": 50.0}).eval()
    truth = np.full((64, 96), 20.0, dtype=np.float32)
    inside = np.zeros((64, 96), dtype=bool)
    inside[rows[0] : rows[1], 3:92] = True
    if crop == "none":
        inside[:] = True
    truth[30:33, 40:44] = [[0.0], [50.0], [1e-3]]
    wrong = np.where(inside & (truth == 20), truth, 77.0).astype(np.float32)
    assert method._errors(wrong, truth)["abs_rel"] == 0
    wrong[rows[0], 50] = 10.0
    assert method._errors(wrong, truth)["abs_rel"] > 0


def test_the_window_of_nyu_is_refused_for_other_images():
    with pytest.raises(UserError, match=r"depth\.crop: crop nyu is for maps of 480 x 640"):
        head(depth={"crop": "nyu"}).eval().predict(depth_batch([1]))


def test_the_score_is_the_mean_over_images_that_have_truth():
    method = head().eval()
    method.decoder.logit.bias.data.fill_(math.log(1 / 7))  # sigmoid 1/8: 10 m of 80
    method.decoder.logit.weight.data.zero_()
    batch = depth_batch([1, 2, 3])
    depth = batch.truth.depth[0].clone()
    depth[0], depth[1], depth[2] = 20.0, 5.0, 0.0
    batch = Batch(batch.views, batch.images, batch.frame_ids, Truth(depth=(depth,)))
    records = method.predict(batch)
    score = method.score(method.condense(records))
    assert score["abs_rel"] == pytest.approx((0.5 + 1.0) / 2, rel=1e-4)
    assert not any(isinstance(value, np.ndarray) for record in method.condense(records) for value in record.values())
    assert method.score([]) == {}


# ------------------------------------------------------------------------------------------------------- predictions


def test_a_prediction_is_what_training_sees_of_a_frame():
    """Also of one that is padded: the loss of the written prediction is the loss."""
    method, batch = head(depth={"flip_test": False}).eval(), depth_batch([1], size=(50, 70))
    assert batch.images[0].images.shape[-2:] == (64, 96)
    (depth,) = method.predict_depth(batch.images[0])
    assert depth.shape == (50, 70)
    expected = sig_loss(depth, batch.truth.depth[0][0, :50, :70])
    assert float(method(batch)["loss"].detach()) == pytest.approx(float(expected), rel=1e-4)


def test_the_flip_test_is_the_mean_of_both_mirrorings():
    both, one = head().eval(), head(depth={"flip_test": False}).eval()
    batch = depth_batch([4])
    view = batch.images[0]
    plain = one.predict_depth(view)[0]
    mirrored = one.predict_depth(type(view)(**{**vars(view), "images": view.images.flip(-1)}))[0].flip(-1)
    assert (plain - mirrored).abs().max() > 1e-4
    torch.testing.assert_close(both.predict_depth(view)[0], (plain + mirrored) / 2)
    symmetric = type(view)(**{**vars(view), "images": torch.maximum(view.images, view.images.flip(-1))})
    found = both.predict_depth(symmetric)[0]
    torch.testing.assert_close(found, found.flip(-1))


def test_a_prediction_does_not_depend_on_larger_images_beside_it():
    method = head().eval()
    samples = [
        augment_frame(street(seed, size=size), AS_IT_IS, Depth.NEEDS, np.random.SeedSequence(seed))
        for seed, size in ((1, (64, 96)), (2, (90, 130)))
    ]
    together = method.predict(Collate(Depth.NEEDS, len(COLUMNS))(samples))
    for record, sample in zip(together, samples, strict=True):
        (alone,) = method.predict(Collate(Depth.NEEDS, len(COLUMNS))([sample]))
        assert record["depth"][0].shape == alone["depth"][0].shape == alone["truth"][0].shape
        np.testing.assert_allclose(record["depth"][0], alone["depth"][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale_up", [True, False])
def test_predictions_stay_inside_the_range(scale_up):
    method = head(depth={"scale_up": scale_up, "min_depth": 2.0, "max_depth": 30.0}).eval()
    for bias in (-50.0, 50.0):
        method.decoder.logit.bias.data.fill_(bias)
        (record,) = method.predict(depth_batch([1]))
        assert record["depth"][0].min() == record["depth"][0].max() == (2.0 if bias < 0 else 30.0)


def test_written_files_hold_what_was_predicted(tmp_path):
    method = head().eval()
    records = method.predict(depth_batch([1, 2]))
    records[0]["frame_id"] = "drive/../7"
    method.write_predictions(records, tmp_path)
    for record, name in zip(records, ("drive_.._7", records[1]["frame_id"]), strict=True):
        for kind in ("depth", "truth"):
            with Image.open(tmp_path / kind / f"{name}.png") as image:
                assert image.mode.startswith("I")
                np.testing.assert_allclose(np.asarray(image) / 256, record[kind][0], atol=0.5 / 256 + 1e-6)
        with Image.open(tmp_path / "pictures" / f"{name}.png") as image:
            assert image.size == (96, 3 * 64)


def test_it_overfits_a_pair_of_pictures():
    """Two small pictures of smooth depth: AbsRel below 6 % in 50 steps."""
    method, batch = (
        head(image_encoder={"model_args": {"channels": [8, 16, 24, 32]}}),
        depth_batch([1, 2], size=(32, 64)),
    )
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 64), indexing="ij")
    depth = torch.stack([6 + 20 * rows + 5 * columns, 30 - 15 * rows * columns])
    batch = Batch(batch.views, batch.images, batch.frame_ids, Truth(depth=(depth,)))
    optimizer = torch.optim.AdamW(method.parameters(), lr=4e-3)
    for _ in range(50):
        loss = method(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # statistics of the pair itself, without running means in between
        assert float(method(batch)["depth_abs_rel"]) < 0.06
