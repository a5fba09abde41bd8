"""How do weights trained one way compute the same where the target fixes another way?

Three things are not in the names of weights: the input's normalisation, BatchNorm's eps, and what the target's layout
puts before the names. Everything here works on copies. Shapes are those of a backbone's state dict in timm's names.
"""

import torch
from torch import Tensor, nn

from simipu3d.encoders.image import IMAGENET_STD, BatchNorm
from simipu3d.errors import UserError


def plain_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files want them: on the CPU, contiguous, on their own storage, float32 (counters int64).

    Half precision becomes float32 exactly.
    """
    copies = {}
    for name, value in state.items():
        dtype = torch.float32 if value.is_floating_point() else torch.int64
        copies[name] = value.detach().to("cpu", dtype, copy=True).contiguous()
    return copies


def fold_input(state: dict[str, Tensor], first_conv: str, source: str, target: str) -> dict[str, Tensor]:
    """Make the first convolution expect another normalisation of the input.

    BGR in 0..255 minus (103.53, 116.28, 123.675) is, channel by channel reversed, 255 * std times RGB normalised by
    ImageNet's mean and std, because 255 * mean are the same numbers: a scale and a reversal, exact, and zero padding
    stays zero.

    Args:
        state: plain copies.
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


def fold_eps(state: dict[str, Tensor], trained: dict[str, float], wanted: dict[str, float]) -> dict[str, Tensor]:
    """Add (eps trained - eps wanted) to every running variance, so that its sum with eps stays.

    Args:
        state: plain copies.
        trained, wanted: eps by BatchNorm name.

    Raises:
        UserError: a variance is smaller than the eps it would have to give up.
    """
    folded = dict(state)
    for name, eps in trained.items():
        difference = eps - wanted[name]
        if difference:
            variance = state[f"{name}.running_var"].double() + difference
            if (variance < 0).any():
                raise UserError(f"{name}: a running variance is too small to move its eps from {eps} to {wanted[name]}")
            folded[f"{name}.running_var"] = variance.float()
    return folded


def norm_eps(module: nn.Module) -> dict[str, float]:
    """eps of every BatchNorm, by name."""
    return {name: part.eps for name, part in module.named_modules() if isinstance(part, BatchNorm)}


def add_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors under longer names."""
    return {prefix + name: value for name, value in state.items()}
