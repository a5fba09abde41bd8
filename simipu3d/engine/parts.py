"""Who fills the registries? Importing this module registers every part of the package; plugins add theirs."""

__all__: list[str] = []
