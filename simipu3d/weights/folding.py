"""How do weights trained one way compute the same where another network fixes another way?

Names and shapes of weights do not tell the input's normalisation, BatchNorm's eps, or whether a convolution in front of
a BatchNorm has a bias. Everything here works on state dicts and changes no tensor in place.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simipu3d.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def fold_input(state: dict[str, Tensor], first_conv: str, source: str, target: str) -> dict[str, Tensor]:
    """Make the first convolution expect another normalisation of the input.

    BGR in 0..255 minus (103.53, 116.28, 123.675) is, channel by channel reversed, 255 * std times RGB normalised by
    ImageNet's mean and std, because 255 * mean are the same numbers: a scale and a reversal, exact, and zero padding
    stays zero.

    Args:
        state: tensors by name.
        first_conv: name of the first convolution.
        source, target: `imagenet_rgb` or `caffe_bgr`, as trained and as wanted.
    """
    if source == target:
        return state
    name = f"{first_conv}.weight"
    scale = 255 * torch.tensor(IMAGENET_STD, dtype=torch.float64).view(1, 3, 1, 1)  # RGB order
    weight = state[name].double()
    weight = weight.flip(1) * scale if source == "caffe_bgr" else (weight / scale).flip(1)
    return {**state, name: weight.float()}


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
