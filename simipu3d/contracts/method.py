"""What is trained? Pre-training methods and downstream heads alike are a `Method`.

The engine, the log line, the optimizer, resume, `--init`, export and the probe know methods by this contract only. A method
says what it needs of the data (`NEEDS`), which blocks of the configuration are its own (`Config`), and returns named losses
and metrics. Everything else has a default.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_args

import numpy as np
import torch.nn as nn
from numpy.typing import NDArray
from torch import Tensor

from simipu3d.config import PartConfig
from simipu3d.contracts.batch import Batch
from simipu3d.contracts.frame import TruthKind

Picture = NDArray[np.uint8]
"""(H, W, 3) RGB."""


@dataclass(frozen=True)
class Needs:
    """What a method reads of every sample. The loader reads, draws and carries this and nothing else.

    Attributes:
        point_views: views of the scan: 0, 1 or 2. Of two views the first stays unmoved unless
            `augment.points.augment_first_view` says otherwise; a single one is moved.
        image_views: views of every image: 0, 1 or 2.
        frames: scans of one place in a sample; 2: the second point view is of another scan (a reader of pairs gives it).
        truth: which kinds of ground truth.
    """

    point_views: int = 0
    image_views: int = 0
    frames: int = 1
    truth: tuple[TruthKind, ...] = ()

    def __post_init__(self) -> None:
        if self.point_views not in (0, 1, 2) or self.image_views not in (0, 1, 2) or self.frames not in (1, 2):
            raise ValueError(f"{self}: point_views and image_views are 0, 1 or 2, frames is 1 or 2")
        if self.frames == 2 and self.point_views != 2:
            raise ValueError(f"{self}: two scans of one place are two point views")
        unknown = set(self.truth) - set(get_args(TruthKind))
        if unknown:
            raise ValueError(f"{self}: truth has no {', '.join(sorted(unknown))}; there are {get_args(TruthKind)}")


@dataclass(frozen=True)
class DataInfo:
    """What a method may know of a data set when it is built.

    Attributes:
        point_columns: names of the columns of every frame's points: x, y, z, intensity, ...
        class_names: what pixel and point classes index; empty where there are none.
    """

    point_columns: tuple[str, ...] = ("x", "y", "z", "intensity")
    class_names: tuple[str, ...] = ()


class Rows(NamedTuple):
    """The matched rows of one contrastive task; retrieval and health monitors read them.

    Attributes:
        query: (N, C), not normalised.
        key: (N, C); row i belongs to row i of `query`.
        ids: (N,) int64; rows that share a value are copies of each other, and no negatives of each other.
        batch_index: (N,) int64, the frame of each row.
    """

    query: Tensor
    key: Tensor
    ids: Tensor
    batch_index: Tensor


class Method(nn.Module):
    """Base class of everything that the engine trains. Registered with `@METHODS.register(name)`.

    A subclass must have `Config`, `NEEDS`, `__init__(self, config, data)` and `forward`; one that lacks something is
    refused when it is defined. A base of several methods that is none itself says `class Base(Method, abstract=True)`.

    A method may hold no parameter that no branch of `branches()` holds, and every parameter that requires a gradient gets
    one from `loss`, also from a batch without frames or pairs, whose loss is 0.
    """

    Config: ClassVar[type[PartConfig]]
    """The method's own blocks: every field is a top-level key of the configuration file. A block that chooses a registered
    part by its `name` is annotated with `simipu3d.config.ChosenPart`."""
    NEEDS: ClassVar[Needs]
    """What is read, drawn and carried for this method."""
    OPTIM: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Default optimizer blocks by branch; a branch that is not named here has AdamW with its defaults."""

    def __init_subclass__(cls, *, abstract: bool = False, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if abstract:
            return
        for problem in _missing(cls):
            raise TypeError(f"the method {cls.__name__} {problem}; contract: simipu3d.contracts.method.Method")

    @classmethod
    def needs_of(cls, config: Any) -> Needs:
        """What is needed with this configuration: `NEEDS`, or less where it switches a branch off."""
        return cls.NEEDS

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalars. `loss` is what is minimised; `<task>_loss`, `<task>_ceiling` (what a network that knows nothing
        reaches), `<task>_top1` and `<task>_rows` (how many rows the former are means of) are shown wherever there is one."""
        raise TypeError(f"{type(self).__name__} has no forward")  # unreachable: __init_subclass__ refuses such a class

    def branches(self) -> dict[str, nn.Module]:
        """Modules by the key of their block in `optim:`; together they hold every parameter once."""
        return {"model": self}

    def pictures(self, batch: Batch) -> dict[str, Picture]:
        """What the method sees in a batch, by name. Called without gradients and in evaluation mode."""
        return {}

    def rows(self, batch: Batch) -> dict[str, Rows]:
        """The matched rows of every contrastive task, by the task's name."""
        return {}

    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        """One plain record (arrays, numbers, texts) a frame, for metrics and submission files; [] where there is none."""
        return []

    def condense(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What `score` reads of the records of a batch. Default: the records as they are; a method whose records hold maps
        leaves them out here, so that no validation keeps those of every frame."""
        return records

    def score(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """Named numbers from the condensed records of all frames that were predicted: a benchmark's metrics. {} where there
        is none."""
        return {}

    def write_predictions(self, records: list[dict[str, Any]], folder: Path) -> None:
        """Write what was predicted of some frames: pictures beside the truth, files as a benchmark takes them. Called for every
        batch of an evaluation with its whole records, in order; nothing where a method predicts nothing."""

    def before_step(self, step: int, num_steps: int) -> None:
        """Called before every training batch, with the number of finished optimizer steps and of the whole run."""

    def after_step(self) -> None:
        """Called after every optimizer step: momentum targets, queues."""

    def sync_norms(self, device_type: str) -> None:
        """Let BatchNorms share their statistics over processes where the configuration says so; called before training."""


def _missing(cls: type[Method]) -> list[str]:
    """What a class that was just defined lacks."""
    problems = []
    config = getattr(cls, "Config", None)
    if not (isinstance(config, type) and issubclass(config, PartConfig)):
        problems.append("has no Config, a class derived from PartConfig whose fields are its blocks")
    if not isinstance(getattr(cls, "NEEDS", None), Needs):
        problems.append("has no NEEDS, like NEEDS = Needs(point_views=2, image_views=1)")
    if cls.__init__ is Method.__init__:
        problems.append("has no __init__(self, config, data)")
    if cls.forward is Method.forward:
        problems.append("has no forward(self, batch)")
    return problems
