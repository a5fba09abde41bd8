"""Two image backbones: one that is no timm model, and one that registers with timm."""

from pydantic import PositiveInt
from torch import Tensor, nn

from simipu3d.compat import import_timm
from simipu3d.config import PartConfig
from simipu3d.contracts.tokens import Level
from simipu3d.registry import IMAGE_BACKBONES

timm = import_timm()


class PatchesConfig(PartConfig):
    """`image_encoder.model_args` of `acme_patches`."""

    width: PositiveInt = 8
    """Channels of the finer map; the coarser one has twice as many."""


@IMAGE_BACKBONES.register("acme_patches", config=PatchesConfig)
class Patches(nn.Module):
    """Patches of 6 pixels, then of 2 x 2 patches: strides 6 and 12, centred 2.5 and 5.5 pixels from the first pixel."""

    def __init__(self, config: PatchesConfig):
        super().__init__()
        fine, coarse = config.width, 2 * config.width
        self.levels = (Level(stride=6, channels=fine, offset=2.5), Level(stride=12, channels=coarse, offset=5.5))
        self.pad_multiple = 12
        self.stem = nn.Sequential(nn.Conv2d(3, fine, 6, stride=6), nn.BatchNorm2d(fine), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(fine, coarse, 2, stride=2), nn.BatchNorm2d(coarse), nn.ReLU())

    def forward(self, images: Tensor, last: int) -> list[Tensor]:
        maps = [self.stem(images)]
        if last > 0:
            maps.append(self.stage(maps[0]))
        return maps


default_cfgs = timm.models.generate_default_cfgs({"acme_resnet": {"first_conv": "conv1", "classifier": "fc"}})


@timm.models.register_model
def acme_resnet(pretrained: bool = False, **kwargs) -> nn.Module:
    """A narrow ResNet with one block a stage, for timm and whoever uses timm."""
    block = timm.models.resnet.BasicBlock
    options = {"block": block, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8, **kwargs}
    return timm.models.build_model_with_cfg(timm.models.resnet.ResNet, "acme_resnet", pretrained, **options)
