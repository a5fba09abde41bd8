"""What does a method see in a batch? Its matches, its token-pixel pairs and its feature maps, as pictures."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from simipu3d.contracts.batch import Batch, PointView
from simipu3d.contracts.method import Picture
from simipu3d.contracts.tokens import FeatureMap, PointTokens
from simipu3d.matching.assignment import TokenPairs
from simipu3d.matching.projection import PixelPairs
from simipu3d.pictures import draw_image_matches, draw_matches, enlarge, features_as_colours, fitting_scale, mosaic
from simipu3d.pictures.canvas import enlarged_pixels


def _array(values: Tensor) -> NDArray:
    return values.detach().cpu().numpy()


def _points_of(view: PointView, frame: int) -> NDArray[np.float32]:
    return _array(view.points[view.batch_index == frame])


def draw_token_pairs(
    batch: Batch, tokens: tuple[PointTokens, PointTokens], pairs: TokenPairs, frame: int = 0
) -> Picture:
    """The two point views of a frame from above, matched tokens joined."""
    own = _array(tokens[0].batch_index[pairs.first] == frame)
    rows = np.stack([_array(pairs.first), _array(pairs.second)], axis=1)[own]
    first, second = batch.views
    return draw_matches(
        _array(tokens[0].xyz),
        _array(tokens[1].xyz),
        rows,
        _array(pairs.distance)[own],
        points_a=_points_of(first, frame),
        points_b=_points_of(second, frame),
        poses=(_array(first.augmented_from_lidar[frame]), _array(second.augmented_from_lidar[frame])),
    )


def view_of_image(batch: Batch, image: int) -> Picture:
    """An augmented image without its padding."""
    height, width = (int(size) for size in batch.images[0].image_size[image])
    return _array(batch.images[0].images[image, :, :height, :width].permute(1, 2, 0))


def images_of_frame(batch: Batch, frame: int) -> list[int]:
    """Rows of a frame's images."""
    return (batch.images[0].batch_index == frame).nonzero().squeeze(1).tolist()


def draw_pixel_pairs(batch: Batch, tokens: PointTokens, used: PixelPairs, frame: int = 0) -> Picture:
    """All augmented images of a frame with their tokens, joined to where they are in space.

    A token that several cameras see has one colour in all of them. The frame must have an image.
    """
    images = images_of_frame(batch, frame)
    pictures = [view_of_image(batch, image) for image in images]
    names = [batch.images[0].camera_names[image] for image in images]
    scale = fitting_scale(mosaic(pictures, names)[0], 900 if len(images) < 3 else 1400)
    picture, places = mosaic(pictures, names, scale=scale)
    parts = []
    for image, place in zip(images, places, strict=True):
        own = (used.image == image) & used.visible
        parts.append((_array(used.token[own]), enlarged_pixels(_array(used.pixels[own]), scale) + place))
    token, pixels = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return draw_image_matches(
        picture,
        pixels,
        _array(tokens.xyz)[token],
        ids=token,
        points=_points_of(batch.views[0], frame),
        pose=_array(batch.views[0].augmented_from_lidar[frame]),
    )


def draw_features(batch: Batch, feature_map: FeatureMap, num_images: int = 4) -> Picture:
    """Images over their matched feature maps, the three strongest directions of the features as colours: all cameras of
    the first frame that has any, and further frames, whole, as long as there are no more than `num_images`."""
    shown: list[int] = []
    for frame in range(batch.num_frames):
        images = images_of_frame(batch, frame)
        if shown and len(shown) + len(images) > num_images:
            break
        shown += images
    maps = features_as_colours([feature_map.features[shown]])[0]
    pairs = []
    for image, colours in zip(shown, maps, strict=True):
        large = enlarge(colours, feature_map.stride)
        picture = view_of_image(batch, image)
        height, width = min(large.shape[0], picture.shape[0]), min(large.shape[1], picture.shape[1])
        pairs.append(np.concatenate([picture[:height, :width], large[:height, :width]]))
    names = [batch.images[0].camera_names[image] for image in shown]
    frames = batch.images[0].batch_index[shown].tolist()
    if len(set(frames)) > 1:
        names = [f"{batch.frame_ids[frame]} {name}" for frame, name in zip(frames, names, strict=True)]
    return mosaic(pairs, names)[0]
