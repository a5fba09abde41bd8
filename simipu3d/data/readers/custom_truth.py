"""How is the ground truth of pixels and points of the custom layout read?

docs/custom_data.md explains the files. Shapes: images H x W, N rows of a scan.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simipu3d.contracts.truth import UNLABELLED
from simipu3d.data.readers.custom_sequence import SequenceModel
from simipu3d.data.readers.files import WAY_OUT, decode_map, read_bytes, read_npy
from simipu3d.errors import BadFrameError

DTYPES = {
    "depth": np.float32,
    "pixel_class": np.uint8,
    "pixel_instance": np.int32,
    "point_class": np.uint8,
    "point_instance": np.int32,
}
"""Types of the arrays of a frame, by the kind of ground truth; .bin files hold it too."""


def read_pixels(path: Path, kind: str, image_size: tuple[int, int], sequence: SequenceModel) -> NDArray:
    """(H, W) of one image's ground truth.

    Args:
        path: a .npy or any greyscale image file.
        kind: `depth`, `pixel_class` or `pixel_instance`.
        image_size: (H, W) that it must have.
        sequence: says the depth's scale and the classes.

    Raises:
        BadFrameError: the file is absent, damaged, of another size or type, or holds a number that means nothing.
    """
    is_array = path.suffix == ".npy"
    values = read_npy(path) if is_array else decode_map(read_bytes(path), str(path))
    if values.shape != image_size:
        size = " x ".join(map(str, values.shape))
        raise BadFrameError(
            f"{path}: is {size}, and sequence.json says the image is {image_size[0]} x {image_size[1]}; {WAY_OUT}"
        )
    if kind == "depth":
        if values.dtype.kind not in ("f" if is_array else "iu"):
            raise BadFrameError(f"{path}: a .npy of depth holds floats, metres, this one {values.dtype}; {WAY_OUT}")
        depth = (values if is_array else values / sequence.depth_scale).astype(np.float32)
        if not np.isfinite(depth).all() or (depth < 0).any():
            raise BadFrameError(f"{path}: holds a depth that is negative, NaN or infinite; 0 is unknown; {WAY_OUT}")
        return depth
    return _labels(path, values, kind, sequence.class_names)


def read_point_labels(path: Path, kind: str, num_points: int, class_names: tuple[str, ...]) -> NDArray:
    """(N,) of one scan's ground truth.

    Args:
        path: a .npy, or a .bin of little-endian numbers.
        kind: `point_class` (uint8) or `point_instance` (int32).
        num_points: rows of the scan.
        class_names: what the classes index.

    Raises:
        BadFrameError: the file is absent, damaged, of another length or type, or holds a number that means nothing.
    """
    if path.suffix == ".npy":
        values = read_npy(path)
    elif path.suffix == ".bin":
        content, dtype = read_bytes(path), np.dtype(DTYPES[kind]).newbyteorder("<")
        values = np.frombuffer(content[: len(content) // dtype.itemsize * dtype.itemsize], dtype=dtype)
    else:
        raise BadFrameError(f"{path}: labels of points are a .bin or a .npy file; {WAY_OUT}")
    if values.shape != (num_points,):
        size = " x ".join(map(str, values.shape))
        raise BadFrameError(f"{path}: holds {size} labels, and the scan {num_points} points; {WAY_OUT}")
    return _labels(path, values, kind, class_names)


def _labels(path: Path, values: NDArray, kind: str, class_names: tuple[str, ...]) -> NDArray:
    """Classes or instances of the right type and within their bounds."""
    dtype = DTYPES[kind]
    if values.dtype.kind not in "iu":
        raise BadFrameError(f"{path}: {kind} holds whole numbers, this file {values.dtype}; {WAY_OUT}")
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high > np.iinfo(dtype).max:
        raise BadFrameError(f"{path}: {kind} holds numbers from {low} to {high}; {WAY_OUT}")
    if kind.endswith("class") and ((values >= len(class_names)) & (values != UNLABELLED)).any():
        wrong = values[(values >= len(class_names)) & (values != UNLABELLED)].flat[0]
        raise BadFrameError(
            f"{path}: holds the class {wrong}, and class_names has {len(class_names)} names (0 to {len(class_names) - 1}; "
            f"{UNLABELLED} is unknown); {WAY_OUT}"
        )
    return values.astype(dtype)
