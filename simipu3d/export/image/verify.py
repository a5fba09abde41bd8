"""Does the written file give the target the features that were trained?

Nothing here uses what wrote the file: it is read back from disk, the target's network is built by torchvision or
timm, the pictures are normalised by the target's own rule, and the outputs are compared with the pre-training
network's.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simipu3d.compat import import_timm, import_torchvision
from simipu3d.encoders.image import ImageEncoder
from simipu3d.encoders.image_levels import forward_levels
from simipu3d.errors import UserError
from simipu3d.weights.files import some_names

TOLERANCE = 1e-4
"""Largest difference allowed, relative to a map's largest value; 3e-6 was measured for ResNet-50."""
ODD_SIZE = (97, 131)
"""Height and width of the pictures: odd, so that a stride in the wrong place shows. Where a backbone needs whole patches
they are rounded up to them, as the user of a plain timm model has to do."""


class ExportError(UserError):
    """The exported file did not pass; no file is left."""


def fixed_pictures(encoder: ImageEncoder, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Two pseudo-random pictures, always the same, the second one smaller and padded: (2, 3, H, W) uint8 and (2, 2)
    sizes."""
    own = tuple(-(-edge // encoder.pad_multiple) * encoder.pad_multiple for edge in ODD_SIZE)
    height, width = size or own
    images = torch.randint(
        0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(20), dtype=torch.uint8
    )
    image_size = torch.tensor([[height, width], [height - 21, width - 34]])
    images[1, :, height - 21 :] = 0
    images[1, :, :, width - 34 :] = 0
    return images, image_size


def target_input(images: Tensor, image_size: Tensor, convention: str) -> Tensor:
    """The pictures as a user of the target feeds them: padded after normalisation, with zeros."""
    batch = []
    for image, (height, width) in zip(images, image_size.tolist(), strict=True):
        picture = image[:, :height, :width].float()
        if convention == "imagenet_rgb":
            mean = torch.tensor([0.485, 0.456, 0.406])
            std = torch.tensor([0.229, 0.224, 0.225])
            picture = (picture / 255 - mean[:, None, None]) / std[:, None, None]
        else:
            picture = picture[[2, 1, 0]] - torch.tensor([103.530, 116.280, 123.675])[:, None, None]
        batch.append(nn.functional.pad(picture, (0, images.shape[3] - width, 0, images.shape[2] - height)))
    return torch.stack(batch)


def load_every_tensor(target: nn.Module, tensors: dict[str, Tensor], may_miss: Iterable[str]) -> None:
    """Load a file's tensors into the target's network and see that every one arrived.

    Raises:
        ExportError: a name is unknown to the target, one is missing, or a tensor is not as it stands in the file.
    """
    try:
        missing, unexpected = target.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ExportError(f"the target refuses the weights: {error}") from error
    lost = sorted(set(missing) - set(may_miss))
    if lost or unexpected:
        raise ExportError(
            f"the names do not fit the target; missing: {some_names(lost)}; unknown to it: {some_names(unexpected)}"
        )
    arrived = target.state_dict()
    differs = [name for name, value in tensors.items() if not torch.equal(arrived[name], value)]
    if differs:
        raise ExportError(f"tensors changed on their way into the target: {some_names(differs)}")


def same_tensors(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise ExportError unless both hold the same names with the same values."""
    names = {*given, *wanted}
    differs = [n for n in names if n not in given or n not in wanted or not torch.equal(given[n], wanted[n])]
    if differs:
        raise ExportError(f"these tensors are not as they were written: {some_names(sorted(differs))}")


def torchvision_resnet(name: str) -> Any:
    """torchvision's ResNet, freshly initialised, in eval mode."""
    return getattr(import_torchvision().models, name)(weights=None).eval()


def resnet_levels(network: Any, images: Tensor) -> list[Tensor]:
    """Stem and the four stages of torchvision's ResNet, which has no types."""
    features = network.relu(network.bn1(network.conv1(images)))
    maps = [features]
    features = network.maxpool(features)
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        features = stage(features)
        maps.append(features)
    return maps


def check_deeplab_names(name: str, tensors: dict[str, Tensor], may_miss: Iterable[str]) -> None:
    """See that torchvision's DeepLabV3, as OpenPCDet builds it, has every `backbone.*` tensor under its name and shape.

    Raises:
        ExportError: a name or shape that it does not have.
    """
    with torch.device("meta"):
        models = import_torchvision().models.segmentation
        network = getattr(models, f"deeplabv3_{name}")(weights=None, weights_backbone=None, num_classes=21)
    expected = network.state_dict()
    wrong = [n for n, value in tensors.items() if n not in expected or expected[n].shape != value.shape]
    may_miss = {f"backbone.{n}" for n in may_miss}
    lost = [n for n in expected if n.startswith("backbone.") and n not in tensors and n not in may_miss]
    if wrong or lost:
        raise ExportError(f"DeepLabV3 lacks or shapes otherwise {some_names(wrong)}; the file lacks {some_names(lost)}")


def timm_levels(
    folder: Path, extra: dict[str, Any], encoder: ImageEncoder, tensors: dict[str, Tensor]
) -> Callable[[Tensor], list[Tensor]]:
    """timm's own model from the exported folder, as the function from pictures to levels.

    Args:
        folder: the export.
        extra: arguments that a user gives beside the folder (dilation, images of any size).
        encoder: the pre-training side, for the numbering of the levels.
        tensors: what the folder's weights file holds.

    Raises:
        ExportError: timm refuses the folder, or a tensor of the file did not arrive.
    """
    timm = import_timm()
    try:
        network = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, **extra).eval()
    except (AssertionError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"timm does not load the folder: {error}") from error
    same_tensors(network.state_dict(), tensors)
    return lambda images: forward_levels(network, images, encoder.level_indices)


def largest_difference(wanted: Tensor, given: Tensor, what: str) -> float:
    """Largest difference of two outputs, relative to the largest value.

    Args:
        wanted: of the pre-training network.
        given: of the target's network.
        what: the output, for errors.

    Raises:
        ExportError: another shape, constant zero, or a difference of more than `TOLERANCE`.
    """
    if wanted.shape != given.shape:
        raise ExportError(f"{what}: {tuple(wanted.shape)} came out as {tuple(given.shape)}")
    scale = wanted.abs().max().item()
    if scale == 0:
        raise ExportError(f"{what} is zero everywhere, so nothing can be compared")
    difference = (wanted - given).abs().max().item() / scale
    if not difference <= TOLERANCE:  # NaN fails too
        raise ExportError(f"{what} differs by {difference:.2g} of its maximum (allowed {TOLERANCE:g})")
    return difference


def compare_features(
    encoder: ImageEncoder,
    target: Callable[[Tensor], list[Tensor]],
    convention: str,
    count: int | None = None,
    size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Same pictures through the pre-training network and through the exported one.

    Args:
        encoder: the pre-training side, eval mode.
        target: pictures as the target wants them to maps, finest first; at least the encoder's levels.
        convention: the target's normalisation.
        count: how many of the maps; None: all.
        size: height and width of the pictures; None: odd ones, where the encoder takes them.

    Returns:
        What was compared and the largest difference, plain values for the metadata.

    Raises:
        ExportError: a map has another shape, is constant zero, or differs by more than `TOLERANCE`.
    """
    images, image_size = fixed_pictures(encoder, size)
    with torch.no_grad():
        trained = encoder(encoder.normalise(images, image_size))[: count or len(encoder.level_indices)]
        exported = target(target_input(images, image_size, convention))[: len(trained)]
    worst = 0.0
    for wanted, given in zip(trained, exported, strict=True):
        worst = max(worst, largest_difference(wanted.features, given, f"the map of stride {wanted.stride}"))
    return {
        "compared": "feature maps of the pre-training network and of the file read back into the target's network",
        "picture_size": list(images.shape[2:]),
        "strides": [level.stride for level in trained],
        "largest_relative_difference": worst,
        "tolerance": TOLERANCE,
    }
