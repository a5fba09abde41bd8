"""How do weights trained one way compute the same where the target fixes another way?

Three things are not in the names of weights: the input's normalisation, BatchNorm's eps, and what the target's layout
puts before the names. Everything here works on copies. Shapes are those of a backbone's state dict in timm's names.
"""

import torch
from torch import Tensor

from simipu3d.weights.folding import fold_bias, fold_eps, fold_input, norm_eps

__all__ = ["add_prefix", "fold_bias", "fold_eps", "fold_input", "norm_eps", "plain_copy"]


def plain_copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files want them: on the CPU, contiguous, on their own storage, float32 (counters int64).

    Half precision becomes float32 exactly.
    """
    copies = {}
    for name, value in state.items():
        dtype = torch.float32 if value.is_floating_point() else torch.int64
        copies[name] = value.detach().to("cpu", dtype, copy=True).contiguous()
    return copies


def add_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors under longer names."""
    return {prefix + name: value for name, value in state.items()}
