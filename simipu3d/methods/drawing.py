"""What does a method see in a batch? Its matches, its token-pixel pairs and its feature maps, as pictures."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from simipu3d.contracts.batch import Batch, PointView
from simipu3d.contracts.tokens import FeatureMap, PointTokens
from simipu3d.matching.assignment import TokenPairs
from simipu3d.matching.projection import PixelPairs
from simipu3d.pictures import draw_image_matches, draw_matches, enlarge, features_as_colours, fitting_scale

Picture = NDArray[np.uint8]


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
    height, width = (int(size) for size in batch.images.image_size[image])
    return _array(batch.images.images[image, :, :height, :width].permute(1, 2, 0))


def draw_pixel_pairs(batch: Batch, tokens: PointTokens, used: PixelPairs, image: int = 0) -> Picture:
    """An augmented image with its tokens, joined to where they are in space."""
    picture, frame = view_of_image(batch, image), int(batch.images.batch_index[image])
    own = (used.image == image) & used.visible
    return draw_image_matches(
        picture,
        _array(used.pixels[own]),
        _array(tokens.xyz[used.token[own]]),
        points=_points_of(batch.views[0], frame),
        scale=fitting_scale(picture),
        pose=_array(batch.views[0].augmented_from_lidar[frame]),
    )


def draw_features(batch: Batch, feature_map: FeatureMap, num_images: int = 4) -> Picture:
    """Some images over their matched feature maps, the three strongest directions of the features as colours."""
    num_images = min(num_images, len(batch.images.images))
    maps = features_as_colours([feature_map.features[:num_images]])[0]
    rows = []
    for image, colours in enumerate(maps):
        large = enlarge(colours, feature_map.stride)
        picture = view_of_image(batch, image)
        height, width = min(large.shape[0], picture.shape[0]), min(large.shape[1], picture.shape[1])
        rows.append(np.concatenate([picture[:height, :width], large[:height, :width]]))
    width = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0))) for row in rows])
