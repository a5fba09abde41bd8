"""SimIPU: two views of a scan teach the point encoder, its tokens teach the image encoder about space.

Source: Li et al., SimIPU: Simple 2D Image and 3D Point Cloud Unsupervised Pre-Training for Spatial-Aware Visual
Representations, AAAI 2022 (arXiv:2112.04680). Where the released code differs from the paper or from what it meant, a
switch says so; defaults are the corrected recipe, `configs/simipu/kitti_released.yaml` the released one.
"""

import logging
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    field_validator,
    model_validator,
)
from torch import Tensor

from simipu3d.config import PartConfig, parse_block, parse_part
from simipu3d.contracts.batch import Batch
from simipu3d.contracts.tokens import FeatureMap, PointTokens
from simipu3d.contrast.heads import ProjectionHead
from simipu3d.contrast.info_nce import ContrastResult, info_nce
from simipu3d.encoders.image import ImageEncoder, ImageEncoderConfig
from simipu3d.errors import UserError
from simipu3d.geometry.camera import MIN_DEPTH
from simipu3d.matching.assignment import TokenPairs, lidar_xyz, match_tokens
from simipu3d.matching.projection import (
    PixelPairs,
    exact_coordinates,
    project_tokens,
    sample_bilinear,
)
from simipu3d.matching.released import released_coordinates
from simipu3d.methods.drawing import Picture, draw_features, draw_pixel_pairs, draw_token_pairs
from simipu3d.registry import ASSIGNMENTS, METHODS, POINT_ENCODERS

log = logging.getLogger(__name__)


class MatchingConfig(PartConfig):
    """The `matching:` block: how pairs are found."""

    assignment: str = "hungarian"
    """Token to token: hungarian (exact, the paper's), greedy (its ablation), nearest or mutual_nearest."""
    max_distance: PositiveFloat | None = None
    """Pairs farther apart than this, metres, are dropped. The paper has no gate."""
    map: int = -1
    """Which image feature map is matched: its stride in pixels (8, 16, 32), or -1 for the last one, as the paper does."""
    grid: Literal["exact", "own_padded_size"] = "exact"
    """Where on the map a pixel is read: (u - offset) / stride, or the released code's formula (see simipu3d.matching)."""
    invisible: Literal["mask", "keep"] = "mask"
    """Tokens that no image shows: left out of the inter-modal loss, or kept (with a zero feature, one row each,
    however many cameras a frame has) as released."""
    min_depth: PositiveFloat = MIN_DEPTH
    """Nearer to the camera than this, metres, nothing is visible."""

    @field_validator("assignment")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            ASSIGNMENTS[name]
        except UserError as error:
            raise ValueError(str(error)) from error  # the key goes before it
        return name


class ContrastConfig(PartConfig):
    """The `contrast:` block: what is compared, and how sharply."""

    temperature: PositiveFloat = 0.07
    """Divides the similarities; smaller is sharper. Default from MoCo (arXiv:1911.05722), as in the paper."""
    dim: PositiveInt = 128
    """Width of the compared vectors (SimCLR, arXiv:2002.05709)."""
    intra_weight: NonNegativeFloat = 1.0
    """Lambda of the paper. 0 leaves the point encoder untrained (and out of the optimizer)."""
    inter_weight: NonNegativeFloat = 1.0
    """Mu of the paper. 0 leaves the image encoder untrained (and out of the run)."""
    inter_direction: Literal["image_to_points", "points_to_image", "symmetric"] = "image_to_points"
    """Query to keys. The released code asks from the image, the paper's Eq. 7 from the points."""
    inter_detach: Literal["before_head", "after_head"] = "before_head"
    """Where the point side of the inter-modal loss loses its gradient. `after_head` (released) leaves its head random: it
    is then frozen and not handed to the optimizer."""
    negatives: Literal["scene", "batch", "all_ranks"] = "batch"
    """Which rows a query chooses from: its own frame's, this process's, or all processes'."""
    mask_duplicates: bool = True
    """Copies of the same lidar point are not each other's negatives. The released code keeps them."""
    head_norm: Literal["local", "sync"] = "local"
    """BatchNorm of the heads: each process's own statistics (released), or shared by all GPUs."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> "ContrastConfig":
        if self.intra_weight == 0 and self.inter_weight == 0:
            raise ValueError("intra_weight and inter_weight are both 0, so there is nothing to learn")
        return self


class SimIPUConfig(PartConfig):
    """All blocks that the method reads."""

    point_encoder: SerializeAsAny[PartConfig]
    image_encoder: ImageEncoderConfig
    matching: MatchingConfig = Field(default_factory=MatchingConfig)
    contrast: ContrastConfig = Field(default_factory=ContrastConfig)


@dataclass(frozen=True, eq=False)
class Embedded:
    """What a batch looks like just before the losses; pictures and retrieval read it too.

    Attributes:
        tokens, xyz: of the first and (None without the intra-modal loss) the second view; xyz (M, 3) in the lidar frame.
        pairs: token to token, or None.
        pixels: token to pixel, all of them; None without the inter-modal loss.
        used: the token-pixel pairs that enter the loss.
        maps: the image encoder's feature maps, or None.
        intra: query and key rows (not normalised) of `pairs`; inter: image and point rows of `used`. Fewer than two rows
            are no contrast: then there are none, in `pairs` and `used` neither.
        copies: (M,) id of each token of the first and second view; equal ids are copies of one lidar point.
    """

    tokens: tuple[PointTokens, PointTokens | None]
    xyz: tuple[Tensor, Tensor | None]
    copies: tuple[Tensor, Tensor | None]
    pairs: TokenPairs | None
    pixels: PixelPairs | None
    used: PixelPairs | None
    maps: list[FeatureMap] | None
    intra: tuple[Tensor, Tensor]
    inter: tuple[Tensor, Tensor]


@METHODS.register("simipu", config=SimIPUConfig)
class SimIPU(nn.Module):
    """The method of the paper on any registered point encoder and any image backbone, timm's or registered.

    Args:
        config: the validated blocks.
        point_columns: columns of the data set's points.
    """

    BLOCKS = ("point_encoder", "image_encoder", "matching", "contrast")

    @classmethod
    def parse_blocks(cls, raw: dict[str, Any]) -> SimIPUConfig:
        """Validate the blocks of `BLOCKS`; one that is missing counts as empty."""
        return SimIPUConfig(
            point_encoder=parse_part("point_encoder", POINT_ENCODERS, raw["point_encoder"]),
            image_encoder=parse_block("image_encoder", ImageEncoderConfig, raw["image_encoder"]),
            matching=parse_block("matching", MatchingConfig, raw["matching"]),
            contrast=parse_block("contrast", ContrastConfig, raw["contrast"]),
        )

    def __init__(self, config: SimIPUConfig, *, point_columns: tuple[str, ...]):
        super().__init__()
        self.config = config
        contrast = config.contrast
        self.uses_intra, self.uses_inter = contrast.intra_weight > 0, contrast.inter_weight > 0
        entry = POINT_ENCODERS[config.point_encoder.name]
        self.point_encoder = entry.target(config.point_encoder, point_columns=point_columns)
        channels = self.point_encoder.out_channels
        if self.uses_intra:
            self.intra_head = ProjectionHead(channels, contrast.dim)
        else:
            self.point_encoder.requires_grad_(False)
        if self.uses_inter:
            self.image_encoder = ImageEncoder(config.image_encoder, map=config.matching.map)
            self.inter_point_head = ProjectionHead(channels, contrast.dim)
            self.inter_image_head = ProjectionHead(self.image_encoder.maps[-1].channels, contrast.dim)
            if contrast.inter_detach == "after_head":
                self.inter_point_head.requires_grad_(False)

    def branches(self) -> dict[str, nn.Module]:
        """The modules that the blocks `optim.points`, `optim.image` and `optim.heads` train."""
        heads = {name: module for name, module in self.named_children() if name.endswith("_head")}
        branches = {"points": self.point_encoder, "heads": nn.ModuleDict(heads)}
        if self.uses_inter:
            branches["image"] = self.image_encoder
        return branches

    def embed(self, batch: Batch) -> Embedded:
        """Encode both sides of a batch, match them, and put the matched rows through the heads."""
        first, second = batch.views
        tokens = self.point_encoder(first)
        xyz, copies = lidar_xyz(tokens, first), _copies(tokens)
        nothing = tokens.features.new_zeros((0, self.config.contrast.dim))
        intra, inter = (nothing, nothing), (nothing, nothing)
        other, other_xyz, other_copies, pairs = None, None, None, None
        if self.uses_intra:
            with torch.no_grad():  # the target side of a one-sided loss: same weights, no gradient
                other = self.point_encoder(second)
                other_xyz, other_copies = lidar_xyz(other, second), _copies(other)
            pairs = match_tokens(
                (tokens, other),
                (xyz, other_xyz),
                batch.num_frames,
                assignment=self.config.matching.assignment,
                max_distance=self.config.matching.max_distance,
            )
            if len(pairs.first) < 2:
                pairs = TokenPairs(*(values[:0] for values in pairs))
            else:
                query = self.intra_head(tokens.features.index_select(0, pairs.first))
                with torch.no_grad():
                    key = self.intra_head(other.features.index_select(0, pairs.second))
                intra = (query, key)
        pixels, used, maps = None, None, None
        if self.uses_inter:
            pixels = project_tokens(xyz, tokens.batch_index, batch.images, min_depth=self.config.matching.min_depth)
            used = pixels.where_visible()
            if self.config.matching.invisible == "keep":
                used = pixels.where_visible_or_unseen(batch.images.camera_index)
            maps = self.image_encoder(self.image_encoder.normalise(batch.images.images, batch.images.image_size))
            if len(used.token) < 2:
                used = PixelPairs(*(values[:0] for values in used))
            else:
                inter = self._inter_rows(batch, tokens, used, maps[-1])
        return Embedded(
            (tokens, other), (xyz, other_xyz), (copies, other_copies), pairs, pixels, used, maps, intra, inter
        )

    def sync_norms(self, device_type: str) -> None:
        """Let BatchNorms share their statistics over processes where the configuration says so; before training."""
        if self.uses_inter:
            self.image_encoder.sync_norms(device_type)
        if self.config.contrast.head_norm == "sync":
            if device_type != "cuda":
                log.info("contrast.head_norm: sync is plain BatchNorm on %s", device_type)
                return
            for name, module in self.branches()["heads"].items():
                setattr(self, name, nn.SyncBatchNorm.convert_sync_batchnorm(module))

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Picture]:
        """What the method sees in a batch, by name; leaves weights and statistics as they are."""
        was_training = self.training
        self.eval()
        embedded = self.embed(batch)
        self.train(was_training)
        drawn = {}
        if self.uses_intra:
            drawn["matches"] = draw_token_pairs(batch, embedded.tokens, embedded.pairs)
        if self.uses_inter and len(batch.images.images):
            frame = int(batch.images.batch_index[0])
            drawn["projected_tokens"] = draw_pixel_pairs(batch, embedded.tokens[0], embedded.used, frame)
            drawn["features"] = draw_features(batch, embedded.maps[-1])
        return drawn

    def _inter_rows(
        self, batch: Batch, tokens: PointTokens, used: PixelPairs, feature_map: FeatureMap
    ) -> tuple[Tensor, Tensor]:
        """Head outputs (image rows, point rows) of the token-pixel pairs; the point side carries no encoder gradient."""
        if self.config.matching.grid == "exact":
            coordinates, outside = exact_coordinates(used, feature_map), "border"
        else:
            coordinates, outside = released_coordinates(used, batch.images, feature_map), "zeros"
        if self.config.matching.invisible == "keep":
            # Released: what no camera sees lands far outside the map and reads zero.
            coordinates = torch.where(used.visible[:, None], coordinates, -2.0)
            outside = "zeros"
        seen = sample_bilinear(feature_map.features, used.image, coordinates, outside=outside)
        point_rows = self.inter_point_head(tokens.features.detach().index_select(0, used.token))
        return self.inter_image_head(seen), point_rows

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses and metrics of a batch, all scalars; `loss` is the weighted sum of `intra_loss` and `inter_loss`."""
        embedded = self.embed(batch)
        contrast = self.config.contrast
        metrics = {"num_tokens": _scalar(len(embedded.tokens[0].xyz), batch)}
        loss = self._tie_unused(embedded)
        metrics["unique_tokens"] = _scalar(len(embedded.copies[0].unique()), batch) / metrics["num_tokens"].clamp(min=1)
        if self.uses_intra:
            result = self._intra_result(embedded)
            loss = loss + contrast.intra_weight * result.loss
            metrics |= _named("intra", result) | self._distances(embedded.pairs, batch)
            metrics["intra_rows"] = _scalar(len(embedded.pairs.first), batch)
        if self.uses_inter:
            result = self._inter_result(embedded)
            loss = loss + contrast.inter_weight * result.loss
            metrics |= _named("inter", result)
            _, num_cameras = embedded.pixels.token[embedded.pixels.visible].unique(return_counts=True)
            num_tokens = metrics["num_tokens"].clamp(min=1)
            metrics["visible_tokens"] = _scalar(len(num_cameras), batch) / num_tokens
            metrics["overlap_tokens"] = (num_cameras > 1).sum() / num_tokens  # seen by two cameras or more
            metrics["inter_rows"] = _scalar(len(embedded.used.token), batch)
        return {"loss": loss, **metrics}

    def _tie_unused(self, embedded: Embedded) -> Tensor | float:
        """0, on the graph of every parameter where a loss has no rows: such a batch gives zero gradients, not none (for
        which other processes would wait)."""
        missing = (self.uses_intra and not len(embedded.intra[0])) or (self.uses_inter and not len(embedded.inter[0]))
        if not missing:
            return 0.0
        return sum(parameter.sum() * 0 for parameter in self.parameters() if parameter.requires_grad)

    def _negatives(self, batch_index: Tensor) -> dict:
        negatives = self.config.contrast.negatives
        return {"scene": batch_index if negatives == "scene" else None, "all_ranks": negatives == "all_ranks"}

    def _intra_result(self, embedded: Embedded) -> ContrastResult:
        pairs, contrast = embedded.pairs, self.config.contrast
        ids = ()
        if contrast.mask_duplicates:
            ids = (embedded.copies[0][pairs.first], embedded.copies[1][pairs.second])
        query, key = embedded.intra
        scene = embedded.tokens[0].batch_index[pairs.first]
        return info_nce(query, key, contrast.temperature, ids=ids, **self._negatives(scene))

    def _inter_result(self, embedded: Embedded) -> ContrastResult:
        used, contrast = embedded.used, self.config.contrast
        token_ids = (
            embedded.copies[0] if contrast.mask_duplicates else torch.arange(len(embedded.copies[0])).to(used.token)
        )
        # A token that two cameras see stands in two rows, which are never each other's negatives.
        rows = {"ids": (token_ids[used.token],), **self._negatives(embedded.tokens[0].batch_index[used.token])}
        image, points = embedded.inter
        if contrast.inter_detach == "after_head":
            points = points.detach()
        results = []
        if contrast.inter_direction in ("image_to_points", "symmetric"):
            results.append(info_nce(image, points, contrast.temperature, **rows))
        if contrast.inter_direction in ("points_to_image", "symmetric"):
            results.append(info_nce(points, image, contrast.temperature, **rows))
        return ContrastResult(*(torch.stack(values).mean() for values in zip(*results, strict=True)))

    @staticmethod
    def _distances(pairs: TokenPairs, batch: Batch) -> dict[str, Tensor]:
        if not len(pairs.distance):
            return {f"matched_distance_{name}": _scalar(0, batch) for name in ("p50", "p90", "max")}
        levels = torch.tensor([0.5, 0.9, 1.0], dtype=pairs.distance.dtype, device=pairs.distance.device)
        values = pairs.distance.quantile(levels).float()
        return dict(zip(("matched_distance_p50", "matched_distance_p90", "matched_distance_max"), values, strict=True))


def _copies(tokens: PointTokens) -> Tensor:
    """(M,) ids within a batch: equal for tokens of one frame on the same lidar point, unique for tokens on none."""
    row = torch.arange(len(tokens.source_index), device=tokens.source_index.device)
    stride = int(tokens.source_index.max()) + 1 if len(row) else 1
    own = tokens.batch_index * max(stride, 1) + tokens.source_index
    highest = int(own.max()) + 1 if len(row) else 0
    return torch.where(tokens.source_index >= 0, own, highest + row)


def _scalar(value: int, batch: Batch) -> Tensor:
    return torch.tensor(float(value), device=batch.views[0].points.device)


def _named(name: str, result: ContrastResult) -> dict[str, Tensor]:
    return {f"{name}_loss": result.loss, f"{name}_ceiling": result.ceiling, f"{name}_top1": result.accuracy}
