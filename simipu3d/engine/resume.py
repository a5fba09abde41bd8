"""Can a run go on from this checkpoint, and with these settings?

A checkpoint is a file like any other: cut, edited or written by another release. What is taken from it is checked against
what this run has, so that a wrong value is one line and not a traceback, or a silent restart, some steps later.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch.trainer.connectors import checkpoint_connector
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor, nn
from torch.optim import Optimizer

from simipu3d.engine.processes import passed_through
from simipu3d.errors import UserError

log = logging.getLogger(__name__)

KEPT = re.compile(r"(last|epoch_\d+)\.ckpt")
"""Names of checkpoints that a run goes on from; others hold the weights of a choice or a mean."""
SCHEDULED = re.compile(r"schedule\.|optim\.[^.]+\.(lr|weight_decay)$")
"""Keys that may change because the first step of the continuation follows the new values."""


class _BadFrames(BaseModel, strict=True):
    messages: list[str]


class RunState(BaseModel, strict=True):
    """The `simipu3d` block of a checkpoint that a run goes on from."""

    config: dict[str, Any]
    method: str
    epoch: NonNegativeInt
    global_step: NonNegativeInt
    position: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]
    bad_frames: _BadFrames
    num_samples: PositiveInt
    world_size: PositiveInt


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a run's folder that holds most steps; the last one wins a draw. None where there is none.

    A kept epoch may be newer than last.ckpt, when the run died between two of those. One that is damaged is left out with
    a warning; a damaged last.ckpt is the newest, so that it is named when it is read.
    """
    last = folder / "last.ckpt"
    steps = {}
    for path in sorted(folder.glob("*.ckpt")):
        if KEPT.fullmatch(path.name):
            step = _step_of(path)
            if step is None and path == last:
                return last
            if step is None:
                log.warning("%s: damaged; left out", path)
            else:
                steps[path] = step
    return max(steps, key=lambda path: (steps[path], path == last), default=None)


def _step_of(path: Path) -> int | None:
    """The step of a checkpoint, without reading its tensors; None: it is damaged, or none of ours."""
    try:
        own = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["simipu3d"]
        return RunState.model_validate(own).global_step
    except Exception:  # what a damaged file raises depends on the place of the damage
        return None


def check_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Are the blocks there that a run goes on from, and are their values possible?

    Raises:
        UserError: one line that names the file and the key.
    """
    lacking = {"optimizer_states", "lr_schedulers", "loops", "state_dict", "simipu3d"} - checkpoint.keys()
    own = checkpoint.get("simipu3d")
    if lacking or not isinstance(own, dict) or RunState.model_fields.keys() - own.keys():
        raise UserError(f"{path}: holds weights but no state of a run; start from it with --init")
    try:
        RunState.model_validate(own)
    except ValidationError as error:
        first = error.errors()[0]
        raise _changed(path, f"simipu3d.{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not isinstance(own["config"].get("method"), str):
        raise _changed(path, "simipu3d.config.method: no name")
    if not _plain(own["config"]):
        raise _changed(path, "simipu3d.config: more than plain values")
    for key, what in (("optimizer_states", "state"), ("lr_schedulers", "last_epoch")):
        states = checkpoint[key]
        if not (isinstance(states, list) and len(states) == 1 and isinstance(states[0], dict) and what in states[0]):
            raise _changed(path, f"{key}: not one state")
    if not isinstance(checkpoint["loops"], dict) or not isinstance(checkpoint["loops"].get("fit_loop"), dict):
        raise _changed(path, "loops.fit_loop: no state")
    check_optimizer_state(checkpoint["optimizer_states"][0], own["global_step"], path)


def _plain(value: Any) -> bool:
    """Is it made of what a YAML file can say?"""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


def not_restored(error: Exception, path: Path | None) -> UserError | None:
    """The line about a checkpoint that Lightning could not restore, when that is where the error comes from."""
    if path is None or not passed_through(error, checkpoint_connector.__name__):
        return None
    return _changed(path, f"cannot be restored ({type(error).__name__}: {error})")


def _changed(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: {what}; the file was changed or is damaged; use another of {path.resolve().parent}, or --init"
    )


def check_optimizer_state(state: Mapping[str, Any], step: int, path: Path) -> None:
    """Does an optimizer's state hold together? Every parameter of a group has the same quantities, once there are any."""
    groups, states = state.get("param_groups"), state["state"]
    if not (isinstance(groups, list) and groups and isinstance(states, dict)):
        raise _changed(path, "optimizer_states: no groups, or no state")
    for number, group in enumerate(groups):
        place = f"optimizer_states: group {number}"
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise _changed(path, f"{place}: no parameters")
        for key in ("lr", "initial_lr"):
            if not isinstance(group.get(key), float) or not 0 <= group[key] < float("inf"):
                raise _changed(path, f"{place}: {key}: {group.get(key)!r}")
        own = [states[index] for index in group["params"] if isinstance(index, int) and index in states]
        if not all(isinstance(values, dict) and values for values in own):
            raise _changed(path, f"{place}: a parameter without state")
        if len({frozenset(values) for values in own}) > 1:
            raise _changed(path, f"{place}: its parameters have different states")
    if step and not states:
        raise _changed(path, f"optimizer_states: empty after {step} steps")


def check_fits(checkpoint: Mapping[str, Any], method: nn.Module, path: Path) -> None:
    """Raise `UserError` when a run's checkpoint lacks a tensor of the method, has one too many, or one of another shape."""
    state = checkpoint["state_dict"]
    if not isinstance(state, dict):
        raise _changed(path, "state_dict: no tensors")
    own = {f"method.{name}": value for name, value in method.state_dict().items()}
    wrong = [name for name, value in own.items() if getattr(state.get(name), "shape", None) != value.shape]
    wrong += [str(name) for name in state if name not in own]
    if wrong:
        raise UserError(
            f"{path}: {len(wrong)} tensors are missing, unknown or of another shape ({', '.join(wrong[:4])}); the file was "
            f"changed; use another of {path.resolve().parent}"
        )


def check_loops(saved: Any, own: Any, path: Path, place: str = "loops.fit_loop") -> None:
    """Has Lightning's progress the form that this Lightning writes, with counts that are none below zero?

    Args:
        saved: of the checkpoint.
        own: the same of this run's trainer.
        path: the checkpoint, for the message.
        place: where in it.
    """
    if isinstance(own, dict):
        if not isinstance(saved, dict) or own.keys() - saved.keys():
            raise _changed(path, f"{place}: not what this release of Lightning writes")
        for key, value in own.items():
            check_loops(saved[key], value, path, f"{place}.{key}")
    elif isinstance(own, int) and (type(saved) is not type(own) or saved < 0):
        raise _changed(path, f"{place}: {saved!r}")


def check_progress(checkpoint: Mapping[str, Any], own_loops: Mapping[str, Any], path: Path) -> None:
    """Do the places agree that a checkpoint names: its step, its position in the data, and Lightning's counts?"""
    loops, own = checkpoint["loops"]["fit_loop"], checkpoint["simipu3d"]
    check_loops(loops, dict(own_loops), path)
    steps = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
    epoch, batches = loops["epoch_progress"]["current"]["processed"], loops["epoch_loop.batch_progress"]["current"]
    places = ([epoch, batches["processed"]], [epoch + 1, 0])
    if steps != own["global_step"] or own["position"] not in places:
        raise _changed(
            path,
            f"step {own['global_step']} at {own['position']} does not agree with Lightning's step {steps} at {places[0]}",
        )


def schedule_states(states: list[dict[str, Any]], global_step: int, epochs: int) -> None:
    """Write into the schedulers' states how many steps and epochs are done, whatever the schedule of the checkpoint
    counted."""
    for state in states:
        state["steps_done"], state["epochs_done"] = global_step, epochs


def keep_settings(saved: dict[str, Any], optimizer: Optimizer, path: str = "the checkpoint") -> dict[str, Any]:
    """An optimizer's saved state with the settings of this run: weight decay, betas and so on are the configuration's, and
    the learning rate is at the same share of the configuration's.

    Args:
        saved: what `optimizer.state_dict()` gave in the run before.
        optimizer: this run's, before anything is loaded.

    Raises:
        UserError: it belongs to other parameters.
    """
    groups = optimizer.param_groups
    sizes = [[len(group["params"]) for group in side] for side in (saved["param_groups"], groups)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{path}: its optimizer has groups of {sizes[0]} parameters, this run's of {sizes[1]}; use --init"
        )
    merged = []
    for old, new in zip(saved["param_groups"], groups, strict=True):
        for index, parameter in zip(old["params"], new["params"], strict=True):
            for name, value in saved["state"].get(index, {}).items():
                if not isinstance(value, Tensor) or (value.ndim and value.shape != parameter.shape):
                    raise UserError(f"{path}: its optimizer's {name} does not fit its parameter; use --init")
        settings = {key: value for key, value in new.items() if key != "params"}
        before = old.get("initial_lr", old["lr"])  # none without a schedule
        settings["lr"] = settings.get("initial_lr", settings["lr"]) * (old["lr"] / before if before else 1.0)
        merged.append({**settings, "params": old["params"]})
    return {**saved, "param_groups": merged}
