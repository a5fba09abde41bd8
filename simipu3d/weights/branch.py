"""What of an encoder do weights from elsewhere fill, and what has to be known to fill it?

An encoder says so itself: an image encoder by `weight_branch`, a point encoder by its name in the registry and, where it
has it, `input_layers`. Nothing here knows a method's or an encoder's attributes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from pydantic import PositiveFloat, model_validator
from torch import Tensor, nn

from simipu3d.config import PartConfig
from simipu3d.registry import POINT_ENCODERS
from simipu3d.weights.folding import CONVENTIONS, Pictures
from simipu3d.weights.namings import NAMINGS, OWN_NAMES, Naming


class WeightsConfig(PartConfig):
    """The `image_encoder.weights:` block: what a foreign file does not say about itself. `pretrained` and `--init` read
    it."""

    input: Literal["imagenet_rgb", "caffe_bgr"] | None = None
    """The pictures that the file was trained on, as in `image_encoder.input`; a run or export of this project says so
    itself. Default: what its names suggest; the log says which."""
    mean: tuple[float, float, float] | None = None
    """Where it differs from that convention's: mean of the three channels in its order and range (RGB in 0..1 for
    `imagenet_rgb`, BGR in 0..255 for `caffe_bgr`). Needs `input`."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """The same for the standard deviation."""
    norm_eps: PositiveFloat | None = None
    """Epsilon of the file's BatchNorms; mmdetection and torchvision have 1e-5, the released SimIPU 1e-3. Default: the
    architecture's own."""
    partial: bool = False
    """Accept a file that fills less than 95 % of the network, or has some tensors in another shape. Default: refuse it."""

    @model_validator(mode="after")
    def _needs_input(self) -> "WeightsConfig":
        if self.input is None and (self.mean or self.std):
            raise ValueError("mean and std are given in the order and range of input; set input as well")
        return self

    def pictures(self) -> Pictures | None:
        """The pictures as stated, or None."""
        if self.input is None:
            return None
        known = CONVENTIONS[self.input]
        scale, step = (255, 1) if known.order == "RGB" else (1, -1)
        mean, std = (None if v is None else tuple(scale * x for x in v[::step]) for v in (self.mean, self.std))
        return Pictures(known.order, mean or known.mean, std or known.std)


class InputLayer(NamedTuple):
    """A layer that reads the points: offsets of a neighbour from its centre, then columns, then something else.

    Attributes:
        axis: of its weight's input channels.
        columns: names of the points' columns that it reads, in order.
        others: further input channels behind them (features of a layer before).
        offsets: whether three offsets, metres, stand before them; None where such an encoder never has any.
        kernel_key: the key that sets its kernel size, "" where none does.
    """

    axis: int
    columns: tuple[str, ...] = ()
    others: int = 0
    offsets: bool | None = None
    kernel_key: str = ""


@dataclass(frozen=True)
class ImageSide:
    """What only an image branch has.

    Attributes:
        first: name of the first convolution, "" where there is no single one.
        pads: whether it pads with zeros.
        pictures: as this run feeds them.
        stated: what the user states about the file.
        stock_eps: the architecture's own BatchNorm eps, by name.
        of_run: pictures and BatchNorm eps of the run that an `image_encoder` block is of.
        convert: names of the architecture's authors to ours, None where nothing is known.
        untrained: names of the architecture's tensors that are not trained here.
    """

    first: str
    pads: bool
    pictures: Pictures
    stated: WeightsConfig
    stock_eps: Callable[[], dict[str, float]]
    of_run: Callable[[Mapping[str, Any]], tuple[Pictures, dict[str, float]]]
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]
    untrained: tuple[str, ...]


@dataclass(frozen=True)
class WeightBranch:
    """An encoder, as weights see it.

    Attributes:
        title: its name in the method.
        network: its registered or timm name.
        module: what has the foreign names.
        namings: to look for.
        prefix: of `module` in the encoder.
        inputs: its layers that read the input, by the name of their weight.
        image: of an image branch.
    """

    title: str
    network: str
    module: nn.Module
    namings: tuple[Naming, ...]
    prefix: str = ""
    inputs: Mapping[str, InputLayer] = field(default_factory=dict)
    image: ImageSide | None = None

    @property
    def full_prefix(self) -> str:
        """What stands before the module's names in the method's state dict."""
        return f"{self.title}.{self.prefix}" if self.title else self.prefix


@runtime_checkable
class HasWeightBranch(Protocol):
    """An encoder that says what of it foreign weights fill."""

    def weight_branch(self, title: str) -> WeightBranch: ...


def find_branches(method: nn.Module) -> list[WeightBranch]:
    """Every encoder in a method, whatever it is called there."""
    registered = {POINT_ENCODERS[name].target: name for name in POINT_ENCODERS.names()}
    found = []
    for title, module in method.named_modules():
        if isinstance(module, HasWeightBranch):
            found.append(module.weight_branch(title))
        elif type(module) in registered:
            network = registered[type(module)]
            inputs = module.input_layers() if hasattr(module, "input_layers") else {}
            found.append(WeightBranch(title, network, module, NAMINGS.get(network, OWN_NAMES), inputs=inputs))
    return found
