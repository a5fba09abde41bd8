"""nuScenes: from the official tables and files alone to Frames, one a key frame.

    root/v1.0-trainval/{sample,sample_data,ego_pose,...}.json      or v1.0-mini, v1.0-test
    root/samples/{LIDAR_TOP,CAM_FRONT,...}/*      the key frames
    root/sweeps/LIDAR_TOP/*                       the scans between them, needed with num_sweeps above 1

The lidar's own frame is x right, y forward, z up; points are turned into x forward, y left, z up. A camera fires when
the scan passes its view, before the lidar's time stamp, and the car moves on: camera_from_lidar goes through the world
with both ego poses, each at its own time. Images are undistorted already; their pixels are taken with integer centres,
as nuScenes' own drawings do.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat

from simipu3d.contracts.frame import EVERYTHING, Camera, Frame, Wants
from simipu3d.data.readers.base import BaseReader, ReaderConfig, check_listed, read_list
from simipu3d.data.readers.files import WAY_OUT, decode_image, read_bytes, read_float_rows, unread_image
from simipu3d.data.readers.nuscenes_boxes import ANNOTATIONS, read_annotations
from simipu3d.data.readers.nuscenes_splits import SPLITS, VERSIONS
from simipu3d.data.readers.nuscenes_tables import read_key_frames, read_scenes
from simipu3d.errors import BadFrameError
from simipu3d.registry import READERS

CameraName = Literal["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"]
CAMERAS: tuple[CameraName, ...] = get_args(CameraName)
"""The six cameras."""

FILE_COLUMNS = ("x", "y", "z", "intensity", "ring")
"""What a .pcd.bin file holds, float32 row after row; it is no PCD file in spite of its name."""

INTENSITY_SCALE = 255.0
"""Intensities are 0 to 255 in the files."""

NATIVE_FROM_LIDAR = np.array([[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float64)
"""From x forward, y left to the sensor's own x right, y forward."""


class NuScenesConfig(ReaderConfig):
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
    keep_other_boxes: bool = False
    """Keep boxes outside the ten detection classes, under their category's name."""


@READERS.register("nuscenes", config=NuScenesConfig)
class NuScenesReader(BaseReader):
    """Key frames of nuScenes, scene after scene. Contract: `FrameReader`; frame ids are sample tokens.

    Raises:
        UserError: a table or a scene is missing, rows do not fit together, or many files are absent.
    """

    config: NuScenesConfig

    def __init__(self, config: NuScenesConfig, wants: Wants = EVERYTHING):
        super().__init__(config, wants)
        self.cameras = CAMERAS if config.cameras is None else config.cameras
        self.point_columns = ("x", "y", "z", *config.features)
        self.tables = config.root / config.version
        scene_names = _chosen_scenes(config, tuple(read_scenes(self.tables)))
        cameras = self.cameras if self._needs_cameras else ()
        with_sweeps = wants.points and config.num_sweeps > 1
        self.frames = read_key_frames(self.tables, scene_names, cameras, with_sweeps=with_sweeps)
        self.frame_ids = self.frames.token
        self.sequence_ids = tuple(self.frames.scene_names[scene] for scene in self.frames.scene)
        way_out = (
            "unpack all parts of the download, or list the scenes you have in data.split_file (tools/inspect_data.py "
            "--list-complete FILE writes the list)"
        )
        names = ([self.frames.file_name[r].decode() for r in records] for records in self._records())
        self._check_present(names, self.sequence_ids, f"{self.tables.name}/sample_data.json", way_out)
        self.annotations = None
        # v1.0-test has the table, without a row.
        labelled = config.version != "v1.0-test" and (self.tables / ANNOTATIONS).is_file()
        if self._wanted("boxes"):
            self.annotations = read_annotations(
                self.tables, self.frame_ids, self.frames.timestamp, config.keep_other_boxes
            )
            labelled = self.annotations is not None
        self.gives = frozenset({"boxes"} if labelled else ())

    def __len__(self) -> int:
        return len(self.frame_ids)

    def __getitem__(self, index: int) -> Frame:
        frames, lidar = self.frames, int(self.frames.lidar[index])
        world_from_lidar = frames.world_from_sensor(lidar) @ NATIVE_FROM_LIDAR
        lidar_from_world: NDArray[np.float64] = np.linalg.inv(world_from_lidar)
        cameras = tuple(
            self._camera(name, int(record), world_from_lidar)
            for name, record in zip(self.cameras, frames.cameras[index], strict=False)  # no records: none are needed
        )
        points = self._no_points()
        if self.wants.points:
            points = self._points(lidar, lidar_from_world)
            filters = "data.min_distance, data.point_range and data.frustum"
            points = points[self._select(points, cameras, str(self._path(lidar)), filters)]
        return Frame(
            points=points,
            point_columns=self.point_columns,
            cameras=cameras if self.wants.images else (),
            frame_id=self.frame_ids[index],
            sequence_id=self.sequence_ids[index],
            timestamp=float(frames.record_timestamp[lidar] * 1e-6),
            world_from_lidar=world_from_lidar,
            native_from_lidar=NATIVE_FROM_LIDAR.copy(),
            intensity_scale=INTENSITY_SCALE,
            boxes=None if self.annotations is None else self.annotations.boxes(index, lidar_from_world),
        )

    def _path(self, record: int) -> Path:
        return self.config.root / self.frames.file_name[record].decode()

    def _camera(self, name: str, record: int, world_from_lidar: NDArray[np.float64]) -> Camera:
        path, encoded = self._path(record), None
        size = tuple(self.frames.image_size[record].tolist())
        image = unread_image(size, f"{self.tables.name}/sample_data.json: {path.name}")
        if self.wants.images:
            encoded = read_bytes(path)
            image = decode_image(encoded, str(path))
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
        raw = raw[self._measured(raw, str(path))]
        xyz = raw[:, :3].astype(np.float64) @ lidar_from_native[:3, :3].T + lidar_from_native[:3, 3]
        columns = {
            "intensity": raw[:, 3] / np.float32(INTENSITY_SCALE),
            "ring": raw[:, 4],
            "time": np.full(len(raw), age, dtype=np.float32),
        }
        return np.column_stack([xyz.astype(np.float32), *(columns[name] for name in self.config.features)])

    def _too_near(self, xyz: NDArray[np.float32]) -> NDArray[np.bool_]:
        near: NDArray[np.bool_] = np.abs(xyz[:, :2]) < self.config.min_distance
        return np.logical_and.reduce(near, axis=1)

    def _records(self) -> Iterator[list[int]]:
        """The records whose files are read, frame after frame."""
        scans = [self.frames.lidar] if self.wants.points else []
        for _ in range(self.config.num_sweeps - 1 if self.wants.points else 0):
            scans.append(np.where(scans[-1] < 0, -1, self.frames.previous[scans[-1]]))
        images = list(self.frames.cameras.T) if self.wants.images else []
        empty = np.zeros((0, len(self.frames.token)), dtype=np.int64)
        for records in np.concatenate([empty, *(column[None] for column in (*images, *scans))]).T.tolist():
            yield [record for record in records if record >= 0]


def _chosen_scenes(config: NuScenesConfig, present: Sequence[str]) -> tuple[str, ...]:
    """The scenes of the configured split, in the order of its list; `present` are those of the release."""
    if config.split == "all":
        return tuple(present)
    where = f"{config.root / config.version}/scene.json"
    if config.split_file is not None:
        names = tuple(read_list(config.split_file, "scene name", "scene-0061"))
        check_listed(
            str(config.split_file), "scenes", names, present, where, "take them off the list, or set data.version"
        )
        return names
    fitting = VERSIONS[config.split]
    way_out = "set data.split=all, or list the scenes you have in data.split_file"
    if fitting != config.version:
        way_out = f"set data.version={fitting}, or {way_out}"
    check_listed(f"data.split: {config.split}", "scenes", SPLITS[config.split], present, where, way_out)
    return SPLITS[config.split]
