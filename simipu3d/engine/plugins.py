"""Which packages outside this one add parts? They are imported before a configuration is validated.

A plugin is a module that registers on import (`simipu3d.registry`, or timm's `register_model`). It is named in `plugins:`
at the top of a configuration or on a command line, or its package declares it as an entry point of the group
`simipu3d.plugins`. What a checkpoint names is never imported for that: nothing read from disk can run code.
"""

import importlib
import logging
import warnings
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any

import simipu3d.engine.parts  # noqa: F401  (fills the registries, so that a plugin that takes a name is to blame)
from simipu3d.errors import UserError
from simipu3d.registry import REGISTRIES

log = logging.getLogger(__name__)

GROUP = "simipu3d.plugins"
"""The entry point group; an entry's value is a module."""

_loaded: dict[str, set[tuple[str, str]]] = {}
"""The (kind, name) pairs that each imported plugin registered."""


def load_plugins(modules: Any, source: str) -> tuple[str, ...]:
    """Import the plugins that a user named, after the installed ones.

    Args:
        modules: what the user gave; None counts as empty.
        source: where it was given (file and key, or option), for error messages.

    Returns:
        The named modules.

    Raises:
        UserError: no list of module names; a plugin is not there, fails on import, or takes a name that exists.
    """
    names = _checked(modules, source)
    _load_installed()
    for name in names:
        _load(name, f"{source}: {name}")
    return names


def require_plugins(modules: Any, source: str) -> tuple[str, ...]:
    """See that the plugins that a file names have been loaded; of them only installed ones are imported here.

    Raises:
        UserError: a plugin is needed and was not named by the user.
    """
    names = _checked(modules, f"{source}: plugins")
    _load_installed()
    missing = [name for name in names if name not in _loaded]
    if missing:
        raise UserError(
            f"{source}: was made with the plugin {missing[0]}, which is not loaded, because a file never decides what is "
            f"run; if you trust it, name it yourself (--plugins {' '.join(missing)}; in Python: "
            f"simipu3d.engine.plugins.load_plugins) or install its package with an entry point of {GROUP}"
        )
    return names


def plugins_behind(resolved: dict[str, Any]) -> list[str]:
    """Plugins whose registered names a resolved configuration uses, in the order in which they were loaded."""
    words = set(_words(resolved))
    return [plugin for plugin, parts in _loaded.items() if words & {name for _, name in parts}]


def _checked(modules: Any, source: str) -> tuple[str, ...]:
    modules = [] if modules is None else modules
    is_list = isinstance(modules, list | tuple)
    if not is_list or not all(isinstance(m, str) and all(p.isidentifier() for p in m.split(".")) for m in modules):
        raise UserError(f"{source}: expected a list of module names, like [my_package], got {modules!r}")
    return tuple(dict.fromkeys(modules))


def _load_installed() -> None:
    for entry in entry_points(group=GROUP):
        package = entry.dist.name if entry.dist is not None else "unknown"
        _load(entry.value, f"plugin {entry.value} (entry point {entry.name!r} of the installed package {package})")


def _load(module: str, who: str) -> None:
    """Import one plugin, once; remember what it registered."""
    if module in _loaded:
        return
    before = _registered()
    try:
        with warnings.catch_warnings():
            # timm only warns when a model takes the name of another one.
            warnings.filterwarnings("error", message="Overwriting .* in registry")
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"{who}: needs the module {error.name}, which is not installed") from error
        raise UserError(
            f"{who}: no such module; install its package, or put the folder that holds it on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:  # whatever a stranger's code raises is to be mended there
        raise UserError(f"{who}: fails on import ({type(error).__name__}: {error}); mend or leave it out") from error
    _loaded[module] = _registered() - before
    found = ", ".join(f"{kind} {name}" for kind, name in sorted(_loaded[module]))
    log.info("plugin %s: %s", module, found or "registers nothing here")


def _registered() -> set[tuple[str, str]]:
    return {(registry.kind, name) for registry in REGISTRIES for name in registry.names()}


def _words(value: Any) -> Iterable[str]:
    """Every text in nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _words(inner)
