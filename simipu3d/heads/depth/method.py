"""Depth of every pixel from one image: an image encoder, a decoder, and a loss on logarithms.

Source: the depth runs of SimIPU's authors (arXiv:2112.04680, section 4; zhyever/Monocular-Depth-Estimation-Toolbox,
configs/simipu). What is scored, and how, is in `metrics.depth`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from simipu3d.contracts.batch import Batch, ImageView
from simipu3d.contracts.method import DataInfo, Method, Needs, Picture
from simipu3d.encoders.image import ImageEncoder
from simipu3d.errors import UserError
from simipu3d.heads.depth.config import DepthBlocks
from simipu3d.heads.depth.decoder import DenseDecoder, LinearDecoder, enlarge
from simipu3d.heads.depth.loss import sig_loss
from simipu3d.metrics.depth import depth_errors, mean_errors, valid_pixels
from simipu3d.pictures import depth_as_colours, save_png
from simipu3d.registry import METHODS

ADAMW = {"name": "adamw", "lr": 1e-4, "betas": [0.95, 0.99], "weight_decay": 0.01}


@METHODS.register("depth")
class Depth(Method):
    """Monocular depth on any image encoder, from depth maps or, where a data set has none, from projected points.

    Args:
        config: the validated blocks.
        data: not read.
    """

    Config = DepthBlocks
    NEEDS = Needs(image_views=1, truth=("depth",))
    OPTIM = {"image": ADAMW, "head": ADAMW}  # noqa: RUF012

    def __init__(self, config: DepthBlocks, data: DataInfo):
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config.image_encoder)
        levels = self.image_encoder.maps
        own = config.depth
        dense = own.decoder == "dense"
        self.decoder = DenseDecoder(levels, own.channels, norm=own.norm == "batch") if dense else LinearDecoder(levels)
        self._warming_up = False

    def branches(self) -> dict[str, nn.Module]:
        """image and head."""
        return {"image": self.image_encoder, "head": self.decoder}

    def sync_norms(self, device_type: str) -> None:
        """The encoder's BatchNorms; the decoder has none."""
        self.image_encoder.sync_norms(device_type)

    def before_step(self, step: int, num_steps: int) -> None:
        """The loss of the first steps is another one."""
        self._warming_up = step < self.config.depth.warmup_steps

    def depth_of(self, images: Tensor, image_size: Tensor) -> Tensor:
        """Depth at the decoder's resolution.

        Args:
            images: (I, 3, H, W) uint8 RGB, I above 0.
            image_size: (I, 2) height and width before padding.

        Returns:
            (I, 1, Hf, Wf) metres, not limited from below with `scale_up: true`, nor from above without.
        """
        own = self.config.depth
        logits = self.decoder(self.image_encoder(self.image_encoder.normalise(images, image_size))).float()
        return logits.sigmoid() * own.max_depth if own.scale_up else logits.relu() + own.min_depth

    def _at_pixels(self, depth: Tensor, size: tuple[int, int]) -> Tensor:
        """(I, H, W) of images of that size, from a map that covers them up to the encoder's next multiple."""
        height, width = size
        multiple = self.image_encoder.pad_multiple
        covered = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
        return enlarge(depth, covered)[:, 0, :height, :width]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`depth_loss` (SigLoss over the `depth_rows` pixels whose truth is known) and their `depth_abs_rel`, to watch."""
        own, view, truth = self.config.depth, batch.images[0], _truth(batch)
        if len(view.images) == 0:
            zero = sum(p.sum() * 0 for p in self.parameters() if p.requires_grad)
            nothing = torch.zeros((), device=view.images.device)
            return {"loss": zero + nothing, "depth_loss": nothing, "depth_abs_rel": nothing, "depth_rows": nothing}
        depth = self._at_pixels(
            self.depth_of(view.images, view.image_size), (view.images.shape[-2], view.images.shape[-1])
        )
        loss = sig_loss(
            depth,
            truth,
            mean_weight=own.mean_weight,
            log_offset=own.log_offset,
            max_depth=own.loss_max_depth,
            scale_only=self.training and self._warming_up,
        )
        known = truth > 0
        relative = (depth.detach() - truth)[known].abs() / truth[known]
        rows = known.sum().float()
        return {
            "loss": loss,
            "depth_loss": loss,
            "depth_abs_rel": relative.sum() / rows.clamp(min=1),
            "depth_rows": rows,
        }

    @torch.no_grad()
    def predict_depth(self, view: ImageView) -> list[Tensor]:
        """(h, w) metres for each image at its own size, inside the range, with `flip_test` averaged over both mirrorings.

        Images of one size run together, padded as a batch of theirs alone would be: no prediction depends on the others of the
        batch, and each is what training saw.
        """
        found: dict[int, Tensor] = {}
        for height, width in view.image_size.unique(dim=0).tolist():
            mine = (view.image_size == view.image_size.new_tensor([height, width])).all(dim=1).nonzero()[:, 0]
            padded = view.own_padded_size[mine[0]].tolist()
            images = view.images[mine, :, : padded[0], : padded[1]]
            depth = self._limited(images, view.image_size[mine])
            if self.config.depth.flip_test:
                mirrored = images.clone()
                mirrored[..., :width] = images[..., :width].flip(-1)
                depth = (depth + self._limited(mirrored, view.image_size[mine]).flip(-1)) / 2
            found |= dict(zip(mine.tolist(), depth.cpu(), strict=True))
        return [found[index] for index in range(len(found))]

    def _limited(self, images: Tensor, image_size: Tensor) -> Tensor:
        """(I, h, w) of images of one size: limited at the decoder's resolution, as published, then enlarged."""
        own = self.config.depth
        depth = self.depth_of(images, image_size).clamp(own.min_depth, own.max_depth)
        height, width = image_size[0].tolist()
        return self._at_pixels(depth, (images.shape[-2], images.shape[-1]))[:, :height, :width]

    def predict(self, batch: Batch) -> list[dict[str, Any]]:
        """A record a frame: `frame_id`, and for each of its `cameras` the image, predicted `depth` and `truth`, all (h, w) of
        the evaluated image, metres, truth 0 where unknown, and `errors`, see `metrics.depth`."""
        view = batch.images[0]
        depths = self.predict_depth(view)
        records: list[dict[str, Any]] = [
            {"frame_id": frame_id, "cameras": [], "images": [], "depth": [], "truth": [], "errors": []}
            for frame_id in batch.frame_ids
        ]
        for index, depth in enumerate(depths):
            record = records[int(view.batch_index[index])]
            height, width = depth.shape
            truth = _truth(batch)[index, :height, :width].cpu().numpy()
            record["cameras"].append(view.camera_names[index])
            record["images"].append(view.images[index, :, :height, :width].permute(1, 2, 0).cpu().numpy())
            record["depth"].append(depth.numpy())
            record["truth"].append(truth)
            record["errors"].append(self._errors(depth.numpy(), truth))
        return records

    def _errors(self, depth: NDArray[np.float32], truth: NDArray[np.float32]) -> dict[str, float]:
        """The numbers of one image.

        Raises:
            UserError: the window is that of images of another size.
        """
        own = self.config.depth
        low, high = own.scored_range
        try:
            valid = valid_pixels(truth, min_depth=low, max_depth=high, crop=own.crop)
        except ValueError as error:
            raise UserError(f"depth.crop: {error}; choose another, or another data.crop or resize") from error
        return depth_errors(depth, truth, valid, min_depth=low, max_depth=own.max_depth)

    def condense(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The numbers without the maps."""
        return [{key: record[key] for key in ("frame_id", "cameras", "errors")} for record in records]

    def score(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """The mean over images of the customary depth numbers; see `metrics.depth`."""
        errors = [own for record in records for own in record["errors"]]
        return mean_errors(errors) if errors else {}

    def write_predictions(self, records: list[dict[str, Any]], folder: Path) -> None:
        """depth/ and truth/ as 16-bit PNGs of `png_scale` a metre (0 = unknown), pictures/ with image, prediction and truth;
        files are called after their frame, and after their camera where a frame has several, with _ for /."""
        for kind in ("depth", "truth", "pictures"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for record in records:
            several = len(record["cameras"]) > 1
            maps = (record[key] for key in ("cameras", "images", "depth", "truth"))
            for camera, image, depth, truth in zip(*maps, strict=True):
                stem = f"{record['frame_id']}_{camera}" if several else record["frame_id"]
                name = stem.replace("/", "_") + ".png"
                self._write_png(folder / "depth" / name, depth)
                self._write_png(folder / "truth" / name, truth)
                save_png(folder / "pictures" / name, self._picture(image, depth, truth))

    def _write_png(self, path: Path, metres: NDArray[np.float32]) -> None:
        values = np.clip(np.round(metres.astype(np.float64) * self.config.depth.png_scale), 0, 65535)
        Image.fromarray(values.astype(np.uint16)).save(path)

    def _picture(self, image: NDArray[np.uint8], depth: NDArray[np.float32], truth: NDArray[np.float32]) -> Picture:
        """Image, prediction and truth below each other."""
        end = self.config.depth.scored_range[1]
        return np.concatenate([image, depth_as_colours(depth, end), depth_as_colours(truth, end)])

    def pictures(self, batch: Batch) -> dict[str, Picture]:
        """The first image with its predicted and its true depth."""
        if not batch.num_frames:
            return {}
        record = self.predict(batch)[0]
        return {"depth": self._picture(record["images"][0], record["depth"][0], record["truth"][0])}


def _truth(batch: Batch) -> Tensor:
    """(I, H, W) metres, 0 where unknown: what `NEEDS` asks for."""
    assert batch.truth is not None
    assert batch.truth.depth is not None
    return batch.truth.depth[0]
