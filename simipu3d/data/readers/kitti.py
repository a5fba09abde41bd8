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
from pydantic import model_validator

from simipu3d.contracts.frame import Boxes, Camera, Frame, check_points
from simipu3d.data.config import DataConfig
from simipu3d.data.readers.files import (
    WAY_OUT,
    decode_image,
    find_image,
    image_stems,
    read_bytes,
    read_float_rows,
    read_text,
)
from simipu3d.data.readers.kitti_labels import read_labels
from simipu3d.data.readers.select_points import PointRange, check_point_range, in_frustum, in_range
from simipu3d.errors import BadFrameError, UserError
from simipu3d.registry import READERS

PROJECTIONS = {"image_2": "P2", "image_3": "P3"}
"""The line of a calib file that belongs to each colour camera."""


class KittiConfig(DataConfig):
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
    point_range: PointRange | None = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)
    """Only points strictly between x, y, z minimum and x, y, z maximum, metres; null: all (default: released code)."""
    frustum: bool = True
    """Only points that fall into one of the images; changes nothing in clouds that are already reduced."""
    load_boxes: bool = True
    """Read label_2 where there is one. Pre-training never looks at it."""

    @model_validator(mode="after")
    def _check(self) -> "KittiConfig":
        check_point_range(self.point_range)
        return self


class KittiCalibration:
    """One calib file.

    Attributes:
        camera_from_lidar: (4, 4) R0_rect Tr_velo_to_cam: from the velodyne to the rectified frame of camera 0.
        image_from_camera: (3, 4) by name of the camera.

    Raises:
        BadFrameError: a line is missing or has not as many finite numbers as it must.
    """

    def __init__(self, path: Path, cameras: tuple[str, ...]):
        lines = dict(line.split(":", 1) for line in read_text(path).splitlines() if ":" in line)
        rectify, camera_from_lidar = np.eye(4), np.eye(4)
        rectify[:3, :3] = _calib_matrix(path, lines, "R0_rect", (3, 3))
        camera_from_lidar[:3] = _calib_matrix(path, lines, "Tr_velo_to_cam", (3, 4))
        self.camera_from_lidar = rectify @ camera_from_lidar
        self.image_from_camera = {name: _calib_matrix(path, lines, PROJECTIONS[name], (3, 4)) for name in cameras}


def _calib_matrix(path: Path, lines: dict[str, str], name: str, shape: tuple[int, int]) -> NDArray[np.float64]:
    if name not in lines:
        raise BadFrameError(f"{path}: has no line {name}:, but {', '.join(lines) or 'none at all'}; {WAY_OUT}")
    try:
        values = np.array([float(word) for word in lines[name].split()])
    except ValueError:
        raise BadFrameError(
            f"{path}: {name} holds a word that is no number: {lines[name].strip()!r}; {WAY_OUT}"
        ) from None
    if len(values) != shape[0] * shape[1] or not np.isfinite(values).all():
        raise BadFrameError(
            f"{path}: {name} has {len(values)} numbers, expected {shape[0] * shape[1]} finite ones; {WAY_OUT}"
        )
    return values.reshape(shape)


@READERS.register("kitti", config=KittiConfig)
class KittiReader:
    """Frames of the KITTI object benchmark. Contract: `FrameReader`; frame ids are like training/000123.

    Raises:
        UserError: a folder or list is missing, or listed frames are absent.
    """

    class_names: tuple[str, ...] = ()
    point_columns = ("x", "y", "z", "intensity")

    def __init__(self, config: KittiConfig):
        self.config = config
        self.cameras = tuple(PROJECTIONS) if config.cameras is None else config.cameras
        self.frame_ids = _listed_frames(config)
        self._check_present()

    def __len__(self) -> int:
        return len(self.frame_ids)

    def prepare(self) -> None:
        """Nothing: the official files are read as they are."""

    def __getitem__(self, index: int) -> Frame:
        frame_id = self.frame_ids[index]
        points_path = self._path(frame_id, self.config.points_folder, "bin")
        points = read_float_rows(points_path, len(self.point_columns))
        check_points(points, str(points_path))
        calibration = KittiCalibration(self._path(frame_id, "calib", "txt"), self.cameras)
        cameras = tuple(self._camera(frame_id, name, calibration) for name in self.cameras)
        return Frame(
            points=self._filter(points, cameras, points_path),
            point_columns=self.point_columns,
            cameras=cameras,
            frame_id=frame_id,
            boxes=self._boxes(frame_id, calibration),
        )

    def _camera(self, frame_id: str, name: str, calibration: KittiCalibration) -> Camera:
        official = self._path(frame_id, name, "png")
        path = find_image(official.parent, official.stem)
        encoded = read_bytes(path)
        return Camera(
            name=name,
            image=decode_image(encoded, str(path)),
            image_from_camera=calibration.image_from_camera[name],
            camera_from_lidar=calibration.camera_from_lidar,
            encoded=encoded,
        )

    def _path(self, frame_id: str, folder: str, suffix: str) -> Path:
        part, number = frame_id.split("/")
        return self.config.root / part / folder / f"{number}.{suffix}"

    def _boxes(self, frame_id: str, calibration: KittiCalibration) -> Boxes | None:
        path = self._path(frame_id, "label_2", "txt")
        return read_labels(path, calibration.camera_from_lidar) if self.config.load_boxes and path.is_file() else None

    def _filter(self, points: NDArray[np.float32], cameras: tuple[Camera, ...], path: Path) -> NDArray[np.float32]:
        """The points inside the range and, if asked for, inside an image; a scan that loses all of them is a bad
        frame."""
        kept = points
        if self.config.point_range is not None:
            kept = kept[in_range(kept, self.config.point_range)]
        if self.config.frustum and cameras:
            kept = kept[in_frustum(kept, cameras)]
        if len(kept):
            return kept
        if cameras and not in_frustum(points, cameras).any():
            raise BadFrameError(f"{path}: no camera sees any of its {len(points)} points; {WAY_OUT}")
        raise BadFrameError(
            f"{path}: none of its {len(points)} points is seen by a camera and lies in data.point_range "
            f"{list(self.config.point_range or ())}; widen the range, or set data.on_bad_frame=skip"
        )

    def _check_present(self) -> None:
        """Compare the list with the folders once, so that a half-unpacked download is told before training starts."""
        folders = {self.config.points_folder: "bin", "calib": "txt", **dict.fromkeys(self.cameras, "png")}
        present: dict[tuple[str, str], set[str]] = {}
        for part in sorted({frame_id.split("/")[0] for frame_id in self.frame_ids}):
            for folder, suffix in folders.items():
                present[part, folder] = _stems(self.config.root / part / folder, suffix)
        absent, lacking = 0, []
        for frame_id in self.frame_ids:
            part, number = frame_id.split("/")
            missing = [folder for folder in folders if number not in present[part, folder]]
            absent += len(missing) == len(folders)
            lacking += [frame_id] if missing else []
        # A frame that lacks a file is a bad frame like any other, unless they are more than a run would bear anyway.
        if absent or len(lacking) > self.config.max_bad_frames(len(self.frame_ids)):
            raise UserError(
                f"{self.config.root}: {len(lacking)} of the {len(self.frame_ids)} frames of split {self.config.split} "
                f"are absent or lack a file of {', '.join(folders)} ({_some(lacking)}); unpack the whole download, or "
                "shorten the list"
            )


def _some(frame_ids: list[str]) -> str:
    return ", ".join(frame_ids[:4]) + (", ..." if len(frame_ids) > 4 else "")


def _stems(folder: Path, suffix: str) -> set[str]:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; data.root must hold training/ and testing/ of the KITTI object download"
        )
    return image_stems(folder) if suffix == "png" else {path.stem for path in folder.glob(f"*.{suffix}")}


def _every_frame(config: KittiConfig, part: str) -> list[str]:
    # Every file names its frame: one whose scan alone is missing must be told, not passed over.
    image_folder = config.cameras[0] if config.cameras else "image_2"
    folders = {config.points_folder: "bin", image_folder: "png", "calib": "txt"}
    stems = set().union(*(_stems(config.root / part / folder, suffix) for folder, suffix in folders.items()))
    frame_ids = [f"{part}/{stem}" for stem in sorted(stems)]
    if not frame_ids:
        raise UserError(
            f"{config.root / part / config.points_folder}: holds no .bin file; unpack the KITTI velodyne download"
        )
    return frame_ids


def _read_list(path: Path, part: str) -> list[str]:
    """Frame ids of a list; an id without a folder belongs to `part`."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such list. KITTI's download has none; the customary ones (train 3712, val 3769 ids) are in "
            "data/kitti/ImageSets of OpenPCDet and of mmdetection3d: copy them to ImageSets/ of data.root, name a list "
            "with data.split_file, or set data.split=all"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a readable list of frame ids ({error})") from error
    frame_ids = [word if "/" in word else f"{part}/{word}" for word in words]
    for word, frame_id in zip(words, frame_ids, strict=True):
        folder, _, number = frame_id.partition("/")
        if folder not in ("training", "testing") or not number.isdigit():
            raise UserError(f"{path}: {word!r} is no frame id; write one a line, like 000123 or testing/000123")
    if not frame_ids:
        raise UserError(f"{path}: the list is empty; write one frame id a line, like 000123")
    if len(set(frame_ids)) < len(frame_ids):
        twice = next(frame_id for frame_id in frame_ids if frame_ids.count(frame_id) > 1)
        raise UserError(f"{path}: {twice} stands in the list twice; remove one")
    return frame_ids


def _listed_frames(config: KittiConfig) -> tuple[str, ...]:
    """The frame ids of the configured split, in the order of its list."""
    if not config.root.is_dir():
        raise UserError(
            f"data.root: {config.root}: no such folder; it must hold training/ and testing/ of the KITTI download"
        )
    lists = config.root / "ImageSets"
    if config.split == "all":
        if config.split_file is not None:
            raise UserError("data.split_file: split all reads no list; remove one of the two, or set data.split=train")
        return tuple(_every_frame(config, "training"))
    test_list = lists / "test.txt"
    if config.split == "test" and config.split_file is not None:
        return tuple(_read_list(config.split_file, "testing"))
    test = []
    if config.split in ("test", "paper"):
        test = _read_list(test_list, "testing") if test_list.is_file() else _every_frame(config, "testing")
    if config.split == "test":
        return tuple(test)
    name = "train" if config.split == "paper" else config.split
    listed = _read_list(config.split_file or lists / f"{name}.txt", "training")
    return tuple(dict.fromkeys([*listed, *test]))
