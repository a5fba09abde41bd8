"""Which keys may a configuration have? Read from the models that validate it, so that the answer is never out of date."""

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import simipu3d.engine.parts  # noqa: F401  (fills the registries)
from simipu3d.config import ChosenPart, chosen_parts
from simipu3d.data.config import AugmentConfig
from simipu3d.data.shards.frames import PrepareConfig
from simipu3d.engine.optim import ScaleConfig
from simipu3d.engine.settings import RunConfig, TopConfig, TrainerConfig, ValidateConfig
from simipu3d.registry import METHODS, OPTIMIZERS, POINT_ENCODERS, READERS, SCHEDULES, Registry

TITLE = "# Every key of a configuration"
HEAD = f"""{TITLE}

Written by `simipu3d keys --write docs/configuration.md` from the models that validate a file; a test compares. Keys are typed:
a number in quotes is no number, an unknown key is refused with the nearest known one. `base: [FILE, ...]` at the top merges other
files first. `simipu3d keys BLOCK` prints a part of it.
"""


class Key(NamedTuple):
    """One key of a block, in words."""

    name: str
    type: str
    default: str
    about: str


def blocks() -> dict[str, type[BaseModel]]:
    """Models by the place of their block; where a `name` chooses the model, it stands behind the block: `data: kitti`."""
    found: dict[str, type[BaseModel]] = {"top level": TopConfig}
    for method in METHODS.names():
        config = METHODS[method].target.Config
        chosen = chosen_parts(config)
        for name, field in config.model_fields.items():
            own = _models(field.annotation)
            if name not in chosen and own:
                found.setdefault(name, own[0])
    found |= _of_registry("data", READERS) | _of_registry("point_encoder", POINT_ENCODERS)
    found |= {"augment": AugmentConfig, "optim": ScaleConfig}
    found |= _of_registry("optim.<branch>", OPTIMIZERS) | _of_registry("schedule", SCHEDULES)
    return found | {"trainer": TrainerConfig, "validate": ValidateConfig, "run": RunConfig, "prepare": PrepareConfig}


def _of_registry(prefix: str, registry: Registry) -> dict[str, type[BaseModel]]:
    models = {f"{prefix}: {name}": registry[name].config for name in registry.names()}
    return {place: model for place, model in models.items() if model is not None}


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """The keys of a block; those of a block inside it follow under its name."""
    for name, field in model.model_fields.items():
        nested = [own for own in _models(field.annotation) if name not in chosen_parts(model)]
        if len(nested) == 1 and get_origin(field.annotation) is None:
            yield from keys_of(nested[0], f"{prefix}{name}.")
            continue
        about = " ".join((field.description or "").split())
        yield Key(f"{prefix}{name}", _type_of(field), _default_of(field), about)


def as_markdown() -> str:
    """docs/configuration.md."""
    lines = [HEAD]
    for place, model in blocks().items():
        lines += [f"## {place}", "", "| key | type | default | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(_escaped(word) for word in key)} |" for key in keys_of(model)]
        lines.append("")
    return "\n".join(lines)


def _escaped(word: str) -> str:
    return word.replace("|", "\\|").replace("<", "&lt;")


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "(needed)"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return str(getattr(value, "name", "see below"))
    try:
        return json.dumps(value, default=str).strip('"')
    except (TypeError, ValueError):
        return str(value)


def _type_of(field: FieldInfo) -> str:
    return _words(field.annotation) + _bounds(field.metadata)


def _bounds(metadata: Any) -> str:
    words = []
    for mark in metadata:
        for kind, attribute, sign in ((Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<=")):
            if isinstance(mark, kind):
                words.append(f"{sign} {getattr(mark, attribute)}")
        if isinstance(mark, MinLen | Len) and mark.min_length:
            words.append(f"at least {mark.min_length} long")
        if isinstance(mark, FieldInfo):  # pydantic keeps bounds of an inner Annotated[..., Field(...)] in one
            words.append(_bounds(mark.metadata).strip())
        if isinstance(mark, ChosenPart):
            words.append(", ".join(mark.registry.names()))
    return (" " + ", ".join(word for word in words if word)) if any(words) else ""


def _words(annotation: Any) -> str:
    """A type in plain words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _words(inner[0]) + _bounds(inner[1:])
    if origin is Literal:
        return " or ".join(str(value) for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _words(one) for one in inner)
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            return f"list of {_words(inner[0])}"
        return f"[{', '.join(_words(one) for one in inner)}]"
    if origin in (list, dict) or annotation is dict:
        return "list" if origin is list else "block"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "block"
    plain = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _models(annotation: Any) -> list[type[BaseModel]]:
    if get_args(annotation):
        return [model for one in get_args(annotation) for model in _models(one)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
