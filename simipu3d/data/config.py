"""Which settings does every data set share? The `data:` block, and the `augment:` block beside it.

A reader's own model inherits from `DataConfig` and adds its keys. Angles are degrees (`_deg`), lengths metres, image
edges pixels.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from simipu3d.config import PartConfig

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]
Vector = tuple[float, float, float]


def check_range(key: str, low: float, high: float) -> None:
    """Raise `ValueError` when the range of `key` runs backwards."""
    if low > high:
        raise ValueError(f"{key} must be [smallest, largest], got [{low}, {high}]")


class ImageAugmentConfig(PartConfig):
    """The `augment.images:` block; every view of every image gets its own draw, in the order of the keys."""

    resize: Literal["long_short", "factor"] | None = None
    """`long_short`: edges drawn from long_edge and short_edge, aspect kept (released code); `factor`: a factor drawn
    from resize_factor; null: the size stays. Default: it stays."""
    long_edge: tuple[PositiveInt, PositiveInt] = (640, 2400)
    """With `resize: long_short`: smallest and largest limit of the longer edge, pixels (released code)."""
    short_edge: tuple[PositiveInt, PositiveInt] = (192, 720)
    """With `resize: long_short`: smallest and largest limit of the shorter edge, drawn independently (released
    code)."""
    resize_factor: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """With `resize: factor`: smallest and largest factor. Default: the size stays."""
    crop: tuple[PositiveInt, PositiveInt] | None = None
    """Height and width of a window at a drawn place; an image that is smaller keeps its own size in that direction.
    Default: none (released code)."""
    rotation_deg: Annotated[float, Field(ge=0, le=45)] = 0.0
    """The image is turned about its middle, before the crop, by an angle from [-rotation_deg, rotation_deg]; what comes in from
    outside is black, and its truth unknown. Default: none (released code); depth runs on KITTI and NYU use 2.5."""
    rotation_probability: Probability = 0.5
    """Chance of a turn, with rotation_deg (BTS, arXiv:1907.10326)."""
    flip_probability: Probability = 0.5
    """Chance of a left-right mirror (released code)."""
    colour_probability: Probability = 0.8
    """Chance that the colours are changed at all, by the six strengths below (SimCLR, arXiv:2002.05709)."""
    brightness: Strength = 0.0
    """Brightness is multiplied by a factor from [1 - strength, 1 + strength]. Default: none (released code)."""
    contrast: Strength = 0.0
    """The same for contrast."""
    saturation: Strength = 0.0
    """The same for saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Hue is turned by a fraction of the full circle from [-strength, strength]. Default: none (released code)."""
    gamma: Strength = 0.0
    """Values in 0..1 are raised to a power from [1 - strength, 1 + strength]. Default: none (released code); BTS (arXiv:1907.10326)
    has 0.1."""
    channels: Strength = 0.0
    """Red, green and blue are each multiplied by a factor of their own from [1 - strength, 1 + strength]. Default: none (released
    code); BTS has 0.1."""
    grayscale_probability: Probability = 0.0
    """Chance of losing all colour. Default: none (released code); MoCo v2 uses 0.2."""
    pad_multiple: PositiveInt = 32
    """Images are padded to a multiple of this, pixels: the stride of the last ResNet stage (released code)."""

    @model_validator(mode="after")
    def _check(self) -> "ImageAugmentConfig":
        check_range("long_edge", *self.long_edge)
        check_range("short_edge", *self.short_edge)
        check_range("resize_factor", *self.resize_factor)
        return self

    def without_draws(self) -> "ImageAugmentConfig":
        """The same with nothing left to chance: a resize stays where its ranges leave one size, the rest goes."""
        ranges = {"factor": (self.resize_factor,), "long_short": (self.long_edge, self.short_edge), None: ()}
        fixed = all(low == high for low, high in ranges[self.resize])
        changes = {
            "crop": None,
            "rotation_deg": 0.0,
            "flip_probability": 0.0,
            "colour_probability": 0.0,
            "grayscale_probability": 0.0,
        }
        return self.model_copy(update=changes if fixed else changes | {"resize": None})


class PointAugmentConfig(PartConfig):
    """The `augment.points:` block: how point views are drawn from a scan.

    A point view is rotated, scaled, shifted and mirrored, in this order; its matrix goes with it.
    """

    num_points: PositiveInt | None = 16384
    """Points drawn for a view (released code); null: all."""
    point_draw: Literal["per_view", "shared"] = "per_view"
    """`per_view`: each view draws its own points; `shared`: both get the same ones (released code; 30 % of the matched
    tokens are then the very same point)."""
    too_few: Literal["all", "repeat"] = "all"
    """A frame with fewer points than num_points gives all it has, or draws with repetition up to num_points (released
    code)."""
    shuffle: bool = True
    """Each view gets its own order of points (released code); false: the reader's order."""
    augment_first_view: bool = False
    """Is the first of two views moved too? Default: only the second is (released code). A single view is always moved."""
    rotation_deg: tuple[float, float] = (-90.0, 90.0)
    """Smallest and largest rotation about the vertical, degrees (released code)."""
    rotation_centre: Vector | None = None
    """The rotation leaves this point of the lidar frame where it is, metres. Default, null: the middle of the data set's
    point_range (released code: of KITTI's usual range, [35.2, 0, -1]), or the origin where it has none."""
    scale: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.25)
    """Smallest and largest scale (released code)."""
    scale_centre: Vector | None = None
    """The scaling leaves this point where it is, metres. Default, null: as for the rotation; the released code scales
    about the origin, [0, 0, 0]."""
    translation_std: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.0, 0.0, 0.0)
    """Standard deviation of a shift along x, y and z, metres (released code: none)."""
    flip_probability: Probability = 0.5
    """Chance of a mirror y -> -y (released code)."""

    @model_validator(mode="after")
    def _check(self) -> "PointAugmentConfig":
        check_range("rotation_deg", *self.rotation_deg)
        check_range("scale", *self.scale)
        return self

    def centred(self, point_range: tuple[float, float, float, float, float, float] | None) -> "PointAugmentConfig":
        """The same with both centres given: where one is null, the middle of a range of x, y, z minimum and x, y, z
        maximum, or the origin where there is no range."""
        middle: tuple[float, ...] = (0.0, 0.0, 0.0)
        if point_range is not None:
            middle = tuple((low + high) / 2 for low, high in zip(point_range[:3], point_range[3:], strict=True))
        given = {key: getattr(self, key) for key in ("rotation_centre", "scale_centre")}
        return self.model_copy(update={key: middle if centre is None else centre for key, centre in given.items()})


class AugmentConfig(PartConfig):
    """The `augment:` block: how the views that a method needs are drawn from a frame."""

    points: PointAugmentConfig = PointAugmentConfig()
    """How point views are drawn."""
    images: ImageAugmentConfig = ImageAugmentConfig()
    """How image views are drawn."""
    joint_flip: bool = False
    """One coin, of `points.flip_probability`, mirrors the second (or only) point view and all images together (released
    code). Default: each has its own."""


class DataConfig(PartConfig):
    """The keys of the `data:` block that every data set has."""

    name: str
    """Which reader (`READERS`)."""
    root: Path | None = None
    """The data set's top folder; null for synthetic data."""
    split: str = "train"
    """Which list of frames; the reader says which there are."""
    cameras: tuple[str, ...] | None = None
    """Names of the cameras to read; null: all that the reader has."""
    batch_size: PositiveInt = 4
    """Frames a process and step (released code: 4); cameras multiply images, not frames."""
    num_workers: NonNegativeInt = 2
    """Processes that read ahead; 0 reads in the training process. The results do not depend on it."""
    on_bad_frame: Literal["raise", "skip"] = "raise"
    """What to do with a frame that cannot be used: stop, or take the next one and say so."""
    max_bad_fraction: Probability = 0.01
    """With `skip`: the run stops when more than max(1, this fraction of the frames) are bad."""
    label_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Train on this share of the frames, drawn by drive (or scene) where the reader knows the drives, else by frame; of two shares
    with one seed the smaller one's frames are among the larger one's. Held-out frames stay all. Default: all."""
    label_seed: NonNegativeInt = 0
    """Which frames label_fraction draws."""
    freeze_draws: bool = False
    """Draw a frame's points and transforms once: every epoch repeats the draws of epoch 0."""

    @field_validator("cameras")
    @classmethod
    def _some_and_once(cls, cameras: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if cameras is not None and not 0 < len(cameras) == len(set(cameras)):
            raise ValueError(f"name at least one camera, each once, got {list(cameras)}; null takes all")
        return cameras

    def max_bad_frames(self, num_frames: int) -> int:
        """How many of `num_frames` frames may be bad before a run stops."""
        return max(1, int(self.max_bad_fraction * num_frames))
