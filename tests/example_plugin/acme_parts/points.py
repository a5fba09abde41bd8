"""A point encoder: a small network over the mean of each pillar's points."""

import torch
from pydantic import PositiveFloat, PositiveInt

from simipu3d.config import PartConfig
from simipu3d.contracts.batch import PointView
from simipu3d.contracts.tokens import PointTokens
from simipu3d.ops.scatter import scatter_reduce
from simipu3d.registry import POINT_ENCODERS


class ColumnConfig(PartConfig):
    """The `point_encoder:` block of `acme_columns`."""

    name: str = "acme_columns"
    width: PositiveInt = 16
    """Channels of a token."""
    cell: PositiveFloat = 4.0
    """Edge of a column, metres."""


@POINT_ENCODERS.register("acme_columns", config=ColumnConfig)
class Columns(torch.nn.Module):
    """A token for every column of `cell` x `cell` metres that holds a point, at the mean of its points."""

    def __init__(self, config: ColumnConfig, point_columns: tuple[str, ...]):
        super().__init__()
        self.cell = config.cell
        self.out_channels = config.width
        sizes = (len(point_columns), config.width, config.width)
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(*sizes[:2]), torch.nn.LayerNorm(sizes[1]), torch.nn.ReLU(), torch.nn.Linear(*sizes[1:])
        )

    def forward(self, view: PointView) -> PointTokens:
        column = torch.floor(view.points[:, :2].detach() / self.cell).long()
        keys, index = torch.unique(
            torch.cat([view.batch_index[:, None], column], dim=1), dim=0, return_inverse=True
        )  # sorted, so the scenes stay in order
        means = scatter_reduce(view.points, index, len(keys), "mean")
        batch_index = keys[:, 0]
        return PointTokens(means[:, :3], self.layers(means), batch_index, torch.full_like(batch_index, -1))
