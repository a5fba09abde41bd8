"""Pre-training methods: encoders, matching and contrast put together. One file a method; contract: `contracts/method.py`.

Importing this package fills the registry `METHODS`.
"""

from simipu3d.methods import simipu

__all__ = ["simipu"]
