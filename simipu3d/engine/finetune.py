"""How is a downstream run started? The engine of pre-training, from a checkpoint or, said in so many words, from scratch."""

import logging
from pathlib import Path

from simipu3d.config import apply_sets, load_yaml
from simipu3d.engine.pretrain import pretrain
from simipu3d.engine.settings import load_settings
from simipu3d.errors import UserError
from simipu3d.weights.files import read_checkpoint

log = logging.getLogger(__name__)

SCRATCH = "scratch"
"""`--init scratch`: random weights, asked for."""
INPUT = "image_encoder.input"


def finetune(
    cfg: str | Path,
    sets: list[str] | None = None,
    *,
    out: Path | None = None,
    resume: str | None = None,
    init: str | None = None,
    partial: bool = False,
) -> Path:
    """Train a downstream method, see `pretrain`.

    Args:
        cfg, sets, out, resume, partial: as for `pretrain`.
        init: a checkpoint's path or `scratch`; not needed with `resume`.

    Returns:
        The run's folder.

    Raises:
        UserError: `init` is missing, or what `pretrain` raises.
    """
    if init is None and resume is None:
        raise UserError("--init: say which checkpoint to start from, or --init scratch for random weights")
    weights = None if init in (None, SCRATCH) else Path(init)
    source = _resumed(out, resume) or weights
    sets = list(sets or [])
    if source is not None:
        sets += followed_input(cfg, sets, source)
    return pretrain(cfg, sets, out=out, resume=resume, init=weights, partial=partial)


def _resumed(out: Path | None, resume: str | None) -> Path | None:
    """The checkpoint that `--resume` goes on from, if there is one."""
    if resume:
        return Path(resume)
    last = None if resume is None or out is None else out / "checkpoints" / "last.ckpt"
    return last if last is not None and last.is_file() else None


def followed_input(cfg: str | Path, sets: list[str], checkpoint: Path) -> list[str]:
    """`--set` pairs that give the image encoder the input normalisation that a checkpoint of ours was trained with, where the
    configuration leaves it open.

    Weights of the other normalisation would be converted exactly, but a first layer scaled by it learns at another pace: rows of
    a comparison would differ in more than their weights.
    """
    settings = load_settings(cfg, sets)
    encoder = getattr(settings.blocks, "image_encoder", None)
    said = apply_sets(load_yaml(cfg), sets).get("image_encoder")
    if encoder is None or (isinstance(said, dict) and "input" in said):
        return []
    try:
        block = read_checkpoint(checkpoint)["simipu3d"]["config"].get("image_encoder")
    except UserError:  # not a run of ours; who loads its weights says what is wrong with it
        return []
    trained = block.get("input") if isinstance(block, dict) else None
    if trained is None or trained == encoder.input:
        return []
    log.info("%s: %s follows %s", INPUT, trained, checkpoint)
    return [f"{INPUT}={trained}"]
