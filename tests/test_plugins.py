"""Parts from outside the package: found by name or entry point, held to the same contracts, never run by a file."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import test_encoder_contract as point_contract
import test_image_families as image_contract
import test_part_contracts as part_contract
import torch
import yaml

from simipu3d.config import parse_block
from simipu3d.contracts.method import DataInfo
from simipu3d.data.loading.loader import build_reader
from simipu3d.encoders.image import ImageEncoder, ImageEncoderConfig
from simipu3d.engine import plugins
from simipu3d.engine.plugins import load_plugins, require_plugins
from simipu3d.engine.pretrain import build_method, pretrain
from simipu3d.engine.settings import load_data_settings, load_settings, parse_settings
from simipu3d.errors import UserError
from simipu3d.registry import IMAGE_BACKBONES, POINT_ENCODERS, REGISTRIES
from simipu3d.tools.export import main as export
from simipu3d.tools.inspect_data import main as inspect_data
from simipu3d.weights.files import read_checkpoint

EXAMPLE = Path(__file__).parent / "example_plugin"
DOCUMENT = Path(__file__).parents[1] / "docs" / "plugins.md"
BASE = {
    "plugins": ["acme_parts"],
    "method": "simipu",
    "data": {"name": "acme_noise", "batch_size": 2, "num_workers": 0},
    "point_encoder": {"name": "acme_columns", "width": 8},
    "image_encoder": {"name": "acme_patches"},
    "matching": {"assignment": "acme_by_range"},
    "contrast": {"dim": 8},
    "trainer": {"max_steps": 2, "accelerator": "cpu", "log_every_n_steps": 1},
    "run": {"pictures_every_steps": 0},
}


@pytest.fixture
def fresh():
    """Whatever is registered in the test is forgotten after it."""
    entries, loaded = [dict(registry._entries) for registry in REGISTRIES], dict(plugins._loaded)
    modules, path = set(sys.modules), list(sys.path)
    yield
    for registry, before in zip(REGISTRIES, entries, strict=True):
        registry._entries.clear()
        registry._entries.update(before)
    plugins._loaded.clear()
    plugins._loaded.update(loaded)
    sys.path[:] = path
    for name in sys.modules.keys() - modules:
        if name.startswith(("acme_", "my_parts", "strange_")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def acme_once():
    """The example is imported once for all: timm's registry cannot forget."""
    sys.path.insert(0, str(EXAMPLE))
    entries = [dict(registry._entries) for registry in REGISTRIES]
    assert load_plugins(["acme_parts"], "test") == ("acme_parts",)
    added = [
        {name: entry for name, entry in registry._entries.items() if name not in before}
        for registry, before in zip(REGISTRIES, entries, strict=True)
    ]
    found = plugins._loaded.pop("acme_parts")
    for registry, before in zip(REGISTRIES, entries, strict=True):
        registry._entries.clear()
        registry._entries.update(before)
    sys.path.remove(str(EXAMPLE))
    return added, found


@pytest.fixture
def acme(acme_once, fresh):
    """The example plugin, loaded for one test."""
    added, found = acme_once
    for registry, entries in zip(REGISTRIES, added, strict=True):
        registry._entries.update(entries)
    plugins._loaded["acme_parts"] = found


def write(path: Path, raw: dict) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def test_one_configuration_takes_a_part_of_each_kind(acme, tmp_path):
    config = load_settings(write(tmp_path / "acme.yaml", BASE))
    resolved = config.to_plain()
    assert resolved["plugins"] == ["acme_parts"]
    assert parse_settings(resolved, "resolved").to_plain() == resolved
    method = build_method(config, DataInfo(build_reader(config.data).point_columns))
    assert type(method.point_encoder).__module__ == "acme_parts.points"
    assert type(method.image_encoder.trunk).__module__ == "acme_parts.image"
    assert method.image_encoder.maps[-1] == (12, 16, 5.5)


def test_a_run_of_foreign_parts_trains_resumes_and_its_checkpoint_runs_nothing(acme, tmp_path, capsys):
    cfg = write(tmp_path / "acme.yaml", BASE)
    out = pretrain(cfg, ["data.num_workers=2"], out=tmp_path / "run")
    pretrain(cfg, ["trainer.max_steps=3"], out=out, resume="")
    checkpoint = out / "checkpoints" / "last.ckpt"
    assert read_checkpoint(checkpoint)["simipu3d"]["config"]["plugins"] == ["acme_parts"]
    arguments = ["--ckpt", str(checkpoint), "--branch", "image", "--to", "timm", "--out", str(tmp_path / "hub")]
    assert export(arguments) == 2
    assert "acme_patches is a plugin's own backbone" in capsys.readouterr().err
    plugins._loaded.clear()
    assert export(arguments) == 2
    said = capsys.readouterr().err
    assert "last.ckpt: was made with the plugin acme_parts, which is not loaded" in said
    assert "--plugins acme_parts" in said
    assert "acme_parts" not in plugins._loaded
    assert not (tmp_path / "hub").exists()


def test_a_model_registered_with_timm_is_exported_to_timm(acme, tmp_path, capsys):
    cfg = write(
        tmp_path / "acme.yaml", {**BASE, "image_encoder": {"name": "acme_resnet", "gradient_checkpointing": True}}
    )
    out = pretrain(cfg, out=tmp_path / "run")
    arguments = ["--ckpt", str(out / "checkpoints" / "last.ckpt"), "--branch", "image", "--to", "timm"]
    assert export([*arguments, "--out", str(tmp_path / "hub"), "--plugins", "acme_parts"]) == 0
    assert "local-dir:" in capsys.readouterr().out
    assert export([*arguments, "--out", str(tmp_path / "other"), "--plugins", "strange_missing"]) == 2
    assert "--plugins: strange_missing: no such module" in capsys.readouterr().err


def test_a_foreign_method_trains_validates_resumes_and_is_shown(acme, tmp_path, caplog):
    """acme_depth, of 40 lines: nothing but its own file knows it."""
    raw = {key: BASE[key] for key in ("plugins", "data", "trainer")}
    raw |= {"method": "acme_depth", "image_encoder": {"name": "acme_patches"}, "optim": {"model": {"lr": 0.01}}}
    raw |= {"validate": {"data": {"split": "train", "num_frames": 3}, "metric": "depth_loss"}}
    raw |= {"run": {"pictures_every_steps": 2, "checkpoint_every_steps": 3}}
    cfg = write(tmp_path / "depth.yaml", raw)
    with caplog.at_level("INFO", "simipu3d"):
        whole = pretrain(cfg, ["trainer.max_steps=8"], out=tmp_path / "whole")
    assert re.search(r"step 5/8  depth \d+\.\d{3}  \d+\.\d frames/s", caplog.text)
    assert re.search(r"step 8/8  held out:  depth \d+\.\d{3}$", caplog.text, re.MULTILINE)
    assert "3 of 3 held-out frames are in the training list" not in caplog.text, "the data set names no frames"
    with open(whole / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["val_depth_loss"]] == ["4", "8"]
    assert {"depth_loss", "lr_model", "val_loss", "val_depth_rows"} <= set(rows[0])
    assert float(rows[-1]["val_depth_loss"]) < float(rows[0]["depth_loss"])
    assert {path.name for path in (whole / "pictures").iterdir()} == {
        f"step_{step:06d}_depth.png" for step in (1, 2, 4, 6, 8)
    }
    parts = pretrain(cfg, ["trainer.max_steps=4"], out=tmp_path / "parts")
    pretrain(cfg, ["trainer.max_steps=8", "data.num_workers=2"], out=parts, resume="")
    one, other = (read_checkpoint(out / "checkpoints" / "last.ckpt") for out in (whole, parts))
    assert (
        one["simipu3d"]["best"] == other["simipu3d"]["best"] == {"value": float(rows[-1]["val_depth_loss"]), "step": 8}
    )
    assert all(torch.equal(other["state_dict"][name], value) for name, value in one["state_dict"].items())
    moments = [content["optimizer_states"][0]["state"] for content in (one, other)]
    assert all(torch.equal(moments[1][i]["exp_avg"], own["exp_avg"]) for i, own in moments[0].items())


def test_inspect_data_reads_a_foreign_data_set(acme, tmp_path, capsys):
    cfg = write(tmp_path / "data.yaml", {"plugins": ["acme_parts"], "data": BASE["data"]})
    assert load_data_settings(cfg).data.name == "acme_noise"
    assert inspect_data(["--cfg", str(cfg), "--num", "1", "--out", str(tmp_path / "pages")]) == 0
    assert len(list((tmp_path / "pages").glob("*.png"))) == 2


# ------------------------------------------------------------------------------------------------------- contracts


@pytest.mark.parametrize("law", [name for name in vars(point_contract) if name.startswith("test_")][1:])
def test_a_foreign_point_encoder_is_held_to_the_contract(acme, monkeypatch, law):
    case = point_contract.Case({"width": 8, "cell": 1.0})
    monkeypatch.setitem(point_contract.CASES, "acme_columns", case)
    test = getattr(point_contract, law)
    for training in (True, False):
        test(*(["acme_columns", training] if "training" in test.__code__.co_varnames[:2] else ["acme_columns"]))


@pytest.mark.parametrize(
    "law",
    [
        "test_a_cell_looks_at_the_pixels_around_its_offset_in_images_of_any_size",
        "test_images_of_several_sizes_share_a_batch",
        "test_every_trainable_weight_gets_a_gradient_through_the_method",
    ],
)
def test_a_foreign_image_backbone_is_held_to_the_laws(acme, monkeypatch, law):
    monkeypatch.setitem(image_contract.FAMILIES, "acme", {"name": "acme_patches", "model_args": {"width": 12}})
    monkeypatch.setitem(image_contract.OFFSETS, "acme", 5.5)
    if law.endswith("method"):  # small images are the helpers' own
        monkeypatch.setitem(image_contract.FAMILIES["acme"], "norm", "sync_bn")
    getattr(image_contract, law)("acme")


def test_a_foreign_assignment_is_held_to_the_contract(acme):
    for sizes in ((30, 30), (12, 40), (40, 12), (1, 5)):
        part_contract.test_pairs_are_rows_of_both_sets("acme_by_range", sizes)
    part_contract.test_empty_sets_give_no_pair("acme_by_range")
    part_contract.test_equal_sets_are_matched_to_themselves("acme_by_range")
    part_contract.test_a_ragged_batch_is_matched_frame_by_frame_within_the_gate_without_gradient("acme_by_range")


def image_encoder(map: int = -1, **block) -> ImageEncoder:
    block = {"name": "acme_patches", "map": map, **block}
    return ImageEncoder(parse_block("image_encoder", ImageEncoderConfig, block))


def test_the_keys_of_the_block_hold_for_a_foreign_image_backbone(acme, tmp_path):
    frozen = image_encoder(frozen_stages=1).train()
    trained = {name for name, parameter in frozen.trunk.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith("stage.") for name in trained)
    assert not frozen.trunk.stem[1].training
    assert frozen.trunk.stage[1].training
    assert not image_encoder(norm="frozen").train().trunk.stage[1].training
    fine = image_encoder(map=6)
    assert all(name.startswith("stage.") for name in fine.untrained)
    assert fine(torch.zeros(1, 3, 20, 30))[-1].features.shape == (1, 8, 4, 6)
    neck = image_encoder(map=6, neck="top_down", neck_channels=5)
    assert neck(torch.zeros(2, 3, 20, 30))[-1].features.shape == (2, 5, 4, 6)
    assert neck(torch.zeros(0, 3, 24, 36))[-1].features.shape == (0, 5, 4, 6)
    torch.save(frozen.trunk.state_dict(), tmp_path / "w.pth")
    again = image_encoder(pretrained=str(tmp_path / "w.pth"))
    assert torch.equal(again.trunk.stem[0].weight, frozen.trunk.stem[0].weight)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"model_args": {"widht": 4}}, r"image_encoder\.model_args\.widht: no such key; did you mean width"),
        ({"output_stride": 8}, "image_encoder.output_stride: acme_patches ends at stride 12"),
        ({"gradient_checkpointing": True}, "image_encoder.gradient_checkpointing: acme_patches has none"),
        ({"name": "acme_patch"}, "and no plugin registered one; did you mean acme_patches"),
        ({"frozen_stages": 3}, "frozen_stages: only 2 levels of acme_patches"),
    ],
)
def test_wrong_keys_of_a_foreign_image_backbone_are_named(acme, block, words):
    with pytest.raises(UserError, match=words):
        image_encoder(**block)


def test_a_backbone_that_is_not_as_it_says_is_refused(acme):
    entry = IMAGE_BACKBONES["acme_patches"]

    class Wrong(entry.target):
        def __init__(self, config):
            super().__init__(config)
            self.levels = (self.levels[0], self.levels[1]._replace(channels=99))

    IMAGE_BACKBONES.register("acme_wrong", config=entry.config)(Wrong)
    with pytest.raises(UserError, match=r"acme_wrong says that level 1 is \(1, 99, 2, 4\).*gives \(1, 16, 2, 4\)"):
        image_encoder(name="acme_wrong")
    IMAGE_BACKBONES.register("acme_silent", config=entry.config)(lambda config: torch.nn.Conv2d(3, 3, 1))
    with pytest.raises(UserError, match=r"gives no feature maps|must have levels"):
        image_encoder(name="acme_silent")
    IMAGE_BACKBONES.register("resnet18", config=entry.config)(entry.target)
    with pytest.raises(UserError, match="resnet18 is a timm architecture and a registered backbone; rename"):
        image_encoder(name="resnet18")


# ------------------------------------------------------------------------------------------------------- bad plugins

TAKEN = """
from simipu3d.config import PartConfig
from simipu3d.registry import POINT_ENCODERS
@POINT_ENCODERS.register("pointnet2_msg", config=PartConfig)
class Mine: pass
"""
TAKEN_TIMM = """
from simipu3d.compat import import_timm
@import_timm().models.register_model
def resnet18(pretrained=False, **kwargs): pass
"""


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("1 / 0", r"fails on import \(ZeroDivisionError: division by zero\)"),
        ("def broken(:", r"fails on import \(SyntaxError"),
        ("import sys; sys.exit('no licence')", r"fails on import \(SystemExit: no licence\)"),
        ("import strange_absent.deep", "needs the module strange_absent, which is not installed"),
        ("from simipu3d.registry import NOTHING", r"fails on import \(ImportError: cannot import name 'NOTHING'"),
        (TAKEN, r"fails on import \(ValueError: the point encoder 'pointnet2_msg' is registered twice"),
        (TAKEN_TIMM, r"fails on import \(UserWarning: Overwriting resnet18 in registry"),
    ],
)
def test_a_plugin_that_fails_is_one_line_that_names_it(fresh, tmp_path, monkeypatch, source, words):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange_one.py").write_text(source)
    with pytest.raises(UserError, match=rf"a.yaml: plugins: strange_one: .*{words}"):
        load_plugins(["strange_one"], "a.yaml: plugins")
    assert "strange_one" not in plugins._loaded
    with pytest.raises(UserError, match="strange_one"):
        require_plugins(["strange_one"], "x.ckpt")


@pytest.mark.parametrize("value", ["acme", [1], {"a": 1}, [""], ["a b"], ["os; boom"], ["../evil"], [".relative"]])
def test_plugins_are_a_list_of_module_names(fresh, tmp_path, value):
    cfg = write(tmp_path / "a.yaml", {**BASE, "plugins": value})
    with pytest.raises(UserError, match=r"a.yaml: plugins: expected a list of module names, like \[my_package\]"):
        load_settings(cfg)
    with pytest.raises(UserError, match=r"c\.ckpt: plugins: expected a list"):
        require_plugins(value, "c.ckpt")


def test_a_missing_plugin_says_how_to_give_it(fresh, tmp_path):
    for name in ("strange_missing", "strange_missing.inner", "simipu3d.strange"):
        with pytest.raises(UserError, match=rf"plugins: {name}: no such module; install its package, or .* PYTHONPATH"):
            load_settings(write(tmp_path / "a.yaml", {**BASE, "plugins": [name]}))


def test_a_file_that_names_a_module_never_imports_it(fresh, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strange_marker.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"was made with the plugin strange_marker.*if you trust it"):
        parse_settings({**BASE, "plugins": ["strange_marker"]}, "some.ckpt")
    assert not (tmp_path / "ran").exists()
    load_plugins(["strange_marker"], "the user")
    assert (tmp_path / "ran").exists()
    assert require_plugins(["strange_marker"], "some.ckpt") == ("strange_marker",)


def test_names_of_parts_show_which_plugin_is_behind(acme):
    assert plugins.plugins_behind({"point_encoder": {"name": "acme_columns"}, "list": [1, None]}) == ["acme_parts"]
    assert plugins.plugins_behind({"point_encoder": {"name": "pointnet2_msg"}}) == []
    assert "acme_columns" in POINT_ENCODERS.names()


# ------------------------------------------------------------------------------------------- entry points, document

INSTALLED = """
import sys
from simipu3d.engine.settings import load_settings, parse_settings
from simipu3d.tools.pretrain import main
config = load_settings(sys.argv[1])
assert config.plugins == (), config.plugins
assert config.to_plain()["plugins"] == ["acme_parts"], config.to_plain()["plugins"]
assert parse_settings(config.to_plain(), "a checkpoint").plugins == ("acme_parts",)
assert "plugins" not in load_settings("configs/simipu/kitti.yaml").to_plain()
sys.path.insert(0, sys.argv[2])
sys.exit(main(["--cfg", sys.argv[1], "--out", "never"]))
"""


def installed(folder: Path, name: str, value: str) -> Path:
    """A folder that holds what an installer writes about a package with one entry point."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[simipu3d.plugins]\nparts = {value}\n")
    return folder


def test_an_installed_plugin_is_found_by_its_entry_point(tmp_path):
    """In a process of its own; then with a second package whose entry point leads nowhere."""
    good = installed(tmp_path / "good", "acme_parts", "acme_parts")
    bad = installed(tmp_path / "bad", "strange", "strange_nowhere")
    cfg = write(tmp_path / "a.yaml", {key: value for key, value in BASE.items() if key != "plugins"})
    environment = {**os.environ, "PYTHONPATH": f"{good}{os.pathsep}{EXAMPLE}"}
    result = subprocess.run(
        [sys.executable, "-c", INSTALLED, str(cfg), str(bad)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 2, result.stderr
    wanted = "error: plugin strange_nowhere (entry point 'parts' of the installed package strange): no such module"
    assert wanted in result.stderr.splitlines()[-1]


def test_the_example_declares_the_entry_point_that_the_test_pretends():
    text = (EXAMPLE / "pyproject.toml").read_text()
    assert f'[project.entry-points."{plugins.GROUP}"]\nacme = "acme_parts"' in text


def test_the_document_s_example_runs(fresh, tmp_path, monkeypatch):
    """The Python and the YAML block of docs/plugins.md, as they stand there."""
    (python,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_parts.py").write_text(python)
    (tmp_path / "mine.yaml").write_text(text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sets = ["data.num_frames=4", "data.batch_size=2", "trainer.max_steps=2", "trainer.accelerator=cpu"]
    out = pretrain(tmp_path / "mine.yaml", [*sets, "run.pictures_every_steps=0"], out=tmp_path / "run")
    own = read_checkpoint(out / "checkpoints" / "last.ckpt")["simipu3d"]
    assert own["global_step"] == 2
    assert own["config"]["plugins"] == ["my_parts"]
    assert own["config"]["point_encoder"] == {"name": "my_cells", "cell": 2.0}
