"""A method: one 1 x 1 convolution on an image backbone learns log depth (L1)."""

import torch
from torch import Tensor, nn

from simipu3d.config import PartConfig
from simipu3d.contracts.batch import Batch
from simipu3d.contracts.method import DataInfo, Method, Needs, Picture
from simipu3d.encoders.image import ImageEncoder, ImageEncoderConfig
from simipu3d.pictures import depth_as_colours
from simipu3d.registry import METHODS


class DepthConfig(PartConfig):
    """The blocks of `acme_depth`."""

    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    """The backbone."""


@METHODS.register("acme_depth")
class Depth(Method):
    """A depth a cell; truth from a depth map or from projected points."""

    Config = DepthConfig
    NEEDS = Needs(image_views=1, truth=("depth",))

    def __init__(self, config: DepthConfig, data: DataInfo):
        super().__init__()
        self.image_encoder = ImageEncoder(config.image_encoder)
        self.out = nn.Conv2d(self.image_encoder.maps[-1].channels, 1, 1)

    def log_depth(self, batch: Batch) -> Tensor:
        """(I, H, W)."""
        images = batch.images[0]
        features = self.image_encoder(self.image_encoder.normalise(images.images, images.image_size))[-1].features
        return nn.functional.interpolate(self.out(features), images.images.shape[2:], mode="bilinear")[:, 0]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        truth = batch.truth.depth[0]
        error = (self.log_depth(batch) - truth.clamp(min=1e-3).log()).abs()[truth > 0]
        loss = error.sum() / max(1, len(error))
        return {"loss": loss, "depth_loss": loss, "depth_rows": torch.tensor(float(len(error)))}

    def pictures(self, batch: Batch) -> dict[str, Picture]:
        return {"depth": depth_as_colours(self.log_depth(batch)[0].exp().cpu().numpy())}
