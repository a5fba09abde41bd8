"""Which class stands behind a name in a configuration?

A registry joins a name to a class and to that class's own pydantic model. A part is added by one new file whose class is
decorated with `@REGISTRY.register(name, config=...)`, and one import line in its package; no `if name ==` anywhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel

from simipu3d.errors import UserError

T = TypeVar("T")


class Entry(NamedTuple):
    """A registered class (or function) and the model that validates its block of the configuration; None where a part
    has no keys of its own."""

    target: Any
    config: type[BaseModel] | None

    @property
    def model(self) -> type[BaseModel]:
        """`config`, of a kind of part whose registration asks for one."""
        assert self.config is not None
        return self.config


class Registry:
    """Names of one kind of part.

    Args:
        kind: what the entries are, in words, for error messages ("point encoder").
        has_keys: whether every entry has a configuration model.
    """

    def __init__(self, kind: str, *, has_keys: bool = True):
        self.kind = kind
        self.has_keys = has_keys
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, *, config: type[BaseModel] | None = None) -> Callable[[T], T]:
        """Decorator that files a class under a name.

        Args:
            name: what a configuration calls it.
            config: the model of its block; None takes the class's own attribute `Config`, where it has one.

        Raises:
            ValueError: the name is taken, or the configuration model is missing (or there, where none is read).
        """

        def add(target: T) -> T:
            model = getattr(target, "Config", None) if config is None else config
            if self.has_keys != (isinstance(model, type) and issubclass(model, BaseModel)):
                wanted = "needs config=, a class derived from PartConfig" if self.has_keys else "has no config="
                raise ValueError(f"the {self.kind} {name!r} {wanted}")
            if name in self._entries:
                raise ValueError(
                    f"the {self.kind} {name!r} is registered twice: {self._entries[name].target} and {target}"
                )
            self._entries[name] = Entry(target, model)
            return target

        return add

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise UserError(f"no {self.kind} is called {name!r}; there are {', '.join(self.names())}")
        return self._entries[name]

    def of(self, config: BaseModel) -> Entry:
        """The entry that a validated block's `name` chose."""
        return self[self.name_of(config)]

    @staticmethod
    def name_of(config: BaseModel) -> str:
        """The `name` of a validated block; "" where its model has none."""
        return str(getattr(config, "name", ""))

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)


POINT_ENCODERS = Registry("point encoder")
"""Entries are `nn.Module` classes called as `cls(config, point_columns=...)`; contract in `contracts/tokens.py`."""

READERS = Registry("data set")
"""Entries are classes called as `cls(config, wants)`; contract: `FrameReader` in `contracts/frame.py`."""

IMAGE_BACKBONES = Registry("image backbone")
"""Image backbones that are no timm models. Entries are `nn.Module` classes called as `cls(config)`, where the config
model validates `image_encoder.model_args`; contract: `ImageBackbone` in `contracts/tokens.py`."""

ASSIGNMENTS = Registry("assignment", has_keys=False)
"""Entries are functions called as `fn(xyz_a, xyz_b, source_a, source_b)`; contract in `matching/assignment.py`."""

METHODS = Registry("method")
"""Entries are classes called as `cls(config, data)`; contract: `Method` in `contracts/method.py`."""

OPTIMIZERS = Registry("optimizer")
"""Entries build a `torch.optim.Optimizer` from parameter groups."""

SCHEDULES = Registry("schedule")
"""Entries build a learning-rate scheduler from an optimizer."""

REGISTRIES = (POINT_ENCODERS, READERS, IMAGE_BACKBONES, ASSIGNMENTS, METHODS, OPTIMIZERS, SCHEDULES)
"""Everything that a plugin can add to."""
