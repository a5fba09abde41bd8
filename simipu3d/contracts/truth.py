"""What ground truth travels with a batch? Moved by the matrices of the views, so that it fits them.

Boxes are in the frame of the first point view (the lidar frame where a method takes no point views). Shapes: K boxes in the
whole batch, I images padded to H x W, N points of a view.
"""

from dataclasses import dataclass

from torch import Tensor

UNLABELLED = 255
"""Class of a pixel or point of which nothing is known; padding has it too."""


@dataclass(frozen=True, eq=False)
class BoxTruth:
    """K boxes.

    Attributes:
        center: (K, 3) float64 geometric centre, metres.
        size: (K, 3) float64 length, width, height, metres.
        yaw: (K,) float64 radians, counter-clockwise from +x, in [-pi, pi).
        velocity: (K, 2) float64 metres a second, NaN where unknown.
        batch_index: (K,) int64, ascending.
        source_index: (K,) int64, row in the boxes of its frame.
        num_points: (K,) int64 lidar points inside, -1 where unknown.
        difficulty: (K,) int64 in the data set's own meaning, -1 where unknown.
        names: K class names in the data set's own spelling.
        attributes: K words, "" where there is none.
    """

    center: Tensor
    size: Tensor
    yaw: Tensor
    velocity: Tensor
    batch_index: Tensor
    source_index: Tensor
    num_points: Tensor
    difficulty: Tensor
    names: tuple[str, ...]
    attributes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Truth:
    """The ground truth that a method asked for in `NEEDS`; the rest is None.

    Attributes:
        boxes: K boxes.
        depth: one (I, H, W) float32 for each image view, metres along the optical axis, 0 where unknown. From the data
            set's own depth map, else from the projected points.
        pixel_class: one (I, H, W) uint8 for each image view, `UNLABELLED` where unknown.
        pixel_instance: one (I, H, W) int32 for each image view, 0 = no object.
        point_class: one (N,) uint8 for each point view, `UNLABELLED` where unknown.
        point_instance: one (N,) int32 for each point view, 0 = no object.
    """

    boxes: BoxTruth | None = None
    depth: tuple[Tensor, ...] | None = None
    pixel_class: tuple[Tensor, ...] | None = None
    pixel_instance: tuple[Tensor, ...] | None = None
    point_class: tuple[Tensor, ...] | None = None
    point_instance: tuple[Tensor, ...] | None = None
