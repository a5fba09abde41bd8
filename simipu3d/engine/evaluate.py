"""How good is a checkpoint? Its method's score on held-out frames, in order and without draws.

Of a run's folder the last checkpoint, the best one and those kept on the way are rows of their own, and so is the mean of the
last ones: a best epoch that was chosen on the frames it is scored on is no fair row of a comparison.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from simipu3d.config import changed_keys, to_plain
from simipu3d.contracts.batch import Batch
from simipu3d.contracts.method import DataInfo, Method
from simipu3d.data.loading.evaluation import make_evaluation_loader
from simipu3d.data.loading.loader import build_reader, wants_of
from simipu3d.engine.disk import write_whole
from simipu3d.engine.finetune import followed_input
from simipu3d.engine.metrics import average
from simipu3d.engine.module import seed_step
from simipu3d.engine.pretrain import build_method
from simipu3d.engine.settings import Settings, load_settings
from simipu3d.errors import UserError
from simipu3d.weights.files import read_checkpoint

log = logging.getLogger(__name__)

Row = tuple[str, dict[str, float]]
"""A checkpoint's name and its numbers."""


def evaluate(
    cfg: str | Path,
    checkpoints: Sequence[Path],
    sets: list[str] | None = None,
    *,
    last: int = 5,
    out: Path | None = None,
    predictions: Path | None = None,
) -> list[Row]:
    """Score checkpoints on the frames of `validate.data`, or of `data` where there is no such block.

    Args:
        cfg: the configuration file.
        checkpoints: files, or folders of runs.
        sets: `key=value` pairs over it.
        last: of a folder: how many of its latest epochs' checkpoints are averaged over.
        out: where metrics.json goes; None: nowhere.
        predictions: where the method writes what it predicts, a folder a checkpoint where there are several; None: nowhere.

    Returns:
        A row for every checkpoint, and for every folder the mean of its last ones.

    Raises:
        UserError: a checkpoint cannot be read or is of another network, or a frame is bad.
    """
    if not checkpoints:
        raise UserError("--ckpt: say which checkpoint or which run's folder")
    groups = [_checkpoints_of(path) for path in checkpoints]
    several = sum(map(len, groups)) > 1
    known: dict[Path, dict[str, float]] = {}
    rows: list[Row] = []
    for path, group in zip(checkpoints, groups, strict=True):
        for name, file in group:
            known[file] = _score(cfg, sets, file, _folder(predictions, name, several))
            rows.append((name, known[file]))
        rows += _mean_of_last(path, [file for _, file in group], known, last)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        table = [{"checkpoint": name, **numbers} for name, numbers in rows]
        write_whole(out / "metrics.json", json.dumps(table, indent=1) + "\n")
    return rows


def _checkpoints_of(path: Path) -> list[tuple[str, Path]]:
    """Names and files: of a run's folder last, best and the kept epochs."""
    if not path.is_dir():
        return [(path.stem if path.parent.name != "checkpoints" else f"{path.parent.parent.name}/{path.stem}", path)]
    folder = path / "checkpoints"
    found = [folder / f"{name}.ckpt" for name in ("last", "best") if (folder / f"{name}.ckpt").is_file()]
    found += sorted(folder.glob("epoch_*.ckpt"))
    if not found:
        raise UserError(f"{path}: holds no checkpoints/*.ckpt; give a run's folder or a file")
    return [(f"{path.name}/{file.stem}", file) for file in found]


def _folder(predictions: Path | None, name: str, several: bool) -> Path | None:
    return predictions / name if predictions is not None and several else predictions


def _mean_of_last(path: Path, files: list[Path], known: dict[Path, dict[str, float]], last: int) -> list[Row]:
    """The mean of the numbers of the last kept epochs, where there are at least two."""
    epochs = [file for file in files if file.name.startswith("epoch_")][-last:]
    if not path.is_dir() or len(epochs) < 2:
        return []
    names = known[epochs[0]]
    mean = {name: sum(known[file][name] for file in epochs) / len(epochs) for name in names}
    return [(f"{path.name}/mean of {len(epochs)} epochs", mean)]


def _score(cfg: str | Path, sets: list[str] | None, checkpoint: Path, folder: Path | None) -> dict[str, float]:
    """The numbers of one checkpoint; its method's losses too, where it has no score."""
    run = read_checkpoint(checkpoint)["simipu3d"]
    settings = load_settings(cfg, [*(sets or []), *followed_input(cfg, list(sets or []), checkpoint)])
    _compare(settings, run, checkpoint)
    data = settings.data if settings.validate_data is None else settings.validate_data
    reader = build_reader(data, wants_of(settings.needs))
    reader.prepare()
    info = DataInfo(tuple(run.get("point_columns") or reader.point_columns), tuple(run.get("class_names") or ()))
    method = load_method(settings, info, checkpoint)
    loader = make_evaluation_loader(data, settings.augment, settings.needs, reader=reader)
    return measure(method, loader, settings, folder)


def _compare(settings: Settings, run: dict[str, Any], checkpoint: Path) -> None:
    """Say what of the method's blocks differs from the run."""
    if run["method"] != settings.method:
        raise UserError(
            f"{checkpoint}: a checkpoint of the method {run['method']!r}, the configuration says {settings.method!r}; give the "
            "configuration of that run"
        )
    blocks = to_plain(settings.blocks)
    for key, (before, now) in changed_keys({name: run["config"].get(name) for name in blocks}, blocks).items():
        log.info("%s: %s was %s in the run, it is %s here", checkpoint, key, before, now)


def load_method(settings: Settings, data: DataInfo, checkpoint: Path) -> Method:
    """The method with a run's weights, in evaluation mode, on the device that `trainer.accelerator` means.

    Raises:
        UserError: the checkpoint is of another network.
    """
    method = build_method(settings, data)
    state = read_checkpoint(checkpoint)["state_dict"]
    own = method.state_dict()
    wrong = [name for name, value in own.items() if getattr(state.get(f"method.{name}"), "shape", None) != value.shape]
    if wrong:
        raise UserError(
            f"{checkpoint}: {len(wrong)} tensors are missing or have another shape ({', '.join(wrong[:3])}): it is of another "
            "network; give the configuration of that run, the config.yaml of its folder"
        )
    method.load_state_dict({name: state[f"method.{name}"] for name in own})
    use_gpu = settings.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return method.eval().to("cuda" if use_gpu else "cpu")


@torch.no_grad()
def measure(method: Method, loader: Any, settings: Settings, folder: Path | None) -> dict[str, float]:
    """A method's score on all batches of a loader; its losses where it has none. The same numbers as those of a validation."""
    device = next(method.parameters()).device
    measured, records = [], []
    for number, batch in enumerate(loader):
        batch = _on(batch, device)
        seed_step(settings.seed, 0, number, 0)
        measured.append(({name: float(value) for name, value in method(batch).items()}, batch.num_frames))
        found = method.predict(batch)
        if folder is not None:
            method.write_predictions(found, folder)
        records += method.condense(found)
    if folder is not None and not folder.exists():
        log.warning("--predict: the method %s writes no predictions", settings.method)
    score = method.score(records)
    return {**score, "loss": average(measured)["loss"]}


def _on(batch: Batch, device: torch.device) -> Batch:
    return batch if device.type == "cpu" else batch.to(device)
