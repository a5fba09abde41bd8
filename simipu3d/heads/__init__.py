"""Downstream heads: a task on top of the encoders. A head is a `Method`; one file or one folder each.

Importing this package fills the registry `METHODS`.
"""

from simipu3d.heads import depth

__all__ = ["depth"]
