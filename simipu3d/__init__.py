"""simipu3d: pre-train image and point-cloud backbones from unlabelled, calibrated camera + lidar drives."""

__version__ = "0.1.0"
