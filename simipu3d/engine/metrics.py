"""How do a run's numbers come together? Means over batches and processes, and one readable line."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def average(parts: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """One number a name from several batches or processes.

    Args:
        parts: each one's numbers and its frames. What is a mean over rows (`<task>_loss`, `_ceiling`, `_top1`) is weighted
            by `<task>_rows`, a name that ends in `_max` stays a maximum, all others are weighted by frames.
    """
    result = {}
    for name in dict.fromkeys(name for metrics, _ in parts for name in metrics):
        own = [(metrics, frames) for metrics, frames in parts if name in metrics]
        values = torch.tensor([metrics[name] for metrics, _ in own], dtype=torch.float32)
        task, _, what = name.rpartition("_")
        if name.endswith("_max"):
            result[name] = float(values.max())
        elif what in ("loss", "ceiling", "top1") and f"{task}_rows" in own[0][0]:
            result[name] = _weighted(values, [metrics[f"{task}_rows"] for metrics, _ in own])
        elif len({frames for _, frames in own}) == 1:
            result[name] = float(values.mean())
        else:
            result[name] = _weighted(values, [frames for _, frames in own])
    return result


def _weighted(values: Tensor, weights: Sequence[float]) -> float:
    own = torch.tensor(weights, dtype=torch.float32)
    return float((values * own).sum() / own.sum().clamp(min=1))


def readable(metrics: Mapping[str, float]) -> list[str]:
    """Every `<task>_loss` with its ceiling and top-1 where there are such, in words; the sum alone where there is no task,
    and whatever a benchmark's score says."""
    parts = []
    for name, loss in metrics.items():
        task = name.removesuffix("_loss")
        if task == name:
            continue
        ceiling, top1 = metrics.get(f"{task}_ceiling"), metrics.get(f"{task}_top1")
        parts.append(
            f"{task} {loss:.3f}"
            + ("" if ceiling is None else f" of {ceiling:.2f}")
            + ("" if top1 is None else f" (top-1 {top1:.1%})")
        )
    if not parts and "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.3f}")
    return parts + [
        f"{name.removeprefix('score_')} {metrics[name]:.3f}" for name in metrics if name.startswith("score_")
    ]
