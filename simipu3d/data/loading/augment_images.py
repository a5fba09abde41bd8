"""How is one view of an image drawn, and where do its pixels go?

An image view carries `augmented_from_image`, (3, 3), built from the realised sizes: resize, crop, mirror. Colours
follow; padding comes at the right and bottom when a batch is put together and moves no pixel. Images stay uint8.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from simipu3d.contracts.frame import Camera
from simipu3d.data.config import ImageAugmentConfig
from simipu3d.geometry.camera import crop_matrix, mirror_matrix, resize_matrix


@dataclass(frozen=True, eq=False)
class ImageSample:
    """One augmented image of one frame, before padding.

    Attributes:
        image: (3, h, w) uint8 RGB.
        camera: the camera's name.
        padded_size: (height, width) rounded up to the padding multiple.
        augmented_from_image: (3, 3) float64.
        image_from_camera, camera_from_lidar, distortion, raw_size: calibration of the original image, see `ImageView`.
    """

    image: Tensor
    camera: str
    padded_size: tuple[int, int]
    augmented_from_image: Tensor
    image_from_camera: Tensor
    camera_from_lidar: Tensor
    distortion: Tensor
    raw_size: tuple[int, int]


def draw_size(size: tuple[int, int], config: ImageAugmentConfig, rng: np.random.Generator) -> tuple[int, int]:
    """(height, width) after the resize; the aspect is kept up to rounding.

    Source: `long_short` is the released SimIPU pipeline (mmdetection's multi-scale range): both edges drawn
    independently, whole pixels, ends included, and the factor that keeps within both.
    """
    if config.resize is None:
        return size
    if config.resize == "long_short":
        long_edge = rng.integers(*config.long_edge, endpoint=True)
        short_edge = rng.integers(*config.short_edge, endpoint=True)
        factor = min(long_edge / max(size), short_edge / min(size))
    else:
        factor = rng.uniform(*config.resize_factor)
    height, width = (max(1, int(edge * factor + 0.5)) for edge in size)
    return height, width


def change_colours(picture: Image.Image, config: ImageAugmentConfig, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue by drawn amounts, then perhaps grey; the size stays."""
    applies = rng.random() < config.colour_probability
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, strength in zip(enhancers, (config.brightness, config.contrast, config.saturation), strict=True):
        factor = rng.uniform(1 - strength, 1 + strength)
        if applies and strength:
            picture = enhancer(picture).enhance(factor)
    turn = round(rng.uniform(-config.hue, config.hue) * 256)
    if applies and config.hue:
        hue, saturation, value = picture.convert("HSV").split()
        hue = hue.point([(level + turn) % 256 for level in range(256)])
        picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if rng.random() < config.grayscale_probability:
        picture = picture.convert("L").convert("RGB")
    return picture


def augment_image(
    camera: Camera, config: ImageAugmentConfig, rng: np.random.Generator, mirrored: bool | None = None
) -> ImageSample:
    """One drawn view of a camera's image, with the matrix that moves its pixels; `mirrored` takes the place of its coin.

    Resizing filters before it shrinks (Pillow's bilinear filter), so that no detail aliases.
    """
    raw_size = camera.image.shape[:2]
    picture = Image.fromarray(camera.image)
    matrix = torch.eye(3, dtype=torch.float64)
    size = draw_size(raw_size, config, rng)
    if size != raw_size:
        picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        matrix = resize_matrix(raw_size, size)
    if config.crop is not None:
        height, width = min(size[0], config.crop[0]), min(size[1], config.crop[1])
        top = int(rng.integers(0, size[0] - height, endpoint=True))
        left = int(rng.integers(0, size[1] - width, endpoint=True))
        picture = picture.crop((left, top, left + width, top + height))
        matrix = crop_matrix(top, left) @ matrix
        size = (height, width)
    own_coin = rng.random() < config.flip_probability
    if own_coin if mirrored is None else mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        matrix = mirror_matrix(size[1]) @ matrix
    pixels = np.asarray(change_colours(picture, config, rng))
    pad = config.pad_multiple
    distortion = np.zeros(5) if camera.distortion is None else camera.distortion
    return ImageSample(
        image=torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
        camera=camera.name,
        padded_size=(-(-size[0] // pad) * pad, -(-size[1] // pad) * pad),
        augmented_from_image=matrix,
        image_from_camera=torch.tensor(camera.image_from_camera, dtype=torch.float64),
        camera_from_lidar=torch.tensor(camera.camera_from_lidar, dtype=torch.float64),
        distortion=torch.tensor(distortion, dtype=torch.float64),
        raw_size=(raw_size[0], raw_size[1]),
    )
