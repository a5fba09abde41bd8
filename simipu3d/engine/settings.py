"""Which settings does a pre-training run have? The blocks of the engine, and the whole configuration put together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from simipu3d.config import PartConfig, apply_sets, check_top_level, load_yaml, merge, parse_block, parse_part, to_plain
from simipu3d.data.shards.frames import PrepareConfig
from simipu3d.encoders.image import ImageEncoderConfig
from simipu3d.engine.optim import OptimConfig, parse_optim
from simipu3d.engine.plugins import load_plugins, plugins_behind, require_plugins
from simipu3d.errors import UserError
from simipu3d.registry import METHODS, POINT_ENCODERS, READERS, SCHEDULES


class TrainerConfig(PartConfig):
    """The `trainer:` block: arguments of Lightning's Trainer under their own names and with its defaults, but for these:
    a run needs `max_steps` or `max_epochs`."""

    max_steps: int = -1
    """Optimizer steps; -1: as many as max_epochs gives."""
    max_epochs: PositiveInt | None = None
    """Passes over the data."""
    accelerator: Literal["auto", "cpu", "gpu", "cuda"] = "auto"
    """Where to compute."""
    devices: PositiveInt | Literal["auto"] = 1
    """Processes on this machine; on CPU more than one means DDP over gloo."""
    num_nodes: PositiveInt = 1
    """Machines."""
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    """Mixed precision computes the encoders in half; losses and geometry stay in float32 or float64."""
    accumulate_grad_batches: PositiveInt = 1
    """Batches a step."""
    gradient_clip_val: PositiveFloat | None = None
    """Largest norm of all gradients together; null: none (SimIPU)."""
    limit_train_batches: PositiveInt | None = None
    """Batches an epoch, at most."""
    log_every_n_steps: PositiveInt = 10
    """Steps from one row of metrics.csv to the next."""
    deterministic: bool = False
    """Refuse operations whose result may differ from run to run (on CPU there are none in this package)."""

    @field_validator("max_steps")
    @classmethod
    def _some_or_open(cls, max_steps: int) -> int:
        if max_steps != -1 and max_steps < 1:
            raise ValueError(f"1 or more, or -1 for as many as max_epochs gives; got {max_steps}")
        return max_steps


class RunConfig(PartConfig):
    """The `run:` block: what a run leaves on disk, and when."""

    checkpoint_every_steps: PositiveInt = 200
    """Steps from one checkpoints/last.ckpt to the next; the last step always writes one."""
    keep_every_epochs: PositiveInt | None = 10
    """Every so many epochs a checkpoint is kept under its own name; null: none."""
    pictures_every_steps: NonNegativeInt = 500
    """Steps from one set of pictures to the next; 0: none."""


@dataclass(frozen=True)
class PretrainConfig:
    """A validated configuration."""

    method: str
    blocks: PartConfig
    data: PartConfig
    optim: OptimConfig
    schedule: PartConfig
    trainer: TrainerConfig
    run: RunConfig
    seed: int
    plugins: tuple[str, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """The resolved configuration: what `load_pretrain_config` would read to the same settings. `plugins` holds those
        that the file named and the installed ones that it uses; without any the key is left out."""
        own = {name: to_plain(getattr(self, name)) for name in ("data", "optim", "schedule", "trainer", "run")}
        resolved = {"method": self.method, **to_plain(self.blocks), **own, "seed": self.seed}
        plugins = list(dict.fromkeys([*self.plugins, *plugins_behind(resolved)]))
        return {"plugins": plugins, **resolved} if plugins else resolved


class _Seed(PartConfig):
    seed: int = Field(default=0, ge=0, lt=2**31)


def parse_pretrain(raw: dict[str, Any], source: str) -> PretrainConfig:
    """Validate a merged configuration, whose plugins have been loaded.

    Args:
        raw: plain values.
        source: the file's name, for error messages.

    Raises:
        UserError: one line that names the key.
    """
    plugins = require_plugins(raw.get("plugins"), source)
    name = raw.get("method")
    if not isinstance(name, str):
        raise UserError(f"{source}: method: this key chooses what to train; there are {', '.join(METHODS.names())}")
    entry = METHODS[name]
    own = ("data", "prepare", "optim", "schedule", "trainer", "run", "seed", "plugins")
    check_top_level(raw, ["method", *entry.target.BLOCKS, *own], source)
    parse_block("prepare", PrepareConfig, raw.get("prepare"))  # belongs to another tool, may stand in the same file
    schedule = raw.get("schedule") or {"name": "constant"}
    data = parse_part("data", READERS, raw.get("data"))
    blocks = with_data_range({block: raw.get(block) for block in entry.target.BLOCKS}, data)
    config = PretrainConfig(
        method=name,
        blocks=entry.target.parse_blocks(blocks),
        data=data,
        optim=parse_optim(raw.get("optim")),
        schedule=parse_part("schedule", SCHEDULES, schedule),
        trainer=parse_block("trainer", TrainerConfig, raw.get("trainer")),
        run=parse_block("run", RunConfig, raw.get("run")),
        seed=parse_block("", _Seed, {"seed": raw.get("seed", 0)}).seed,
        plugins=plugins,
    )
    if config.trainer.max_steps < 1 and config.trainer.max_epochs is None:
        raise UserError(f"{source}: trainer.max_steps: set it, or trainer.max_epochs, so that the run ends")
    return config


def with_data_range(blocks: dict[str, Any], data: PartConfig) -> dict[str, Any]:
    """The same blocks, with the bounds of the data in a `point_encoder:` that needs some and says none.

    An encoder needs bounds when its `point_range` has a default other than null: that one is right for one data set only.
    """
    block = blocks.get("point_encoder")
    if not isinstance(block, dict) or block.get("name") not in POINT_ENCODERS.names() or block.get("point_range"):
        return blocks
    field = POINT_ENCODERS[block["name"]].config.model_fields.get("point_range")
    ranges = [
        getattr(part, "point_range", None) for part in [entry.data for entry in getattr(data, "sets", ())] or [data]
    ]
    if field is None or field.default is None or None in ranges:
        return blocks
    corners = list(zip(*ranges, strict=True))
    box = [*map(min, corners[:3]), *map(max, corners[3:])]
    return {**blocks, "point_encoder": {**block, "point_range": box}}


def with_default_names(raw: dict[str, Any]) -> dict[str, Any]:
    """The same configuration with the names said that its blocks leave to the defaults, so that `--set` can tell when a
    block's name changes."""
    defaults = {"image_encoder": {"name": ImageEncoderConfig().name}}
    optim = raw.get("optim")
    if isinstance(optim, dict):
        own = {
            b: {"name": getattr(OptimConfig(), b).name}
            for b in OptimConfig.model_fields
            if isinstance(optim.get(b), dict)
        }
        defaults["optim"] = own
    present = {block: names for block, names in defaults.items() if isinstance(raw.get(block), dict)}
    return merge(present, raw)


def load_data_config(path: str | Path, sets: list[str] | None = None) -> PartConfig:
    """The `data:` block of a configuration; the other blocks are checked too, where the file has a method."""
    return load_prepare_config(path, sets)[0]


def load_prepare_config(path: str | Path, sets: list[str] | None = None) -> tuple[PartConfig, PrepareConfig]:
    """The `data:` and `prepare:` blocks of a configuration; the other blocks are checked too, where the file has a
    method."""
    raw = _read(path, sets)
    prepare = parse_block("prepare", PrepareConfig, raw.get("prepare"))
    if "method" in raw:
        return parse_pretrain(raw, str(path)).data, prepare
    check_top_level(raw, ["data", "prepare", "plugins"], str(path))
    return parse_part("data", READERS, raw.get("data")), prepare


def load_pretrain_config(path: str | Path, sets: list[str] | None = None) -> PretrainConfig:
    """Read, merge and validate a configuration file, after importing the plugins that it names."""
    return parse_pretrain(_read(path, sets), str(path))


def _read(path: str | Path, sets: list[str] | None) -> dict[str, Any]:
    """The merged configuration; its plugins are loaded from here on."""
    raw = apply_sets(with_default_names(load_yaml(path)), sets or [])
    load_plugins(raw.get("plugins"), f"{path}: plugins")
    return raw
