"""Every shipped configuration is loaded, built, and means what its comments say."""

import subprocess
import sys
from pathlib import Path

import pytest

from simipu3d.config import changed_keys
from simipu3d.contracts.method import DataInfo
from simipu3d.data.config import DataConfig
from simipu3d.engine.pretrain import build_method
from simipu3d.engine.settings import load_settings, parse_settings
from simipu3d.registry import READERS

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_read_resolved_and_built(path):
    config = load_settings(path)
    resolved = config.to_plain()
    assert parse_settings(resolved, "resolved").to_plain() == resolved
    assert isinstance(config.data, DataConfig)
    method = build_method(config, DataInfo(READERS[config.data.name].target.point_columns))
    assert any(parameter.requires_grad for parameter in method.parameters())


def test_the_released_recipe_differs_from_the_corrected_one_in_these_switches_only():
    kitti, released = (load_settings(f"configs/simipu/{name}.yaml") for name in ("kitti", "kitti_released"))
    assert set(changed_keys(kitti.to_plain(), released.to_plain())) == {
        "data.split",
        "augment.points.point_draw",
        "augment.points.scale_centre",
        "augment.points.too_few",
        "augment.joint_flip",
        "point_encoder.use_xyz",
        "point_encoder.ffps_range",
        "image_encoder.input",
        "image_encoder.norm",
        "image_encoder.bn_eps",
        "image_encoder.bn_momentum",
        "image_encoder.init",
        "matching.grid",
        "matching.invisible",
        "contrast.inter_detach",
        "contrast.mask_duplicates",
        "optim.points.decay_norm_and_bias",
        "optim.image.decay_norm_and_bias",
        "optim.heads.decay_norm_and_bias",
        "trainer.max_epochs",
    }


@pytest.mark.parametrize(
    "encoder",
    ["pillar", "pointnet2_msg", "pointnet2_ssg", "sparse_unet34", "voxel_backbone8x", "voxel_res_backbone8x"],
)
def test_an_encoder_is_swapped_by_one_word(encoder):
    config = load_settings("configs/simipu/kitti.yaml", [f"point_encoder.name={encoder}"])
    method = build_method(config, DataInfo())
    assert type(method.point_encoder).__module__.startswith("simipu3d.encoders")
    assert config.blocks.point_encoder.name == encoder


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name == "image_encoders"], ids=lambda path: path.stem
)
def test_an_image_encoder_configuration_changes_the_image_branch_only(path):
    kitti, mine = (load_settings(p).to_plain() for p in (Path("configs/simipu/kitti.yaml"), path))
    assert mine["image_encoder"]["name"].startswith(path.stem.split("_")[0])
    changed = {
        ".".join(key.split(".")[:2]) for key in changed_keys(kitti, mine) if key != "augment.images.pad_multiple"
    }
    assert {key for key in changed if not key.startswith("image_encoder.")} == {"optim.image"}


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.parent.name == "encoders"], ids=lambda path: path.stem
)
def test_an_encoder_configuration_changes_the_encoder_only(path):
    """The file is called after the encoder (and its size), and resolves to the corrected recipe in everything else."""
    kitti, mine = (load_settings(p).to_plain() for p in (Path("configs/simipu/kitti.yaml"), path))
    assert path.stem.removesuffix("_light") == mine["point_encoder"]["name"]
    assert path.stem.endswith("_light") == (mine["point_encoder"].get("size") == "light")
    assert {key.partition(".")[0] for key in changed_keys(kitti, mine)} <= {"point_encoder"}


@pytest.mark.parametrize("name", ["nuscenes", "waymo"])
def test_another_data_set_changes_the_data_only(name):
    kitti, mine = (load_settings(f"configs/simipu/{file}.yaml").to_plain() for file in ("kitti", name))
    assert mine["data"]["name"] == name
    changed = {key for key in changed_keys(kitti, mine) if not key.startswith("data.")}
    assert changed <= {f"augment.images.{key}" for key in ("resize", "resize_factor", "long_edge", "short_edge")}


def test_repeated_lines_are_few():
    """A configuration is a delta over its base and the models' defaults: blocks of four lines that stand in two places are
    under 8 % of all lines."""
    lines = {path: [line.split(" #")[0].rstrip() for line in path.read_text().splitlines()] for path in CONFIGS}
    lines = {path: [line for line in own if line and not line.lstrip().startswith("#")] for path, own in lines.items()}
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = {}
    for path, own in lines.items():
        for first in range(len(own) - 3):
            places.setdefault(tuple(own[first : first + 4]), []).append((path, first))
    repeated = {
        (path, first + more)
        for found in places.values()
        if len(found) > 1
        for path, first in found
        for more in range(4)
    }
    assert len(repeated) < 0.08 * sum(map(len, lines.values())), sorted(repeated)


def test_the_documented_keys_are_those_of_the_models():
    """In a process of its own: a plugin that another test loaded has keys too."""
    code = "import simipu3d.engine.keys as keys; print(keys.as_markdown(), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    written = Path(__file__).parents[1] / "docs" / "configuration.md"
    assert written.read_text() == done.stdout, "simipu3d keys --write docs/configuration.md"


def test_the_released_networks_have_their_size():
    """Sizes of the authors' checkpoint: PointNet++ 1,778,432, point heads 2 x 2,234,752, image head 8,663,424, ResNet-50
    trunk 23,508,032."""
    method = build_method(load_settings("configs/simipu/kitti_released.yaml"), DataInfo())
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in method.named_children()}
    assert sizes == {
        "point_encoder": 1_778_432,
        "intra_head": 2_234_752,
        "image_encoder": 23_508_032,
        "inter_point_head": 2_234_752,
        "inter_image_head": 8_663_424,
    }
