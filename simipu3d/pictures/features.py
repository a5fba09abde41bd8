"""What does a feature map look like, and which class is where?

Shapes: I images, C channels, a map of Hf x Wf cells.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from simipu3d.pictures.canvas import Picture
from simipu3d.pictures.colours import id_colours


def features_as_colours(maps: Sequence[Tensor]) -> list[NDArray[np.uint8]]:
    """The three strongest common directions of several feature maps as red, green and blue.

    All maps are shown with the same directions and the same ranges, so equal colours mean equal features, also between
    maps. Each map is first freed of its own mean and overall size: those of two networks differ by more than anything
    within one of them. A direction's sign is fixed by its projections (positive third moment), so turning or mirroring
    the feature space changes no colour.

    Args:
        maps: (C, Hf, Wf), or (I, C, Hf, Wf) for several images of one network; sizes may differ, C may not.

    Returns:
        For each map (Hf, Wf, 3) or (I, Hf, Wf, 3) uint8. Directions without variance stay grey.

    Raises:
        ValueError: no maps, or maps with different numbers of channels.
    """
    channels = {item.shape[-3] for item in maps}
    if len(channels) != 1:
        raise ValueError(f"maps that share their colours need one number of channels, got {sorted(channels)}")
    rows = [np.moveaxis(item.detach().cpu().double().numpy(), -3, -1) for item in maps]
    flat = [_centred(item.reshape(-1, item.shape[-1])) for item in rows]
    projected = _principal(np.concatenate(flat))
    low, high = np.percentile(projected, [1, 99], axis=0)
    spread = high - low
    shares = np.where(spread > 1e-9, (projected - low) / np.where(spread > 1e-9, spread, 1.0), 0.5)
    colours = (np.clip(shares, 0, 1) * 255).round().astype(np.uint8)
    ends = np.cumsum([len(item) for item in flat])[:-1]
    parts = np.split(colours, ends)
    return [part.reshape(*item.shape[:-1], 3) for part, item in zip(parts, rows, strict=True)]


def _centred(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, C) rows without their mean, mean squared length 1 (left at 0 where all rows are equal)."""
    features = features - features.mean(axis=0)
    size = np.sqrt((features**2).sum(axis=1).mean())
    return features / size if size > 1e-12 else np.zeros_like(features)


def _principal(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 3) projections of (n, C) centred rows on the three strongest directions, zeros where C < 3."""
    _, directions = np.linalg.eigh(features.T @ features / len(features))
    projected = features @ directions[:, ::-1][:, :3]
    projected = projected * np.where((projected**3).sum(axis=0) < 0, -1.0, 1.0)
    return np.pad(projected, ((0, 0), (0, 3 - projected.shape[1])))


def class_as_colours(pixel_class: NDArray[np.integer]) -> Picture:
    """(H, W, 3): a map of class indices (H, W) with a colour for every class; class 0 is dark grey."""
    return np.where(pixel_class[..., None] == 0, np.uint8(64), id_colours(pixel_class))
