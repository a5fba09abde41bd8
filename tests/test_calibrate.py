"""Exported BatchNorm statistics: those of pre-training, or measured again on bare pictures, and the sidecar says which."""

import numpy as np
import pytest
import torch
from test_export_image import write_checkpoint

from simipu3d.config import PartConfig, parse_block
from simipu3d.contracts.frame import Camera, Frame
from simipu3d.encoders.image import BatchNorm, ImageEncoder, ImageEncoderConfig
from simipu3d.errors import UserError
from simipu3d.export.image.calibrate import bare_pictures, calibrate
from simipu3d.export.image.write import export_image
from simipu3d.registry import READERS, Entry

TINY = {"name": "resnet18", "model_args": {"channels": [8, 12, 16, 20], "stem_width": 8}}


def encoder(**changes):
    torch.manual_seed(1)
    return ImageEncoder(parse_block("image_encoder", ImageEncoderConfig, {**TINY, **changes}))


def pictures(seed, count, height, width):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def test_statistics_are_those_of_all_pixels_whatever_the_batches():
    """Of the first BatchNorm by hand: mean and variance of what the stem gives, over two sizes of pictures."""
    network, batches = encoder(), [pictures(1, 2, 40, 56), pictures(2, 3, 48, 48)]
    assert calibrate(network, batches) == 5
    values = []
    with torch.no_grad():
        for images in batches:
            size = torch.tensor([images.shape[2:]] * len(images))
            given = network.trunk.conv1(network.normalise(images, size)).double()
            values.append(given.transpose(0, 1).flatten(1))
    values = torch.cat(values, 1)
    torch.testing.assert_close(network.trunk.bn1.running_mean.double(), values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        network.trunk.bn1.running_var.double(), values.var(1, correction=0), rtol=1e-4, atol=1e-5
    )
    assert not network.training
    assert network.trunk.bn1.momentum == 0.1


def test_weights_and_frozen_norms_stay():
    network = encoder(frozen_stages=1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    calibrate(network, [pictures(1, 2, 40, 56)])
    moved = {name for name, value in network.state_dict().items() if not torch.equal(before[name], value)}
    assert moved
    assert all("running_" in name or "num_batches" in name for name in moved)
    assert not any(name.startswith("trunk.bn1.") for name in moved)


def test_padding_makes_the_variance_too_small():
    """What this is for: half of a batch is padding, and the stored variance is of about half the size."""
    padded, bare = encoder(bn_momentum=1.0), encoder(bn_momentum=1.0)
    images = torch.nn.functional.pad(pictures(1, 4, 48, 64), (0, 64))
    padded.train()(padded.normalise(images, torch.tensor([[48, 64]] * 4)))
    calibrate(bare, [pictures(1, 4, 48, 64)])
    assert 0.4 < (padded.trunk.bn1.running_var / bare.trunk.bn1.running_var).mean() < 0.65


def test_without_pictures_or_norms_it_is_refused():
    with pytest.raises(UserError, match="no picture"):
        calibrate(encoder(), [])
    with pytest.raises(UserError, match="no BatchNorm that was trained"):
        calibrate(encoder(norm="frozen"), [pictures(1, 2, 40, 56)])


class Config(PartConfig):
    name: str = "ten_pictures"


class TenPictures:
    """Frames of two cameras; every third one of another size."""

    def __init__(self, config, wants):
        assert not wants.points

    def __len__(self):
        return 10

    def __getitem__(self, index):
        size = (40, 48) if index % 3 else (48, 64)
        cameras = []
        for name in ("left", "right"):
            image = np.full((*size, 3), index, np.uint8)
            image[::2] = 200
            cameras.append(Camera(name, image, np.eye(3, 4), np.eye(4)))
        return Frame(np.zeros((0, 4), np.float32), ("x", "y", "z", "intensity"), tuple(cameras), str(index))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setitem(READERS._entries, "ten_pictures", Entry(TenPictures, Config))
    path = tmp_path / "data.yaml"
    path.write_text("data: {name: ten_pictures}\n")
    return path


def test_pictures_of_a_configuration_come_whole_and_in_batches_of_one_size(data):
    batches = list(bare_pictures(data))
    assert sum(len(batch) for batch in batches) == 20
    assert {tuple(batch.shape[1:]) for batch in batches} == {(3, 40, 48), (3, 48, 64)}
    assert sum(len(batch) for batch in bare_pictures(data, 3)) == 3


def test_the_sidecar_says_which_statistics_are_in_the_file(tmp_path, data):
    write_checkpoint(tmp_path / "last.ckpt", name="resnet18")
    plain = export_image(tmp_path / "last.ckpt", "torchvision", tmp_path / "a.pth")
    assert plain.meta["norm_statistics"].startswith("of pre-training")
    other = export_image(tmp_path / "last.ckpt", "torchvision", tmp_path / "b.pth", calibrate_on=data)
    assert other.meta["norm_statistics"] == "measured again on 20 whole pictures of data.yaml, without padding"
    assert "measured again on 20" in other.summary()
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("a.pth", "b.pth"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)


def test_a_calibrated_network_normalises_its_pictures():
    """In eval mode the first BatchNorm's output then has mean 0 and variance 1 over these pictures."""
    network, images = encoder(), pictures(3, 4, 48, 64)
    calibrate(network, [images])
    assert any(isinstance(module, BatchNorm) for module in network.trunk.modules())
    with torch.no_grad():
        given = network.trunk.bn1(network.trunk.conv1(network.normalise(images, torch.tensor([[48, 64]] * 4))))
    assert given.mean((0, 2, 3)).abs().max() < 1e-3
    assert (given.var((0, 2, 3)) - 1).abs().max() < 1e-2
