"""Which keys does the `depth:` block have?

Defaults are the depth runs that SimIPU's authors published (zhyever/Monocular-Depth-Estimation-Toolbox, configs/simipu):
DenseDepth decoder, SigLoss, KITTI.
"""

from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from simipu3d.config import PartConfig
from simipu3d.encoders.image_trunk import ImageEncoderConfig


class DepthConfig(PartConfig):
    """The `depth:` block: from feature maps to metres, the loss, and how predictions are scored."""

    decoder: Literal["dense", "linear"] = "dense"
    """`dense`: DenseDepth (arXiv:1812.11941), every level of the encoder joins on the way up; `linear`: one 1x1 convolution on
    the last map, for what the features alone know. Default: SimIPU's depth runs."""
    channels: tuple[PositiveInt, ...] | None = None
    """With `decoder: dense`: channels of the decoder at every level of the encoder, finest first. Default, null: those of the
    encoder's level, at the finest one at least half of the next coarser one's (ResNet-50: 128, 256, 512, 1024, 2048, as in
    SimIPU's depth runs)."""
    norm: Literal["batch"] | None = None
    """With `decoder: dense`: BatchNorm behind its convolutions; a short training from scratch is faster with it. Default: none
    (SimIPU's depth runs)."""
    min_depth: PositiveFloat = 1e-3
    """The smallest predicted depth, and the smallest depth that is scored, metres (SimIPU's depth runs)."""
    max_depth: PositiveFloat = 80.0
    """The largest predicted depth, metres. Default: KITTI; NYU 10."""
    scale_up: bool = True
    """true: depth = sigmoid(x) max_depth (SimIPU's depth runs); false: relu(x) + min_depth, without an upper end while
    training."""
    mean_weight: NonNegativeFloat = 0.15
    """SigLoss is sqrt(Var(g) + mean_weight mean(g)^2) of g = ln prediction - ln truth. Default: SimIPU's depth runs (the
    scale-invariant loss of arXiv:1406.2283 with lambda 0.85); 1 is the plain root mean square, 0 leaves the scale free."""
    log_offset: NonNegativeFloat = 1e-3
    """Added to both depths before the logarithm, metres (SimIPU's depth runs)."""
    loss_max_depth: PositiveFloat | None = None
    """Pixels whose truth is deeper, metres, are left out of the loss. Default: none is (SimIPU's depth runs)."""
    warmup_steps: NonNegativeInt = 0
    """In so many first steps the loss is sqrt(mean_weight mean(g)^2) alone: the scale is found first. Default: off
    (SimIPU's depth runs); the toolbox's option has 100."""
    flip_test: bool = True
    """Predictions are the mean of those of the image and of its mirror image (SimIPU's depth runs)."""
    crop: Literal["none", "garg", "eigen", "nyu"] = "garg"
    """Which part of an image is scored: `garg` (Eigen split, shares of rows and columns), `eigen` (the same, older),
    `nyu` (rows 45 to 470 and columns 41 to 600 of 480 x 640), or `none`. Default: SimIPU's depth runs on KITTI."""
    cap: PositiveFloat | None = None
    """Only truth nearer than this is scored, metres. Default, null: max_depth; 50 is customary too."""
    png_scale: PositiveFloat = 256.0
    """Value of a written 16-bit PNG for one metre. Default: KITTI; NYU 1000."""

    @model_validator(mode="after")
    def _check(self) -> "DepthConfig":
        if not self.min_depth < self.max_depth:
            raise ValueError(f"min_depth {self.min_depth} must be below max_depth {self.max_depth}")
        if self.warmup_steps and not self.mean_weight:
            raise ValueError("warmup_steps leaves nothing of the loss with mean_weight 0; set one of the two")
        return self

    @property
    def scored_range(self) -> tuple[float, float]:
        """Truth strictly between these, metres, is scored."""
        return self.min_depth, self.max_depth if self.cap is None else self.cap


class DepthBlocks(PartConfig):
    """All blocks that the method reads."""

    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    """Images to feature maps."""
    depth: DepthConfig = DepthConfig()
    """From feature maps to metres, the loss, and how predictions are scored."""

    @model_validator(mode="after")
    def _check(self) -> "DepthBlocks":
        if self.image_encoder.neck is not None:
            raise ValueError("image_encoder.neck: the depth decoder joins the encoder's own levels; leave the key out")
        return self
