"""Where does an exported file come from, and what has to hold where it is used? Plain values only."""

import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import simipu3d
from simipu3d.encoders.image import CAFFE_BGR_MEAN, ImageEncoder
from simipu3d.weights.folding import IMAGENET_MEAN, IMAGENET_STD

FORMAT_VERSION = 1
LICENCES = {
    "kitti": "KITTI: CC BY-NC-SA 3.0, non-commercial use only",
    "nuscenes": "nuScenes: CC BY-NC-SA 4.0, non-commercial use only",
    "waymo": "Waymo Open Dataset licence, non-commercial use only",
    "drive_world": "synthetic drives of this project, free of third-party terms",
}
INPUTS = {
    "imagenet_rgb": {"order": "RGB", "range": "0..1", "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
    "caffe_bgr": {"order": "BGR", "range": "0..255", "mean": list(CAFFE_BGR_MEAN), "std": [1.0, 1.0, 1.0]},
}


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_hash(tensors: dict[str, Tensor]) -> str:
    """One SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def licence_note(data: dict[str, Any]) -> str:
    """What is known about the terms of the pre-training data."""
    return LICENCES.get(str(data.get("name")), "see the terms of the data that was used")


def describe_run(checkpoint: Path, run: dict[str, Any], branch: str) -> dict[str, Any]:
    """Metadata that every exported file shares.

    Args:
        checkpoint: the run's checkpoint.
        run: what the run wrote about itself.
        branch: image or points.
    """
    config = run["config"]
    data = config.get("data") if isinstance(config.get("data"), dict) else {}
    plain = json.dumps(config, sort_keys=True)
    return {
        "format_version": FORMAT_VERSION,
        "branch": branch,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "simipu3d_version": simipu3d.__version__,
        "git_commit": run.get("git_commit"),
        "git_dirty": run.get("git_dirty"),
        "source_checkpoint": {
            "file": checkpoint.name,
            "sha256": file_hash(checkpoint),
            "epoch": run.get("epoch"),
            "step": run.get("global_step"),
            "simipu3d_version": run.get("version"),
        },
        "method": run.get("method"),
        "config": json.loads(plain),
        "config_sha256": hashlib.sha256(plain.encode()).hexdigest(),
        "datasets": [{"name": data.get("name"), "split": data.get("split"), "num_samples": run.get("num_samples")}],
        "licence": licence_note(data),
        "conversions": [],
    }


def describe_image_export(
    checkpoint: Path, run: dict[str, Any], encoder: ImageEncoder, convention: str, dropped: list[str]
) -> dict[str, Any]:
    """Metadata that every kind of image file shares.

    Args:
        checkpoint: the run's checkpoint.
        run: what the run wrote about itself.
        encoder: the pre-training side.
        convention: normalisation that the file expects.
        dropped: names of the run's image branch that were left out.
    """
    stage_strides = [level.stride for level in encoder.maps[: len(encoder.level_indices)]]
    return describe_run(checkpoint, run, "image") | {
        "architecture": {
            "name": encoder.config.name,
            "model_args": dict(encoder.config.model_args),
            "style": "pytorch",
            "output_stride_trained": encoder.config.output_stride,
            "strides_trained": stage_strides,
            "matched_stride": encoder.maps[-1].stride,
            "pad_multiple": encoder.pad_multiple,
        },
        "input": INPUTS[convention],
        "dropped": dropped,
        "untrained": list(encoder.untrained),
    }


def model_card(meta: dict[str, Any], usage: list[str]) -> str:
    """README.md of a timm folder."""
    architecture, source = meta["architecture"], meta["source_checkpoint"]
    largest = meta["verification"]["largest_relative_difference"]
    untrained = len(meta["untrained"])
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-feature-extraction, timm, self-supervised]",
        "---",
        f"# {architecture['name']}, pre-trained with simipu3d ({meta['method']})",
        "",
        "Image backbone pre-trained without labels from camera images and lidar scans. No classifier.",
        "",
        f"- data: {', '.join(str(d['name']) for d in meta['datasets'])}; {meta['licence']}",
        f"- checkpoint: {source['file']}, epoch {source['epoch']}, step {source['step']}",
        f"- architecture arguments: `{json.dumps(architecture['model_args'])}`",
        f"- trained at output stride {architecture['output_stride_trained']}, "
        f"matched with the points at stride {architecture['matched_stride']}",
        "- input: {order} in {range}, mean {mean}, std {std}".format(**meta["input"]),
        f"- {meta['tensors']} tensors; features differ from the pre-training network's by at most {largest:.1e}",
    ]
    if untrained:
        lines.append(f"- **{untrained} tensors were not trained** and hold a random initialisation: see metadata.json")
    return "\n".join([*lines, "", "```python", "import timm", "", *usage, "```", ""])
