"""Where does SimIPU's released code read a feature map? Its own formulae, apart from the package's.

Kept only to reproduce the release. Shapes: P token-image pairs.
"""

import torch
from torch import Tensor

from simipu3d.contracts.batch import ImageView
from simipu3d.contracts.tokens import FeatureMap
from simipu3d.matching.projection import PixelPairs


def released_coordinates(pairs: PixelPairs, images: ImageView, feature_map: FeatureMap) -> Tensor:
    """(P, 2) position on the feature map as SimIPU's released code computes it, its mistakes included.

    Pixels are scaled about 0 and mirrored as w - u; the grid 2u/W - 1 takes W from the image's own padded size though the
    batch may be padded further, and is read with align_corners. Kept only to reproduce the release.

    Source: zhyever/SimIPU, project_cl/decorator/inter_intro_decorator_moco_better.py, in our own words.
    """
    matrix = images.augmented_from_image.index_select(0, pairs.image)
    diagonal = torch.diagonal(matrix[:, :2, :2], dim1=1, dim2=2)
    scale = diagonal.abs()
    size_vu = images.image_size.index_select(0, pairs.image).to(scale.dtype)
    mirrored = diagonal < 0
    # augmented_from_image holds integer-centre pixels: its shift is 0.5 s - 0.5 - cut, and W - 1 minus that when mirrored.
    shift = torch.where(mirrored, size_vu.flip(1) - 1 - matrix[:, :2, 2], matrix[:, :2, 2])
    cut = 0.5 * scale - 0.5 - shift
    moved = pairs.raw_pixels * scale - cut
    moved = torch.where(mirrored, size_vu.flip(1) - moved, moved)
    own_size = images.own_padded_size.index_select(0, pairs.image).to(scale.dtype).flip(1)
    height, width = feature_map.features.shape[2:]
    return moved / own_size * torch.tensor([width - 1, height - 1], dtype=scale.dtype, device=scale.device)
