"""How is one view of an image drawn, and where do its pixels go?

An image view carries `augmented_from_image`, (3, 3), built from the realised sizes: resize, turn, crop, mirror. The same move
takes maps of ground truth along. Colours follow; padding comes at the right and bottom when a batch is put together and
moves no pixel. Images stay uint8.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from torch import Tensor

from simipu3d.contracts.frame import Camera
from simipu3d.data.config import ImageAugmentConfig
from simipu3d.geometry.camera import crop_matrix, inside_image, mirror_matrix, move_pixels, resize_matrix, turn_matrix


@dataclass(frozen=True)
class ImageMove:
    """Where the pixels of one image go: it is resized, turned about its middle, a window is cut out, and that is mirrored. Sizes
    are (height, width).

    Attributes:
        raw_size: of the original image.
        resized: after the resize.
        top, left: the window's first row and column in the resized image.
        size: of the window, and so of the augmented image.
        mirrored: left-right.
        turn: radians, from u towards v (clockwise as one sees it).
    """

    raw_size: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    size: tuple[int, int]
    mirrored: bool
    turn: float = 0.0

    def matrix(self) -> Tensor:
        """(3, 3) float64 `augmented_from_image`."""
        matrix = resize_matrix(self.raw_size, self.resized)
        if self.turn:
            matrix = turn_matrix(self.resized, self.turn) @ matrix
        matrix = crop_matrix(self.top, self.left) @ matrix
        return mirror_matrix(self.size[1]) @ matrix if self.mirrored else matrix

    def move_picture(self, picture: Image.Image) -> Image.Image:
        """Colours, moved. A resize filters before it shrinks (Pillow's bilinear filter), so that no detail aliases."""
        if self.resized != self.raw_size:
            picture = picture.resize((self.resized[1], self.resized[0]), Image.Resampling.BILINEAR)
        if self.turn:
            back = turn_matrix(self.resized, -self.turn)
            back[:2, 2] += 0.5 - 0.5 * back[:2, :2].sum(dim=1)  # Pillow's pixels have their centres at halves
            rows = tuple(back[:2].flatten().tolist())
            picture = picture.transform(picture.size, Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)
        if self.size != self.resized:
            picture = picture.crop((self.left, self.top, self.left + self.size[1], self.top + self.size[0]))
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else picture

    def move_map(self, values: NDArray, unknown: int = 0) -> NDArray:
        """A (height, width) map of depths or labels, moved: every pixel takes the nearest one's value, none is mixed; `unknown` is
        the value of what a turn brings in from outside."""
        if self.turn:
            return self._turned_map(values, unknown)
        rows = _nearest(self.raw_size[0], self.resized[0])[self.top : self.top + self.size[0]]
        columns = _nearest(self.raw_size[1], self.resized[1])[self.left : self.left + self.size[1]]
        return values[np.ix_(rows, columns[::-1] if self.mirrored else columns)]

    def _turned_map(self, values: NDArray, unknown: int) -> NDArray:
        rows, columns = np.mgrid[: self.size[0], : self.size[1]]
        pixels = torch.from_numpy(np.stack([columns, rows], axis=-1).reshape(-1, 2).astype(np.float64))
        raw = move_pixels(torch.linalg.inv(self.matrix()), pixels)
        inside = inside_image(raw, self.raw_size).numpy()
        u, v = np.floor(raw.numpy() + 0.5).astype(np.int64).T
        moved = np.full(len(pixels), unknown, dtype=values.dtype)
        # Half a pixel more than a number just below W - 0.5 may round to W.
        moved[inside] = values[np.minimum(v, self.raw_size[0] - 1)[inside], np.minimum(u, self.raw_size[1] - 1)[inside]]
        return moved.reshape(self.size)


def _nearest(length: int, new_length: int) -> NDArray[np.int64]:
    """(new_length,) the old pixel that each new pixel's centre lies in, (u' + 0.5) length / new_length, in whole numbers."""
    return (2 * np.arange(new_length) + 1) * length // (2 * new_length)


@dataclass(frozen=True, eq=False)
class ImageSample:
    """One augmented image of one frame, before padding.

    Attributes:
        image: (3, h, w) uint8 RGB.
        camera: the camera's name.
        padded_size: (height, width) rounded up to the padding multiple.
        move: what happened to the pixels.
        augmented_from_image: (3, 3) float64, the same as a matrix.
        image_from_camera, camera_from_lidar, distortion: calibration of the original image, see `ImageView`.
        depth: (h, w) float32, pixel_class: (h, w) uint8, pixel_instance: (h, w) int32, see `Truth`; None where not needed.
    """

    image: Tensor
    camera: str
    padded_size: tuple[int, int]
    move: ImageMove
    augmented_from_image: Tensor
    image_from_camera: Tensor
    camera_from_lidar: Tensor
    distortion: Tensor
    depth: Tensor | None = None
    pixel_class: Tensor | None = None
    pixel_instance: Tensor | None = None


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
        factor = float(min(long_edge / max(size), short_edge / min(size)))
    else:
        factor = rng.uniform(*config.resize_factor)
    height, width = (max(1, int(edge * factor + 0.5)) for edge in size)
    return height, width


def change_colours(picture: Image.Image, config: ImageAugmentConfig, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation, hue, gamma and channels by drawn amounts, then perhaps grey; the size stays."""
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
    if config.gamma or config.channels:
        power = rng.uniform(1 - config.gamma, 1 + config.gamma)
        factors = rng.uniform(1 - config.channels, 1 + config.channels, 3)
        if applies:
            levels = 255 * np.multiply.outer(factors, (np.arange(256) / 255) ** power)
            picture = picture.point(np.clip(np.round(levels), 0, 255).astype(int).flatten().tolist())
    if rng.random() < config.grayscale_probability:
        picture = picture.convert("L").convert("RGB")
    return picture


def draw_move(
    raw_size: tuple[int, int], config: ImageAugmentConfig, rng: np.random.Generator, mirrored: bool | None = None
) -> ImageMove:
    """Size, turn, window and mirror of one view of an image; `mirrored` takes the place of its coin."""
    resized = size = draw_size(raw_size, config, rng)
    turn = 0.0
    if config.rotation_deg:
        turns = rng.random() < config.rotation_probability
        angle = float(rng.uniform(-config.rotation_deg, config.rotation_deg))
        turn = math.radians(angle) if turns else 0.0
    top = left = 0
    if config.crop is not None:
        size = (min(resized[0], config.crop[0]), min(resized[1], config.crop[1]))
        top = int(rng.integers(0, resized[0] - size[0], endpoint=True))
        left = int(rng.integers(0, resized[1] - size[1], endpoint=True))
    own_coin = bool(rng.random() < config.flip_probability)
    return ImageMove(raw_size, resized, top, left, size, own_coin if mirrored is None else mirrored, turn)


def augment_image(
    camera: Camera, config: ImageAugmentConfig, rng: np.random.Generator, mirrored: bool | None = None
) -> ImageSample:
    """One drawn view of a camera's image, with the matrix that moves its pixels; `mirrored` takes the place of its coin."""
    height, width = camera.image.shape[:2]
    move = draw_move((height, width), config, rng, mirrored)
    pixels = np.asarray(change_colours(move.move_picture(Image.fromarray(camera.image)), config, rng))
    pad = config.pad_multiple
    distortion = np.zeros(5) if camera.distortion is None else camera.distortion
    return ImageSample(
        image=torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
        camera=camera.name,
        padded_size=(-(-move.size[0] // pad) * pad, -(-move.size[1] // pad) * pad),
        move=move,
        augmented_from_image=move.matrix(),
        image_from_camera=torch.tensor(camera.image_from_camera, dtype=torch.float64),
        camera_from_lidar=torch.tensor(camera.camera_from_lidar, dtype=torch.float64),
        distortion=torch.tensor(distortion, dtype=torch.float64),
    )
