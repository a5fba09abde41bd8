"""Which pixel does each token see, and what does a feature map hold there?

Tokens are projected through the calibration of the original image, then moved by the image view's own matrix. Pixels are
(u, v) with integer centres. Shapes: M tokens, I images, P token-image pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from simipu3d.contracts.batch import ImageView
from simipu3d.contracts.tokens import FeatureMap
from simipu3d.geometry.camera import MIN_DEPTH, inside_image, move_pixels, project_points


class PixelPairs(NamedTuple):
    """P pairs of a token and an image of its frame.

    Attributes:
        token: (P,) int64 row of the token.
        image: (P,) int64 row of the image in the batch.
        pixels: (P, 2) float64 in the augmented image. Meaningless where not visible.
        raw_pixels: (P, 2) float64 in the original image.
        visible: (P,) bool, in front of the camera, inside the original image and inside the augmented one before padding.
    """

    token: Tensor
    image: Tensor
    pixels: Tensor
    raw_pixels: Tensor
    visible: Tensor

    def where_visible(self) -> "PixelPairs":
        """Only the pairs that may enter a loss."""
        return PixelPairs(*(values[self.visible] for values in self))

    def where_visible_or_unseen(self, camera_index: Tensor) -> "PixelPairs":
        """The visible pairs, and one for every token that no image of its frame shows: that with the frame's first.

        Args:
            camera_index: (I,) `ImageView.camera_index`.
        """
        seen = self.token.new_zeros(int(self.token.max()) + 1 if len(self.token) else 0, dtype=torch.bool)
        seen[self.token[self.visible]] = True
        kept = self.visible | (~seen[self.token] & (camera_index[self.image] == 0))
        return PixelPairs(*(values[kept] for values in self))


@torch.no_grad()
def project_tokens(xyz: Tensor, batch_index: Tensor, images: ImageView, *, min_depth: float = MIN_DEPTH) -> PixelPairs:
    """Project every token into every image of its frame.

    Args:
        xyz: (M, 3) in the lidar frame, metres.
        batch_index: (M,) frame of each token.
        images: the image views of the batch.
        min_depth: nearer than this, metres, nothing is visible.

    Returns:
        The pairs, images in order, tokens in order within an image; a token that two cameras see stands in two pairs.
    """
    parts = []
    for image in range(len(images.images)):
        token = (batch_index == images.batch_index[image]).nonzero().squeeze(1)
        raw_pixels, _, visible = project_points(
            xyz.index_select(0, token).to(torch.float64),
            images.image_from_camera[image],
            images.camera_from_lidar[image],
            images.raw_size[image],
            distortion=images.distortion[image],
            min_depth=min_depth,
        )
        pixels = move_pixels(images.augmented_from_image[image], raw_pixels)
        visible &= inside_image(pixels, images.image_size[image])
        parts.append(PixelPairs(token, torch.full_like(token, image), pixels, raw_pixels, visible))
    if not parts:
        empty = torch.zeros(0, dtype=torch.int64, device=xyz.device)
        pixels = torch.zeros((0, 2), dtype=torch.float64, device=xyz.device)
        return PixelPairs(empty, empty, pixels, pixels, empty.bool())
    return PixelPairs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def exact_coordinates(pairs: PixelPairs, feature_map: FeatureMap) -> Tensor:
    """(P, 2) position (x, y) on the feature map, in cells: (u - offset) / stride."""
    return (pairs.pixels - feature_map.offset) / feature_map.stride


def sample_bilinear(feature_map: Tensor, image: Tensor, coordinates: Tensor, *, outside: str = "border") -> Tensor:
    """Read feature maps between their cells.

    Args:
        feature_map: (I, C, Hf, Wf).
        image: (P,) which map to read.
        coordinates: (P, 2) as (x, y), in cells; (0, 0) is the centre of the first.
        outside: "border" clamps to the outermost cells, "zeros" fades to zero beyond them.

    Returns:
        (P, C). Rows are gathered with `index_select`, whose backward adds in a fixed order.
    """
    num_images, channels, height, width = feature_map.shape
    rows = feature_map.permute(0, 2, 3, 1).reshape(num_images * height * width, channels)
    limit = torch.tensor([width - 1, height - 1], device=coordinates.device, dtype=coordinates.dtype)
    if outside == "border":
        coordinates = coordinates.clamp(min=0).minimum(limit)
    # Far-away rows are pulled to just outside, where every neighbour weighs zero, so that they fit an integer.
    coordinates = coordinates.clamp(min=-2).minimum(limit + 2)
    base = coordinates.floor()
    fraction = (coordinates - base).to(feature_map.dtype)
    base = base.to(torch.int64)
    result = feature_map.new_zeros((len(image), channels))
    for step_x, step_y in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x, y = base[:, 0] + step_x, base[:, 1] + step_y
        weight_x = fraction[:, 0] if step_x else 1 - fraction[:, 0]
        weight_y = fraction[:, 1] if step_y else 1 - fraction[:, 1]
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        row = (image * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
        result = result + rows.index_select(0, row) * (weight_x * weight_y * inside)[:, None]
    return result
