"""A point encoder, two image backbones, an assignment and a data set for simipu3d. Importing this package registers them."""

from acme_parts import assignment, data, image, points

__all__ = ["assignment", "data", "image", "points"]
