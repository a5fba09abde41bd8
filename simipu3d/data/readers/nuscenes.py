"""nuScenes: from the official tables and files alone to Frames, one a key frame.

    root/v1.0-trainval/{sample,sample_data,ego_pose,...}.json      or v1.0-mini, v1.0-test
    root/samples/{LIDAR_TOP,CAM_FRONT,...}/*      the key frames
    root/sweeps/LIDAR_TOP/*                       the scans between them, needed with num_sweeps above 1

The lidar's own frame is x right, y forward, z up; points are turned into x forward, y left, z up. A camera fires when
the scan passes its view, before the lidar's time stamp, and the car moves on: camera_from_lidar goes through the world
with both ego poses, each at its own time. Images are undistorted already; their pixels are taken with integer centres,
as nuScenes' own drawings do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, model_validator

from simipu3d.contracts.frame import Boxes, Camera, Frame, check_points
from simipu3d.data.config import DataConfig
from simipu3d.data.readers.files import WAY_OUT, decode_image, read_bytes, read_float_rows
from simipu3d.data.readers.nuscenes_boxes import read_annotations
from simipu3d.data.readers.nuscenes_splits import SPLITS, VERSIONS
from simipu3d.data.readers.nuscenes_tables import KeyFrames, read_key_frames, read_scenes
from simipu3d.data.readers.select_points import PointRange, check_point_range, select_points
from simipu3d.errors import BadFrameError, UserError
from simipu3d.registry import READERS

CameraName = Literal["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"]
CAMERAS: tuple[CameraName, ...] = CameraName.__args__
"""The six cameras."""

FILE_COLUMNS = ("x", "y", "z", "intensity", "ring")
"""What a .pcd.bin file holds, float32 row after row; it is no PCD file in spite of its name."""

INTENSITY_SCALE = 255.0
"""Intensities are 0 to 255 in the files."""

NATIVE_FROM_LIDAR = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float64)
"""From x forward, y left to the sensor's own x right, y forward."""


class NuScenesConfig(DataConfig):
    """The `data:` block for `name: nuscenes`."""

    name: str = "nuscenes"
    """Which reader (`READERS`)."""
    root: Path
    """The folder that holds samples/, sweeps/ and the folders of tables."""
    version: Literal["v1.0-trainval", "v1.0-mini", "v1.0-test"] = "v1.0-trainval"
    """The folder of tables: which release."""
    split: Literal["train", "val", "test", "mini_train", "mini_val", "all"] = "train"
    """The official scenes of a split (700, 150, 150, 8, 2), or `all`: every scene of the release."""
    split_file: Path | None = None
    """Read this list of scenes, one name a line, like scene-0061, instead of an official split."""
    cameras: tuple[CameraName, ...] | None = None
    """Which cameras. Default: all six."""
    num_sweeps: int = Field(default=1, ge=1, le=100)
    """Scans in a frame: the key frame's and those right before it, moved into its lidar frame. Default: the key frame
    alone; detectors on nuScenes customarily use 10, half a second."""
    features: tuple[Literal["intensity", "ring", "time"], ...] = ("intensity",)
    """Columns of a point after x, y, z: intensity in [0, 1], ring (0 to 31, the beam), time (seconds from its scan to
    the key frame's: 0 for the latter and positive for earlier ones, as detectors on nuScenes have it)."""
    min_distance: NonNegativeFloat = 1.0
    """A point this near to the sensor along both horizontal axes of its own scan is dropped, metres: the car itself
    (devkit: 1.0)."""
    point_range: PointRange | None = None
    """Only points strictly between x, y, z minimum and x, y, z maximum, metres. Default: all."""
    frustum: bool = False
    """Only points that fall into one of the images. Default: the whole scan."""
    load_boxes: bool = True
    """Read sample_annotation, whose 1.2 million rows take some seconds; pre-training never looks at it."""
    keep_other_boxes: bool = False
    """Keep boxes outside the ten detection classes, under their category's name."""

    @model_validator(mode="after")
    def _check(self) -> "NuScenesConfig":
        check_point_range(self.point_range)
        if len(set(self.features)) < len(self.features):
            raise ValueError(f"features names a column twice: {list(self.features)}")
        if self.split == "all" and self.split_file is not None:
            raise ValueError("split all reads no list; remove split_file, or set split to another name")
        return self


@READERS.register("nuscenes", config=NuScenesConfig)
class NuScenesReader:
    """Key frames of nuScenes, scene after scene. Contract: `FrameReader`; frame ids are sample tokens.

    Raises:
        UserError: a table or a scene is missing, rows do not fit together, or many files are absent.
    """

    class_names: tuple[str, ...] = ()
    point_columns: tuple[str, ...] = ("x", "y", "z", "intensity")

    def __init__(self, config: NuScenesConfig):
        self.config = config
        self.cameras = CAMERAS if config.cameras is None else config.cameras
        self.point_columns = ("x", "y", "z", *config.features)
        self.tables = config.root / config.version
        scene_names = _chosen_scenes(config, tuple(read_scenes(self.tables)))
        self.frames = read_key_frames(self.tables, scene_names, self.cameras, with_sweeps=config.num_sweeps > 1)
        self.frame_ids = self.frames.token
        self._check_present()
        self.annotations = None
        if config.load_boxes:
            self.annotations = read_annotations(
                self.tables, self.frame_ids, self.frames.timestamp, config.keep_other_boxes
            )

    def __len__(self) -> int:
        return len(self.frame_ids)

    def prepare(self) -> None:
        """Nothing: the official files are read as they are."""

    def __getitem__(self, index: int) -> Frame:
        frames, lidar = self.frames, int(self.frames.lidar[index])
        world_from_lidar = frames.world_from_sensor(lidar) @ NATIVE_FROM_LIDAR
        lidar_from_world = np.linalg.inv(world_from_lidar)
        cameras = tuple(
            self._camera(name, int(record), world_from_lidar)
            for name, record in zip(self.cameras, frames.cameras[index], strict=True)
        )
        points = select_points(
            self._points(lidar, lidar_from_world),
            cameras,
            self.config.point_range,
            self.config.frustum,
            str(self._path(lidar)),
            "data.min_distance, data.point_range and data.frustum",
        )
        return Frame(
            points=points,
            point_columns=self.point_columns,
            cameras=cameras,
            frame_id=self.frame_ids[index],
            sequence_id=frames.scene_names[frames.scene[index]],
            timestamp=float(frames.record_timestamp[lidar] * 1e-6),
            world_from_lidar=world_from_lidar,
            native_from_lidar=NATIVE_FROM_LIDAR.copy(),
            intensity_scale=INTENSITY_SCALE,
            boxes=self._boxes(index, lidar_from_world),
        )

    def _path(self, record: int) -> Path:
        return self.config.root / self.frames.file_name[record].decode()

    def _boxes(self, index: int, lidar_from_world: NDArray[np.float64]) -> Boxes | None:
        return None if self.annotations is None else self.annotations.boxes(index, lidar_from_world)

    def _camera(self, name: str, record: int, world_from_lidar: NDArray[np.float64]) -> Camera:
        path = self._path(record)
        encoded = read_bytes(path)
        image = decode_image(encoded, str(path))
        size = tuple(self.frames.image_size[record].tolist())
        if image.shape[:2] != size:
            raise BadFrameError(
                f"{path}: the image is {image.shape[0]} x {image.shape[1]}, and sample_data.json and its calibration "
                f"are for {size[0]} x {size[1]}; {WAY_OUT}"
            )
        return Camera(
            name=name,
            image=image,
            image_from_camera=self.frames.sensors[self.frames.sensor[record]].image_from_camera,
            camera_from_lidar=np.linalg.inv(self.frames.world_from_sensor(record)) @ world_from_lidar,
            encoded=encoded,
            timestamp=float(self.frames.record_timestamp[record] * 1e-6),
        )

    def _points(self, lidar: int, lidar_from_world: NDArray[np.float64]) -> NDArray[np.float32]:
        """(N, 3 + F) of the key frame and of the scans before it that the scene has, newest first."""
        scans, record = [], lidar
        for _ in range(self.config.num_sweeps):
            # The key frame's own axes are swapped, not sent through the world and back, so that no digit is lost.
            lidar_from_native = (
                NATIVE_FROM_LIDAR.T if record == lidar else lidar_from_world @ self.frames.world_from_sensor(record)
            )
            age = (self.frames.record_timestamp[lidar] - self.frames.record_timestamp[record]) * 1e-6
            scans.append(self._scan(self._path(record), lidar_from_native, float(age)))
            record = int(self.frames.previous[record])
            if record < 0:
                break
        return np.concatenate(scans)

    def _scan(self, path: Path, lidar_from_native: NDArray[np.float64], age: float) -> NDArray[np.float32]:
        raw = read_float_rows(path, len(FILE_COLUMNS))
        check_points(raw, str(path))
        raw = raw[(np.abs(raw[:, :2]) >= self.config.min_distance).any(axis=1)]
        xyz = raw[:, :3].astype(np.float64) @ lidar_from_native[:3, :3].T + lidar_from_native[:3, 3]
        columns = {
            "intensity": raw[:, 3] / np.float32(INTENSITY_SCALE),
            "ring": raw[:, 4],
            "time": np.full(len(raw), age, dtype=np.float32),
        }
        return np.column_stack([xyz.astype(np.float32), *(columns[name] for name in self.config.features)])

    def _check_present(self) -> None:
        """Compare the tables with the folders once, so that a part of the download is told before training starts."""
        frames = self.frames
        needed = [*frames.cameras.T, frames.lidar]
        for _ in range(self.config.num_sweeps - 1):
            needed.append(np.where(needed[-1] < 0, -1, frames.previous[needed[-1]]))
        records = np.stack(needed, axis=1)
        absent = (records >= 0) & _absent_files(self.config.root, frames)[records]
        lacking = absent.any(axis=1)
        # A frame that lacks a file is a bad frame like any other, unless they are more than a run would bear anyway.
        number = int(lacking.sum())
        if number == len(lacking) or number > self.config.max_bad_frames(len(lacking)):
            scenes = list(dict.fromkeys(frames.scene_names[scene] for scene in frames.scene[lacking]))
            raise UserError(
                f"{self._path(int(records[absent][0]))}: no such file, though {self.tables.name}/sample_data.json "
                f"names it; {number} of the {len(lacking)} key frames lack a file ({', '.join(scenes[:3])}"
                f"{', ...' if len(scenes) > 3 else ''}); unpack all parts of the download, or list the scenes you have "
                "in data.split_file"
            )


def _absent_files(root: Path, frames: KeyFrames) -> NDArray[np.bool_]:
    """(R,) which records' files are not in their folders."""
    present: dict[str, set[str]] = {}
    absent = np.zeros(len(frames.file_name), dtype=np.bool_)
    for record, name in enumerate(frames.file_name):
        folder, _, file = name.decode().rpartition("/")
        if folder not in present:
            path = root / folder
            present[folder] = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        absent[record] = file not in present[folder]
    return absent


def _chosen_scenes(config: NuScenesConfig, present: Sequence[str]) -> tuple[str, ...]:
    """The scenes of the configured split, in the order of its list; `present` are those of the release."""
    if config.split == "all":
        return tuple(present)
    names = SPLITS[config.split] if config.split_file is None else _read_list(config.split_file)
    absent = [name for name in names if name not in present]
    if absent:
        source = f"data.split: {config.split}" if config.split_file is None else str(config.split_file)
        way_out = "take them off the list, or set data.version"
        if config.split_file is None:
            fitting = VERSIONS[config.split]
            way_out = "set data.split=all, or list the scenes you have in data.split_file"
            if fitting != config.version:
                way_out = f"set data.version={fitting}, or {way_out}"
        raise UserError(
            f"{source}: {len(absent)} of its {len(names)} scenes are not in {config.root / config.version}/scene.json "
            f"({', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}), which has {len(present)}; {way_out}"
        )
    return names


def _read_list(path: Path) -> tuple[str, ...]:
    try:
        names = path.read_text(encoding="utf-8").split()
    except FileNotFoundError:
        raise UserError(
            f"data.split_file: {path}: no such list; write one scene name a line, like scene-0061"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a readable list of scene names ({error})") from error
    if not names:
        raise UserError(f"{path}: the list is empty; write one scene name a line, like scene-0061")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: {next(name for name in names if names.count(name) > 1)} stands twice; remove one")
    return tuple(names)
