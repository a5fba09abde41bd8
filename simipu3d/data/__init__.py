"""Readers, augmentation and batches. Importing this package fills the registry `READERS`."""

from simipu3d.data import drive_world, readers

__all__ = ["drive_world", "readers"]
