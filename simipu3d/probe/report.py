"""What did a run on drive_world learn? Retrieval and the linear probe on held-out streets, and a page of pictures.

The streets of `val` give the labelled frames, those of `test` are scored; pre-training saw neither.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simipu3d.contracts.batch import Batch
from simipu3d.contracts.frame import Frame, FrameReader
from simipu3d.contracts.tokens import FeatureMap
from simipu3d.data.loading.augment import augment_frame
from simipu3d.data.loading.collate import collate
from simipu3d.data.loading.loader import build_reader
from simipu3d.data.loading.order import sample_seeds
from simipu3d.encoders.image import ImageEncoder
from simipu3d.engine.pretrain import build_method
from simipu3d.engine.run import read_checkpoint
from simipu3d.engine.settings import PretrainConfig, parse_pretrain
from simipu3d.methods.drawing import draw_pixel_pairs, draw_token_pairs
from simipu3d.methods.simipu import SimIPU
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

NUM_CALIBRATION = 128
"""Training images that BatchNorm statistics of every probed backbone are averaged over."""
NUM_SHOWN = 3
"""Held-out frames that are drawn."""


@dataclass(frozen=True, eq=False)
class RunReport:
    """What `report_run` found.

    Attributes:
        retrieval: loss name -> (top-1 on held-out frames, chance).
        losses: loss name -> (held-out loss, its ceiling ln N).
        table: the linear probe.
        picture: (H, W, 3), a page to look at.
    """

    retrieval: dict[str, tuple[float, float]]
    losses: dict[str, tuple[float, float]]
    table: ProbeTable
    picture: np.ndarray


def load_run(run: Path) -> tuple[PretrainConfig, SimIPU, FrameReader]:
    """Configuration, trained method in evaluation mode, and training data of a run directory."""
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    config = parse_pretrain(checkpoint["simipu3d"]["config"], str(run))
    reader = build_reader(config.data)
    method = build_method(config, reader.point_columns)
    prefix = "method."
    state = {name.removeprefix(prefix): value for name, value in checkpoint["state_dict"].items()}
    method.load_state_dict(state)
    return config, method.eval(), reader


def encoder_of(model: ImageEncoder, calibration: Tensor) -> Encoder:
    """A copy of an image encoder with BatchNorm statistics made anew from `calibration`, as a probe wants it."""
    model = copy.deepcopy(model).eval()

    def encode(images: Tensor) -> FeatureMap:
        size = torch.tensor([images.shape[2:]] * len(images))
        return model(model.normalise(images, size))[-1]

    recompute_batchnorm(model, calibration, encode)
    return torch.no_grad()(encode)


def batches(config: PretrainConfig, reader: FrameReader) -> Iterator[Batch]:
    """The held-out frames, augmented as in training by draws of their own."""
    size = config.data.batch_size
    for first in range(0, len(reader) - size + 1, size):
        samples = [
            augment_frame(reader[index], config.data.augment, sample_seeds(config.seed, 0, index))
            for index in range(first, first + size)
        ]
        yield collate(samples)


@torch.no_grad()
def retrieve(
    config: PretrainConfig, method: SimIPU, reader: FrameReader
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """Top-1 of both tasks on held-out batches against chance, and their losses beside the ceilings (means)."""
    found: dict[str, list[tuple[float, float]]] = {"intra": [], "inter": []}
    losses: dict[str, list[tuple[float, float]]] = {"intra": [], "inter": []}
    for batch in batches(config, reader):
        embedded = method.embed(batch)
        metrics = method(batch)
        intra_ids = embedded.copies[0][embedded.pairs.first]
        inter_ids = embedded.copies[0][embedded.used.token]
        for name, (query, key), ids in (("intra", embedded.intra, intra_ids), ("inter", embedded.inter, inter_ids)):
            found[name].append((retrieval_top1(query, key, ids), chance_top1(ids)))
            losses[name].append((float(metrics[f"{name}_loss"]), float(metrics[f"{name}_ceiling"])))
    return _means(found), _means(losses)


def _means(values: dict[str, list[tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    return {name: tuple(np.mean(pairs, axis=0).tolist()) for name, pairs in values.items()}


def _split(config: PretrainConfig, split: str, num_frames: int) -> FrameReader:
    data = config.data.model_copy(update={"split": split, "num_frames": num_frames})
    reader = build_reader(data)
    reader.prepare()
    return reader


def report_run(run: Path, *, num_labelled: int = 160, num_held_out: int = 152, num_labels: int = 40) -> RunReport:
    """Measure a finished SimIPU run on drive_world.

    Args:
        run: its folder.
        num_labelled: frames that label subsets are drawn from.
        num_held_out: frames that are scored.
        num_labels: labelled frames that a probe sees.
    """
    config, method, reader = load_run(run)
    labelled_reader = _split(config, "val", num_labelled)
    held_out_reader = _split(config, "test", num_held_out)
    labelled = gather_data((labelled_reader[i] for i in range(num_labelled)), labelled_reader.class_names)
    held_out = gather_data((held_out_reader[i] for i in range(num_held_out)), held_out_reader.class_names)
    step = max(1, len(reader) // NUM_CALIBRATION)
    frames = [reader[index].cameras[0].image for index in range(0, len(reader), step)]
    calibration = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()

    def random(seed: int) -> Encoder:
        torch.manual_seed(seed)
        return encoder_of(ImageEncoder(config.blocks.image_encoder, map=config.blocks.matching.map), calibration)

    trained = encoder_of(method.image_encoder, calibration)
    table = probe_table(labelled, held_out, pretrained=trained, random=random, num_labels=num_labels)
    retrieval, losses = retrieve(config, method, held_out_reader)
    picture = draw_page(config, method, held_out_reader, labelled.subset(np.arange(num_labels)), random(0), trained)
    return RunReport(retrieval, losses, table, picture)


@torch.no_grad()
def draw_page(
    config: PretrainConfig,
    method: SimIPU,
    reader: FrameReader,
    labelled: ProbeData,
    random: Encoder,
    trained: Encoder,
) -> np.ndarray:
    """Streets, projected points, matches, features before and after, and the depth that the probe reads from both."""
    shown = np.linspace(0, len(reader) - 1, NUM_SHOWN).round().astype(int)
    frames: list[Frame] = [reader[index] for index in shown.tolist()]
    cameras = [frame.cameras[0] for frame in frames]
    images = torch.from_numpy(np.stack([camera.image for camera in cameras])).permute(0, 3, 1, 2).contiguous()
    size = config.data.batch_size
    samples = [augment_frame(reader[i], config.data.augment, sample_seeds(config.seed, 0, i)) for i in range(size)]
    batch = collate(samples)
    embedded = method.embed(batch)
    streets = [("", camera.image) for camera in cameras]
    points = [
        ("", overlay_points(camera, frame.points, scale=3)) for camera, frame in zip(cameras, frames, strict=True)
    ]
    rows = [
        ("held-out streets of drive_world", streets),
        ("their lidar points, projected; near is warm", points),
        (
            "tokens matched between two augmented views (left), and tokens with their pixels (right)",
            [
                ("", draw_token_pairs(batch, embedded.tokens, embedded.pairs)),
                ("", draw_pixel_pairs(batch, embedded.tokens[0], embedded.used)),
            ],
        ),
    ]
    depth_rows = [("true depth", [("", depth_as_colours(camera.depth)) for camera in cameras])]
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
