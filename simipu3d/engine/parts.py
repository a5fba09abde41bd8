"""Who fills the registries? Importing this module registers every part of the package; plugins add theirs."""

from simipu3d import data, encoders, heads, methods
from simipu3d.matching import assignment

__all__ = ["assignment", "data", "encoders", "heads", "methods"]
