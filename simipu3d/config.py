"""How does a YAML file become validated settings?

One `safe_load`, `base:` merging, `--set key=value`, then pydantic models that stand beside the classes they configure.
Every error is one line that names the file or the key and the way out.
"""

import difflib
import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from simipu3d.errors import UserError
from simipu3d.registry import Registry

PACKAGED_CONFIGS = "simipu3d.configs"
Model = TypeVar("Model", bound=BaseModel)


class PartConfig(BaseModel):
    """Base of every block's model: strict, frozen, no unknown keys; attribute docstrings are the keys' documentation."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 (`1e-3` is a number, `on` and `000010` are words), no timestamps, and no
    key twice in a mapping."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own class attribute)
        first: [
            (tag, regexp) for tag, regexp in resolvers if not tag.endswith((":float", ":timestamp", ":int", ":bool"))
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not a word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$"
        r"|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$|^0x[0-9a-fA-F]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise UserError(f"{source}{where}: not valid YAML: {' '.join(problem.split())}") from error


def find_config(path: str | Path) -> Path:
    """The configuration file: `path` itself, else the one of that name that was installed with the package."""
    path = Path(path)
    if path.is_file():
        return path
    packaged = _packaged(path)
    if packaged.is_file():
        return packaged
    raise UserError(
        f"{path}: no such configuration file, neither here nor among the installed ones ({packaged.parent})"
    )


def _packaged(path: Path) -> Path:
    """Where the installed configuration of that name would be."""
    from importlib.resources import files

    relative = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    return Path(str(files(PACKAGED_CONFIGS))) / relative


def load_yaml(path: str | Path, _open: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a configuration file and merge it over the files of its `base:` list (paths relative to the file itself, else
    names of installed ones)."""
    path = find_config(path)
    if path.resolve() in _open:
        raise UserError(f"{path}: base files include each other in a circle")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    raw = _parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values, this is {type(raw).__name__}")
    bases = raw.pop("base", [])
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: base must be a list of file names, like base: [kitti.yaml]")
    merged: dict[str, Any] = {}
    for base in bases:
        beside, packaged = path.parent / base, _packaged(Path(base))
        found = packaged if packaged.is_file() and not beside.is_file() else beside
        merged = merge(merged, load_yaml(found, (*_open, path.resolve())))
    return merge(merged, raw)


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`: later wins, mappings merge, lists (and an empty mapping) replace; a block that gets another
    `name` loses its old keys."""
    result = dict(old)
    for key, value in new.items():
        before = result.get(key)
        if isinstance(before, dict) and isinstance(value, dict) and value:
            renamed = "name" in value and "name" in before and value["name"] != before["name"]
            result[key] = merge({} if renamed else before, value)
        else:
            result[key] = value
    return result


def apply_sets(raw: dict[str, Any], sets: list[str]) -> dict[str, Any]:
    """Apply `--set key.path=value` pairs: names first, then the rest; values are plain YAML, lists included. A number in a
    path chooses an entry of a list that is there: data.sets.0.root=/path."""
    pairs = []
    for item in sets:
        key, sign, text = item.partition("=")
        if not sign or not all(key.split(".")):
            raise UserError(f"--set {item}: expected key=value, for example --set trainer.max_steps=100")
        pairs.append((key.split("."), _parse_yaml(text, f"--set {item}")))
    for keys, value in sorted(pairs, key=lambda pair: not _names_a_part(*pair)):
        delta: Any = value
        for position in reversed(range(len(keys))):
            delta = _wrapped(delta, _value_at(raw, keys[:position]), keys, position)
        raw = merge(raw, delta)
    return raw


def _value_at(raw: Any, keys: list[str]) -> Any:
    """What stands at a path; None where there is nothing."""
    for key in keys:
        if isinstance(raw, list):
            raw = raw[int(key)] if key.isdecimal() and int(key) < len(raw) else None
        else:
            raw = raw.get(key) if isinstance(raw, dict) else None
    return raw


def _wrapped(delta: Any, parent: Any, keys: list[str], position: int) -> Any:
    """What to merge over `parent`, which stands at keys[:position], so that `delta` is merged over its keys[position]."""
    key, path = keys[position], ".".join(keys[:position])
    if isinstance(parent, list):
        if not key.isdecimal() or int(key) >= len(parent):
            entries = f"with the entries 0 to {len(parent) - 1}" if parent else "without entries"
            raise UserError(f"--set {'.'.join(keys)}: {path} is a list {entries}, there is no {key}")
        changed = list(parent)
        changed[int(key)] = merge({key: parent[int(key)]}, {key: delta})[key]
        return changed
    if position and parent is not None and not isinstance(parent, dict):
        raise UserError(f"--set {'.'.join(keys)}: {path} is a value, not a block of keys")
    return {key: delta}


def _names_a_part(keys: list[str], value: Any) -> bool:
    return keys[-1] == "name" or (isinstance(value, dict) and "name" in value)


def _suggest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


_UNION_TAGS = ("int", "float", "str", "bool", "none", "tuple")
"""pydantic puts the branch of a union that it tried into an error's path."""


def _explain(error: ValidationError, prefix: str, model: type[BaseModel]) -> str:
    """The first problem of a validation, as one line that names the key; a misspelt key goes before the one it is missed
    as."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # of a block inside this one, which names its key in full
        return str(cause)
    path = [
        str(part) for part in first["loc"] if isinstance(part, int) or (part.isidentifier() and part not in _UNION_TAGS)
    ]
    name = ".".join([prefix, *path] if prefix else path)
    if first["type"] == "extra_forbidden":
        return f"{name}: no such key; {_suggest(path[-1], _keys_at(model, path[:-1]))}"
    if first["type"] == "missing":
        return f"{name}: this key is needed and not set"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    said = isinstance(first["input"], dict) or first["type"] == "value_error"
    given = "" if said else f", got {first['input']!r}"
    return f"{name}: {message}{given}"


def _keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        if part.isdigit():  # an entry of a list: its model was found with the list
            continue
        nested = _models_in(model.model_fields[part].annotation) if part in model.model_fields else []
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a field may hold: itself, or inside lists and optional values."""
    if get_args(annotation):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def parse_block(prefix: str, model: type[Model], block: Any) -> Model:
    """Validate one block of a configuration.

    Args:
        prefix: name of the block in the file, for error messages ("contrast").
        model: the pydantic model that knows its keys.
        block: what the file holds there; None counts as empty.

    Raises:
        UserError: one line that names the key.
    """
    if block is None:
        block = {}
    if not isinstance(block, dict):
        raise UserError(f"{prefix}: expected a block of keys, got {block!r}")
    try:
        return model.model_validate_json(json.dumps(block))
    except ValidationError as error:
        raise UserError(_explain(error, prefix, model)) from error
    except TypeError as error:
        raise UserError(f"{prefix}: holds a value that is neither number, text, list nor mapping ({error})") from error


def parse_part(prefix: str, registry: Registry, block: Any) -> PartConfig:
    """Validate a block whose `name` chooses the class, against that class's own model."""
    if not isinstance(block, dict) or not isinstance(block.get("name"), str):
        raise UserError(f"{prefix}.name: this key chooses the {registry.kind}; there are {', '.join(registry.names())}")
    try:
        model = registry[block["name"]].config
    except UserError as error:
        raise UserError(f"{prefix}.name: {error}") from error
    if model is None or not issubclass(model, PartConfig):
        raise UserError(f"{prefix}.name: the model of {block['name']} is not derived from PartConfig; mend the plugin")
    return parse_block(prefix, model, block)


class ChosenPart:
    """Marks a field whose block chooses a registered part by its `name`; the part's own model validates the block.

    Written as `point_encoder: Annotated[PartConfig, ChosenPart("point_encoder", POINT_ENCODERS)]`.

    Args:
        prefix: name of the block in the file, for error messages.
        registry: where the part is looked up.
    """

    def __init__(self, prefix: str, registry: Registry):
        self.prefix, self.registry = prefix, registry

    def parse(self, block: Any) -> PartConfig:
        """The validated block; one that was validated before is taken as it is."""
        return block if isinstance(block, PartConfig) else parse_part(self.prefix, self.registry, block)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        plain = core_schema.plain_serializer_function_ser_schema(to_plain)
        return core_schema.no_info_plain_validator_function(self.parse, serialization=plain)


def chosen_parts(model: type[BaseModel]) -> dict[str, Registry]:
    """The fields of a model that choose a registered part, with the registry."""
    marks = {
        name: [m for m in field.metadata if isinstance(m, ChosenPart)] for name, field in model.model_fields.items()
    }
    return {name: found[0].registry for name, found in marks.items() if found}


def check_top_level(raw: dict[str, Any], known: list[str], source: str) -> None:
    """Refuse a top-level key that no part reads."""
    for key in raw:
        if key not in known:
            raise UserError(f"{source}: {key}: no such key; {_suggest(key, known)}")


def to_plain(config: BaseModel) -> dict[str, Any]:
    """A model as plain YAML values, every default filled in."""
    return json.loads(config.model_dump_json())


def dump_yaml(raw: dict[str, Any]) -> str:
    """YAML text that `load_yaml` reads back to the same values."""
    return yaml.dump(raw, Dumper=_Dumper, sort_keys=False, width=120)


def flatten(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value})
    return flat


def changed_keys(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, as key -> (old, new); a missing one counts as None."""
    flat_old, flat_new = flatten(old), flatten(new)
    differs = {
        key: (flat_old.get(key), flat_new.get(key))
        for key in dict.fromkeys([*flat_old, *flat_new])
        if flat_old.get(key) != flat_new.get(key)
    }
    return {key: pair for key, pair in differs.items() if not all(isinstance(v, float) and math.isnan(v) for v in pair)}
