"""What did a run on drive_world learn? Retrieval and the linear probe on held-out streets, and a page of pictures.

The streets of `val` give the labelled frames, those of `test` are scored; pre-training saw neither.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from simipu3d.contracts.frame import Frame, FrameReader
from simipu3d.contracts.method import DataInfo, Method
from simipu3d.contracts.tokens import FeatureMap
from simipu3d.data.loading.loader import build_reader, make_loader, wants_of
from simipu3d.encoders.image import ImageEncoder
from simipu3d.engine.pretrain import build_method
from simipu3d.engine.settings import Settings, parse_settings
from simipu3d.errors import UserError
from simipu3d.pictures import depth_as_colours, features_as_colours, overlay_points, page
from simipu3d.probe.linear import (
    Encoder,
    ProbeData,
    encode_all,
    fit_probe,
    gather_data,
    predict_pixels,
    recompute_batchnorm,
)
from simipu3d.probe.retrieval import chance_top1, retrieval_top1
from simipu3d.probe.table import ProbeTable, probe_table
from simipu3d.weights.files import read_checkpoint

NUM_CALIBRATION = 128
"""Training images that BatchNorm statistics of every probed backbone are averaged over."""
NUM_SHOWN = 3
"""Held-out frames that are drawn."""


class Task(NamedTuple):
    """One contrastive task on held-out frames: its loss beside the ceiling ln N, its top-1 beside chance."""

    loss: float
    ceiling: float
    top1: float
    chance: float


@dataclass(frozen=True, eq=False)
class RunReport:
    """What `report_run` found.

    Attributes:
        tasks: the method's contrastive tasks by name.
        table: the linear probe.
        picture: (H, W, 3), a page to look at.
    """

    tasks: dict[str, Task]
    table: ProbeTable
    picture: np.ndarray


def load_run(run: Path) -> tuple[Settings, Method, FrameReader]:
    """Configuration, trained method in evaluation mode, and training data of a run directory."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    settings = parse_settings(checkpoint["simipu3d"]["config"], str(run))
    reader = build_reader(settings.data, wants_of(settings.needs))
    method = build_method(settings, DataInfo(tuple(reader.point_columns), tuple(reader.class_names)))
    prefix = "method."
    state = {name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items()}
    method.load_state_dict(state)
    return settings, method.eval(), reader


def image_encoder_of(method: Method, run: Path) -> ImageEncoder:
    """The one image encoder of a method.

    Raises:
        UserError: it has none.
    """
    found = [module for module in method.modules() if isinstance(module, ImageEncoder)]
    if not found:
        raise UserError(f"{run}: the method has no image encoder, so its image features cannot be probed")
    return found[0]


def encoder_of(model: ImageEncoder, calibration: Tensor) -> Encoder:
    """A copy of an image encoder with BatchNorm statistics made anew from `calibration`, as a probe wants it."""
    model = copy.deepcopy(model).eval()

    def encode(images: Tensor) -> FeatureMap:
        size = torch.tensor([images.shape[2:]] * len(images))
        return model(model.normalise(images, size))[-1]

    recompute_batchnorm(model, calibration, encode)
    return torch.no_grad()(encode)


@torch.no_grad()
def held_out_tasks(settings: Settings, method: Method, reader: FrameReader) -> dict[str, Task]:
    """Every contrastive task of a method on held-out frames, augmented as in training by draws of their own (means over
    full batches)."""
    loader = make_loader(settings.data, settings.augment, settings.needs, settings.seed, reader=reader)
    found: dict[str, list[Task]] = {}
    for batch in loader:
        metrics = method(batch)
        for name, rows in method.rows(batch).items():
            top1, chance = retrieval_top1(rows.query, rows.key, rows.ids), chance_top1(rows.ids)
            loss, ceiling = float(metrics[f"{name}_loss"]), float(metrics[f"{name}_ceiling"])
            found.setdefault(name, []).append(Task(loss, ceiling, top1, chance))
    return {name: Task(*np.mean(tasks, axis=0).tolist()) for name, tasks in found.items()}


def _split(settings: Settings, split: str, num_frames: int) -> FrameReader:
    data = settings.data.model_copy(update={"split": split, "num_frames": num_frames})
    reader = build_reader(data)
    reader.prepare()
    return reader


def report_run(run: Path, *, num_labelled: int = 160, num_held_out: int = 152, num_labels: int = 40) -> RunReport:
    """Measure a finished run on drive_world.

    Args:
        run: its folder.
        num_labelled: frames that label subsets are drawn from.
        num_held_out: frames that are scored.
        num_labels: labelled frames that a probe sees.

    Raises:
        UserError: the method has no image encoder.
    """
    settings, method, reader = load_run(run)
    own = image_encoder_of(method, run)
    labelled_reader = _split(settings, "val", num_labelled)
    held_out_reader = _split(settings, "test", num_held_out)
    labelled = gather_data((labelled_reader[i] for i in range(num_labelled)), labelled_reader.class_names)
    held_out = gather_data((held_out_reader[i] for i in range(num_held_out)), held_out_reader.class_names)
    step = max(1, len(reader) // NUM_CALIBRATION)
    frames = [reader[index].cameras[0].image for index in range(0, len(reader), step)]
    calibration = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()

    def random(seed: int) -> Encoder:
        torch.manual_seed(seed)
        return encoder_of(ImageEncoder(own.config), calibration)

    trained = encoder_of(own, calibration)
    table = probe_table(labelled, held_out, pretrained=trained, random=random, num_labels=num_labels)
    tasks = held_out_tasks(settings, method, held_out_reader)
    picture = draw_page(settings, method, held_out_reader, labelled.subset(np.arange(num_labels)), random(0), trained)
    return RunReport(tasks, table, picture)


@torch.no_grad()
def draw_page(
    settings: Settings,
    method: Method,
    reader: FrameReader,
    labelled: ProbeData,
    random: Encoder,
    trained: Encoder,
) -> np.ndarray:
    """Streets, projected points, what the method draws of a batch, features before and after, and the depth that the probe
    reads from both."""
    shown = np.linspace(0, len(reader) - 1, NUM_SHOWN).round().astype(int)
    frames: list[Frame] = [reader[index] for index in shown.tolist()]
    cameras = [frame.cameras[0] for frame in frames]
    images = torch.from_numpy(np.stack([camera.image for camera in cameras])).permute(0, 3, 1, 2).contiguous()
    batch = next(iter(make_loader(settings.data, settings.augment, settings.needs, settings.seed, reader=reader)))
    drawn = method.pictures(batch)
    rows = [
        ("held-out streets of drive_world", [("", camera.image) for camera in cameras]),
        (
            "their lidar points, projected; near is warm",
            [
                ("", overlay_points(camera, frame.points, scale=3))
                for camera, frame in zip(cameras, frames, strict=True)
            ],
        ),
        ("what the method compares: " + ", ".join(name.replace("_", " ") for name in drawn), [*drawn.items()]),
    ]
    true = [camera.depth for camera in cameras if camera.depth is not None]  # every drive_world camera has it
    depth_rows = [("true depth", [("", depth_as_colours(depth)) for depth in true])]
    for name, encode in (("before", random), ("after", trained)):
        maps = encode_all(encode, images)
        colours = features_as_colours([maps.features])[0]
        rows.append((f"image features as colours, {name} pre-training", [("", picture) for picture in colours]))
        probe = fit_probe(encode_all(encode, labelled.images), labelled, np.random.default_rng(0))
        depth = [
            np.exp(predict_pixels(probe.depth, probe.row_log_depth, maps, i, camera.image.shape[:2])[0])
            for i, camera in enumerate(cameras)
        ]
        pictures = [("", depth_as_colours(one)) for one in depth]
        depth_rows.append((f"depth from a linear probe on frozen features, {name} pre-training", pictures))
    return page([*rows, *depth_rows])
