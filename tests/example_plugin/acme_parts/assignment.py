"""An assignment: pairs in the order of the distance from the sensor, whatever lies between them."""

import torch
from torch import Tensor

from simipu3d.registry import ASSIGNMENTS


@ASSIGNMENTS.register("acme_by_range")
def by_range(xyz_a: Tensor, xyz_b: Tensor, source_a: Tensor, source_b: Tensor) -> Tensor:
    """(P, 2): the nearest token to the sensor with the nearest one of the other view, and so on."""
    rows = torch.stack(
        [places.norm(dim=1).argsort()[: min(len(xyz_a), len(xyz_b))] for places in (xyz_a, xyz_b)], dim=1
    )
    return rows[rows[:, 0].argsort()]
