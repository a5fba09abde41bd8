"""The embedded data set: street scenes that are generated from a seed, with exact ground truth."""

from simipu3d.data.drive_world.dataset import DriveWorld, DriveWorldConfig

__all__ = ["DriveWorld", "DriveWorldConfig"]
