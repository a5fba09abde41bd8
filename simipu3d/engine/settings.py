"""Which settings does a run have? The blocks of the engine, and the whole configuration put together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from simipu3d.config import (
    PartConfig,
    apply_sets,
    check_top_level,
    chosen_parts,
    load_yaml,
    merge,
    parse_block,
    parse_part,
    to_plain,
)
from simipu3d.contracts.method import Method, Needs
from simipu3d.data.config import AugmentConfig, DataConfig
from simipu3d.data.shards.frames import PrepareConfig
from simipu3d.engine.optim import OptimSettings, default_optimizer, parse_optim
from simipu3d.engine.plugins import load_plugins, plugins_behind, require_plugins
from simipu3d.errors import UserError
from simipu3d.moved_keys import refuse_moved_keys
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
    check_val_every_n_epoch: PositiveInt | None = 1
    """With a `validate:` block: epochs from one validation to the next; null: count val_check_interval over epochs."""
    val_check_interval: PositiveInt | Annotated[float, Field(gt=0, le=1)] | None = None
    """With a `validate:` block: batches, or a share of an epoch, from one validation to the next; null: at its end."""
    limit_val_batches: PositiveInt | None = None
    """Batches of a validation, at most."""
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
    calibration_frames: NonNegativeInt = 12
    """Frames in which a fresh run compares depth edges of the points with edges of the pictures, to warn of a calibration
    that seems off; 0: none. Default: a second or two on KITTI."""


class ValidateConfig(PartConfig):
    """The `validate:` block: what is measured on held-out frames during training, and which checkpoint is the best."""

    data: dict[str, Any] = Field(default_factory=lambda: {"split": "val"})
    """Keys of `data:` that are different for held-out frames; without a split among them it is val."""
    metric: str = "loss"
    """Held-out number, without its prefix val_, that chooses checkpoints/best.ckpt. Default: the weighted sum of losses."""
    mode: Literal["min", "max"] = "min"
    """Is the smallest or the largest the best?"""

    @field_validator("data")
    @classmethod
    def _other_split(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {"split": "val", **data}


@dataclass(frozen=True)
class Settings:
    """A validated configuration."""

    method: str
    blocks: PartConfig
    data: DataConfig
    augment: AugmentConfig
    optim: OptimSettings
    schedule: PartConfig
    trainer: TrainerConfig
    run: RunConfig
    seed: int
    validate: ValidateConfig | None = None
    validate_data: DataConfig | None = None
    plugins: tuple[str, ...] = ()

    @property
    def needs(self) -> Needs:
        """What the method reads of every sample."""
        return METHODS[self.method].target.needs_of(self.blocks)

    def to_plain(self) -> dict[str, Any]:
        """The resolved configuration: what `load_settings` would read to the same settings. `plugins` holds those that the
        file named and the installed ones that it uses; without any the key is left out, as is `validate`."""
        resolved: dict[str, Any] = {
            "method": self.method,
            "data": to_plain(self.data),
            "augment": to_plain(self.augment),
        }
        resolved |= to_plain(self.blocks)
        resolved |= {"optim": self.optim.to_plain()}
        resolved |= {name: to_plain(getattr(self, name)) for name in ("schedule", "trainer", "run")}
        if self.validate is not None:
            resolved["validate"] = to_plain(self.validate)
        resolved["seed"] = self.seed
        plugins = list(dict.fromkeys([*self.plugins, *plugins_behind(resolved)]))
        return {"plugins": plugins, **resolved} if plugins else resolved


@dataclass(frozen=True)
class DataSettings:
    """The blocks of a configuration that say which data there is and what becomes of it; `needs` of its method, or None."""

    data: DataConfig
    augment: AugmentConfig
    prepare: PrepareConfig
    needs: Needs | None


class TopConfig(PartConfig):
    """The keys that stand at the top of a file beside the blocks."""

    method: str
    """What is trained: a registered name (`METHODS`)."""
    plugins: tuple[str, ...] = ()
    """Modules that register parts of your own; imported before anything is validated."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Weights, order of the data and every draw are a function of it."""


OWN_BLOCKS = ("data", "augment", "prepare", "optim", "schedule", "validate", "trainer", "run", "seed", "plugins")
"""Top-level keys beside `method` and the method's own blocks."""


def parse_settings(raw: dict[str, Any], source: str) -> Settings:
    """Validate a merged configuration, whose plugins have been loaded.

    Args:
        raw: plain values.
        source: the file's name, for error messages.

    Raises:
        UserError: one line that names the key.
    """
    plugins = require_plugins(raw.get("plugins"), source)
    refuse_moved_keys(raw, source)
    name = raw.get("method")
    if not isinstance(name, str):
        raise UserError(f"{source}: method: this key chooses what to train; there are {', '.join(METHODS.names())}")
    method = METHODS[name].target
    check_top_level(raw, ["method", *method.Config.model_fields, *OWN_BLOCKS], source)
    parse_block("prepare", PrepareConfig, raw.get("prepare"))  # belongs to another tool, may stand in the same file
    data = parse_data(raw.get("data"))
    blocks = {block: raw[block] for block in method.Config.model_fields if raw.get(block) is not None}
    for block, registry in chosen_parts(method.Config).items():
        if block not in blocks and method.Config.model_fields[block].is_required():
            parse_part(block, registry, None)  # says which there are
    validate = parse_block("validate", ValidateConfig, raw["validate"]) if raw.get("validate") is not None else None
    settings = Settings(
        method=name,
        blocks=parse_block("", method.Config, with_data_range(method.Config, blocks, data)),
        data=data,
        augment=parse_block("augment", AugmentConfig, raw.get("augment")),
        optim=parse_optim(raw.get("optim"), method.OPTIM),
        schedule=parse_part("schedule", SCHEDULES, raw.get("schedule") or {"name": "constant"}),
        trainer=parse_block("trainer", TrainerConfig, raw.get("trainer")),
        run=parse_block("run", RunConfig, raw.get("run")),
        seed=parse_block("", TopConfig, {"method": name, "seed": raw.get("seed", 0)}).seed,
        validate=validate,
        validate_data=None if validate is None else _validate_data(raw, validate),
        plugins=plugins,
    )
    if settings.trainer.max_steps < 1 and settings.trainer.max_epochs is None:
        raise UserError(f"{source}: trainer.max_steps: set it, or trainer.max_epochs, so that the run ends")
    return settings


def parse_data(block: Any) -> DataConfig:
    """The `data:` block.

    Raises:
        UserError: one line that names the key.
    """
    data = parse_part("data", READERS, block)
    if not isinstance(data, DataConfig):
        raise UserError(
            f"data.name: {block['name']}: its configuration does not derive from simipu3d.data.config.DataConfig"
        )
    return data


def _validate_data(raw: dict[str, Any], validate: ValidateConfig) -> DataConfig:
    """The `data:` block of held-out frames: that of training, with what differs, and with all labels."""
    merged = merge({"data": _with_all_labels(raw["data"])}, {"data": validate.data})["data"]
    try:
        return parse_data(merged)
    except UserError as error:
        raise UserError(f"validate.{error}") from error


def _with_all_labels(block: dict[str, Any]) -> dict[str, Any]:
    """A `data:` block, and the sets of a mixture in it, without the keys of few labels: they are for training."""
    kept = {key: value for key, value in block.items() if key not in ("label_fraction", "label_seed")}
    if isinstance(kept.get("sets"), list):
        kept["sets"] = [_with_all_labels(own) if isinstance(own, dict) else own for own in kept["sets"]]
    return kept


def with_data_range(model: type[BaseModel], blocks: dict[str, Any], data: DataConfig) -> dict[str, Any]:
    """The same blocks, with the bounds of the data in a point encoder's block that needs some and says none.

    An encoder needs bounds when its `point_range` has a default other than null: that one is right for one data set only.
    """
    ranges = [
        getattr(part, "point_range", None) for part in [entry.data for entry in getattr(data, "sets", ())] or [data]
    ]
    if None in ranges:
        return blocks
    corners = list(zip(*ranges, strict=True))
    box = [*map(min, corners[:3]), *map(max, corners[3:])]
    filled = dict(blocks)
    for name, registry in chosen_parts(model).items():
        block = blocks.get(name)
        if registry is not POINT_ENCODERS or not isinstance(block, dict) or block.get("point_range"):
            continue
        if block.get("name") in registry.names():
            field = registry[block["name"]].model.model_fields.get("point_range")
            if field is not None and field.default is not None:
                filled[name] = {**block, "point_range": box}
    return filled


def with_default_names(raw: dict[str, Any], method: type[Method] | None) -> dict[str, Any]:
    """The same configuration with the names said that its blocks leave to the defaults, so that `--set` can tell when a
    block's name changes."""
    if method is None:
        return raw
    defaults = {
        block: {"name": field.default.name}
        for block, field in method.Config.model_fields.items()
        if isinstance(raw.get(block), dict) and isinstance(getattr(field.default, "name", None), str)
    }
    optim = raw.get("optim")
    if isinstance(optim, dict):
        defaults["optim"] = {
            branch: {"name": default_optimizer(branch, method.OPTIM)}
            for branch, own in optim.items()
            if isinstance(own, dict)
        }
    return merge(defaults, raw)


def load_data_settings(path: str | Path, sets: list[str] | None = None) -> DataSettings:
    """What a configuration says of its data; the other blocks are checked too, where the file has a method."""
    raw = _read(path, sets)
    prepare = parse_block("prepare", PrepareConfig, raw.get("prepare"))
    if "method" in raw:
        settings = parse_settings(raw, str(path))
        return DataSettings(settings.data, settings.augment, prepare, settings.needs)
    refuse_moved_keys(raw, str(path))
    check_top_level(raw, ["data", "augment", "prepare", "plugins"], str(path))
    data = parse_data(raw.get("data"))
    return DataSettings(data, parse_block("augment", AugmentConfig, raw.get("augment")), prepare, None)


def load_settings(path: str | Path, sets: list[str] | None = None) -> Settings:
    """Read, merge and validate a configuration file, after importing the plugins that it names."""
    return parse_settings(_read(path, sets), str(path))


def _read(path: str | Path, sets: list[str] | None) -> dict[str, Any]:
    """The merged configuration; its plugins are loaded from here on."""
    raw = load_yaml(path)
    said = apply_sets(raw, sets or [])  # which plugins and which method, whatever becomes of the rest
    load_plugins(said.get("plugins"), f"{path}: plugins")
    name = said.get("method")
    method = METHODS[name].target if name in METHODS.names() else None
    return apply_sets(with_default_names(raw, method), sets or [])
