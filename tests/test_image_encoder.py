"""Laws of the image encoder: maps lie where they say, weights are trained or named, files are loaded whole or not."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from simipu3d.compat import import_timm
from simipu3d.config import parse_block
from simipu3d.encoders.image import BatchNorm, ImageEncoder, ImageEncoderConfig
from simipu3d.encoders.image_levels import Level, find_level
from simipu3d.errors import UserError


def encoder(map=-1, **block) -> ImageEncoder:
    block = {"name": "resnet18", "model_args": {"channels": [8, 16, 24, 32], "stem_width": 8}, **block}
    if block["name"] != "resnet18":
        block["model_args"] = block["model_args"] if "channels" not in block["model_args"] else {}
    return ImageEncoder(parse_block("image_encoder", ImageEncoderConfig, {"map": map, **block}))


BACKBONES = [
    ({}, -1),
    ({}, 8),
    ({"output_stride": 8}, 8),
    ({"neck": "top_down", "neck_channels": 12}, 8),
    ({"neck": "top_down", "neck_channels": 12, "output_stride": 16}, 4),
    ({"name": "convnext_atto"}, 16),
    ({"name": "vit_tiny_patch16_224"}, -1),
    ({"name": "swin_tiny_patch4_window7_224", "model_args": {"depths": [2, 2, 2, 2]}}, 8),
    ({"name": "tf_efficientnet_b0"}, 16),
    ({"name": "hrnet_w18_small"}, 16),
]


@pytest.mark.parametrize(("block", "map"), BACKBONES)
def test_maps_are_as_described_and_every_trained_weight_gets_a_gradient(block, map):
    network = encoder(map, **block)
    height, width = 64, 96
    maps = network(torch.randn(2, 3, height, width))
    assert len(maps) == len(network.maps)
    for given, level in zip(maps, network.maps, strict=True):
        assert given.features.shape == (2, level.channels, height // level.stride, width // level.stride)
        assert (given.stride, given.offset) == (level.stride, level.offset)
    if map > 0:
        assert maps[-1].stride == map
    maps[-1].features.square().sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
        else:
            assert name.removeprefix("trunk.") in network.untrained, name


def gradient_energy(features, images, cell, *, draws=3):
    """(W,) how strongly each input column moves a cell, summed over random directions."""
    energy = torch.zeros(images.shape[-1])
    for _ in range(draws):
        total = (features[:, :, cell, cell] * torch.randn(features.shape[:2])).sum()
        (gradient,) = torch.autograd.grad(total, images, retain_graph=True)
        energy += gradient.square().sum((0, 1, 2))
    return energy


@pytest.mark.parametrize(
    ("block", "offsets"),
    [
        ({}, [0, 0, 0, 0, 0]),
        ({"output_stride": 8}, [0, 0, 0, 0, 0]),
        ({"name": "convnext_atto"}, [1.5, 3.5, 7.5, 15.5]),
        ({"name": "vit_tiny_patch16_224"}, [7.5]),
        ({"name": "swin_tiny_patch4_window7_224", "model_args": {"depths": [2, 2, 2, 2]}}, [1.5, 3.5, 7.5, 15.5]),
        ({"name": "tf_efficientnet_b0"}, [1, 3, 7, 15, 31]),
        ({"name": "pvt_v2_b0"}, [0, 0, 0, 0]),
    ],
)
def test_a_cell_looks_at_the_pixels_around_its_offset(block, offsets):
    """The energy of a cell's gradient is centred on offset + stride * cell (random weights have no preferred side)."""
    network = encoder(**block).eval()
    size = 192
    images = torch.randn(2, 3, size, size, requires_grad=True)
    columns = torch.arange(size)
    for given, offset in zip(network(images), offsets, strict=True):
        cell = given.features.shape[-1] // 2
        energy = gradient_energy(given.features, images, cell)
        centre = given.offset + given.stride * cell
        near = (columns - centre).abs() <= min(centre, size - 1 - centre)
        measured = (energy * columns)[near].sum() / energy[near].sum() - given.stride * cell
        assert abs(measured - given.offset) < 0.15 * given.stride + 0.3
        assert given.offset == offset


@pytest.mark.parametrize("block", [{}, {"name": "convnext_atto"}])
def test_moving_the_image_by_a_stride_moves_the_map_by_a_cell(block):
    network = encoder(8, **block).eval()
    wide = torch.randn(1, 3, 32, 520)
    with torch.no_grad():
        here, there = (network(wide[..., start : start + 512])[-1].features for start in (0, 8))
    torch.testing.assert_close(here[..., 21:-20], there[..., 20:-21], rtol=1e-4, atol=1e-5)


def test_a_batch_gives_what_its_images_give_one_by_one():
    network = encoder().eval()
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        together = network(images)
        for index in range(3):
            for batch, single in zip(together, network(images[index : index + 1]), strict=True):
                torch.testing.assert_close(batch.features[index : index + 1], single.features, rtol=1e-4, atol=1e-5)


def test_no_image_gives_empty_maps_and_leaves_statistics_alone():
    network = encoder(8, neck="top_down")
    before = copy.deepcopy(network.state_dict())
    for given, level in zip(network(torch.zeros(0, 3, 64, 96)), network.maps, strict=True):
        assert given.features.shape == (0, level.channels, 64 // level.stride, 96 // level.stride)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("convention", ["imagenet_rgb", "caffe_bgr"])
def test_normalise_follows_its_convention_and_pads_with_zeros(convention):
    network = encoder(8, input=convention)
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    size = torch.tensor([[32, 64], [20, 33]])
    normal = network.normalise(images, size)
    assert normal.dtype == torch.float32
    assert normal[1, :, 20:].abs().max() == 0
    assert normal[1, :, :, 33:].abs().max() == 0
    red, green, blue = (images[1, channel, 19, 32].item() for channel in range(3))
    if convention == "imagenet_rgb":
        by_hand = [(red / 255 - 0.485) / 0.229, (green / 255 - 0.456) / 0.224, (blue / 255 - 0.406) / 0.225]
    else:
        by_hand = [blue - 103.530, green - 116.280, red - 123.675]
    torch.testing.assert_close(normal[1, :, 19, 32], torch.tensor(by_hand), rtol=1e-5, atol=1e-5)
    assert "mean" not in network.state_dict()
    assert "std" not in network.state_dict()


def test_map_is_a_stride_or_an_index_from_the_end():
    levels = [Level(4, 1, 0.0), Level(8, 2, 0.0), Level(8, 3, 0.0), Level(16, 4, 0.0)]
    assert [find_level(levels, m) for m in (4, 8, 16, -1, -4)] == [0, 2, 3, 3, 0]
    for wrong in (0, 3, 32, -5):
        with pytest.raises(UserError, match=r"image_encoder\.map.*4, 8, 16"):
            find_level(levels, wrong)


def test_stages_behind_the_matched_map_are_not_built_and_are_named():
    whole, short = encoder(-1), encoder(8)
    kept = {name for name in whole.trunk.state_dict() if not name.startswith(("layer3", "layer4"))}
    assert set(short.trunk.state_dict()) == kept
    assert set(short.untrained) == set(whole.trunk.state_dict()) - kept
    assert whole.untrained == ()


@pytest.mark.parametrize(
    ("block", "map", "message"),
    [
        ({"name": "resnet5O"}, -1, "resnet50"),
        ({"name": "resnet50.a1_in1k"}, -1, "without tag"),
        ({"name": "hf-hub:timm/resnet18"}, -1, "no architecture"),
        ({"model_args": {"pretrained": True}}, -1, r"model_args\.pretrained"),
        ({"model_args": {"chanels": [1]}}, -1, "cannot build"),
        ({"name": "vit_tiny_patch16_224", "output_stride": 8}, -1, "cannot build|output_stride"),
        ({"name": "maxvit_tiny_tf_224"}, -1, "does not take images of any size"),
        ({"name": "convnext_atto", "norm": "sync_bn"}, -1, r"image_encoder\.norm.*no BatchNorm"),
        ({"name": "convnext_atto", "bn_eps": 1e-3}, -1, r"image_encoder\.bn_eps"),
        ({"neck": "top_down"}, -1, r"image_encoder\.neck"),
        ({"name": "vit_tiny_patch16_224", "neck": "top_down"}, -4, r"image_encoder\.neck.*one stride"),
        ({}, 64, r"image_encoder\.map"),
        ({"frozen_stages": 4}, 8, r"frozen_stages: only 3"),
    ],
)
def test_what_a_user_can_get_wrong_is_said_in_one_line(block, map, message):
    with pytest.raises(UserError, match=message):
        encoder(map, **block)


# ------------------------------------------------------------------------------------------------ freezing, norms, init


@pytest.mark.parametrize("stages", [1, 2])
def test_frozen_stages_keep_weights_and_statistics_also_after_train(stages):
    network = copy.deepcopy(encoder(frozen_stages=stages, init="torch_default")).eval().train()
    frozen = ("conv1", "bn1") if stages == 1 else ("conv1", "bn1", "layer1")
    before = copy.deepcopy(network.trunk.state_dict())
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network(torch.randn(2, 3, 64, 64))[-1].features.square().sum().backward()
    optimizer.step()
    for name, value in network.trunk.state_dict().items():
        assert torch.equal(before[name], value) == name.startswith(frozen), name


def test_frozen_norm_trains_convolutions_only():
    network = encoder(norm="frozen").train()
    before = copy.deepcopy(network.trunk.state_dict())
    network(torch.randn(2, 3, 64, 64))[-1].features.square().sum().backward()
    for module in network.trunk.modules():
        for parameter in module.parameters(recurse=False):
            assert (parameter.grad is None) == isinstance(module, BatchNorm)
    assert all(torch.equal(before[name], value) for name, value in network.trunk.state_dict().items())


def test_sync_bn_is_plain_on_a_cpu_and_keeps_all_names_on_cuda(caplog):
    network = encoder(norm="sync_bn", frozen_stages=1)
    names = list(network.state_dict())
    with caplog.at_level(logging.INFO, "simipu3d.encoders"):
        network.sync_norms("cpu")
    assert "plain BatchNorm" in caplog.text
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    network.sync_norms("cuda")
    norms = [module for module in network.modules() if isinstance(module, BatchNorm)]
    assert norms
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    assert list(network.state_dict()) == names
    assert not network.train().trunk.bn1.training
    assert network.trunk.layer1[0].bn1.training


def test_torch_default_init_and_batchnorm_settings():
    """Released: convolutions uniform within 1 / sqrt(fan in), BatchNorm weights 1, eps and momentum as set."""
    network = encoder(init="torch_default", bn_eps=1e-3, bn_momentum=0.01)
    for module in network.trunk.modules():
        if isinstance(module, nn.Conv2d):
            bound = (module.in_channels * module.kernel_size[0] * module.kernel_size[1]) ** -0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound
        elif isinstance(module, BatchNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
            assert (module.eps, module.momentum) == (1e-3, 0.01)
    assert any((module.weight == 0).all() for module in encoder().trunk.modules() if isinstance(module, BatchNorm))


# ------------------------------------------------------------------------------------------------------ pretrained


@pytest.fixture
def weights():
    """Random trunk weights of the small ResNet-18, with a classifier."""
    state = {name: value.clone() for name, value in encoder().trunk.state_dict().items()}
    for value in state.values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return {**state, "fc.weight": torch.zeros(10, 32), "fc.bias": torch.zeros(10)}


@pytest.mark.parametrize("prefix", ["", "backbone.", "img_backbone.", "module.encoder_q."])
@pytest.mark.parametrize("nesting", [None, "state_dict", "model", "model_state", "safetensors"])
def test_pretrained_weights_arrive_whatever_stands_round_them(tmp_path, weights, prefix, nesting):
    state = {prefix + name: value for name, value in weights.items()} | {"other_head.weight": torch.zeros(3)}
    if nesting == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(state, path)
    else:
        path = tmp_path / "w.pth"
        torch.save({nesting: state, "epoch": 3} if nesting else state, path)
    network = encoder(pretrained=str(path))
    for name, value in network.trunk.state_dict().items():
        assert torch.equal(value, weights[name]), name
    report = network.load_report
    assert report.prefix == prefix
    assert set(report.loaded) == set(network.trunk.state_dict())
    assert report.classifier == (prefix + "fc.bias", prefix + "fc.weight")
    assert report.left_over == ("other_head.weight",)


def test_pretrained_stages_that_do_not_run_are_left_over_and_counters_may_be_missing(tmp_path, weights):
    kept = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "w.pth")
    report = encoder(8, pretrained=str(tmp_path / "w.pth")).load_report
    assert report.left_over
    assert all(name.startswith(("layer3", "layer4")) for name in report.left_over)
    assert report.not_in_file
    assert all(name.endswith("num_batches_tracked") for name in report.not_in_file)


def spoil(weights, how):
    state = dict(weights)
    if how == "missing":
        del state["layer4.1.bn2.running_var"]
    elif how == "shape":
        state["layer2.0.conv1.weight"] = torch.zeros(3, 3, 3, 3)
    elif how == "deeper":
        state["layer3.5.conv1.weight"] = torch.zeros(24, 24, 3, 3)
    elif how == "twice":
        state = {f"{side}.{name}": value for side in ("left", "right") for name, value in weights.items()}
    elif how == "nothing":
        state = {"pts_backbone.a": torch.zeros(3)}
    elif how == "nan":
        state["conv1.weight"] = torch.full_like(state["conv1.weight"], float("nan"))
    elif how == "no tensors":
        state = {"epoch": 3}
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing: layer4\.1\.bn2\.running_var"),
        ("shape", r"another shape.*layer2\.0\.conv1\.weight"),
        ("deeper", r"another network there: deeper, by layer3\.5"),
        ("twice", "2 times, under 'left.', 'right.'"),
        ("nothing", "this network finds 0 of 63 trainable tensors"),
        ("nan", "NaN"),
        ("no tensors", "no named tensors"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, weights, how, message):
    torch.save(spoil(weights, how), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as caught:
        encoder(pretrained=str(tmp_path / "w.pth"))
    assert "image_encoder.pretrained" in str(caught.value)
    assert "w.pth" in str(caught.value)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_missing_damaged_and_dangerous_files_give_one_line(tmp_path, weights, name):
    path = tmp_path / name
    with pytest.raises(UserError, match="no such file"):
        encoder(pretrained=str(path))
    torch.save(weights, path) if name == "w.pth" else save_file(weights, path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            encoder(pretrained=str(path))
    if name == "w.pth":
        torch.save({"state_dict": weights, "extra": Bomb(tmp_path / "boom")}, path)
        with pytest.raises(UserError, match="never executed"):
            encoder(pretrained=str(path))
        assert not (tmp_path / "boom").exists()


# ---------------------------------------------------------------------------------------------------------- compat


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_compat_does_nothing_at_import_and_declares_only_what_is_needed():
    code = """
import sys, simipu3d.compat as compat, torch
assert "torchvision" not in sys.modules and "timm" not in sys.modules and compat._declared == []
timm = compat.import_timm()
assert compat.import_timm() is timm and compat.import_torchvision() is sys.modules["torchvision"]
assert len(compat._declared) <= 1
assert timm.create_model("resnet18", num_classes=0)(torch.zeros(1, 3, 64, 64)).shape == (1, 512)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_compat_leaves_a_torchvision_that_imports_alone():
    code = """
import sys, types, simipu3d.compat as compat
sys.modules["torchvision"] = fake = types.ModuleType("torchvision")
assert compat.import_torchvision() is fake and compat._declared == []
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_trunk_names_are_timms():
    timm = import_timm()
    assert list(encoder(model_args={}).trunk.state_dict()) == list(
        timm.create_model("resnet18", num_classes=0).state_dict()
    )
