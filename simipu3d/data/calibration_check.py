"""Do the projected points lie where the picture shows them?

Depth edges of a scan (`geometry.depth_edges`) should fall on edges of the image. The camera is turned a little, sideways and
up or down, and the score of every turn is compared with that of the calibration as given, paired by frame. Upright depth edges
and the image's change along u tell the sideways direction, level ones and the change along v the other; the two are reported
apart, with the spread between frames as uncertainty. Pixels are those of the camera's image; a positive offset moves the
projected points right or down. Shapes: K offsets, F frames.

Source of the idea: Levinson & Thrun, Automatic Online Calibration of Cameras and Lasers, RSS 2013.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from simipu3d.contracts.frame import Camera, FrameReader
from simipu3d.errors import BadFrameError
from simipu3d.geometry.depth_edges import DepthEdges, depth_edges
from simipu3d.geometry.rigid import check_projection, check_rigid
from simipu3d.pictures.overlay import project

log = logging.getLogger(__name__)

WORK_WIDTH = 640
"""Edges are sought in an image of about this width, pixels: what matters is seen there, and it is fast."""
BLURS = (0.0, 1.5, 4.0)
"""Edge strength is the sum of three maps, blurred by these standard deviations, pixels of the small image: a sharp peak on a
broad slope."""
STRONGEST = 98.0
"""Percentile at which edge strength is cut off, so that few bright edges do not outshine all others."""
REFERENCE_WIDTH = 1242
"""Offsets and tolerances below are pixels of an image of KITTI's width; other images have them in proportion."""
SMALLEST_WIDTH = 430
"""Images narrower than this are taken as so wide: below about a third of a pixel nothing can be seen."""
OFFSETS = np.arange(-60, 61, 2.5)
"""(K,) offsets that are tried, pixels at the reference width; the middle one is the calibration as given."""
SOUGHT = np.abs(OFFSETS) <= 35
"""Offsets among which the best is sought; those beyond are surroundings."""
RING = (10, 25)
"""A score is compared with its mean at offsets so far to either side, pixels at the reference width: a true match is a sharp
peak, while road, horizon and a street's direction make broad slopes under any picture."""
FAR_LENS = 1.5
"""A camera farther than this from the origin of the lidar frame, metres, says that the frame is the car's, not the lidar's.
The points are then taken as seen from the camera: on cars the two stand close together."""
FEWEST_EDGES = 30
"""A frame with fewer depth edges in one direction says nothing about it."""
FEWEST_FRAMES = 8
"""With fewer frames there is not enough evidence for any verdict."""
NUM_FRAMES = 48
"""More frames than this are not read for a check: the uncertainty hardly falls any further."""
TOLERANCE = (2.7, 6.0)
"""Offsets sideways and in height that are no problem, pixels at the reference width. KITTI's own drives are off by 1.3 to 2.5
sideways (24 frames each, standard error 0.2 to 0.3); in height the beams are some 5 pixels apart."""
GAIN_T = 3.0
"""How many standard errors better another offset must be than none."""
NO_FIT = 0.07
"""Scores are in standard deviations of an image's edge map. On 24 frames of KITTI a right calibration has a peak of 0.2 to 0.5,
a picture of another frame one of 0.03 at most; where not even three standard errors more would reach this, points and pictures
do not belong together."""

Verdict = Literal["agrees", "seems off", "does not fit", "not enough evidence"]


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """Scores of one camera in one frame.

    Attributes:
        unit: pixels of its image for one pixel at the reference width.
        focal: focal lengths along u and v, pixels.
        sideways, upwards: (K,) scores at `OFFSETS` along u and along v; None with too few edges.
    """

    unit: float
    focal: tuple[float, float]
    sideways: NDArray[np.float64] | None
    upwards: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class Direction:
    """What the frames say about one direction.

    Attributes:
        num_frames: F, those with enough edges.
        offset: where the score peaks, pixels.
        error: its standard error over frames (jackknife), pixels.
        offset_deg: the same as a rotation of the camera, degrees.
        gain_t: how many standard errors the peak is better than the calibration as given; each frame's peak is taken from
            the other frames.
        contrast: sharpness at that peak; `contrast_error` its standard error.
        offsets, scores, score_errors: (S,) pixels, mean sharpness, standard error of its difference to that at 0.
    """

    num_frames: int
    offset: float
    error: float
    offset_deg: float
    gain_t: float
    contrast: float
    contrast_error: float
    offsets: NDArray[np.float64]
    scores: NDArray[np.float64]
    score_errors: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class CalibrationCheck:
    """Result for one camera; `message` is one line for a person. A direction is None without two frames that show it."""

    camera: str
    verdict: Verdict
    message: str
    sideways: Direction | None
    upwards: Direction | None

    @property
    def is_problem(self) -> bool:
        """Do the pictures speak against the calibration?"""
        return self.verdict in ("seems off", "does not fit")


def edge_maps(image: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Strength of upright edges and of level edges (mean 0, standard deviation 1), and the whole factor by which the maps are
    smaller than the image."""
    factor = max(1, round(image.shape[1] / WORK_WIDTH))
    height, width = (size // factor for size in image.shape[:2])
    cells = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    grey = cells.mean(axis=(1, 3, 4), dtype=np.float32)
    maps = []
    for axis in (1, 0):
        change = np.abs(ndimage.sobel(grey, axis))
        change = np.minimum(change, np.percentile(change, STRONGEST))
        blurred = (_standard(ndimage.gaussian_filter(change, blur) if blur else change) for blur in BLURS)
        maps.append(_standard(np.sum(list(blurred), axis=0)))
    return maps[0], maps[1], factor


def _standard(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return (values - values.mean()) / max(float(values.std()), 1e-6)


def visible_edges(camera: Camera, points: NDArray[np.floating]) -> DepthEdges:
    """Depth edges among the points that a camera sees."""
    _, _, visible = project(camera, points[:, :3])
    lens = np.linalg.inv(camera.camera_from_lidar)[:3, 3]
    return depth_edges(points[visible, :3], lens if np.linalg.norm(lens) > FAR_LENS else np.zeros(3))


def turned(camera: Camera, axis: int, offset: float) -> Camera:
    """The camera turned so that points straight ahead move by `offset` pixels right (axis 0) or down (axis 1)."""
    return replace(camera, camera_from_lidar=_turn(camera, axis, offset) @ camera.camera_from_lidar)


def _turn(camera: Camera, axis: int, offset: float) -> NDArray[np.float64]:
    tangent = offset / camera.image_from_camera[axis, axis]
    cos, sin = 1 / np.hypot(1, tangent), tangent / np.hypot(1, tangent)
    turn = np.eye(4)
    turn[axis, axis] = turn[2, 2] = cos
    turn[axis, 2], turn[2, axis] = sin, -sin
    return turn


def pixel_unit(camera: Camera) -> float:
    """Pixels of this camera's image for one at the reference width."""
    return max(camera.image.shape[1], SMALLEST_WIDTH) / REFERENCE_WIDTH


def edge_scores(camera: Camera, points: NDArray[np.floating]) -> EdgeScores:
    """How well depth edges meet image edges at every offset.

    Args:
        camera: image and a calibration that can be inverted.
        points: (N, 3 + F) in the lidar frame; N may be 0.
    """
    unit, edges = pixel_unit(camera), visible_edges(camera, points)
    *maps, factor = edge_maps(camera.image)
    curves: list[NDArray[np.float64] | None] = []
    for axis, (edge_map, own) in enumerate(zip(maps, (edges.upright, ~edges.upright), strict=True)):
        if own.sum() < FEWEST_EDGES or not edge_map.any():
            curves.append(None)
            continue
        curves.append(_scores(camera, axis, unit, edges.xyz[own], edges.weight[own], edge_map, factor))
    focal = (float(camera.image_from_camera[0, 0]), float(camera.image_from_camera[1, 1]))
    return EdgeScores(unit, focal, curves[0], curves[1])


def _scores(
    camera: Camera,
    axis: int,
    unit: float,
    xyz: NDArray[np.float64],
    weight: NDArray[np.float64],
    edge_map: NDArray[np.float32],
    factor: int,
) -> NDArray[np.float64] | None:
    """(K,) weighted means of the edge map at the projected places; None where an offset leaves none of them visible."""
    rays = np.column_stack([xyz, np.ones(len(xyz))]) @ camera.camera_from_lidar.T
    # The turned camera frames' points, all offsets in one go: (K, E, 3).
    moved = np.stack([rays @ _turn(camera, axis, offset * unit).T for offset in OFFSETS])[..., :3]
    pixels, _, visible = project(replace(camera, camera_from_lidar=np.eye(4)), moved.reshape(-1, 3))
    places = np.where(visible[:, None], (pixels + 0.5) / factor - 0.5, 0)
    values = ndimage.map_coordinates(edge_map, places[:, ::-1].T, order=1, mode="nearest").reshape(len(OFFSETS), -1)
    weights = visible.reshape(len(OFFSETS), -1) * weight
    total = weights.sum(axis=1)
    return (weights * values).sum(axis=1) / total if (total > 0).all() else None


def judge(camera: str, frames: Sequence[EdgeScores]) -> CalibrationCheck:
    """The verdict on one camera from its scores in some frames."""
    sideways = _direction(frames, [frame.sideways for frame in frames], 0)
    upwards = _direction(frames, [frame.upwards for frame in frames], 1)
    unit = float(np.mean([frame.unit for frame in frames])) if frames else 1.0
    limits = [limit * unit for limit in TOLERANCE]
    enough = [
        (found, limit)
        for found, limit in zip((sideways, upwards), limits, strict=True)
        if found is not None and found.num_frames >= FEWEST_FRAMES
    ]
    verdict: Verdict = "not enough evidence"
    if any(_off(found, limit) for found, limit in enough):
        verdict = "seems off"
    elif sideways is not None and sideways.num_frames >= FEWEST_FRAMES:
        # In height, road and horizon make any picture fit a little; only the sideways peak is the scene's own.
        spread = 3 * sideways.contrast_error
        if sideways.contrast < spread and sideways.contrast + spread < NO_FIT:
            verdict = "does not fit"
        elif sideways.contrast > max(NO_FIT, spread) and abs(sideways.offset) <= limits[0]:
            verdict = "agrees"
    return CalibrationCheck(
        camera, verdict, _message(verdict, (sideways, upwards), limits, len(frames)), sideways, upwards
    )


def _direction(
    frames: Sequence[EdgeScores], curves: Sequence[NDArray[np.float64] | None], axis: int
) -> Direction | None:
    own = [(frame, curve) for frame, curve in zip(frames, curves, strict=True) if curve is not None]
    if len(own) < 2:
        return None
    unit = float(np.mean([frame.unit for frame, _ in own]))
    focal = float(np.mean([frame.focal[axis] for frame, _ in own]))
    scores = sharpness(np.stack([curve for _, curve in own]))
    others = (scores.sum(axis=0) - scores) / (len(own) - 1)
    peaks = others.argmax(axis=1)
    at_peak = np.take_along_axis(scores, peaks[:, None], axis=1)[:, 0]
    tried = OFFSETS[SOUGHT]
    none = int(np.flatnonzero(tried == 0)[0])
    gain, gain_error = _mean_and_error(at_peak - scores[:, none])
    contrast, contrast_error = _mean_and_error(at_peak)
    left_out = np.array([_peak(tried, curve) for curve in others])
    error = np.sqrt((len(own) - 1) * np.mean((left_out - left_out.mean()) ** 2))
    offset = _peak(tried, scores.mean(axis=0)) * unit
    differences = scores - scores[:, none : none + 1]
    return Direction(
        num_frames=len(own),
        offset=offset,
        error=float(error) * unit,
        offset_deg=float(np.rad2deg(np.arctan(offset / focal))),
        gain_t=gain / max(gain_error, 1e-9),
        contrast=contrast,
        contrast_error=contrast_error,
        offsets=tried * unit,
        scores=scores.mean(axis=0),
        score_errors=differences.std(axis=0, ddof=1) / np.sqrt(len(own)),
    )


def sharpness(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """(F, S) scores at the S offsets that are sought, minus the mean of their surroundings (`RING`), of (F, K) scores."""
    gap = np.abs(OFFSETS[SOUGHT][:, None] - OFFSETS[None])
    ring = (gap >= RING[0]) & (gap <= RING[1])
    return scores[:, SOUGHT] - scores @ (ring / ring.sum(axis=1, keepdims=True)).T


def _mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _peak(offsets: NDArray[np.float64], curve: NDArray[np.float64]) -> float:
    """Where a curve is highest: the top of the parabola through the highest value and its neighbours."""
    top = int(curve.argmax())
    if top in (0, len(curve) - 1):
        return float(offsets[top])
    x, y = offsets[top - 1 : top + 2], curve[top - 1 : top + 2]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    return float((x[0] + x[1]) / 2 - left / (2 * bend)) if bend < 0 else float(x[1])


def _off(found: Direction, tolerance: float) -> bool:
    return abs(found.offset) > max(tolerance, 2 * found.error) and found.gain_t > GAIN_T


def _message(verdict: Verdict, directions: Sequence[Direction | None], limits: Sequence[float], num_frames: int) -> str:
    """The verdict in words; `limits` are the tolerances in pixels."""
    words = [
        f"{abs(found.offset):.1f} +- {found.error:.1f} px {words[int(found.offset > 0)]} ({found.offset_deg:+.2f} degrees)"
        for found, limit, words in zip(directions, limits, (("left", "right"), ("up", "down")), strict=True)
        if found is not None and (verdict != "seems off" or (found.num_frames >= FEWEST_FRAMES and _off(found, limit)))
    ]
    if verdict == "seems off":
        return (
            f"the calibration seems off by the pictures of {num_frames} frames: the projected points should move "
            f"{' and '.join(words)}"
        )
    if verdict == "does not fit":
        return (
            f"depth edges and image edges of {num_frames} frames meet at no offset: are images and scans of different "
            "moments, or is the calibration another camera's?"
        )
    if verdict == "agrees":
        return f"points and pictures of {num_frames} frames agree: best {' and '.join(words)}"
    known = max([found.num_frames for found in directions if found is not None], default=0)
    why = "no clear peak" if known >= FEWEST_FRAMES else f"{known} frames with depth edges, {FEWEST_FRAMES} are needed"
    return f"not enough evidence about the calibration ({why})"


def judge_all(scores: Mapping[str, Sequence[EdgeScores]]) -> list[CalibrationCheck]:
    """The verdict on every camera, by name."""
    return [judge(camera, frames) for camera, frames in scores.items()]


def calibration_problem(camera: Camera) -> str:
    """Why a camera's matrices are no calibration; empty where they are one."""
    if wrong := check_rigid(camera.camera_from_lidar):
        return f"camera_from_lidar {wrong}"
    wrong = check_projection(camera.image_from_camera, camera.image.shape[:2])
    return f"image_from_camera {wrong}" if wrong else ""


def warn_if_calibration_seems_off(reader: FrameReader, num_frames: int = 12) -> list[CalibrationCheck]:
    """Log a warning for each camera whose pictures speak against its calibration; for the start of a training.

    Costs about 0.15 s for each image of `num_frames` frames, spread over the data set. Frames that cannot be read are left to
    the training itself; frames without points or images say nothing.

    Returns:
        The verdicts, those without a warning too.
    """
    scores: dict[str, list[EdgeScores]] = {}
    for index in np.unique(np.linspace(0, len(reader) - 1, min(num_frames, len(reader))).round().astype(int)):
        try:
            frame = reader[int(index)]
        except BadFrameError:
            continue
        for camera in frame.cameras:
            if not calibration_problem(camera):
                scores.setdefault(camera.name, []).append(edge_scores(camera, frame.points))
    checks = judge_all(scores)
    for check in checks:
        if check.is_problem:
            log.warning("camera %s: %s; look with inspect_data --check", check.camera, check.message)
    return checks
