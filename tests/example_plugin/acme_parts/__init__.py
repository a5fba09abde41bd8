"""Parts of every kind for simipu3d: a point encoder, two image backbones, an assignment, a data set, a method."""

from acme_parts import assignment, data, image, method, points

__all__ = ["assignment", "data", "image", "method", "points"]
