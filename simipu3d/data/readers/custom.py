"""Your own rig: a folder a sequence, with one JSON that names scans, images, calibration and poses.

    root/<sequence>/sequence.json       see docs/custom_data.md and `custom_sequence`
    root/<sequence>/...                 scans (.bin, .npy) and images, wherever sequence.json says
    root/<split>.txt                    names of sequences, one a line, for every split but `all`

An image's camera_from_lidar is inverse(world_from_camera) world_from_lidar where both are given, so that the way of the
car between scan and exposure is inside, else the calibration's own.
"""

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from simipu3d.contracts.frame import Boxes, Camera, Frame, check_points
from simipu3d.data.config import DataConfig
from simipu3d.data.readers.custom_sequence import (
    BoxModel,
    FrameModel,
    ImageModel,
    PointFormat,
    SequenceModel,
    read_sequence,
)
from simipu3d.data.readers.files import WAY_OUT, decode_image, read_bytes, read_npy
from simipu3d.data.readers.select_points import PointRange, check_point_range, select_points
from simipu3d.errors import BadFrameError, UserError
from simipu3d.registry import READERS

log = logging.getLogger(__name__)


class CustomConfig(DataConfig):
    """The `data:` block for `name: custom`."""

    name: str = "custom"
    """Which reader (`READERS`)."""
    root: Path
    """The folder that holds a folder for every sequence."""
    split: str = "all"
    """`all`: every folder with a sequence.json; any other name: the sequences that root/<split>.txt lists."""
    split_file: Path | None = None
    """Read this list of sequences, one name a line, instead of root/<split>.txt."""
    features: tuple[str, ...] = ("intensity",)
    """Columns of a point after x, y, z; every sequence must have them. [] takes none."""
    point_range: PointRange | None = None
    """Only points strictly between x, y, z minimum and x, y, z maximum, metres. Default: all."""
    frustum: bool = False
    """Only points that fall into one of the images. Default: the whole scan."""
    load_boxes: bool = True
    """Keep the boxes where a frame has some; pre-training never looks at them."""

    @model_validator(mode="after")
    def _check(self) -> "CustomConfig":
        check_point_range(self.point_range)
        if len(set(self.features)) < len(self.features) or {"x", "y", "z"} & set(self.features):
            raise ValueError(f"features names columns after x, y, z, each once, got {list(self.features)}")
        if self.split == "all" and self.split_file is not None:
            raise ValueError("split all reads no list; remove split_file, or set split to another name")
        return self


@READERS.register("custom", config=CustomConfig)
class CustomReader:
    """Frames of a rig in the custom layout. Contract: `FrameReader`; frame ids are <sequence>/<id>.

    Raises:
        UserError: a list, a sequence.json or a column is missing or wrong, or many files are absent.
    """

    class_names: tuple[str, ...] = ()
    point_columns: tuple[str, ...] = ("x", "y", "z", "intensity")

    def __init__(self, config: CustomConfig):
        self.config = config
        self.point_columns = ("x", "y", "z", *config.features)
        self.sequences = self._open_all(_listed_sequences(config))
        frames = [(name, frame) for name, sequence in self.sequences.items() for frame in sequence.frames]
        self.frames = [(name, frame) for name, frame in frames if self._images(frame)]
        self._check_cameras()
        if len(self.frames) < len(frames):
            left_out = len(frames) - len(self.frames)
            log.warning(
                "%s: %d of %d frames have no image of data.cameras and are left out", config.root, left_out, len(frames)
            )
        self._check_present()

    def __len__(self) -> int:
        return len(self.frames)

    def prepare(self) -> None:
        """Nothing: the files are read as they are."""

    def __getitem__(self, index: int) -> Frame:
        name, frame = self.frames[index]
        sequence = self.sequences[name]
        cameras = tuple(self._camera(name, frame, image) for image in self._images(frame))
        return Frame(
            points=self._points(self.config.root / name / frame.points, sequence.points, cameras),
            point_columns=self.point_columns,
            cameras=cameras,
            frame_id=f"{name}/{frame.id}",
            sequence_id=name,
            timestamp=frame.timestamp,
            world_from_lidar=None if frame.world_from_lidar is None else frame.world_from_lidar.copy(),
            intensity_scale=sequence.points.intensity_scale,
            boxes=_boxes(frame.boxes) if self.config.load_boxes and frame.boxes is not None else None,
        )

    def _open_all(self, names: list[str]) -> dict[str, SequenceModel]:
        """Every sequence; of several that are wrong the first is explained and the others are named."""
        sequences: dict[str, SequenceModel] = {}
        wrong: dict[str, UserError] = {}
        for name in names:
            try:
                sequences[name] = self._open(name)
            except UserError as error:
                wrong[name] = error
        if wrong:
            (_, *others), error = wrong, next(iter(wrong.values()))
            if not others:
                raise error
            raise UserError(f"{error}; {len(others)} further sequences are wrong: {', '.join(others)}") from error
        return sequences

    def _open(self, name: str) -> SequenceModel:
        path = self.config.root / name / "sequence.json"
        sequence = read_sequence(path)
        absent = [column for column in self.config.features if column not in sequence.points.columns]
        if absent:
            raise UserError(
                f"{path}: points.columns has no {', '.join(absent)}, but {', '.join(sequence.points.columns)}; set "
                f"data.features={list(sequence.points.columns[3:])}".replace("'", "")
            )
        return sequence

    def _images(self, frame: FrameModel) -> list[ImageModel]:
        """The chosen images of a frame, in the order of `data.cameras`, else of the file."""
        if self.config.cameras is None:
            return list(frame.images)
        own = {image.camera: image for image in frame.images}
        return [own[name] for name in self.config.cameras if name in own]

    def _camera(self, name: str, frame: FrameModel, image: ImageModel) -> Camera:
        model = next(camera for camera in self.sequences[name].cameras if camera.name == image.camera)
        path = self.config.root / name / image.file
        encoded = read_bytes(path)
        pixels = decode_image(encoded, str(path))
        if pixels.shape[:2] != model.image_size:
            raise BadFrameError(
                f"{path}: the image is {pixels.shape[0]} x {pixels.shape[1]}, and sequence.json says {image.camera} is "
                f"calibrated for {model.image_size[0]} x {model.image_size[1]}; {WAY_OUT}"
            )
        camera_from_lidar = model.camera_from_lidar
        if image.world_from_camera is not None:
            camera_from_lidar = np.linalg.inv(image.world_from_camera) @ frame.world_from_lidar
        return Camera(
            name=image.camera,
            image=pixels,
            image_from_camera=model.image_from_camera.copy(),
            camera_from_lidar=camera_from_lidar.copy(),
            distortion=None if model.distortion is None else model.distortion.copy(),
            timestamp=image.timestamp,
            encoded=encoded,
        )

    def _points(self, path: Path, form: PointFormat, cameras: tuple[Camera, ...]) -> NDArray[np.float32]:
        """(N, 3 + F): the columns asked for, in metres and shares of the full intensity; a scan that the filters empty
        is a bad frame."""
        raw = _read_scan(path, form)
        columns = []
        for name in self.point_columns:
            values = raw[:, form.columns.index(name)]
            values = values * form.metres_per_unit if name in "xyz" else values
            columns.append(values / form.intensity_scale if name == "intensity" else values)
        points = np.column_stack(columns).astype(np.float32)
        check_points(points, str(path))
        return select_points(points, cameras, self.config.point_range, self.config.frustum, str(path))

    def _check_cameras(self) -> None:
        known = dict.fromkeys(camera.name for sequence in self.sequences.values() for camera in sequence.cameras)
        absent = [name for name in self.config.cameras or () if name not in known]
        if absent:
            raise UserError(f"data.cameras: no sequence has {', '.join(absent)}; there are {', '.join(known)}")
        if not self.frames:
            raise UserError(f"data.cameras: no frame has an image of {', '.join(self.config.cameras or known)}")

    def _check_present(self) -> None:
        """Compare the sequences with the folders once, so that a half-copied disk is told before training starts."""
        present: dict[Path, set[str]] = {}
        missing: list[Path] = []
        lacking = 0
        for name, frame in self.frames:
            own = []
            for file in (frame.points, *(image.file for image in self._images(frame))):
                path = self.config.root / name / file
                if path.parent not in present:
                    present[path.parent] = (
                        {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
                    )
                own += [] if path.name in present[path.parent] else [path]
            missing += own
            lacking += bool(own)
        # A frame that lacks a file is a bad frame like any other, unless they are more than a run would bear anyway.
        if lacking == len(self.frames) or lacking > self.config.max_bad_frames(len(self.frames)):
            raise UserError(
                f"{missing[0]}: no such file, though its sequence.json names it; {lacking} of the {len(self.frames)} "
                "frames lack a file; restore them, or list whole sequences in data.split_file"
            )


def _read_scan(path: Path, form: PointFormat) -> NDArray:
    """(N, columns) as the file has them."""
    width = len(form.columns)
    if path.suffix == ".npy":
        rows = read_npy(path)
        if rows.ndim != 2 or rows.shape[1] != width or rows.dtype.kind not in "fiu":
            raise BadFrameError(
                f"{path}: holds {rows.dtype} of shape {rows.shape}, expected numbers of shape (N, {width}), one column "
                f"each for {', '.join(form.columns)}; {WAY_OUT}"
            )
        return rows
    if path.suffix != ".bin":
        raise BadFrameError(f"{path}: a scan is a .bin or a .npy file; {WAY_OUT}")
    dtype = np.dtype(form.dtype).newbyteorder("<")
    content = read_bytes(path)
    if len(content) % (width * dtype.itemsize):
        raise BadFrameError(
            f"{path}: {len(content)} bytes are no whole number of points ({width} columns of {form.dtype}), so the file "
            f"is cut short or points.columns or points.dtype is wrong; {WAY_OUT}"
        )
    return np.frombuffer(content, dtype=dtype).reshape(-1, width)


def _boxes(models: tuple[BoxModel, ...]) -> Boxes:
    """Velocities that are not given are NaN, as where nobody knows them; counts that only some boxes have are left out."""
    unknown = (float("nan"), float("nan"))
    has_velocity = any(box.velocity is not None for box in models)
    has_num_points = bool(models) and all(box.num_points is not None for box in models)
    return Boxes(
        center=np.array([box.center for box in models], dtype=np.float64).reshape(-1, 3),
        size=np.array([box.size for box in models], dtype=np.float64).reshape(-1, 3),
        yaw=np.array([box.yaw for box in models], dtype=np.float64),
        names=tuple(box.name for box in models),
        velocity=np.array([box.velocity or unknown for box in models], dtype=np.float64) if has_velocity else None,
        num_points=np.array([box.num_points for box in models], dtype=np.int64) if has_num_points else None,
    )


def _listed_sequences(config: CustomConfig) -> list[str]:
    """The names of the configured split's sequences."""
    if not config.root.is_dir():
        raise UserError(f"data.root: {config.root}: no such folder; it must hold a folder for every sequence")
    present = sorted(path.parent.name for path in config.root.glob("*/sequence.json"))
    if config.split == "all":
        if not present:
            raise UserError(f"data.root: {config.root}: no folder in it has a sequence.json; see docs/custom_data.md")
        return present
    path = config.split_file or config.root / f"{config.split}.txt"
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read as a list of sequences ({error}); write one name a line, or set data.split=all"
        ) from error
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: must name at least one sequence, each once, one a line")
    absent = [name for name in names if name not in present]
    if absent:
        raise UserError(
            f"{path}: {len(absent)} of its {len(names)} sequences have no sequence.json below {config.root} "
            f"({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}); correct the list or copy them there"
        )
    return names
