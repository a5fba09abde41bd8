"""SimIPU: two views of a scan teach the point encoder, its tokens teach the image encoder about space.

Source: Li et al., SimIPU: Simple 2D Image and 3D Point Cloud Unsupervised Pre-Training for Spatial-Aware Visual
Representations, AAAI 2022 (arXiv:2112.04680). Where the released code differs from the paper or from what it meant, a
switch says so; defaults are the corrected recipe, `configs/simipu/kitti_released.yaml` the released one.
"""

import logging
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator
from torch import Tensor

from simipu3d.config import ChosenPart, PartConfig
from simipu3d.contracts.batch import Batch, ImageView
from simipu3d.contracts.method import DataInfo, Method, Needs, Picture, Rows
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
from simipu3d.methods.drawing import draw_features, draw_pixel_pairs, draw_token_pairs
from simipu3d.registry import ASSIGNMENTS, METHODS, POINT_ENCODERS

log = logging.getLogger(__name__)


class MatchingConfig(PartConfig):
    """The `matching:` block: how pairs are found."""

    assignment: str = "hungarian"
    """Token to token: hungarian (exact, the paper's), greedy (its ablation), nearest or mutual_nearest."""
    max_distance: PositiveFloat | None = None
    """Pairs farther apart than this, metres, are dropped. The paper has no gate."""
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

    point_encoder: Annotated[PartConfig, ChosenPart("point_encoder", POINT_ENCODERS)]
    """Points to tokens."""
    image_encoder: ImageEncoderConfig = ImageEncoderConfig()
    """Images to a feature map."""
    matching: MatchingConfig = MatchingConfig()
    """How pairs are found."""
    contrast: ContrastConfig = ContrastConfig()
    """What is compared, and how sharply."""


@dataclass(frozen=True, eq=False)
class EncodedView:
    """A point view behind the encoder.

    Attributes:
        tokens: of the view.
        xyz: (M, 3) where they are in the lidar frame, metres.
        copies: (M,) id of each token, unique in the view but for copies of one lidar point.
    """

    tokens: PointTokens
    xyz: Tensor
    copies: Tensor


@dataclass(frozen=True, eq=False)
class IntraPart:
    """Token to token: the second view, the pairs, and their rows (P, C) behind the head, not normalised. Fewer than two
    pairs are no contrast: then there are none."""

    second: EncodedView
    pairs: TokenPairs
    query: Tensor
    key: Tensor


@dataclass(frozen=True, eq=False)
class InterPart:
    """Pixel to token: all pairs, those that enter the loss, the matched feature map, and the rows (P, C) of the used pairs
    behind the heads, not normalised. Fewer than two pairs are no contrast: then there are none."""

    pixels: PixelPairs
    used: PixelPairs
    feature_map: FeatureMap
    image_rows: Tensor
    point_rows: Tensor


@dataclass(frozen=True, eq=False)
class Embedded:
    """What a batch looks like just before the losses: the first view, and what each loss that has a weight compares."""

    first: EncodedView
    intra: IntraPart | None
    inter: InterPart | None


@METHODS.register("simipu")
class SimIPU(Method):
    """The method of the paper on any registered point encoder and any image backbone, timm's or registered.

    Args:
        config: the validated blocks.
        data: the columns of its points.
    """

    Config = SimIPUConfig
    NEEDS = Needs(point_views=2, image_views=1)
    OPTIM = {"points": {"name": "adamw"}, "image": {"name": "sgd"}, "heads": {"name": "sgd"}}  # noqa: RUF012

    def __init__(self, config: SimIPUConfig, data: DataInfo):
        super().__init__()
        self.config = config
        contrast = config.contrast
        self.uses_intra, self.uses_inter = contrast.intra_weight > 0, contrast.inter_weight > 0
        self.point_encoder = POINT_ENCODERS.of(config.point_encoder).target(
            config.point_encoder, point_columns=data.point_columns
        )
        channels = self.point_encoder.out_channels
        if self.uses_intra:
            self.intra_head = ProjectionHead(channels, contrast.dim)
        else:
            self.point_encoder.requires_grad_(False)
        if self.uses_inter:
            self.image_encoder = ImageEncoder(config.image_encoder)
            self.inter_point_head = ProjectionHead(channels, contrast.dim)
            self.inter_image_head = ProjectionHead(self.image_encoder.maps[-1].channels, contrast.dim)
            if contrast.inter_detach == "after_head":
                self.inter_point_head.requires_grad_(False)

    @classmethod
    def needs_of(cls, config: SimIPUConfig) -> Needs:
        """Without the inter-modal loss no image is read."""
        return cls.NEEDS if config.contrast.inter_weight > 0 else Needs(point_views=2)

    def branches(self) -> dict[str, nn.Module]:
        """points, heads and, with the inter-modal loss, image."""
        heads = {name: module for name, module in self.named_children() if name.endswith("_head")}
        branches: dict[str, nn.Module] = {"points": self.point_encoder, "heads": nn.ModuleDict(heads)}
        if self.uses_inter:
            branches["image"] = self.image_encoder
        return branches

    def embed(self, batch: Batch) -> Embedded:
        """Encode both sides of a batch, match them, and put the matched rows through the heads."""
        tokens = self.point_encoder(batch.views[0])
        first = EncodedView(tokens, lidar_xyz(tokens, batch.views[0]), _copies(tokens))
        intra = self._embed_intra(batch, first) if self.uses_intra else None
        inter = self._embed_inter(batch.images[0], first) if self.uses_inter else None
        return Embedded(first, intra, inter)

    def _embed_intra(self, batch: Batch, first: EncodedView) -> IntraPart:
        with torch.no_grad():  # the target side of a one-sided loss: same weights, no gradient
            tokens = self.point_encoder(batch.views[1])
            second = EncodedView(tokens, lidar_xyz(tokens, batch.views[1]), _copies(tokens))
        pairs = match_tokens(
            (first.tokens, tokens),
            (first.xyz, second.xyz),
            batch.num_frames,
            assignment=self.config.matching.assignment,
            max_distance=self.config.matching.max_distance,
        )
        if len(pairs.first) < 2:
            nothing = first.tokens.features.new_zeros((0, self.config.contrast.dim))
            return IntraPart(second, TokenPairs(*(values[:0] for values in pairs)), nothing, nothing)
        query = self.intra_head(first.tokens.features.index_select(0, pairs.first))
        with torch.no_grad():
            key = self.intra_head(tokens.features.index_select(0, pairs.second))
        return IntraPart(second, pairs, query, key)

    def _embed_inter(self, images: ImageView, first: EncodedView) -> InterPart:
        matching = self.config.matching
        pixels = project_tokens(first.xyz, first.tokens.batch_index, images, min_depth=matching.min_depth)
        used = pixels.where_visible()
        if matching.invisible == "keep":
            used = pixels.where_visible_or_unseen(images.camera_index)
        feature_map = self.image_encoder(self.image_encoder.normalise(images.images, images.image_size))[-1]
        if len(used.token) < 2:
            used = PixelPairs(*(values[:0] for values in used))
            nothing = first.tokens.features.new_zeros((0, self.config.contrast.dim))
            return InterPart(pixels, used, feature_map, nothing, nothing)
        if matching.grid == "exact":
            coordinates, outside = exact_coordinates(used, feature_map), "border"
        else:
            coordinates, outside = released_coordinates(used, images, feature_map), "zeros"
        if matching.invisible == "keep":
            # Released: what no camera sees lands far outside the map and reads zero.
            coordinates = torch.where(used.visible[:, None], coordinates, -2.0)
            outside = "zeros"
        seen = sample_bilinear(feature_map.features, used.image, coordinates, outside=outside)
        # The point side carries no gradient of the encoder.
        point_rows = self.inter_point_head(first.tokens.features.detach().index_select(0, used.token))
        return InterPart(pixels, used, feature_map, self.inter_image_head(seen), point_rows)

    def sync_norms(self, device_type: str) -> None:
        """Let BatchNorms share their statistics over processes where the configuration says so; before training."""
        if self.uses_inter:
            self.image_encoder.sync_norms(device_type)
        if self.config.contrast.head_norm == "sync":
            if device_type != "cuda":
                log.info("contrast.head_norm: sync is plain BatchNorm on %s", device_type)
                return
            for name, module in list(self.named_children()):
                if name.endswith("_head"):
                    setattr(self, name, nn.SyncBatchNorm.convert_sync_batchnorm(module))

    def pictures(self, batch: Batch) -> dict[str, Picture]:
        """Matched tokens of two views, tokens on their pixels, and the matched feature map as colours."""
        embedded = self.embed(batch)
        drawn = {}
        if embedded.intra is not None:
            tokens = (embedded.first.tokens, embedded.intra.second.tokens)
            drawn["matches"] = draw_token_pairs(batch, tokens, embedded.intra.pairs)
        if embedded.inter is not None and len(batch.images[0].images):
            frame = int(batch.images[0].batch_index[0])
            drawn["projected_tokens"] = draw_pixel_pairs(batch, embedded.first.tokens, embedded.inter.used, frame)
            drawn["features"] = draw_features(batch, embedded.inter.feature_map)
        return drawn

    def rows(self, batch: Batch) -> dict[str, Rows]:
        """intra: first view's token, second view's token; inter: pixel, token."""
        embedded = self.embed(batch)
        first, found = embedded.first, {}
        if embedded.intra is not None:
            token = embedded.intra.pairs.first
            own = (first.copies[token], first.tokens.batch_index[token])
            found["intra"] = Rows(embedded.intra.query, embedded.intra.key, *own)
        if embedded.inter is not None:
            token = embedded.inter.used.token
            own = (first.copies[token], first.tokens.batch_index[token])
            found["inter"] = Rows(embedded.inter.image_rows, embedded.inter.point_rows, *own)
        return found

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Losses and metrics of a batch, all scalars; `loss` is the weighted sum of `intra_loss` and `inter_loss`."""
        embedded = self.embed(batch)
        contrast, first = self.config.contrast, embedded.first
        num_tokens = _scalar(len(first.xyz), first)
        metrics = {"num_tokens": num_tokens}
        loss = self._tie_unused(embedded)
        metrics["unique_tokens"] = _scalar(len(first.copies.unique()), first) / num_tokens.clamp(min=1)
        if embedded.intra is not None:
            result = self._intra_result(first, embedded.intra)
            loss = loss + contrast.intra_weight * result.loss
            metrics |= _named("intra", result) | _distances(embedded.intra.pairs, first)
            metrics["intra_rows"] = _scalar(len(embedded.intra.pairs.first), first)
        if embedded.inter is not None:
            result = self._inter_result(first, embedded.inter)
            loss = loss + contrast.inter_weight * result.loss
            metrics |= _named("inter", result)
            pixels = embedded.inter.pixels
            _, num_cameras = pixels.token[pixels.visible].unique(return_counts=True)
            metrics["visible_tokens"] = _scalar(len(num_cameras), first) / num_tokens.clamp(min=1)
            metrics["overlap_tokens"] = (num_cameras > 1).sum() / num_tokens.clamp(min=1)  # seen by two cameras or more
            metrics["inter_rows"] = _scalar(len(embedded.inter.used.token), first)
        return {"loss": torch.as_tensor(loss), **metrics}

    def _tie_unused(self, embedded: Embedded) -> Tensor | float:
        """0, on the graph of every parameter where a loss has no rows: such a batch gives zero gradients, not none (for
        which other processes would wait)."""
        intra, inter = embedded.intra, embedded.inter
        if (intra is None or len(intra.query)) and (inter is None or len(inter.image_rows)):
            return 0.0
        return sum(parameter.sum() * 0 for parameter in self.parameters() if parameter.requires_grad)

    def _contrast(
        self,
        query: Tensor,
        key: Tensor,
        ids: tuple[Tensor, ...],
        batch_index: Tensor,
        cross_ids: tuple[Tensor, Tensor] | None = None,
    ) -> ContrastResult:
        """InfoNCE with the negatives that the configuration chooses. A held-out loss must not depend on how many processes
        measure it, so that rows of other processes take part in training only."""
        contrast = self.config.contrast
        return info_nce(
            query,
            key,
            contrast.temperature,
            ids=ids,
            cross_ids=cross_ids,
            scene=batch_index if contrast.negatives == "scene" else None,
            all_ranks=contrast.negatives == "all_ranks" and self.training,
        )

    def _intra_result(self, first: EncodedView, part: IntraPart) -> ContrastResult:
        ids: tuple[Tensor, ...] = ()
        cross_ids = None
        rows = part.pairs
        if self.config.contrast.mask_duplicates:
            ids = (first.copies[rows.first], part.second.copies[rows.second])
            # A rule that is not exact may leave a token's own lidar point to another row: that key is no negative either.
            cross_ids = (_raw_points(first.tokens)[rows.first], _raw_points(part.second.tokens)[rows.second])
        return self._contrast(part.query, part.key, ids, first.tokens.batch_index[rows.first], cross_ids)

    def _inter_result(self, first: EncodedView, part: InterPart) -> ContrastResult:
        contrast = self.config.contrast
        token = part.used.token
        # A token that two cameras see stands in two rows, which are never each other's negatives.
        own = first.copies if contrast.mask_duplicates else torch.arange(len(first.copies)).to(token)
        ids, batch_index = (own[token],), first.tokens.batch_index[token]
        image, points = part.image_rows, part.point_rows
        if contrast.inter_detach == "after_head":
            points = points.detach()
        results = []
        if contrast.inter_direction in ("image_to_points", "symmetric"):
            results.append(self._contrast(image, points, ids, batch_index))
        if contrast.inter_direction in ("points_to_image", "symmetric"):
            results.append(self._contrast(points, image, ids, batch_index))
        return ContrastResult(*(torch.stack(values).mean() for values in zip(*results, strict=True)))


def _distances(pairs: TokenPairs, first: EncodedView) -> dict[str, Tensor]:
    if not len(pairs.distance):
        return {f"matched_distance_{name}": _scalar(0, first) for name in ("p50", "p90", "max")}
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


def _raw_points(tokens: PointTokens) -> Tensor:
    """(M,) ids of the lidar points that tokens sit on, the same in both views of a frame; -1 for tokens on none."""
    own = tokens.batch_index * (1 << 32) + tokens.source_index
    return torch.where(tokens.source_index >= 0, own, -1)


def _scalar(value: int, view: EncodedView) -> Tensor:
    return torch.tensor(float(value), device=view.xyz.device)


def _named(name: str, result: ContrastResult) -> dict[str, Tensor]:
    return {f"{name}_loss": result.loss, f"{name}_ceiling": result.ceiling, f"{name}_top1": result.accuracy}
