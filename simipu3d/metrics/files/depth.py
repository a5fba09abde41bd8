"""Depth maps as 16-bit PNGs: value / 256 is metres on KITTI, value / 1000 on NYU; 0 is not measured."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from simipu3d.errors import UserError
from simipu3d.metrics.depth import ERRORS, depth_errors, kb_crop, mean_errors, valid_pixels
from simipu3d.metrics.files.scores import Scores, Table, kept, read_bytes, same_frames, shown


def score(
    truth: Path,
    predictions: Path,
    frames: Path | None = None,
    *,
    scale: float = 256.0,
    min_depth: float = 1e-3,
    max_depth: float = 80.0,
    crop: str = "none",
    kb: bool = False,
) -> Scores:
    """Score a folder of predicted maps against a folder of measured ones of the same names.

    Args:
        truth, predictions: folders of 16-bit PNGs.
        frames: a list of the names to score, without .png; None takes all.
        scale: PNG values a metre.
        min_depth, max_depth, crop: see `valid_pixels`.
        kb: cut the truth as KITTI's depth benchmark does; predictions may be cut already or not.

    Raises:
        UserError: a map is missing, damaged, or of another size than its truth.
    """
    names = same_frames(truth, predictions, ".png", frames)
    images = []
    for name in names:
        measured = read_depth(truth / f"{name}.png", scale)
        path = predictions / f"{name}.png"
        predicted = read_depth(path, scale)
        try:
            if kb:
                is_whole = predicted.shape == measured.shape
                measured = kb_crop(measured)
                predicted = kb_crop(predicted) if is_whole else predicted
            if predicted.shape != measured.shape:
                sizes = ["{1} x {0}".format(*depth.shape) for depth in (predicted, measured)]
                raise UserError(
                    f"{path}: is {sizes[0]} pixels, and its truth {sizes[1]}; write maps of the truth's size"
                )
            valid = valid_pixels(measured, min_depth=min_depth, max_depth=max_depth, crop=crop)
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"{path.name}: {error}") from error
        images.append(depth_errors(predicted, measured, valid, min_depth=min_depth, max_depth=max_depth))
    means = mean_errors(images)
    used = sum(not np.isnan(own["abs_rel"]) for own in images)
    title = (
        f"depth, {used} images, {min_depth:g} m to {max_depth:g} m, crop {crop}{', after the KB crop' if kb else ''}"
    )
    values = {
        "images": used,
        "images_without_truth": len(images) - used,
        "mean": {k: kept(v) for k, v in means.items()},
    }
    values["by_image"] = {
        name: {error: kept(value) for error, value in own.items()} for name, own in zip(names, images, strict=True)
    }
    rows = [("mean over images", *(shown(means[name], 4) for name in ERRORS))]
    return Scores([Table(title, ("what", *ERRORS), rows)], values)


def read_depth(path: Path, scale: float) -> NDArray[np.float64]:
    """(H, W) metres, 0 where the file has no value.

    Raises:
        UserError: the file is missing, damaged, or no picture of one channel of 16 bits.
    """
    content = read_bytes(path)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if not image.mode.startswith("I"):
                raise UserError(
                    f"{path}: is a picture of mode {image.mode}; a depth map is a PNG of one channel of 16 bits"
                )
            values = np.asarray(image, dtype=np.float64)
    except UnidentifiedImageError:
        raise UserError(f"{path}: is not an image, or its first bytes are damaged") from None
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: the image is cut short or damaged ({' '.join(str(error).split())})") from error
    return values / scale


def write_depth(path: Path, depth: NDArray, scale: float = 256.0) -> None:
    """Write a map as a 16-bit PNG; what is beyond 65535 / scale metres is cut there."""
    values = np.clip(np.round(np.asarray(depth, dtype=np.float64) * scale), 0, 65535)
    Image.fromarray(values.astype(np.uint16)).save(path)
