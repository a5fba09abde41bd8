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
    """A registered class (or function) and the model that validates its block of the configuration."""

    target: Any
    config: type[BaseModel]


class Registry:
    """Names of one kind of part.

    Args:
        kind: what the entries are, in words, for error messages ("point encoder").
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, *, config: type[BaseModel]) -> Callable[[T], T]:
        """Decorator that files a class under a name; the same name twice is an error."""

        def add(target: T) -> T:
            if name in self._entries:
                raise ValueError(
                    f"the {self.kind} {name!r} is registered twice: {self._entries[name].target} and {target}"
                )
            self._entries[name] = Entry(target, config)
            return target

        return add

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise UserError(f"no {self.kind} is called {name!r}; there are {', '.join(self.names())}")
        return self._entries[name]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._entries)


POINT_ENCODERS = Registry("point encoder")
"""Entries are `nn.Module` classes called as `cls(config, point_columns=...)`; contract in `contracts/tokens.py`."""

READERS = Registry("data set")
"""Entries are classes called as `cls(config)`; contract: `FrameReader` in `contracts/frame.py`."""

METHODS = Registry("method")
"""Entries are `nn.Module` classes; contract in `methods/__init__.py`."""

OPTIMIZERS = Registry("optimizer")
"""Entries build a `torch.optim.Optimizer` from parameter groups."""

SCHEDULES = Registry("schedule")
"""Entries build a learning-rate scheduler from an optimizer."""
