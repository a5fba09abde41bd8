"""Every registered method keeps the contract, and each law of it catches a method that does not."""

import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import AUGMENT, BLOCKS, CLASS_NAMES, COLUMNS, batch_of
from method_laws import LAWS
from torch import nn

import simipu3d.engine.parts  # noqa: F401  (fills the registry)
from simipu3d.config import PartConfig, parse_block, to_plain
from simipu3d.contracts.method import DataInfo, Method, Needs
from simipu3d.registry import METHODS

CASES = {
    "simipu": BLOCKS,
    "depth": {
        "image_encoder": {"name": "resnet18", "model_args": {"channels": [8, 12, 16, 20]}},
        "depth": {"crop": "none", "channels": [8, 8, 8, 16, 16]},
    },
}
"""Small blocks of every method."""


def builder(name: str, blocks: dict):
    method = METHODS[name].target

    def build(seed: int) -> Method:
        torch.manual_seed(seed)
        return method(parse_block("", method.Config, blocks), DataInfo(COLUMNS, CLASS_NAMES))

    return build


def test_every_method_has_a_case():
    assert set(METHODS.names()) >= set(CASES)
    here = [name for name in METHODS.names() if METHODS[name].target.__module__.startswith("simipu3d.")]
    assert set(here) == set(CASES)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CASES)
def test_a_method_keeps_the_contract(name, law):
    build = builder(name, CASES[name])
    needs = type(build(0)).needs_of(build(0).config)
    law(build, lambda seeds: batch_of(seeds, AUGMENT, needs))


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_read_and_written_alike(name):
    config = METHODS[name].target.Config
    parsed = parse_block("", config, CASES[name])
    assert parse_block("", config, to_plain(parsed)) == parsed


# ------------------------------------------------------------------------------------------- methods that break a law


class Nothing(PartConfig):
    """No block."""


class Mean(Method):
    """The mean of all pixels through one weight: the smallest method that keeps every law."""

    Config = Nothing
    NEEDS = Needs(image_views=1)

    def __init__(self, config, data):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, batch):
        images = batch.images[0].images.float() / 255
        loss = (
            (images.mean(dim=(2, 3)) * self.weight).sum() / max(1, len(images))
            if len(images)
            else self.weight.sum() * 0
        )
        return {"loss": loss}


class NoLoss(Mean):
    def forward(self, batch):
        return {"mean_loss": super().forward(batch)["loss"]}


class NotFinite(Mean):
    def forward(self, batch):
        return {"loss": super().forward(batch)["loss"] / 0}


class LostParameter(Mean):
    def __init__(self, config, data):
        super().__init__(config, data)
        self.part = nn.Linear(3, 1)

    def branches(self):
        return {"part": self.part}

    def forward(self, batch):
        return {"loss": super().forward(batch)["loss"] + sum(p.sum() for p in self.part.parameters())}


class NoGradient(Mean):
    def __init__(self, config, data):
        super().__init__(config, data)
        self.unused = nn.Linear(3, 1)


class OfItsNeighbours(Mean):
    def forward(self, batch):
        return {"loss": super().forward(batch)["loss"] * batch.num_frames}


class ForgetsItsState(Mean):
    def __init__(self, config, data):
        super().__init__(config, data)
        self.direction = torch.rand(3)  # no buffer

    def forward(self, batch):
        return {"loss": (self.weight * self.direction).sum() * (batch.num_frames > 0)}


BROKEN = {
    NoLoss: "losses_are_finite_scalars",
    NotFinite: "losses_are_finite_scalars",
    LostParameter: "branches_hold_every_parameter_once",
    NoGradient: "every_trainable_parameter_gets_a_gradient",
    OfItsNeighbours: "a_batch_gives_what_its_frames_give",
    ForgetsItsState: "a_state_dict_comes_back",
}


def of_class(method: type[Method]):
    def build(seed: int) -> Method:
        torch.manual_seed(seed)
        return method(Nothing(), DataInfo())

    return build, lambda seeds: batch_of(seeds, AUGMENT, method.NEEDS)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_smallest_method_keeps_the_contract(law):
    law(*of_class(Mean))


@pytest.mark.parametrize("method", BROKEN, ids=lambda method: method.__name__)
def test_a_broken_method_is_caught(method):
    law = next(law for law in LAWS if law.__name__ == BROKEN[method])
    with pytest.raises(AssertionError):
        law(*of_class(method))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"NEEDS": Needs(), "__init__": Mean.__init__, "forward": Mean.forward}, "has no Config"),
        ({"Config": Nothing, "__init__": Mean.__init__, "forward": Mean.forward}, "has no NEEDS"),
        ({"Config": Nothing, "NEEDS": Needs(), "forward": Mean.forward}, "has no __init__"),
        ({"Config": Nothing, "NEEDS": Needs(), "__init__": Mean.__init__}, "has no forward"),
        ({"Config": dict, "NEEDS": Needs(), "__init__": Mean.__init__, "forward": Mean.forward}, "has no Config"),
    ],
)
def test_a_class_that_lacks_something_is_refused_when_it_is_defined(body, words):
    with pytest.raises(TypeError, match=f"the method Lacking {words}"):
        type("Lacking", (Method,), body)
    type("Base", (Method,), body, abstract=True)


@pytest.mark.parametrize(
    "wrong",
    [{"point_views": 3}, {"image_views": -1}, {"frames": 2}, {"truth": ("boxen",)}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_needs_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="Needs"):
        Needs(**wrong)


# --------------------------------------------------------------------------------------------- the text of the manual


def test_the_text_of_the_manual_trains_validates_and_resumes(tmp_path, monkeypatch, caplog):
    """docs/methods.md, as it stands."""
    from simipu3d.engine.pretrain import pretrain

    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    code, yaml_text = (re.search(rf"```{kind}\n(.*?)```", text, re.S).group(1) for kind in ("python", "yaml"))
    assert len([line for line in code.split("class OneScan(Method)")[1].splitlines() if line.strip()]) <= 30
    (tmp_path / "one_scan.py").write_text(code)
    (tmp_path / "one_scan.yaml").write_text(yaml_text)
    monkeypatch.syspath_prepend(tmp_path)
    small = [
        "data.image_size=[32,64]",
        "data.beams=16",
        "data.azimuth_step_deg=2.0",
        f"data.root={tmp_path / 'frames'}",
    ]
    with caplog.at_level("INFO", logger="simipu3d"):
        out = pretrain(tmp_path / "one_scan.yaml", small, out=tmp_path / "run")
        pretrain(tmp_path / "one_scan.yaml", [*small, "trainer.max_steps=10"], out=out, resume="")
    assert "points " in caplog.text
    assert "held out:" in caplog.text
    header = (out / "metrics.csv").read_text().splitlines()[0]
    assert {"points_loss", "points_top1", "val_points_loss", "val_points_top1"} <= set(header.split(","))
    assert (out / "checkpoints" / "best.ckpt").is_file()
    METHODS._entries.pop("one_scan")
    sys.modules.pop("one_scan")
