"""Runs a method: run directory, optimizers, callbacks, Lightning's Trainer."""

from simipu3d.compat import import_torchvision

# Lightning imports torchmetrics, and that torchvision: it has to be importable before any file here says `import lightning`.
import_torchvision()
