"""Your own rig: a folder a sequence, with one JSON that names scans, images, calibration and poses.

    root/<sequence>/sequence.json       see docs/custom_data.md and `custom_sequence`
    root/<sequence>/...                 scans (.bin, .npy), images and ground truth, wherever sequence.json says
    root/<split>.txt                    names of sequences, one a line, for every split but `all`

An image's camera_from_lidar is inverse(world_from_camera) world_from_lidar where both are given, so that the way of the
car between scan and exposure is inside, else the calibration's own.
"""

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simipu3d.contracts.frame import EVERYTHING, Boxes, Camera, Frame, TruthKind, Wants, check_points
from simipu3d.data.readers.base import CAMERA_TRUTH, POINT_TRUTH, BaseReader, ReaderConfig, check_listed, read_list
from simipu3d.data.readers.custom_sequence import (
    MANUAL,
    BoxModel,
    FrameModel,
    ImageModel,
    PointFormat,
    SequenceModel,
    read_sequence,
)
from simipu3d.data.readers.custom_truth import read_pixels, read_point_labels
from simipu3d.data.readers.files import WAY_OUT, decode_image, read_bytes, read_npy, unread_image
from simipu3d.errors import BadFrameError, UserError
from simipu3d.registry import READERS

log = logging.getLogger(__name__)

CAMERA_AXES = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
"""camera_from_lidar of a frame without scan and boxes: its lidar frame is the camera's, turned x forward, y left, z up."""


class CustomConfig(ReaderConfig):
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


@READERS.register("custom", config=CustomConfig)
class CustomReader(BaseReader):
    """Frames of a rig in the custom layout. Contract: `FrameReader`; frame ids are <sequence>/<id>.

    Where points are wanted, frames without a scan are left out, and where images are wanted, those without one of the
    chosen cameras.

    Raises:
        UserError: a list, a sequence.json or a column is missing or wrong, or many files are absent.
    """

    config: CustomConfig

    def __init__(self, config: CustomConfig, wants: Wants = EVERYTHING):
        super().__init__(config, wants)
        self.point_columns = ("x", "y", "z", *config.features)
        self.sequences = self._open_all(_listed_sequences(config))
        self.class_names = self._same_classes()
        frames = [(name, frame) for name, sequence in self.sequences.items() for frame in sequence.frames]
        self.frames = [(name, frame) for name, frame in frames if self._lacks(frame) is None]
        self._check_some(frames)
        self.frame_ids = tuple(f"{name}/{frame.id}" for name, frame in self.frames)
        self.gives = self._given()
        self.sequence_ids = tuple(name for name, _ in self.frames)
        needed = ([f"{name}/{file}" for file in self._files(frame)] for name, frame in self.frames)
        self._check_present(
            needed, self.sequence_ids, "its sequence.json", "restore them, or list whole sequences in data.split_file"
        )

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Frame:
        name, frame = self.frames[index]
        sequence = self.sequences[name]
        cameras = tuple(self._camera(name, frame, image) for image in self._images(frame) if self._needs_cameras)
        points = self._no_points()
        truth: dict[str, NDArray] = {}
        if self.wants.points:
            points, truth = self._points(name, frame, sequence.points, cameras)
        return Frame(
            points=points,
            point_columns=self.point_columns,
            cameras=cameras if self.wants.images else (),
            frame_id=self.frame_ids[index],
            sequence_id=name,
            timestamp=frame.timestamp,
            world_from_lidar=None if frame.world_from_lidar is None else frame.world_from_lidar.copy(),
            intensity_scale=sequence.points.intensity_scale,
            boxes=_boxes(frame.boxes) if self._wanted("boxes") and frame.boxes is not None else None,
            **truth,
        )

    def _lacks(self, frame: FrameModel) -> str | None:
        """What a frame lacks of what is wanted."""
        if self.wants.points and frame.points is None:
            return "points"
        return "image" if self.wants.images and not self._images(frame) else None

    def _given(self) -> frozenset[TruthKind]:
        """The kinds of ground truth that a frame of the split names."""
        given: set[TruthKind] = set()
        for _, frame in self.frames:
            given |= {"boxes"} if frame.boxes is not None else set()
            given |= {kind for kind in POINT_TRUTH if getattr(frame, kind) is not None}
            given |= {kind for kind in CAMERA_TRUTH for image in frame.images if getattr(image, kind) is not None}
        return frozenset(given)

    def _files(self, frame: FrameModel) -> list[str]:
        """The files that are read of a frame."""
        own = [frame.points, *(getattr(frame, kind) for kind in POINT_TRUTH if self._wanted(kind))]
        names = own if self.wants.points else []
        for image in self._images(frame) if self.wants.images else []:
            names = [*names, image.file, *(getattr(image, kind) for kind in CAMERA_TRUTH if self._wanted(kind))]
        return [name for name in names if name is not None]

    def _same_classes(self) -> tuple[str, ...]:
        """The class names of all sequences that have some."""
        lists = {sequence.class_names: name for name, sequence in self.sequences.items() if sequence.class_names}
        if len(lists) > 1:
            (first, own), (other, name) = list(lists.items())[:2]
            raise UserError(
                f"{self.config.root / name}/sequence.json: class_names is {list(other)}, and {own} has {list(first)}; give "
                "every sequence the same list"
            )
        return next(iter(lists), ())

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
            (_, *others), first = wrong, next(iter(wrong.values()))
            if not others:
                raise first
            raise UserError(f"{first}; {len(others)} further sequences are wrong: {', '.join(others)}") from first
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
        path, encoded, truth = self.config.root / name / image.file, None, {}
        pixels = unread_image(model.image_size)
        if self.wants.images:
            encoded = read_bytes(path)
            pixels = decode_image(encoded, str(path))
            sequence = self.sequences[name]
            for kind in (kind for kind in CAMERA_TRUTH if self._wanted(kind)):
                if (file := getattr(image, kind)) is not None:
                    truth[kind] = read_pixels(self.config.root / name / file, kind, model.image_size, sequence)
        if pixels.shape[:2] != model.image_size:
            raise BadFrameError(
                f"{path}: the image is {pixels.shape[0]} x {pixels.shape[1]}, and sequence.json says {image.camera} is "
                f"calibrated for {model.image_size[0]} x {model.image_size[1]}; {WAY_OUT}"
            )
        camera_from_lidar = CAMERA_AXES if model.camera_from_lidar is None else model.camera_from_lidar
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
            **truth,
        )

    def _points(
        self, name: str, frame: FrameModel, form: PointFormat, cameras: tuple[Camera, ...]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray]]:
        """(N, 3 + F), the columns asked for, in metres and shares of the full intensity; and their classes and instances,
        where they are wanted. A scan that the filters empty is a bad frame."""
        path = self.config.root / name / frame.points
        raw = _read_scan(path, form)
        columns = []
        for column in self.point_columns:
            values = raw[:, form.columns.index(column)]
            values = values * form.metres_per_unit if column in "xyz" else values
            columns.append(values / form.intensity_scale if column == "intensity" else values)
        points = np.column_stack(columns).astype(np.float32)
        check_points(points, str(path))
        kept = self._select(points, cameras, str(path))
        truth: dict[str, NDArray] = {}
        for kind in (kind for kind in POINT_TRUTH if self._wanted(kind)):
            if (file := getattr(frame, kind)) is not None:
                labels = read_point_labels(self.config.root / name / file, kind, len(points), self.class_names)
                truth[kind] = labels[kept]
        return points[kept], truth

    def _check_some(self, frames: list[tuple[str, FrameModel]]) -> None:
        """The chosen cameras are known, and a frame has what is wanted; frames that are left out are reported."""
        known = dict.fromkeys(camera.name for sequence in self.sequences.values() for camera in sequence.cameras)
        absent = [name for name in self.config.cameras or () if name not in known]
        if absent:
            there = ", ".join(known) or "none"
            raise UserError(f"data.cameras: no sequence has {', '.join(absent)}; there are {there}")
        if self.wants.points and all(frame.points is None for _, frame in frames):
            raise UserError(f"{self.config.root}: no frame has points, which are needed; {MANUAL}")
        if not self.frames:
            cameras = ", ".join(self.config.cameras or known) or "any camera"
            raise UserError(f"data.cameras: no frame has an image of {cameras}, which is needed")
        for what in ("points", "image"):
            number = sum(self._lacks(frame) == what for _, frame in frames)
            words = "no points" if what == "points" else "no image of data.cameras"
            if number:
                log.warning(
                    "%s: %d of %d frames have %s and are left out", self.config.root, number, len(frames), words
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
    """Velocities and image boxes that are not given are NaN; counts, difficulties and ids that only some boxes have are left
    out."""
    unknown = (float("nan"),) * 4
    has_velocity = any(box.velocity is not None for box in models)
    has_attributes = any(box.attribute is not None for box in models)
    cameras = dict.fromkeys(camera for box in models for camera in box.image_boxes)
    num_points, difficulty, ids = (
        [getattr(box, key) for box in models]
        if all(getattr(box, key) is not None for box in models) and models
        else None
        for key in ("num_points", "difficulty", "id")
    )
    return Boxes(
        center=np.array([box.center for box in models], dtype=np.float64).reshape(-1, 3),
        size=np.array([box.size for box in models], dtype=np.float64).reshape(-1, 3),
        yaw=np.array([box.yaw for box in models], dtype=np.float64),
        names=tuple(box.name for box in models),
        velocity=np.array([box.velocity or unknown[:2] for box in models], dtype=np.float64) if has_velocity else None,
        attributes=tuple(box.attribute or "" for box in models) if has_attributes else None,
        num_points=None if num_points is None else np.array(num_points, dtype=np.int64),
        difficulty=None if difficulty is None else np.array(difficulty, dtype=np.int64),
        ids=None if ids is None else tuple(ids),
        image_boxes={c: np.array([box.image_boxes.get(c, unknown) for box in models]) for c in cameras} or None,
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
    way_out = "write one sequence a line, or set data.split=all"
    names = read_list(path, "sequence", "monday", way_out)
    check_listed(
        str(path),
        "sequences",
        names,
        present,
        f"{config.root} with a sequence.json",
        "correct the list or copy them there",
    )
    return names
