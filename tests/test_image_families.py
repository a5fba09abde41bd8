"""Laws that every family of image backbones keeps: ResNet, ConvNeXt, Swin, ViT with DINOv2's patches of 14 pixels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import batch_of, small_method

from simipu3d.compat import import_timm
from simipu3d.config import parse_block
from simipu3d.encoders.image import BatchNorm, ImageEncoder, ImageEncoderConfig
from simipu3d.errors import UserError

FAMILIES = {
    "resnet18": {"name": "resnet18", "model_args": {"channels": [8, 12, 16, 24], "stem_width": 8}},
    "resnet101": {"name": "resnet101", "model_args": {"channels": [8, 8, 8, 8], "layers": [1, 1, 2, 1]}},
    "convnext": {"name": "convnext_atto", "model_args": {"depths": [1, 1, 2, 1], "dims": [8, 16, 24, 32]}},
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "model_args": {"depths": [2, 2, 2, 2], "embed_dim": 12, "num_heads": [1, 2, 2, 2]},
    },
    "vit": {"name": "vit_tiny_patch16_224", "model_args": {"depth": 3, "embed_dim": 24, "num_heads": 2}},
    "dinov2": {
        "name": "vit_small_patch14_dinov2",
        "model_args": {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 56},
    },
}
OFFSETS = {"resnet18": 0, "resnet101": 0, "convnext": 15.5, "swin": 15.5, "vit": 7.5, "dinov2": 6.5}
EVERY = pytest.mark.parametrize("family", FAMILIES)


def encoder(family: str, map: int = -1, **block) -> ImageEncoder:
    torch.manual_seed(1)
    return ImageEncoder(parse_block("image_encoder", ImageEncoderConfig, {**FAMILIES[family], "map": map, **block}))


@EVERY
def test_a_cell_looks_at_the_pixels_around_its_offset_in_images_of_any_size(family):
    """The gradient of a cell is centred on offset + stride * cell, (patch - 1) / 2 for cell 0 of patches, also where the
    size is no multiple of anything and the encoder pads."""
    network = encoder(family).eval()
    images = torch.randn(2, 3, 187, 201, requires_grad=True)
    given = network(images)[-1]
    assert given.offset == OFFSETS[family]
    assert given.features.shape[2:] == (-(-187 // given.stride), -(-201 // given.stride))
    for axis, size in ((2, 187), (3, 201)):
        cell = size // given.stride // 2
        middle = given.features.shape[5 - axis] // 2
        row, column = (cell, middle) if axis == 2 else (middle, cell)
        places = torch.arange(size)
        energy = torch.zeros(size)
        for _ in range(6):
            total = (given.features[:, :, row, column] * torch.randn(given.features.shape[:2])).sum()
            (gradient,) = torch.autograd.grad(total, images, retain_graph=True)
            energy += gradient.square().sum(tuple(d for d in range(4) if d != axis))
        centre = given.offset + given.stride * cell
        near = (places - centre).abs() <= min(centre, size - 1 - centre)
        measured = (energy * places)[near].sum() / energy[near].sum()
        assert abs(measured - centre) < 0.15 * given.stride + 0.3


@EVERY
def test_what_the_encoder_pads_is_what_a_user_would_pad(family):
    network = encoder(family).eval()
    images = torch.randn(1, 3, 75, 101)
    multiple = network.pad_multiple
    assert multiple == {"resnet18": 1, "resnet101": 1, "vit": 16, "dinov2": 14}.get(family, 32)
    padded = F.pad(images, (0, -101 % multiple, 0, -75 % multiple))
    with torch.no_grad():
        assert torch.equal(network(images)[-1].features, network(padded)[-1].features)


@EVERY
def test_images_of_several_sizes_share_a_batch(family):
    """An image gives in a batch what it gives alone, padded as in the batch."""
    network = encoder(family).eval()
    sizes = torch.tensor([[100, 90], [64, 101], [31, 47]])
    images = torch.randint(0, 256, (3, 3, 100, 101), dtype=torch.uint8)
    with torch.no_grad():
        together = network(network.normalise(images, sizes))[-1].features
        for i in range(3):
            alone = network(network.normalise(images[i : i + 1], sizes[i : i + 1]))[-1].features
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["resnet18", "convnext"])
def test_convolutions_see_the_padding_near_the_edge_only(family):
    """Alone and unpadded, or in the corner of a large batch: equal away from the edge."""
    network = encoder(family, map=4).eval()
    image = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        alone = network(image)[-1].features
        corner = network(F.pad(image, (0, 64, 0, 32)))[-1].features[..., :24, :32]
    torch.testing.assert_close(alone[..., :-8, :-8], corner[..., :-8, :-8], rtol=1e-4, atol=1e-5)


@EVERY
@pytest.mark.parametrize("stages", [1, 2])
def test_frozen_stages_get_no_gradient_and_keep_their_statistics(family, stages):
    network = encoder(family, frozen_stages=stages).train()
    free = encoder(family)
    before = copy.deepcopy(network.trunk.state_dict())
    network(torch.randn(2, 3, 56, 64))[-1].features.square().sum().backward()
    frozen = {name for name, p in network.trunk.named_parameters() if not p.requires_grad}
    frozen -= {name for name, p in free.trunk.named_parameters() if not p.requires_grad}
    ends = {
        "resnet18": ("conv1", "bn1", "layer1."),
        "resnet101": ("conv1", "bn1", "layer1."),
        "convnext": ("stem.", "stages.0.", "stages.1."),
        "swin": ("patch_embed.", "layers.0.", "layers.1."),
    }.get(family, ("patch_embed.", "cls_token", "pos_embed", "blocks.0.", "blocks.1."))
    ends = ends if stages == 2 else ends[:-1]
    assert frozen == {name for name, _ in free.trunk.named_parameters() if name.startswith(ends)}
    for name, parameter in network.trunk.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    moved = {name for name, value in network.trunk.state_dict().items() if not torch.equal(before[name], value)}
    assert not any(name.startswith(ends) for name in moved)
    assert bool(moved) == family.startswith("resnet")


def test_all_levels_frozen_leaves_nothing_to_train():
    network = encoder("vit", frozen_stages=3)
    assert not any(parameter.requires_grad for parameter in network.parameters())


@EVERY
def test_every_trainable_weight_gets_a_gradient_through_the_method(family):
    method = small_method(image_encoder=FAMILIES[family], contrast={"dim": 8})
    method(batch_of([1, 2]))["loss"].backward()
    trained = 0
    for name, parameter in method.image_encoder.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        trained += parameter.requires_grad
        if not parameter.requires_grad:
            assert name.removeprefix("trunk.") in method.image_encoder.untrained
    assert trained > 4


@EVERY
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_gradient_checkpointing_changes_no_gradient_and_no_statistic(family, norm):
    if norm == "frozen" and not family.startswith("resnet"):
        pytest.skip("no BatchNorm")
    images = torch.randn(2, 3, 70, 84)
    found = []
    for checkpointing in (False, True):
        network = encoder(family, norm=norm, gradient_checkpointing=checkpointing, frozen_stages=1).train()
        torch.manual_seed(2)  # Swin drops paths at random
        for _ in range(2):  # twice: statistics of the first pass are counted before the second
            network(images)[-1].features.square().sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append((gradients, network.state_dict(), network.eval()(images)[-1].features))
    (plain, state, features), (checkpointed, other_state, other_features) = found
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)
    assert list(state) == list(other_state)
    assert all(torch.equal(state[name], value) for name, value in other_state.items())
    torch.testing.assert_close(features, other_features)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("crossvit_tiny_240", "crossvit_tiny_240 has a map of .* so that no stride says where a cell lies"),
        ("nest_tiny", "does not take images of any size .only 224 x 224 pixels"),
        ("inception_v3", "does not take images of any size .its windows have no padding"),
    ],
)
def test_a_backbone_whose_cells_are_nowhere_in_particular_is_refused_for_the_right_reason(name, words):
    with pytest.raises(UserError, match=words):
        ImageEncoder(parse_block("image_encoder", ImageEncoderConfig, {"name": name}))


@pytest.mark.parametrize(
    ("name", "map", "multiple"), [("mobilevitv2_050", -1, 64), ("hrnet_w18_small", 16, 32), ("hrnet_w18_small", -1, 32)]
)
def test_odd_numbers_of_cells_are_padded_where_the_backbone_needs_even_ones(name, map, multiple):
    """Otherwise it resizes inside, or its branches do not meet: cells would not lie where their number says."""
    torch.manual_seed(1)
    block = parse_block("image_encoder", ImageEncoderConfig, {"name": name, "map": map})
    network = ImageEncoder(block).eval()
    assert network.pad_multiple == multiple
    with torch.no_grad():
        given = network(torch.zeros(1, 3, 70, 5 * network.maps[-1].stride - 3))[-1]
    padded = [-(-size // multiple) * multiple for size in (70, 5 * given.stride - 3)]
    assert given.features.shape[2:] == tuple(size // given.stride for size in padded)


def test_gradient_checkpointing_is_refused_where_it_would_do_nothing(monkeypatch):
    resnet = import_timm().models.resnet.ResNet
    monkeypatch.setattr(resnet, "set_grad_checkpointing", lambda self, enable: None)
    with pytest.raises(UserError, match=r"image_encoder\.gradient_checkpointing: resnet18 has none"):
        encoder("resnet18", gradient_checkpointing=True)


def test_sync_bn_and_checkpointing_go_together():
    network = encoder("resnet18", norm="sync_bn", gradient_checkpointing=True)
    names = list(network.state_dict())
    network.sync_norms("cuda")
    assert list(network.state_dict()) == names
    assert all(isinstance(m, torch.nn.SyncBatchNorm) for m in network.modules() if isinstance(m, BatchNorm))
