"""Monocular depth: which depth does every pixel of one image have?"""

from simipu3d.heads.depth.method import Depth

__all__ = ["Depth"]
