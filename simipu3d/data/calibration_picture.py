"""A page that shows how the pictures speak for or against a camera's calibration."""

from pathlib import Path

from simipu3d.contracts.frame import Frame, FrameReader
from simipu3d.data.calibration_check import CalibrationCheck, turned, visible_edges
from simipu3d.data.check import Report
from simipu3d.errors import UserError
from simipu3d.pictures.calibration import draw_depth_edges, plot_scores
from simipu3d.pictures.canvas import Picture, save_png
from simipu3d.pictures.overlay import project
from simipu3d.pictures.page import page


def draw_calibration(check: CalibrationCheck, frame: Frame) -> Picture | None:
    """A page for one camera: a frame's depth edges on its picture as calibrated, at the best offsets where it seems off, and
    the scores over the offsets. None where the frame lacks the camera, or nothing was measured."""
    camera = next((camera for camera in frame.cameras if camera.name == check.camera), None)
    measured = [found for found in (check.sideways, check.upwards) if found is not None]
    if camera is None or not measured:
        return None
    edges = visible_edges(camera, frame.points)
    cameras = [("as calibrated", camera)]
    if check.verdict == "seems off":
        best = camera
        for axis, found in enumerate((check.sideways, check.upwards)):
            best = best if found is None else turned(best, axis, found.offset)
        cameras.append(("turned to where they fit best", best))
    rows: list[tuple[str, list[tuple[str, Picture]]]] = []
    for words, own in cameras:
        pixels, _, visible = project(own, edges.xyz)
        drawn = draw_depth_edges(own.image, pixels[visible], edges.upright[visible])
        caption = f"frame {frame.frame_id}: depth edges {words}, cyan where a farther thing is beside, magenta above"
        rows.append(("" if rows else f"{check.camera}: {check.verdict}", [(caption, drawn)]))
    plots = [
        ("", plot_scores(found.offsets, found.scores, found.score_errors, found.offset, words))
        for found, words in (
            (
                check.sideways,
                ("upright edges: agreement when moved sideways", "pixels left (-) and right (+); grey: as given"),
            ),
            (
                check.upwards,
                ("level edges: agreement when moved in height", "pixels up (-) and down (+); grey: as given"),
            ),
        )
        if found is not None
    ]
    return page([*rows, (check.message, plots)])


def write_calibrations(folder: Path, reader: FrameReader, report: Report) -> list[Path]:
    """Write `calibration-<camera>.png` for every camera that a check has compared with its pictures; returns their paths.

    Raises:
        UserError: the folder cannot be written.
    """
    paths = []
    for check in report.calibrations:
        picture = draw_calibration(check, reader[report.example(check.camera)])
        if picture is None:
            continue
        name = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in check.camera)
        try:
            paths.append(save_png(folder / f"calibration-{name}.png", picture))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error}; name another folder with --out") from error
    return paths
