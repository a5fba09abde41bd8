"""Waymo Open Dataset: from the downloads as they are, of either format, to Frames.

    root/{training,validation,testing}/<component>/<segment>.parquet      format v2
    root/{training,validation,testing}/*.tfrecord                         format v1

A format's source makes `WaymoMoment`s; here they become Frames. The lidar frame is Waymo's vehicle frame at the frame's
time stamp (x forward, y left, z up, origin in the middle of the rear axle). Range images become points there, each pixel
of the top lidar by the vehicle's pose at its own time. A camera fires at its own time too: camera_from_lidar goes
through the world with the pose that is stored with the image. Waymo's camera axes (x out of the lens, y left, z up) are
swapped for ours, and its edge-based pixels get integer centres: half a pixel off the principal point. The rolling
shutter is not modelled. Intensity is unbounded (10,000 and more) and is squashed by tanh, as detectors on Waymo do.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, field_validator, model_validator

from simipu3d.contracts.frame import EVERYTHING, Boxes, Camera, Frame, Wants
from simipu3d.data.readers.base import BaseReader, ReaderConfig, check_listed, read_list
from simipu3d.data.readers.files import WAY_OUT, decode_image, unread_image
from simipu3d.data.readers.waymo_boxes import image_boxes
from simipu3d.data.readers.waymo_moment import (
    CAMERA_NAMES,
    LASER_NAMES,
    WaymoCamera,
    WaymoLaser,
    WaymoMoment,
    WaymoRequest,
    WaymoSource,
)
from simipu3d.data.readers.waymo_v1 import WaymoV1
from simipu3d.data.readers.waymo_v2 import WaymoV2
from simipu3d.errors import BadFrameError, UserError
from simipu3d.geometry.range_image import range_image_points
from simipu3d.registry import READERS

CameraName = Literal["FRONT", "FRONT_LEFT", "FRONT_RIGHT", "SIDE_LEFT", "SIDE_RIGHT"]
LaserName = Literal["TOP", "FRONT", "SIDE_LEFT", "SIDE_RIGHT", "REAR"]

FORMATS: dict[str, type[WaymoSource]] = {
    "v2": WaymoV2,
    "v1": WaymoV1,
}
"""Which source reads a format."""

FOLDERS = {"train": "training", "val": "validation", "test": "testing"}
"""The folder of a split; `all` is the root itself."""

SIGNS = {"v2": "vehicle_pose/*.parquet", "v1": "*.tfrecord"}
"""What a split's folder holds in each format."""

CAMERA_AXES = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float64)
"""From Waymo's camera axes to ours: x right, y down, z out of the lens."""

INSIDE_NO_LABEL_ZONE = 1
"""The flag of a pixel that lies in one; others have -1."""


class WaymoConfig(ReaderConfig):
    """The `data:` block for `name: waymo`."""

    all_is_listed = True
    name: str = "waymo"
    """Which reader (`READERS`)."""
    root: Path
    """The folder that holds training/, validation/, testing/."""
    version: str = "v2"
    """Which format the download has: v2 (folders of .parquet) or v1 (.tfrecord). Both give the same frames."""
    split: Literal["train", "val", "test", "all"] = "train"
    """The folder training, validation or testing; `all`: root itself holds the components' folders (v2) or the records
    (v1)."""
    split_file: Path | None = None
    """Read only the segments of this list, one name a line; `segment-`, `_with_camera_labels` and the file's ending may
    stand round a name."""
    fraction: tuple[float, float] = (0.0, 1.0)
    """From which to which share of the segments, sorted by name: [0, 0.5] and [0.5, 1] are halves without a common
    segment. The paper cut a half, a fifth and a tenth as one piece each too: [0, 0.5], [0, 0.2], [0, 0.1]."""
    load_interval: int = Field(default=1, ge=1)
    """Every how many-th frame is read, after the cut. The paper's is 5: frames are 0.1 s apart."""
    cameras: tuple[CameraName, ...] | None = None
    """Which cameras. Default: all five."""
    lasers: tuple[LaserName, ...] | None = None
    """Which lidars; null: all five. []: none, so that a download without range images can be looked at (its frames
    have no points: methods that need some refuse them)."""
    returns: Literal[1, 2] = 2
    """1: a lidar's first return only; 2: its second too. Default: both (paper's converter)."""
    features: tuple[Literal["intensity", "elongation"], ...] = ("intensity",)
    """Columns of a point after x, y, z: tanh of the intensity, and the elongation as it was measured (how much longer
    than it was sent the pulse came back). Waymo has no time a point."""
    min_distance: NonNegativeFloat = 0.0
    """A point nearer to its own lidar than this is dropped, metres. Default: none."""
    no_label_zone: Literal["keep", "drop"] = "drop"
    """What becomes of points in zones that nobody labelled. Default: dropped, as by the paper's converter and those of
    detection toolboxes, so that a scan holds what detectors see; pre-training needs no label and may keep them."""

    @field_validator("version")
    @classmethod
    def _known(cls, version: str) -> str:
        if version not in FORMATS:
            raise ValueError(f"Waymo has no format {version!r} here; there are {', '.join(FORMATS)}")
        return version

    @model_validator(mode="after")
    def _check_choice(self) -> "WaymoConfig":
        if len(set(self.lasers or ())) < len(self.lasers or ()):
            raise ValueError(f"lasers names something twice: {list(self.lasers or ())}")
        first, last = self.fraction
        if not 0 <= first < last <= 1:
            raise ValueError(f"fraction must be [from, to] with 0 <= from < to <= 1, got [{first}, {last}]")
        return self


@READERS.register("waymo", config=WaymoConfig)
class WaymoReader(BaseReader):
    """Frames of the Waymo Open Dataset, segment after segment. Contract: `FrameReader`; a frame's id is its segment and
    its time stamp in microseconds.

    Raises:
        UserError: a folder, a component or a listed segment is missing, or a segment's files do not fit together.
    """

    config: WaymoConfig

    def __init__(self, config: WaymoConfig, wants: Wants = EVERYTHING):
        super().__init__(config, wants)
        self.cameras = tuple(CAMERA_NAMES.values()) if config.cameras is None else config.cameras
        self.lasers = tuple(LASER_NAMES.values()) if config.lasers is None else config.lasers
        self.point_columns = ("x", "y", "z", *config.features)
        if wants.points and not self.lasers and wants != EVERYTHING:
            raise UserError(
                "data.lasers: [] reads no lidar, so frames have no points, which the method needs; null reads all lidars. [] "
                "serves for looking at images and boxes, and for methods of images alone"
            )
        folder = _folder(config)
        source = FORMATS[config.version]
        self.gives = frozenset({"boxes"} if config.split != "test" and source.has_boxes(folder) else ())
        has_boxes = self._wanted("boxes") and "boxes" in self.gives
        self.request = WaymoRequest(
            cameras=self.cameras if self._needs_cameras else (),
            lasers=self.lasers if wants.points else (),
            returns=config.returns,
            boxes=has_boxes,
            projected_boxes=has_boxes and wants.images,
            pixels=wants.images,
        )
        self.segments = _chosen_segments(config, folder, source.list_segments(folder))
        self.source = source(folder, self.segments, self.request)
        self.positions = range(0, len(self.source.moments), config.load_interval)
        self.sequence_ids = tuple(self.source.moments[position][0] for position in self.positions)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Frame:
        moment = self.source.read(self.positions[index])
        where = _place(moment, "lidar")
        _check_sensors(moment, self.request)
        cameras = tuple(_camera(camera, moment, self.request.pixels) for camera in moment.cameras)
        points = np.concatenate([self._no_points(), *(scan for scan, _ in self._scans(moment))])
        if self.request.lasers:
            points = points[self._cut(points, cameras, where)]
        return Frame(
            points=points,
            point_columns=self.point_columns,
            cameras=cameras if self.wants.images else (),
            frame_id=f"{moment.segment}/{moment.timestamp_micros}",
            sequence_id=moment.segment,
            timestamp=moment.timestamp_micros * 1e-6,
            world_from_lidar=moment.world_from_vehicle,
            boxes=_boxes(moment),
        )

    def stored_projections(self, index: int) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float64]]]:
        """Where the data set itself says that a frame's points are seen; for checks of our own projection.

        Returns:
            For each of the chosen cameras the points (M, 3), in the lidar frame and before `point_range` and `frustum`,
            that it sees, and their pixels (M, 2) as (u, v) in the package's convention. The files name the pixel that
            holds a point by whole numbers, so that a pixel is right to half a pixel; they count the rolling shutter in.
        """
        moment = self.source.read(
            self.positions[index], replace(self.request, boxes=False, projected_boxes=False, projections=True)
        )
        found = {name: ([np.zeros((0, 3), np.float32)], [np.zeros((0, 2))]) for name in self.cameras}
        number_of = {name: number for number, name in CAMERA_NAMES.items()}
        for scan, projection in self._scans(moment):
            if projection is None:
                raise BadFrameError(f"{_place(moment, 'lidar')}: holds no lidar-to-camera projection; {WAY_OUT}")
            for name, (points, pixels) in found.items():
                for camera, u, v in (projection[:, :3].T, projection[:, 3:].T):
                    seen = camera == number_of[name]
                    points.append(scan[seen, :3])
                    pixels.append(np.stack([u[seen], v[seen]], axis=1).astype(np.float64))
        return {name: (np.concatenate(points), np.concatenate(pixels)) for name, (points, pixels) in found.items()}

    def _scans(self, moment: WaymoMoment) -> list[tuple[NDArray[np.float32], NDArray[np.int32] | None]]:
        """For each return of each lidar its points (N, 3 + F) and their stored projections (N, 6)."""
        vehicle_from_world = np.linalg.inv(moment.world_from_vehicle)
        return [
            self._scan(moment, laser, number, vehicle_from_world)
            for laser in moment.lasers
            for number in range(len(laser.returns))
        ]

    def _too_near(self, xyz: NDArray[np.float32]) -> NDArray[np.bool_]:
        """None: each lidar's own ranges were cut, for its place is not the origin of the frame."""
        return np.zeros(len(xyz), dtype=np.bool_)

    def _scan(
        self, moment: WaymoMoment, laser: WaymoLaser, number: int, vehicle_from_world: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int32] | None]:
        image, projection = laser.returns[number].image, laser.returns[number].projection
        ranges = image[..., 0]
        ranges = np.where(ranges < self.config.min_distance, 0, ranges)
        if self.config.no_label_zone == "drop":
            ranges = np.where(image[..., 3] == INSIDE_NO_LABEL_ZONE, 0, ranges)
        posed = laser.pixel_pose is not None
        try:
            xyz, pixels = range_image_points(
                ranges,
                laser.inclinations,
                laser.inclination_range,
                laser.vehicle_from_laser,
                pixel_pose=laser.pixel_pose,
                vehicle_from_world=vehicle_from_world if posed else None,
            )
        except ValueError as error:
            raise BadFrameError(f"{_place(moment, 'lidar')}: lidar {laser.name}: {error}; {WAY_OUT}") from error
        row, column = pixels.T
        values = image[row, column]
        columns = {"intensity": np.tanh(values[:, 1]), "elongation": values[:, 2]}
        scan = np.column_stack([xyz.astype(np.float32), *(columns[name] for name in self.config.features)])
        return scan, None if projection is None else projection[row, column]


def _place(moment: WaymoMoment, component: str = "*") -> str:
    """File and frame, for messages."""
    return f"{moment.source.replace('*', component)}: frame at {moment.timestamp_micros}"


def _check_sensors(moment: WaymoMoment, request: WaymoRequest) -> None:
    """Raise `BadFrameError` when the files lack a sensor for this one moment."""
    for key, component, asked, found in (
        ("cameras", "camera_image", request.cameras, {camera.name for camera in moment.cameras}),
        ("lasers", "lidar", request.lasers, {laser.name for laser in moment.lasers}),
    ):
        absent = [name for name in asked if name not in found]
        if absent:
            raise BadFrameError(
                f"{_place(moment, component)}: has nothing of {', '.join(absent)}; leave it out of data.{key}, or set "
                "data.on_bad_frame=skip"
            )


def _boxes(moment: WaymoMoment) -> Boxes | None:
    return (
        None if moment.boxes is None else replace(moment.boxes, image_boxes=image_boxes(moment.boxes, moment.cameras))
    )


def _camera(camera: WaymoCamera, moment: WaymoMoment, pixels: bool) -> Camera:
    """`pixels`: is the image decoded?"""
    where = f"{_place(moment, 'camera_image')}: camera {camera.name}"
    image = decode_image(camera.jpeg, where) if pixels else unread_image(camera.size, where)
    if image.shape[:2] != camera.size:
        raise BadFrameError(
            f"{where}: the image is {image.shape[0]} x {image.shape[1]}, and its calibration is for {camera.size[0]} x "
            f"{camera.size[1]}; {WAY_OUT}"
        )
    f_u, f_v, c_u, c_v = camera.intrinsic[:4]
    camera_from_lidar = CAMERA_AXES @ np.linalg.inv(camera.vehicle_from_camera)
    if camera.world_from_vehicle is not None:
        camera_from_lidar = camera_from_lidar @ np.linalg.inv(camera.world_from_vehicle) @ moment.world_from_vehicle
    return Camera(
        name=camera.name,
        image=image,
        image_from_camera=np.array([[f_u, 0, c_u - 0.5, 0], [0, f_v, c_v - 0.5, 0], [0, 0, 1, 0]], dtype=np.float64),
        camera_from_lidar=camera_from_lidar,
        distortion=camera.intrinsic[4:].copy(),
        timestamp=camera.pose_timestamp,
        encoded=camera.jpeg if pixels else None,
    )


def _folder(config: WaymoConfig) -> Path:
    """Where the split's files lie. A folder that is absent, or of the other format, is reported with what there is; what a
    source misses in a folder of its own format it reports itself."""
    places = {split: config.root / name for split, name in FOLDERS.items()} | {"all": config.root}
    folder = places[config.split]
    own = SIGNS[config.version]
    if any(folder.glob(own)) or (folder.is_dir() and not any(any(folder.glob(sign)) for sign in SIGNS.values())):
        return folder
    for split, place in {config.split: folder, **places}.items():
        for version, sign in SIGNS.items():
            if any(place.glob(sign)):
                raise UserError(
                    f"{folder}: holds no {own} (Waymo format {config.version}); {place} has {sign}: set "
                    f"data.version={version} and data.split={split}"
                )
    return folder


def _chosen_segments(config: WaymoConfig, folder: Path, present: tuple[str, ...]) -> tuple[str, ...]:
    """The configured part of the segments, sorted by name."""
    names = sorted(present)
    if config.split_file is not None:
        names = sorted(_read_segments(config.split_file))
        check_listed(
            str(config.split_file), "segments", names, present, str(folder), "take them off the list, or set data.split"
        )
    first, last = (round(share * len(names)) for share in config.fraction)
    if first == last:
        raise UserError(f"data.fraction: {list(config.fraction)} of {len(names)} segments is none; take a larger part")
    return tuple(names[first:last])


def _read_segments(path: Path) -> list[str]:
    names = [
        word.removesuffix(".tfrecord")
        .removesuffix(".parquet")
        .removeprefix("segment-")
        .removesuffix("_with_camera_labels")
        for word in read_list(path, "segment name", "10017090168044687777_6380_000_6400_000")
    ]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: {next(name for name in names if names.count(name) > 1)} stands twice; remove one")
    return names
