"""How do weights trained one way compute the same where another network fixes another way?

Names and shapes of weights do not tell the input's normalisation, BatchNorm's eps, or whether a convolution in front of
a BatchNorm has a bias. Everything here works on state dicts and changes no tensor in place.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simipu3d.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Pictures(NamedTuple):
    """How pictures are fed to a network: (value - mean) / std of 0..255 values, channels in that order.

    Attributes:
        order: RGB or BGR.
        mean, std: of red, green, blue, whatever the order, in grey levels of 0..255.
    """

    order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __str__(self) -> str:
        return next((name for name, known in CONVENTIONS.items() if known == self), "") or (
            f"{self.order}, mean {_rounded(self.mean)}, std {_rounded(self.std)} (of red, green, blue in 0..255)"
        )


def _rounded(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:g}" for value in values)


CONVENTIONS = {
    "imagenet_rgb": Pictures("RGB", tuple(255 * v for v in IMAGENET_MEAN), tuple(255 * v for v in IMAGENET_STD)),
    "caffe_bgr": Pictures("BGR", tuple(255 * v for v in IMAGENET_MEAN), (1.0, 1.0, 1.0)),
}
"""255 * ImageNet's mean is (123.675, 116.28, 103.53), so that one is a scale and a reversal of the other."""
_SAME_MEAN = 1e-3
"""Grey levels by which two means may differ and count as equal."""


def fold_input(state: dict[str, Tensor], first_conv: str, source: str, target: str) -> dict[str, Tensor]:
    """`fold_pictures` between two of `CONVENTIONS`: exact, and zero padding stays zero."""
    return fold_pictures(state, first_conv, CONVENTIONS[source], CONVENTIONS[target])


def fold_pictures(
    state: dict[str, Tensor], first_conv: str, source: Pictures, target: Pictures, *, pads: bool = True
) -> dict[str, Tensor]:
    """Make the first convolution expect another normalisation of the input.

    Args:
        state: tensors by name.
        first_conv: name of the first convolution.
        source, target: as trained and as wanted.
        pads: whether the convolution pads its input with zeros. Another mean cannot be folded then: 0 is another colour.

    Raises:
        UserError: the means differ and the convolution pads, or has no bias that could take the difference up.
    """
    if source == target:
        return state
    name = f"{first_conv}.weight"
    given, wanted = (torch.tensor(p.std, dtype=torch.float64).view(1, 3, 1, 1) for p in (source, target))
    weight = state[name].double()
    weight = weight.flip(1) if source.order == "BGR" else weight
    folded = {**state}
    move = torch.tensor(target.mean, dtype=torch.float64) - torch.tensor(source.mean, dtype=torch.float64)
    if move.abs().max() > _SAME_MEAN:
        if pads or f"{first_conv}.bias" not in state:
            raise UserError(
                f"weights for pictures with another mean ({source}; this run has {target}) cannot be folded exactly: "
                f"{first_conv} pads with zeros, or has no bias; state image_encoder.weights.mean as this run's if the "
                "difference may be neglected"
            )
        offset = (weight / given * move.view(1, 3, 1, 1)).sum((1, 2, 3))
        folded[f"{first_conv}.bias"] = (state[f"{first_conv}.bias"].double() + offset).float()
    weight = weight * wanted / given
    folded[name] = (weight.flip(1) if target.order == "BGR" else weight).contiguous().float()
    return folded


def fold_eps(
    state: dict[str, Tensor], trained: Mapping[str, float], wanted: Mapping[str, float], *, rescale: bool = False
) -> dict[str, Tensor]:
    """Add (eps trained - eps wanted) to every running variance, so that its sum with eps stays.

    Args:
        state: tensors by name.
        trained, wanted: eps by BatchNorm name.
        rescale: where a variance is too small for it, set it to 0 and enlarge the BatchNorm's weight instead; exact with
            running statistics, near it when statistics are of the batch.

    Raises:
        UserError: a variance is smaller than the eps it would have to give up, and `rescale` is not set.
    """
    folded = dict(state)
    for name, eps in trained.items():
        difference = eps - wanted[name]
        if not difference:
            continue
        old = state[f"{name}.running_var"].double()
        variance = old + difference
        if (variance < 0).any():
            if not rescale:
                raise UserError(f"{name}: a running variance is too small to move its eps from {eps} to {wanted[name]}")
            variance = variance.clamp(min=0)
            gain = ((variance + wanted[name]) / (old + eps)).sqrt()
            folded[f"{name}.weight"] = (state[f"{name}.weight"].double() * gain).float()
        folded[f"{name}.running_var"] = variance.float()
    return folded


def fold_bias(state: dict[str, Tensor], conv: str, norm: str) -> dict[str, Tensor]:
    """Take the bias of a convolution into the running mean of the BatchNorm behind it, and drop it."""
    folded = dict(state)
    bias = folded.pop(f"{conv}.bias")
    folded[f"{norm}.running_mean"] = (state[f"{norm}.running_mean"].double() - bias.double()).float()
    return folded


def norm_eps(module: nn.Module) -> dict[str, float]:
    """eps of every BatchNorm, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: part.eps for name, part in module.named_modules() if isinstance(part, kind)}
