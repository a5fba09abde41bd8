"""KITTI 3D object benchmark: from the official folders alone to Frames.

    root/training/{velodyne,image_2,calib,label_2}/000000.{bin,png,txt,txt}      root/testing/ the same without label_2
    (images may also be .jpg or another of `files.IMAGE_SUFFIXES`)
    root/ImageSets/{train,val,...}.txt      lists of ids; not part of the download

The velodyne frame is x forward, y left, z up, as ours; the clouds may be full sweeps or already reduced to the image. A
pixel is P2 R0_rect Tr_velo_to_cam X; P2's fourth column is kept. KITTI's pixels have integer centres, as ours.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from simipu3d.contracts.frame import EVERYTHING, Camera, Frame, Wants
from simipu3d.data.readers.base import BaseReader, ReaderConfig, listed, read_list, some
from simipu3d.data.readers.files import (
    WAY_OUT,
    decode_image,
    image_names,
    read_bytes,
    read_float_rows,
    read_image_size,
    read_text,
    unread_image,
)
from simipu3d.data.readers.kitti_labels import read_labels
from simipu3d.data.readers.select_points import PointRange
from simipu3d.errors import BadFrameError, UserError
from simipu3d.geometry.rigid import check_rigid
from simipu3d.registry import READERS

PROJECTIONS = {"image_2": "P2", "image_3": "P3"}
"""The line of a calib file that belongs to each colour camera."""
FILE_COLUMNS = ("x", "y", "z", "intensity")
"""What a .bin file holds, float32 row after row."""
OTHER_CALIBRATIONS = {
    frozenset(
        {"P0", "Tr"}
    ): "KITTI odometry: write the numbers of its line Tr: behind Tr_velo_to_cam:, and the line R0_rect: 1 0 0 "
    "0 1 0 0 0 1 (the rectification is in Tr already)",
    frozenset({"R_rect", "Tr_velo_cam"}): "KITTI tracking: rename its lines R_rect to R0_rect: and Tr_velo_cam to "
    "Tr_velo_to_cam:, and copy the file for every frame of its sequence",
    frozenset(
        {"P_rect_02"}
    ): "KITTI raw data (calib_cam_to_cam.txt); docs/custom_data.md, 'From KITTI raw in ten lines', reads such drives",
    frozenset(
        {"R", "T"}
    ): "KITTI raw data (calib_velo_to_cam.txt or calib_imu_to_velo.txt); docs/custom_data.md, 'From KITTI "
    "raw in ten lines', reads such drives",
}
"""Lines that tell the calibration files of KITTI's other benchmarks, what these are, and the way out."""


class KittiConfig(ReaderConfig):
    """The `data:` block for `name: kitti`."""

    name: str = "kitti"
    """Which reader (`READERS`)."""
    root: Path
    """The folder that holds training/ and testing/."""
    split: str = "train"
    """`train`, `val`, `trainval` or any other name: the frames of training/ that ImageSets/<name>.txt lists; `test`:
    those of testing/ (all of them without ImageSets/test.txt); `paper`: train + test, so the images without val
    (SimIPU); `all`: every frame of training/, which needs no list."""
    split_file: Path | None = None
    """Read this list of ids, one a line, instead of ImageSets/<split>.txt. An id may name its folder:
    testing/000017."""
    cameras: tuple[Literal["image_2", "image_3"], ...] | None = ("image_2",)
    """Which colour cameras. Default: the left one (released code)."""
    points_folder: str = "velodyne"
    """Folder of the clouds; `velodyne_reduced` is what some toolboxes call the copies cropped to the image."""
    features: tuple[Literal["intensity"], ...] = ("intensity",)
    """Columns of a point after x, y, z. [] takes none."""
    point_range: PointRange | None = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)
    """Only points strictly between x, y, z minimum and x, y, z maximum, metres; null: all (default: released code)."""
    frustum: bool = True
    """Only points that fall into one of the images; changes nothing in clouds that are already reduced."""


class KittiCalibration:
    """One calib file.

    Attributes:
        camera_from_lidar: (4, 4) R0_rect Tr_velo_to_cam: from the velodyne to the rectified frame of camera 0.
        image_from_camera: (3, 4) by name of the camera.

    Raises:
        BadFrameError: a line is missing or has not as many finite numbers as it must, or its numbers are no calibration.
    """

    def __init__(self, path: Path, cameras: tuple[str, ...]):
        text = read_text(path)
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if "R0_rect" not in lines or "Tr_velo_to_cam" not in lines:
            _check_kind(path, text)
        rectify, camera_from_lidar = np.eye(4), np.eye(4)
        rectify[:3, :3] = _calib_matrix(path, lines, "R0_rect", (3, 3))
        camera_from_lidar[:3] = _calib_matrix(path, lines, "Tr_velo_to_cam", (3, 4))
        self.camera_from_lidar = rectify @ camera_from_lidar
        if wrong := check_rigid(rectify) or check_rigid(self.camera_from_lidar):
            raise BadFrameError(f"{path}: R0_rect Tr_velo_to_cam {wrong}; {WAY_OUT}")
        self.image_from_camera = {name: _calib_matrix(path, lines, PROJECTIONS[name], (3, 4)) for name in cameras}


def _check_kind(path: Path, text: str) -> None:
    """Raise `BadFrameError` when a file is the calibration of another benchmark of KITTI's."""
    words = {line.split()[0].removesuffix(":") for line in text.splitlines() if line.split()}
    for marks, way_out in OTHER_CALIBRATIONS.items():
        if marks <= words:
            raise BadFrameError(
                f"{path}: has no line R0_rect: and Tr_velo_to_cam: as the object benchmark has; it is a calibration of {way_out}"
            )


def _calib_matrix(path: Path, lines: dict[str, str], name: str, shape: tuple[int, int]) -> NDArray[np.float64]:
    if name not in lines:
        raise BadFrameError(f"{path}: has no line {name}:, but {some(lines, 12) or 'none at all'}; {WAY_OUT}")
    try:
        values = np.array([float(word) for word in lines[name].split()])
    except ValueError:
        raise BadFrameError(
            f"{path}: {name} holds a word that is no number: {lines[name].strip()[:200]!r}; {WAY_OUT}"
        ) from None
    if len(values) != shape[0] * shape[1] or not np.isfinite(values).all():
        raise BadFrameError(
            f"{path}: {name} has {len(values)} numbers, expected {shape[0] * shape[1]} finite ones; {WAY_OUT}"
        )
    return values.reshape(shape)


IMAGE = "png"
"""The official suffix of images; copies may have another of `files.IMAGE_SUFFIXES`."""


@READERS.register("kitti", config=KittiConfig)
class KittiReader(BaseReader):
    """Frames of the KITTI object benchmark. Contract: `FrameReader`; frame ids are like training/000123.

    Boxes are those of label_2, which training/ alone has. KITTI labelled the images of image_2: the boxes' `image_boxes` and
    `ignored` have that camera only, whichever cameras are read.

    Raises:
        UserError: a folder or list is missing, or listed frames are absent.
    """

    config: KittiConfig

    def __init__(self, config: KittiConfig, wants: Wants = EVERYTHING):
        super().__init__(config, wants)
        self.point_columns = ("x", "y", "z", *config.features)
        self.cameras = tuple(PROJECTIONS) if config.cameras is None else config.cameras
        self._listed: dict[tuple[str, str], dict[str, str]] = {}
        folders = self._folders()
        self.frame_ids = _listed_frames(config, folders)
        if any((config.root / part / "label_2").is_dir() for part in {name.split("/")[0] for name in self.frame_ids}):
            self.gives = frozenset({"boxes"})
        needed = ([self._name(frame_id, *item) for item in folders.items()] for frame_id in self.frame_ids)
        way_out = "unpack the whole download, or shorten the list"
        self._check_present(needed, self.frame_ids, "the list of frames", way_out)

    def __len__(self) -> int:
        return len(self.frame_ids)

    def __getitem__(self, index: int) -> Frame:
        frame_id = self.frame_ids[index]
        labels = self.config.root / self._name(frame_id, "label_2", "txt")
        has_boxes = self._wanted("boxes") and labels.is_file()
        calibration = None
        if self._needs_cameras or has_boxes:
            path = self.config.root / self._name(frame_id, "calib", "txt")
            calibration = KittiCalibration(path, self.cameras if self._needs_cameras else ())
        cameras = tuple(self._camera(frame_id, name, calibration) for name in self.cameras if self._needs_cameras)
        return Frame(
            points=self._points(frame_id, cameras) if self.wants.points else self._no_points(),
            point_columns=self.point_columns,
            cameras=cameras if self.wants.images else (),
            frame_id=frame_id,
            boxes=read_labels(labels, calibration.camera_from_lidar) if has_boxes else None,
        )

    def _camera(self, frame_id: str, name: str, calibration: KittiCalibration) -> Camera:
        path = self.config.root / self._name(frame_id, name, IMAGE)
        encoded = read_bytes(path) if self.wants.images else None
        return Camera(
            name=name,
            image=unread_image(read_image_size(path), str(path))
            if encoded is None
            else decode_image(encoded, str(path)),
            image_from_camera=calibration.image_from_camera[name],
            camera_from_lidar=calibration.camera_from_lidar,
            encoded=encoded,
        )

    def _points(self, frame_id: str, cameras: tuple[Camera, ...]) -> NDArray[np.float32]:
        path = self.config.root / self._name(frame_id, self.config.points_folder, "bin")
        points = read_float_rows(path, len(FILE_COLUMNS))
        return points[self._cut(points, cameras, str(path)), : len(self.point_columns)]

    def _name(self, frame_id: str, folder: str, suffix: str) -> str:
        """A file's path below the root."""
        part, number = frame_id.split("/")
        if suffix == IMAGE:
            name = self._images(part, folder).get(number, f"{number}.{suffix}")
            return f"{part}/{folder}/{name}"
        return f"{part}/{folder}/{number}.{suffix}"

    def _images(self, part: str, camera: str) -> dict[str, str]:
        """The images of a folder, which is listed once: they need not be .png."""
        if (part, camera) not in self._listed:
            self._listed[part, camera] = image_names(self.config.root / part / camera)
        return self._listed[part, camera]

    def _folders(self) -> dict[str, str]:
        """The folders that every frame is read of, and their files' suffixes; labels are optional."""
        folders = {self.config.points_folder: "bin"} if self.wants.points else {}
        if self._needs_cameras:
            folders |= dict.fromkeys(self.cameras, IMAGE)
        if self._needs_cameras or self._wanted("boxes") or not folders:
            folders["calib"] = "txt"
        return folders


def _stems(folder: Path, suffix: str) -> set[str]:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; data.root must hold training/ and testing/ of the KITTI object download"
        )
    return set(image_names(folder)) if suffix == IMAGE else {path.stem for path in listed(folder, f"*.{suffix}")}


def _every_frame(config: KittiConfig, part: str, folders: dict[str, str]) -> list[str]:
    # Every file names its frame: one whose scan alone is missing must be reported, not passed over.
    stems = set().union(*(_stems(config.root / part / folder, suffix) for folder, suffix in folders.items()))
    frame_ids = [f"{part}/{stem}" for stem in sorted(stems)]
    if not frame_ids:
        folder, suffix = next(iter(folders.items()))
        raise UserError(f"{config.root / part / folder}: holds no .{suffix} file; unpack the KITTI download of it")
    return frame_ids


def _read_ids(path: Path, part: str) -> list[str]:
    """Frame ids of a list; an id without a folder belongs to `part`."""
    source = (
        "KITTI's download has none; the customary ones (train 3712, val 3769 ids) are in data/kitti/ImageSets of OpenPCDet "
        "and of mmdetection3d: copy them to ImageSets/ of data.root, name a list with data.split_file, or set "
        "data.split=all"
    )
    words = read_list(path, "frame id", "000123", source)
    frame_ids = [word if "/" in word else f"{part}/{word}" for word in words]
    for word, frame_id in zip(words, frame_ids, strict=True):
        folder, _, number = frame_id.partition("/")
        if folder not in ("training", "testing") or "/" in number or "." in number:
            raise UserError(f"{path}: {word!r} is no frame id; write one a line, like 000123 or testing/000123")
    if len(set(frame_ids)) < len(frame_ids):
        twice = next(frame_id for frame_id in frame_ids if frame_ids.count(frame_id) > 1)
        raise UserError(f"{path}: {twice} stands twice; remove one")
    return frame_ids


def _listed_frames(config: KittiConfig, folders: dict[str, str]) -> tuple[str, ...]:
    """The frame ids of the configured split, in the order of its list."""
    if not config.root.is_dir():
        raise UserError(
            f"data.root: {config.root}: no such folder; it must hold training/ and testing/ of the KITTI download"
        )
    lists = config.root / "ImageSets"
    if config.split == "all":
        return tuple(_every_frame(config, "training", folders))
    test_list = lists / "test.txt"
    if config.split == "test" and config.split_file is not None:
        return tuple(_read_ids(config.split_file, "testing"))
    test = []
    if config.split in ("test", "paper"):
        test = _read_ids(test_list, "testing") if test_list.is_file() else _every_frame(config, "testing", folders)
    if config.split == "test":
        return tuple(test)
    name = "train" if config.split == "paper" else config.split
    listed = _read_ids(config.split_file or lists / f"{name}.txt", "training")
    return tuple(dict.fromkeys([*listed, *test]))
