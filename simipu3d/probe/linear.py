"""How much do frozen image features say about depth and classes, beyond what the image row says alone?

The image row is given for free: every prediction starts from the mean of its pixel row in the labelled frames, and the
cells of a feature map predict, by ridge regression, by how much the log depth and the class shares of their footprints
deviate from it. The deviations are interpolated to every pixel of held-out frames and the sums are scored there, so
that maps of different strides are measured with the same yardstick, beside the same baseline. The strength of the ridge
is chosen, for depth and classes apart, on a quarter of the labelled frames, which then join the fit.

Three rows are compared under the same label subsets: no features ("row mean"), an untrained backbone, a pre-trained
one. Their BatchNorm statistics must have been made alike: see `recompute_batchnorm`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from simipu3d.contracts.frame import Frame
from simipu3d.contracts.tokens import FeatureMap
from simipu3d.errors import UserError
from simipu3d.probe.cells import cell_means, upsample
from simipu3d.probe.ridge import Ridge, fit_ridge, row_means

Encoder = Callable[[Tensor], FeatureMap]
"""(I, 3, H, W) uint8 RGB images to one feature map; in evaluation mode, normalisation of the images included."""

STRENGTHS = tuple(10.0**exponent for exponent in range(-6, 2))
"""Ridge strengths to choose from, for features of standard deviation 1."""

HIGHER_IS_BETTER = {
    "abs_rel": False,
    "abs_rel_off_ground": False,
    "delta_1.25": True,
    "vehicle_iou": True,
    "mean_iou": True,
}
"""The metrics, and which way is better."""


@dataclass(frozen=True, eq=False)
class ProbeData:
    """Labelled images, all of one size.

    Attributes:
        images: (I, 3, H, W) uint8 RGB.
        depth: (I, H, W) metres along the optical axis, 0 where unknown.
        pixel_class: (I, H, W) index into `class_names`; 255 where unlabelled.
        class_names: K names, the vehicles merged into one called "vehicle".
        ground: indices of the classes that are ground.
    """

    images: Tensor
    depth: NDArray[np.float32]
    pixel_class: NDArray[np.uint8]
    class_names: tuple[str, ...]
    ground: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: NDArray[np.integer]) -> "ProbeData":
        """The images at `index`, in its order."""
        images = self.images.index_select(0, torch.from_numpy(np.asarray(index, dtype=np.int64)))
        return ProbeData(images, self.depth[index], self.pixel_class[index], self.class_names, self.ground)


def gather_data(
    frames: Iterable[Frame],
    class_names: Sequence[str],
    *,
    vehicles: Sequence[str] = ("car", "van"),
    ground: Sequence[str] = ("road", "sidewalk", "terrain"),
    max_depth: float = 80.0,
) -> ProbeData:
    """Labelled images from the first camera of each frame.

    Args:
        frames: with `depth` and `pixel_class`.
        class_names: what `pixel_class` indexes.
        vehicles: classes that count as one.
        ground: classes that "off ground" leaves out; the sky has no depth and needs no mention.
        max_depth: depth beyond this, metres, counts as unknown.

    Raises:
        UserError: a frame without camera or ground truth, no frames, or images of different sizes.
    """
    merged = tuple(dict.fromkeys("vehicle" if name in vehicles else name for name in class_names))
    new_index = np.full(256, 255, dtype=np.uint8)
    for index, name in enumerate(class_names):
        new_index[index] = merged.index("vehicle" if name in vehicles else name)
    images: list[NDArray[np.uint8]] = []
    depths, classes = [], []
    for frame in frames:
        camera = frame.cameras[0] if frame.cameras else None
        if camera is None or camera.depth is None or camera.pixel_class is None:
            raise UserError(
                f"frame {frame.frame_id}: a probe needs depth and classes for every pixel; use drive_world frames"
            )
        if images and camera.image.shape != images[0].shape:
            raise UserError(
                f"frame {frame.frame_id}: its image is {camera.image.shape[:2]}, the first one {images[0].shape[:2]}; "
                "a probe needs images of one size"
            )
        images.append(camera.image)
        depths.append(np.where((camera.depth > 0) & (camera.depth <= max_depth), camera.depth, 0).astype(np.float32))
        classes.append(new_index[camera.pixel_class])
    if not images:
        raise UserError("a probe needs labelled frames, the list of frames is empty")
    stacked = torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))
    ground_index = tuple(merged.index(name) for name in ground if name in merged)
    return ProbeData(stacked, np.stack(depths), np.stack(classes), merged, ground_index)


@torch.no_grad()
def recompute_batchnorm(model: nn.Module, images: Tensor, encode: Callable[[Tensor], object], chunk: int = 16) -> None:
    """Replace the running statistics of a model's BatchNorms by plain averages over images.

    Running statistics lag behind weights that still move, and those of an untrained network are 0 and 1: before
    backbones are compared, give all of them statistics from the same images. Layers that the model keeps fixed in
    training mode (frozen BatchNorm) stay as they are; every module is left in the mode it was in.

    Args:
        model: whatever holds the BatchNorms; changed in place.
        images: (I, 3, H, W), handed on in chunks.
        encode: runs the model on some of them.
        chunk: images at a time; a last chunk of fewer than half that is left out.
    """
    modes = {module: module.training for module in model.modules()}
    model.train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    model.eval()
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # torch: cumulative average
        for part in images.split(chunk):
            if 2 * len(part) >= min(chunk, len(images)):
                encode(part)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def encode_all(encode: Encoder, images: Tensor, chunk: int = 16) -> FeatureMap:
    """The feature map of all images, encoded in chunks, float32 on the CPU."""
    maps = [encode(part) for part in images.split(chunk)]
    return FeatureMap(torch.cat([item.features.float().cpu() for item in maps]), maps[0].stride, maps[0].offset)


@dataclass(frozen=True, eq=False)
class Probe:
    """Fitted regressions of one feature map.

    Attributes:
        row_log_depth: (H, 1) mean log depth of every pixel row of the labelled images, metres before the logarithm.
        row_shares: (H, K) shares of the classes in every pixel row.
        depth, classes: what the features add to them.
    """

    row_log_depth: NDArray[np.float64]
    row_shares: NDArray[np.float64]
    depth: Ridge
    classes: Ridge


def fit_probe(features: FeatureMap, data: ProbeData, generator: np.random.Generator) -> Probe:
    """Fit log depth and class shares on the cells of labelled images.

    Shares of a footprint are the mean of its pixels' one-hot classes: unlike a majority vote, regression on them does
    not lose what is smaller than a cell.

    Args:
        features: (I, C, Hf, Wf) of the images of `data`; C may be 0.
        data: the labels.
        generator: draws which quarter of the images chooses the strength.
    """
    cells = (features.features.shape[2], features.features.shape[3])
    x = np.moveaxis(features.features.numpy().astype(np.float64), 1, -1)
    index = np.indices(x.shape[:3])
    image, row = index[0], index[1]
    tuning = generator.permutation(len(data)) < max(1, len(data) // 4)

    def fit(values: NDArray, known: NDArray) -> tuple[NDArray, Ridge]:
        """Row means and the regression of the deviations from them; values (I, H, W, T)."""
        pixel_row = np.broadcast_to(np.arange(known.shape[1])[:, None], known.shape)[known]
        if len(pixel_row) == 0:
            raise UserError("a probe needs labels: no pixel of the labelled frames has a known depth or class")
        means = row_means(values[known], pixel_row, known.shape[1])
        parts = [
            cell_means(values[..., t] - means[:, t, None], known, cells, features.stride, features.offset)
            for t in range(values.shape[-1])
        ]
        return means, _tune(x, np.stack([part for part, _ in parts], axis=-1), parts[0][1], row, tuning[image])

    seen = data.depth > 0
    log_depth = np.log(np.where(seen, data.depth, 1.0), dtype=np.float64)
    row_log_depth, depth = fit(log_depth[..., None], seen)
    one_hot = data.pixel_class[..., None] == np.arange(len(data.class_names))
    row_shares, classes = fit(one_hot.astype(np.float64), data.pixel_class < len(data.class_names))
    return Probe(row_log_depth, row_shares, depth, classes)


def _tune(x: NDArray, targets: NDArray, known: NDArray, row: NDArray, tuning: NDArray) -> Ridge:
    """The ridge of the known cells, its strength chosen by the squared error on those of them that `tuning` marks."""
    train, test = known & ~tuning, known & tuning
    strength = STRENGTHS[-1]
    if train.any() and test.any():
        tried = fit_ridge(x[train], targets[train], row[train], x.shape[1], STRENGTHS)
        errors = [((ridge.predict(x[test], row[test]) - targets[test]) ** 2).mean() for ridge in tried]
        strength = STRENGTHS[int(np.argmin(errors))]
    return fit_ridge(x[known], targets[known], row[known], x.shape[1], [strength])[0]


def predict_pixels(
    ridge: Ridge, row_mean: NDArray, features: FeatureMap, index: int, size: tuple[int, int]
) -> NDArray[np.float64]:
    """(T, H, W): what a regression says about every pixel of one image.

    Args:
        ridge: T regressions on the cells.
        row_mean: (H, T) what the pixel rows say by themselves.
        features: of all images.
        index: which one.
        size: (H, W) of the image.
    """
    x = np.moveaxis(features.features[index].numpy().astype(np.float64), 0, -1)
    row = np.arange(x.shape[0])[:, None].repeat(x.shape[1], axis=1)
    deviation = np.moveaxis(ridge.deviation(x, row), -1, 0)
    return row_mean.T[:, :, None] + upsample(deviation, size, features.stride, features.offset)


def score_probe(probe: Probe, features: FeatureMap, data: ProbeData) -> dict[str, float]:
    """The metrics of `HIGHER_IS_BETTER` over all known pixels of `data`; NaN where there is none to count.

    abs_rel is the mean of |predicted - true| / true (off ground: without the ground's pixels), delta_1.25 the share
    with max(predicted / true, true / predicted) < 1.25, mean_iou the mean over the classes that occur.
    """
    num_classes = len(data.class_names)
    errors, near, above = [], [], []
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)

    size = data.depth.shape[1:]
    for index in range(len(data)):
        known = data.depth[index] > 0
        log_depth = predict_pixels(probe.depth, probe.row_log_depth, features, index, size)[0]
        difference = log_depth[known] - np.log(data.depth[index][known])
        errors.append(np.abs(np.expm1(difference)))
        near.append(np.abs(difference) < np.log(1.25))
        above.append(~np.isin(data.pixel_class[index][known], data.ground))
        labelled = data.pixel_class[index] < num_classes
        chosen = predict_pixels(probe.classes, probe.row_shares, features, index, size).argmax(axis=0)
        pairs = data.pixel_class[index][labelled].astype(np.int64) * num_classes + chosen[labelled]
        confusion += np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)
    relative, close, off_ground = np.concatenate(errors), np.concatenate(near), np.concatenate(above)
    iou = _iou(confusion)
    vehicle = data.class_names.index("vehicle") if "vehicle" in data.class_names else None
    return {
        "abs_rel": _mean(relative),
        "abs_rel_off_ground": _mean(relative[off_ground]),
        "delta_1.25": _mean(close),
        "vehicle_iou": float("nan") if vehicle is None else float(iou[vehicle]),
        "mean_iou": _mean(iou[confusion.sum(axis=1) > 0]),
    }


def _mean(values: NDArray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _iou(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """(K,) intersection over union from (K, K) counts, truth down, prediction across; NaN where a class occurs in
    neither."""
    hits = np.diag(confusion).astype(np.float64)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)
