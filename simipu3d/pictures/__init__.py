"""Pictures for people: overlays, views from above, matches, features as colours, pages. All are (H, W, 3) uint8 RGB."""

from simipu3d.pictures.bird_eye import Extent, bird_eye, fit_extent
from simipu3d.pictures.canvas import draw_dots, draw_lines, enlarge, fitting_scale, mosaic, save_png
from simipu3d.pictures.colours import colour_scale, depth_as_colours, id_colours
from simipu3d.pictures.features import class_as_colours, features_as_colours
from simipu3d.pictures.matches import draw_image_matches, draw_matches, draw_tokens
from simipu3d.pictures.overlay import draw_boxes, overlay_points
from simipu3d.pictures.page import page

__all__ = [
    "overlay_points",
    "draw_boxes",
    "bird_eye",
    "Extent",
    "fit_extent",
    "draw_matches",
    "draw_tokens",
    "draw_image_matches",
    "features_as_colours",
    "class_as_colours",
    "depth_as_colours",
    "colour_scale",
    "id_colours",
    "draw_dots",
    "draw_lines",
    "enlarge",
    "fitting_scale",
    "mosaic",
    "page",
    "save_png",
]
