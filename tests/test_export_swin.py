"""A Swin trained here computes the same in mmdetection and in OpenPCDet's BEVFusion, as far as they compute alike."""

import pytest
import torch
from test_export_image import write_checkpoint

from simipu3d.errors import UserError
from simipu3d.export.image import convert, swin
from simipu3d.export.image.write import export_image

SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "input": "caffe_bgr",
    "model_args": {"depths": [2, 2, 2, 2], "embed_dim": 24, "num_heads": [1, 2, 3, 6], "always_partition": True},
}
SWIN_FORMS = {
    "mmdet3d": ({}, "state_dict", "backbone.stages.0.blocks.1.attn.w_msa.qkv.weight"),
    "load_from": ({"prefix": "img_backbone."}, "state_dict", "img_backbone.stages.2.downsample.reduction.weight"),
    "openpcdet": ({}, "state_dict", "backbone.stages.3.blocks.0.ffn.layers.0.0.weight"),
    "whole": ({"prefix": "image_backbone."}, "model_state", "image_backbone.patch_embed.projection.weight"),
    "microsoft": ({"convert_weights": True}, "model", "layers.2.downsample.reduction.weight"),
}


@pytest.mark.parametrize("form", SWIN_FORMS)
def test_swin_goes_into_mmdetection_and_bevfusion(tmp_path, form):
    torch.manual_seed(3)
    write_checkpoint(tmp_path / "last.ckpt", **SWIN)
    options, key, name = SWIN_FORMS[form]
    target = "mmdet3d" if form in ("mmdet3d", "load_from") else "openpcdet"
    report = export_image(tmp_path / "last.ckpt", target, tmp_path / "x.pth", **options)
    state = torch.load(tmp_path / "x.pth", weights_only=True)[key]
    assert name in state
    assert len(state) == 119
    assert report.meta["verification"]["strides"] == [4, 8, 16, 32]
    assert ("CONVERT_WEIGHTS: True" in report.summary()) == (form == "microsoft")
    assert ("init_cfg" in report.summary()) == (form == "mmdet3d")


def test_swin_says_which_stage_the_target_computes_otherwise(tmp_path):
    args = {name: value for name, value in SWIN["model_args"].items() if name != "always_partition"}
    write_checkpoint(tmp_path / "last.ckpt", **{**SWIN, "model_args": args})
    report = export_image(tmp_path / "last.ckpt", "mmdet3d", tmp_path / "x.pth")
    assert report.meta["verification"]["strides"] == [4, 8, 16]
    assert "stage 4 there shifts windows" in report.summary()
    with pytest.raises(UserError, match="BEVFusion"):
        export_image(tmp_path / "last.ckpt", "openpcdet", tmp_path / "y.pth", prefix="vfe.ffn.ddn.model.backbone.")


SWIN_FAULTS = {
    "order of merged channels": ("unfold_order", lambda value: value),
    "stage of the merging": ("swin_mmdet", lambda name: ORIGINAL_SWIN(name).replace("stages.0.down", "stages.1.down")),
    "colours": None,
}
ORIGINAL_SWIN = swin.swin_mmdet


@pytest.mark.parametrize("fault", SWIN_FAULTS)
def test_a_broken_swin_leaves_no_file(tmp_path, monkeypatch, fault):
    write_checkpoint(tmp_path / "last.ckpt", **SWIN)
    if SWIN_FAULTS[fault]:
        monkeypatch.setattr(swin, *SWIN_FAULTS[fault])
    else:
        monkeypatch.setattr(convert, "fold_input", lambda state, *_: state)
    with pytest.raises(UserError):
        export_image(tmp_path / "last.ckpt", "mmdet3d", tmp_path / "x.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
