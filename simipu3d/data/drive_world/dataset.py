"""How does the synthetic world become a data set like any other?

`DriveWorld` is a `FrameReader`. A frame is a function of (seed, split, index) and of the settings alone: sequence =
index // frames_per_sequence is one street, the frames of a sequence are `frame_interval` seconds apart. Splits share no
street. `Frame.world_from_lidar` leads to the street: x along it, z up, the road at z = 0. The lidar frame is level (see
`sensors`).
"""

import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from simipu3d.contracts.frame import EVERYTHING, Boxes, Camera, Frame, Wants
from simipu3d.data.drive_world import cache, sensors
from simipu3d.data.drive_world.materials import CLASS_NAMES
from simipu3d.data.drive_world.scene import Scene, build_scene
from simipu3d.data.readers.base import CAMERA_TRUTH, POINT_TRUTH, TRUTH_KINDS, BaseReader, ScanConfig
from simipu3d.data.readers.files import unread_image
from simipu3d.registry import READERS

GENERATOR_VERSION = 1
"""Part of the cache's key: raise it with every change that changes a frame."""

SPLITS = ("train", "val", "test")

Edge = Annotated[int, Field(ge=8, le=4096)]


class DriveWorldConfig(ScanConfig):
    """The `data:` block of the synthetic street world.

    The defaults are small pictures for a CPU. KITTI's proportions: `image_size: [375, 1242]`, `azimuth_range_deg: 360`,
    `azimuth_step_deg: 0.18`, `elevation_range_deg: [-24.8, 2.0]`, `max_range: 100`.
    """

    name: str = "drive_world"
    """Which reader (`READERS`)."""
    root: Path | None = None
    """The folder that keeps generated frames; null: simipu3d in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    split: Literal["train", "val", "test"] = "train"
    """Which streets; no two splits share one."""
    cache: bool = True
    """Keep generated frames on disk (0.4 MB each at the default size)? Default: generating takes 20 times as long as reading."""
    seed: NonNegativeInt = 0
    """Which world: another seed has other streets throughout."""
    num_frames: PositiveInt = 400
    """Frames in a split. Default: enough for the demo not to overfit (100 did, in trials)."""
    frames_per_sequence: PositiveInt = 4
    """Frames in one street, one after the other."""
    frame_interval: PositiveFloat = 0.5
    """Seconds between frames (the key frames of nuScenes)."""
    image_size: tuple[Edge, Edge] = (64, 224)
    """Height and width, pixels. Default: small enough for pre-training on a CPU."""
    horizontal_fov_deg: Annotated[float, Field(ge=20, le=140)] = 81.5
    """Opening of a camera (KITTI's colour camera); the focal length is width / 2 / tan(half of it)."""
    num_cameras: Annotated[int, Field(ge=1, le=len(sensors.CAMERA_MOUNTS))] = 1
    """The rig has the first so many of front, front_left, front_right, back, back_left, back_right."""
    supersampling: Annotated[int, Field(ge=1, le=4)] = 2
    """Where outlines pass, a pixel's colour is the mean of so many rays squared."""
    image_noise: NonNegativeFloat = 2.0
    """Standard deviation of the cameras' noise, steps of 8 bits."""
    beams: PositiveInt = 64
    """Beams of the lidar (HDL-64, the lidar of KITTI)."""
    azimuth_range_deg: Annotated[float, Field(gt=0, le=360)] | None = None
    """The sector that the lidar scans, its middle straight ahead; 360 is all round. null: 86, a little more than
    the front camera sees, and all round with more cameras."""
    azimuth_step_deg: Annotated[float, Field(ge=0.02, le=10)] = 0.36
    """Degrees between two columns of the lidar. Default: about 8,500 points in the default picture."""
    elevation_range_deg: tuple[Annotated[float, Field(ge=-60, le=60)], Annotated[float, Field(ge=-60, le=60)]] = (
        -16.0,
        8.0,
    )
    """Lowest and highest beam. Default: what the default picture sees of them."""
    range_noise: NonNegativeFloat = 0.02
    """Standard deviation of a measured distance, metres (HDL-64's data sheet)."""
    dropout: Annotated[float, Field(ge=0, le=0.24)] = 0.1
    """Chance of losing a near return; it grows to four times that at `max_range`, and with gloss."""
    max_range: Annotated[float, Field(gt=1, le=300)] = 80.0
    """The lidar sees no farther, metres; cameras do."""
    pitch_std_deg: Annotated[float, Field(ge=0, le=5)] = 1.3
    """Standard deviation of the body's pitch. Default: the image row alone tells little about the depth."""
    roll_std_deg: Annotated[float, Field(ge=0, le=5)] = 0.6
    """Standard deviation of the body's roll."""

    @model_validator(mode="after")
    def _check(self) -> "DriveWorldConfig":
        if not self.elevation_range_deg[0] < self.elevation_range_deg[1]:
            raise ValueError(f"elevation_range_deg must be [lowest, highest], got {list(self.elevation_range_deg)}")
        if (self.frames_per_sequence - 1) * self.frame_interval > 60:
            raise ValueError("frames_per_sequence times frame_interval must stay within the 60 s that a street lasts")
        known = tuple(sensors.CAMERA_MOUNTS)[: self.num_cameras]
        for camera in self.cameras if self.cameras is not None else ():
            if camera not in known:
                raise ValueError(
                    f"cameras: a rig of num_cameras={self.num_cameras} has no {camera!r}, it has {', '.join(known)}"
                )
        return self

    def azimuth_range(self) -> float:
        """The lidar's sector, degrees."""
        if self.azimuth_range_deg is not None:
            return self.azimuth_range_deg
        return 86.0 if self.num_cameras == 1 else 360.0

    def world_settings(self) -> dict[str, object]:
        """The keys that a frame depends on, as plain values."""
        own = set(type(self).model_fields) - set(ScanConfig.model_fields) - {"cache", "num_frames"}
        return {"version": GENERATOR_VERSION, **self.model_dump(mode="json", include=own)}


@READERS.register("drive_world", config=DriveWorldConfig)
class DriveWorld(BaseReader):
    """Street scenes generated from a seed, with depth, classes, instances and boxes. Contract: `FrameReader`.

    Boxes are those of the actors (Car, Van, Pedestrian, Cyclist) that the lidar met at least once; they are tight, and
    `num_points` counts the returns of the object itself (range noise carries some of them out of the box). `velocity`
    is the speed over ground. Instances are numbered within a sequence and keep their number in it; a box's id is that number.
    """

    class_names = CLASS_NAMES
    point_columns = ("x", "y", "z", "intensity")
    gives = frozenset(TRUTH_KINDS)
    config: DriveWorldConfig

    def __init__(self, config: DriveWorldConfig, wants: Wants = EVERYTHING):
        super().__init__(config, wants)
        self.frame_ids = tuple(f"{config.split}-{index:06d}" for index in range(config.num_frames))
        self.sequence_ids = tuple(self._sequence(index) for index in range(config.num_frames))
        self._rig = tuple(sensors.CAMERA_MOUNTS)[: config.num_cameras]
        self._cameras = config.cameras if config.cameras is not None else self._rig
        self._image_from_camera = sensors.pinhole(config.image_size, config.horizontal_fov_deg)
        folder = config.root if config.root is not None else cache.default_folder()
        self._folder = folder / "drive_world" / cache.content_key(config.world_settings()) / config.split

    def __len__(self) -> int:
        return self.config.num_frames

    def __getitem__(self, index: int) -> Frame:
        """Frame `index`, from the cache or generated now.

        Raises:
            IndexError: there is no such frame.
            UserError: the cache cannot be written.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        arrays = cache.read_arrays(self._path(index), self._names()) if self.config.cache else None
        if arrays is None:
            arrays = self._make(self._scene(index // self.config.frames_per_sequence), index)
            if self.config.cache:
                cache.write_arrays(self._path(index), arrays)
        return self._frame(index, arrays)

    def prepare(self, num_threads: int | None = None, *, progress: bool = True) -> int:
        """Fill the cache with every frame that is not in it yet.

        Args:
            num_threads: threads that make frames; None: one a processor. The frames do not depend on it.
            progress: show a progress bar.

        Returns:
            how many frames were made.

        Raises:
            UserError: there is no cache, or it cannot be written.
        """
        if not self.config.cache:
            return 0
        step = self.config.frames_per_sequence
        missing = [index for index in range(len(self)) if not self._path(index).is_file()]
        sequences: dict[int, list[int]] = {}
        for index in missing:
            sequences.setdefault(index // step, []).append(index)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            Progress(*columns, disable=not progress or not missing) as bar,
            ThreadPoolExecutor(num_threads or len(os.sched_getaffinity(0))) as pool,
        ):
            task = bar.add_task(f"making drive_world {self.config.split}", total=len(missing))
            jobs = [pool.submit(self._store, sequence, frames) for sequence, frames in sequences.items()]
            try:
                for job in as_completed(jobs):
                    bar.advance(task, job.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return len(missing)

    def _store(self, sequence: int, frames: list[int]) -> int:
        scene = self._scene(sequence)
        for index in frames:
            cache.write_arrays(self._path(index), self._make(scene, index))
        return len(frames)

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:06d}.npz"

    def _rng(self, purpose: int, number: int) -> Generator:
        return default_rng([self.config.seed, SPLITS.index(self.config.split), purpose, number])

    def _scene(self, sequence: int) -> Scene:
        duration = (self.config.frames_per_sequence - 1) * self.config.frame_interval
        return build_scene(self._rng(0, sequence), duration)

    def _sequence(self, index: int) -> str:
        return f"{self.config.split}-{index // self.config.frames_per_sequence:05d}"

    def _time(self, index: int) -> float:
        return index % self.config.frames_per_sequence * self.config.frame_interval

    def _names(self) -> list[str]:
        """The stored arrays that a frame needs."""
        names = ["world_from_lidar"]
        if self.wants.points:
            names += ["points", *(kind for kind in POINT_TRUTH if self._wanted(kind))]
        if self._wanted("boxes"):
            names += [f"box_{name}" for name in ("center", "size", "yaw", "velocity", "num_points", "names")]
            names += [] if "point_instance" in names else ["point_instance"]
        kinds = ["camera_from_lidar"] if self._needs_cameras else []
        if self.wants.images:
            kinds += ["image", *(kind for kind in CAMERA_TRUTH if self._wanted(kind))]
        return [*names, *(f"{camera}.{kind}" for camera in self._cameras for kind in kinds)]

    def _make(self, scene: Scene, index: int) -> dict[str, NDArray]:
        """All arrays of a frame, of every camera of the rig."""
        config, time, rng = self.config, self._time(index), self._rng(1, index)
        x, y, yaw = scene.ego.pose(time)
        pitch, roll = np.radians([config.pitch_std_deg, config.roll_std_deg]) * rng.standard_normal(2)
        pose = sensors.Pose(x, y, yaw, float(pitch), float(roll))
        world = scene.at(time)
        settings = sensors.LidarSettings(
            config.beams,
            config.azimuth_range(),
            config.azimuth_step_deg,
            config.elevation_range_deg,
            config.range_noise,
            config.dropout,
            config.max_range,
        )
        points, point_class, point_solid = sensors.scan(world, pose, settings, rng)
        # GROUND and NOTHING are -1 and -2: they index the two zeros at the end, and no object has the number 0.
        instance_of = np.append(scene.instances, [0, 0]).astype(np.uint16)
        arrays: dict[str, Any] = {
            "points": points,
            "point_class": point_class,
            "point_instance": instance_of[point_solid],
            "world_from_lidar": pose.street_from_lidar,
        }
        arrays.update(_boxes(scene, time, pose, arrays["point_instance"]))
        pictures = sensors.take_pictures(
            world,
            scene.light,
            pose,
            self._rig,
            self._image_from_camera,
            config.image_size,
            config.supersampling,
            config.image_noise,
            rng,
        )
        for name, picture in zip(self._rig, pictures, strict=True):
            picture["pixel_instance"] = instance_of[picture.pop("pixel_solid")]
            arrays.update({f"{name}.{kind}": array for kind, array in picture.items()})
        return arrays

    def _frame(self, index: int, arrays: dict[str, NDArray]) -> Frame:
        cameras = tuple(self._camera(name, index, arrays) for name in self._cameras if self._needs_cameras)
        points = self._no_points()
        truth: dict[str, Any] = {}
        if self.wants.points:
            points = arrays["points"]
            truth = {kind: arrays[kind] for kind in POINT_TRUTH if self._wanted(kind)}
            kept = self._cut(points, cameras, f"drive_world: frame {self.frame_ids[index]}")
            points, truth = points[kept], {kind: labels[kept] for kind, labels in truth.items()}
        if "point_instance" in truth:
            truth["point_instance"] = truth["point_instance"].astype(np.int32)
        return Frame(
            points=points,
            point_columns=self.point_columns,
            cameras=cameras if self.wants.images else (),
            frame_id=self.frame_ids[index],
            sequence_id=self.sequence_ids[index],
            timestamp=self._time(index),
            world_from_lidar=arrays["world_from_lidar"],
            boxes=_frame_boxes(arrays) if self._wanted("boxes") else None,
            **truth,
        )

    def _camera(self, name: str, index: int, arrays: dict[str, NDArray]) -> Camera:
        truth: dict[str, Any] = {kind: arrays[f"{name}.{kind}"] for kind in CAMERA_TRUTH if self._wanted(kind)}
        if "pixel_instance" in truth:
            truth["pixel_instance"] = truth["pixel_instance"].astype(np.int32)
        return Camera(
            name=name,
            image=arrays[f"{name}.image"]
            if self.wants.images
            else unread_image(self.config.image_size, "data.image_size"),
            image_from_camera=self._image_from_camera.copy(),
            camera_from_lidar=arrays[f"{name}.camera_from_lidar"],
            timestamp=self._time(index),
            **truth,
        )


def _frame_boxes(arrays: dict[str, NDArray]) -> Boxes:
    # The boxes are those of the actors that the lidar met, in the order of their numbers.
    instances = np.unique(arrays["point_instance"])
    return Boxes(
        center=arrays["box_center"],
        size=arrays["box_size"],
        yaw=arrays["box_yaw"],
        names=tuple(str(name) for name in arrays["box_names"]),
        velocity=arrays["box_velocity"],
        num_points=arrays["box_num_points"],
        ids=tuple(str(instance) for instance in instances[instances > 0]),
    )


def _boxes(scene: Scene, time: float, pose: sensors.Pose, point_instance: NDArray[np.uint16]) -> dict[str, NDArray]:
    """The boxes, in the lidar frame, of the actors that the lidar met; K may be 0."""
    counts = np.bincount(point_instance, minlength=len(scene.actors) + 1)
    seen = [actor for actor in scene.actors if counts[actor.instance] > 0]
    lidar_from_street = np.linalg.inv(pose.street_from_lidar)
    centre = np.array([actor.centre + time * actor.velocity for actor in seen]).reshape(-1, 3)
    velocity = np.array([actor.velocity for actor in seen]).reshape(-1, 3)
    turn = np.array([actor.yaw for actor in seen]).reshape(-1) - pose.yaw
    return {
        "box_center": centre @ lidar_from_street[:3, :3].T + lidar_from_street[:3, 3],
        "box_size": np.array([actor.size for actor in seen]).reshape(-1, 3),
        "box_yaw": np.arctan2(np.sin(turn), np.cos(turn)),
        "box_velocity": (velocity @ lidar_from_street[:3, :3].T)[:, :2],
        "box_num_points": np.array([counts[actor.instance] for actor in seen], dtype=np.int64),
        "box_names": np.array([actor.name for actor in seen], dtype="<U10"),
    }
