"""Where do the tokens of a voxel network stand? At the mean of the raw points that a site owns.

The geometric centre of a cell would be off by up to half a cell, which is many pixels in the image. A site that owns no
point (dilation makes such sites) gives no token. Shapes: N points, S sites, M tokens of B scenes, C channels.
"""

import torch
from torch import Tensor

from simipu3d.contracts.batch import PointView
from simipu3d.contracts.tokens import PointTokens
from simipu3d.encoders.sparse import SparseTensor
from simipu3d.ops.backend import offsets_from_batch_index
from simipu3d.ops.farthest_point import farthest_point_sample
from simipu3d.ops.scatter import scatter_reduce


def tokens_at_sites(view: PointView, sites: SparseTensor, point_site: Tensor, num_tokens: int) -> PointTokens:
    """Tokens of a view: a site's features at the mean of its points.

    Args:
        view: the points.
        sites: features (S, C) of the network's last stage.
        point_site: (N,) int64 row of the site that owns a point, -1 where none does.
        num_tokens: most tokens of a scene; more are thinned by farthest point sampling (D-FPS).

    Returns:
        tokens in the order of the sites (by scene, then z, y, x), also after thinning; M <= B * num_tokens.
    """
    owned = (point_site >= 0).nonzero().flatten()
    rows, token = torch.unique(point_site.index_select(0, owned), return_inverse=True)
    xyz = scatter_reduce(view.points[:, :3].index_select(0, owned), token, len(rows), "mean")
    batch_index = sites.voxel_bzyx[:, 0].index_select(0, rows)
    offsets = offsets_from_batch_index(batch_index, view.num_frames)
    # unique() sorts, and drops a row that farthest point sampling takes twice where tokens share a place.
    taken = farthest_point_sample(xyz, offsets, num_tokens).unique()
    rows, batch_index = rows.index_select(0, taken), batch_index.index_select(0, taken)
    features = sites.features.index_select(0, rows)
    return PointTokens(xyz.index_select(0, taken), features, batch_index, torch.full_like(batch_index, -1))
