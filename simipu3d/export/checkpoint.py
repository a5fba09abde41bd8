"""What does the checkpoint of a pre-training run hold?"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simipu3d.config import PartConfig, parse_block, parse_part
from simipu3d.encoders.image import ImageEncoder, ImageEncoderConfig
from simipu3d.engine.plugins import require_plugins
from simipu3d.errors import UserError
from simipu3d.registry import POINT_ENCODERS
from simipu3d.weights.files import read_checkpoint, some_names

IMAGE_PREFIX = "method.image_encoder."
POINT_PREFIX = "method.point_encoder."
DEFAULT_COLUMNS = ("x", "y", "z", "intensity")
"""Of checkpoints that do not say which columns the points had."""


def load_run_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and origin of a pre-training run.

    Args:
        path: a checkpoint below a run's `checkpoints/`.

    Returns:
        state: the run's state dict.
        run: what the run wrote about itself: `config` (resolved), `version`, `git_commit`, `epoch`, `global_step`,
            `method`.

    Raises:
        UserError: it is missing, damaged, no checkpoint of this project, or made with a plugin that is not loaded.
    """
    content = read_checkpoint(path)
    state, run = content["state_dict"], content["simipu3d"]
    if not isinstance(state, dict) or not isinstance(run, dict) or not isinstance(run.get("config"), dict):
        raise UserError(f"{path}: a checkpoint without weights or without its configuration; use another of the run")
    require_plugins(run["config"].get("plugins"), str(path))
    return state, run


def rebuild_image_encoder(path: Path, state: dict[str, Tensor], run: dict[str, Any]) -> ImageEncoder:
    """The run's own image encoder with its trained weights, in eval mode.

    Args:
        path: the checkpoint, for errors.
        state: the run's state dict.
        run: what the run wrote about itself.

    Raises:
        UserError: the run has no image branch, or its weights and its configuration do not belong together.
    """
    own = {name.removeprefix(IMAGE_PREFIX): value for name, value in state.items() if name.startswith(IMAGE_PREFIX)}
    block, matching = run["config"].get("image_encoder"), run["config"].get("matching")
    if isinstance(block, dict) and isinstance(matching, dict) and "map" in matching:
        block = {"map": matching["map"], **block}  # where older runs have the key
    if not own or not isinstance(block, dict):
        method = run.get("method", "unknown")
        raise UserError(f"{path}: this run (method {method}) has no image branch; export a run that has one")
    config = parse_block("image_encoder", ImageEncoderConfig, {**block, "pretrained": None})
    encoder = ImageEncoder(config)
    _load_exactly(path, encoder, own, "image")
    return encoder.eval()


def rebuild_point_encoder(
    path: Path, state: dict[str, Tensor], run: dict[str, Any]
) -> tuple[nn.Module, PartConfig, tuple[str, ...]]:
    """The run's own point encoder with its trained weights, in eval mode on the torch backend.

    Args:
        path: the checkpoint, for errors.
        state: the run's state dict.
        run: what the run wrote about itself.

    Returns:
        encoder, its validated block, and the columns of the points it was trained with.

    Raises:
        UserError: the run has no point branch, or its weights and its configuration do not belong together.
    """
    own = {name.removeprefix(POINT_PREFIX): value for name, value in state.items() if name.startswith(POINT_PREFIX)}
    block = run["config"].get("point_encoder")
    if not own or not isinstance(block, dict):
        method = run.get("method", "unknown")
        raise UserError(f"{path}: this run (method {method}) has no point branch; export a run that has one")
    if "sparse_backend" in block:
        block = {**block, "sparse_backend": "torch"}
    config = parse_part("point_encoder", POINT_ENCODERS, block)
    columns = tuple(run.get("point_columns") or DEFAULT_COLUMNS)
    encoder = POINT_ENCODERS.of(config).target(config, point_columns=columns)
    _load_exactly(path, encoder, own, "point")
    return encoder.eval(), config, columns


def _load_exactly(path: Path, encoder: nn.Module, own: dict[str, Tensor], branch: str) -> None:
    """Load a branch's tensors, all of them and no others.

    Raises:
        UserError: names or shapes differ from the configuration's, or values are not finite.
    """
    expected = encoder.state_dict()
    missing = [name for name in expected if name not in own]
    surplus = [name for name in own if name not in expected]
    if missing or surplus:
        raise UserError(
            f"{path}: its {branch} branch is not the one of its configuration; missing: {some_names(missing)}; "
            f"surplus: {some_names(surplus)}; the file may be damaged or from another version"
        )
    wrong = [name for name, value in expected.items() if own[name].shape != value.shape]
    if wrong:
        raise UserError(f"{path}: shapes differ from its configuration's: {some_names(wrong)}")
    bad = [name for name, value in own.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(
            f"{path}: {some_names(bad)} hold NaN or infinite values: the run diverged; take an earlier checkpoint"
        )
    encoder.load_state_dict(own)


def without_dilation(encoder: ImageEncoder) -> ImageEncoder:
    """The same weights and levels at the architecture's own strides, without neck: what a plain target computes."""
    if encoder.config.output_stride == 32 and encoder.neck is None:
        return encoder
    deepest = encoder.level_indices[-1] - encoder.num_levels
    changes = {"map": deepest, "output_stride": 32, "neck": None, "frozen_stages": 0}
    plain = ImageEncoder(encoder.config.model_copy(update=changes))
    plain.trunk.load_state_dict(encoder.trunk.state_dict())
    return plain.eval()
