"""The demonstration from its command line to its files, on frames small enough for a test."""

import json

import pytest
import yaml
from helpers import BLOCKS

from simipu3d.probe.report import report_run
from simipu3d.tools.demo import main


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    data = {
        "name": "drive_world",
        "root": str(folder / "frames"),
        "num_frames": 8,
        "image_size": [32, 64],
        "beams": 16,
        "azimuth_step_deg": 2.0,
        "batch_size": 4,
        "num_workers": 0,
    }
    augment = {"points": {"num_points": 64}}
    trainer = {"max_steps": 2, "accelerator": "cpu"}
    raw = {"method": "simipu", "data": data, "augment": augment, **BLOCKS, "trainer": trainer}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(raw))
    assert main(["--cfg", str(folder / "tiny.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_it_leaves_numbers_a_page_and_a_backbone_that_loads(demo):
    from simipu3d.compat import import_timm

    numbers = json.loads((demo / "demo.json").read_text())
    assert set(numbers["probe"]["values"]) == {"row mean", "random initialisation", "after pre-training"}
    assert set(numbers["tasks"]) == {"intra", "inter"}
    for task in numbers["tasks"].values():
        assert 0 <= task["top1"] <= 1
        assert 0 < task["chance"] < 0.1
        assert 0 < task["loss"] < 2 * task["ceiling"]
    assert (demo / "demo.png").stat().st_size > 10_000
    backbone = import_timm().create_model(f"local-dir:{demo / 'backbone_timm'}", pretrained=True, num_classes=0)
    assert backbone.num_features == 20


def test_a_report_repeats(demo):
    small = {"num_labelled": 8, "num_held_out": 8, "num_labels": 4}
    one, two = report_run(demo, **small), report_run(demo, **small)
    assert one.table.as_dict() == two.table.as_dict()
    assert one.tasks == two.tasks
    assert (one.picture == two.picture).all()
