"""What turns backbone features into the vectors that a contrastive loss compares?"""

import torch.nn as nn
from torch import Tensor


class ProjectionHead(nn.Module):
    """Three linear layers, each followed by BatchNorm (the last one too), ReLU after the first two.

    Args:
        in_channels: width of the backbone's features; also of the two hidden layers.
        out_channels: width of the compared vectors.

    Source: SimIPU's released heads (`layer1..3`, each linear with bias and BatchNorm1d); SimCLR, arXiv:2002.05709.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        widths = [in_channels, in_channels, in_channels, out_channels]
        for number in (1, 2, 3):
            linear = nn.Linear(widths[number - 1], widths[number])
            self.add_module(f"layer{number}", nn.Sequential(linear, nn.BatchNorm1d(widths[number])))

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_channels) to (N, out_channels), not normalised. N >= 2 in training (BatchNorm needs a spread)."""
        hidden = self.layer1(features).relu()
        return self.layer3(self.layer2(hidden).relu())
