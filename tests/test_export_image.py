"""An exported image backbone computes in the target what it computed in pre-training, or there is no file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from simipu3d.compat import import_timm, import_torchvision
from simipu3d.config import parse_block, to_plain
from simipu3d.encoders.image import BatchNorm, ImageEncoder, ImageEncoderConfig
from simipu3d.errors import UserError
from simipu3d.export.image import convert, targets
from simipu3d.export.image.verify import ExportError
from simipu3d.export.image.write import export_image
from simipu3d.tools.export import main

RELEASED = {"bn_eps": 1e-3, "bn_momentum": 0.01, "input": "caffe_bgr", "norm": "sync_bn"}
HALF = {"name": "resnet18", "model_args": {"channels": [32, 64, 128, 256]}}


def write_checkpoint(path: Path, map=-1, **block) -> ImageEncoder:
    """A checkpoint as a run writes it, with random weights and BatchNorm statistics (some variances small)."""
    config = parse_block("image_encoder", ImageEncoderConfig, {"map": map, **block})
    encoder = ImageEncoder(config).eval()
    for module in encoder.modules():
        if isinstance(module, BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.005, 2.0)
            module.num_batches_tracked.fill_(7)
    state = {f"method.image_encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {"method.point_encoder.weight": torch.zeros(3), "method.inter_image_head.weight": torch.zeros(3)}
    resolved = {"method": "simipu", "image_encoder": to_plain(config), "matching": {}}
    resolved["data"] = {"name": "kitti", "split": "train"}
    run = {
        "config": resolved,
        "version": "0.1.0",
        "git_commit": "abc",
        "epoch": 3,
        "global_step": 30,
        "method": "simipu",
    }
    torch.save({"state_dict": state, "simipu3d": run, "optimizer_states": []}, path)
    return encoder


def picture():
    return torch.randint(0, 256, (1, 3, 75, 107), dtype=torch.uint8)


def trained_features(encoder, image):
    with torch.no_grad():
        return [m.features for m in encoder(encoder.normalise(image, torch.tensor([image.shape[2:]])))]


def imagenet(image):
    """torchvision's transform, written once more."""
    transforms = import_torchvision().transforms
    return transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))(image.float() / 255)


def torchvision_stages(network, x):
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    maps = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        x = stage(x)
        maps.append(x)
    return maps


def assert_same(given, wanted):
    assert len(given) == len(wanted)
    for one, other in zip(given, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A ResNet-50 trained as the released code does: BGR, std 1, eps 1e-3."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    return path, write_checkpoint(path, name="resnet50", **RELEASED)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    return path, write_checkpoint(path, name="resnet18", **RELEASED)


# ------------------------------------------------------------------------------------------------- what arrives where


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_resnet_goes_into_torchvision_without_a_missing_or_unknown_name(released, small, tmp_path, suffix):
    (ckpt, encoder), name, count = (released, "resnet50", 318) if suffix == ".pth" else (small, "resnet18", 120)
    out = tmp_path / f"{name}{suffix}"
    report = export_image(ckpt, "torchvision", out)
    state = torch.load(out, weights_only=True) if suffix == ".pth" else load_file(out)
    network = getattr(import_torchvision().models, name)(weights=None).eval()
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    assert len(state) == count == report.meta["tensors"]
    image = picture()
    with torch.no_grad():
        assert_same(torchvision_stages(network, imagenet(image)), trained_features(encoder, image)[1:])
    meta = json.loads((tmp_path / f"{out.name}.json").read_text())
    assert meta == json.loads(json.dumps(report.meta))
    assert meta["verification"]["largest_relative_difference"] < 1e-4
    assert len(meta["conversions"]) == 2


def test_resnet50_goes_into_timm_as_a_folder(released, tmp_path):
    ckpt, encoder = released
    export_image(ckpt, "timm", tmp_path / "hub")
    timm = import_timm()
    name = f"local-dir:{tmp_path / 'hub'}"
    image = picture()
    wanted = trained_features(encoder, image)
    network = timm.create_model(name, pretrained=True, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    with torch.no_grad():
        assert_same(network(imagenet(image)), wanted[1:])
        plain = timm.create_model(name, pretrained=True).eval()
        assert_same([plain.forward_features(imagenet(image))], wanted[-1:])
    assert len(plain.state_dict()) == 318
    assert plain.pretrained_cfg["tag"] == "simipu3d"
    assert timm.create_model(name, pretrained=True, num_classes=7).fc.out_features == 7
    by_path = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(tmp_path / "hub" / "model.safetensors"))
    assert torch.equal(by_path.state_dict()["layer4.2.bn3.running_var"], plain.state_dict()["layer4.2.bn3.running_var"])
    assert "non-commercial" in (tmp_path / "hub" / "README.md").read_text()


def test_half_width_resnet_goes_into_timm_by_its_arguments_and_nowhere_else(tmp_path):
    ckpt = tmp_path / "last.ckpt"
    encoder = write_checkpoint(ckpt, map=8, output_stride=8, **HALF)
    report = export_image(ckpt, "timm", tmp_path / "half")
    timm = import_timm()
    image = picture()
    network = timm.create_model(
        f"local-dir:{tmp_path / 'half'}", pretrained=True, features_only=True, out_indices=(1, 2, 3, 4), output_stride=8
    ).eval()
    with torch.no_grad():
        assert_same(network(imagenet(image)), trained_features(encoder, image)[1:])
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["model_args"] == HALF["model_args"]
    assert config["num_features"] == 256
    assert "output_stride=8" in report.summary()
    by_hand = timm.create_model("resnet18", num_classes=0, **HALF["model_args"])
    by_hand.load_state_dict(load_file(tmp_path / "half" / "model.safetensors"))
    for target in ("torchvision", "mmdet3d"):
        with pytest.raises(UserError, match=r"not the standard one.*--to timm"):
            export_image(ckpt, target, tmp_path / "x.pth")


@pytest.mark.parametrize(("prefix", "convention"), [(None, "imagenet_rgb"), ("backbone.", "caffe_bgr")])
def test_mmdet3d_reads_its_prefix_and_its_normalisation(small, tmp_path, prefix, convention):
    ckpt, encoder = small
    out = tmp_path / "small.pth"
    report = export_image(ckpt, "mmdet3d", out, prefix=prefix, input=convention)
    prefix = prefix or "img_backbone."
    content = torch.load(out, weights_only=True)
    assert set(content) == {"meta", "state_dict"}
    assert all(name.startswith(prefix) for name in content["state_dict"])
    network = import_torchvision().models.resnet18(weights=None).eval()
    state = {name.removeprefix(prefix): value for name, value in content["state_dict"].items()}
    assert network.load_state_dict(state, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    image = picture()
    bgr = image.float().flip(1) - torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    given = imagenet(image) if convention == "imagenet_rgb" else bgr
    with torch.no_grad():
        assert_same(torchvision_stages(network, given), trained_features(encoder, image)[1:])
    assert prefix in report.summary()
    assert content["meta"]["config"]["image_encoder"]["name"] == "resnet18"


def test_openpcdet_file_suits_caddn_and_focals(released, tmp_path):
    """CaDDN drops a classifier of another size and then loads strictly; Focals Conv wants 21 rows or none."""
    ckpt, encoder = released
    out = tmp_path / "both.pth"
    report = export_image(ckpt, "openpcdet", out)
    state = torch.load(out, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert len(state) == 320
    segmentation = import_torchvision().models.segmentation
    caddn = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=81)
    assert state["classifier.4.weight"].shape[0] != 81
    backbone = {name: value for name, value in state.items() if not name.startswith("classifier.4.")}
    caddn.load_state_dict({**caddn.state_dict(), **backbone}, strict=True)
    focals = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21).eval()
    assert focals.load_state_dict(state, strict=False).unexpected_keys == []
    image = picture()
    with torch.no_grad():
        x = focals.backbone.maxpool(focals.backbone.relu(focals.backbone.bn1(focals.backbone.conv1(imagenet(image)))))
        first = focals.backbone.layer1(x)
        assert_same([first, focals.backbone.layer2(first)], trained_features(encoder, image)[1:3])
    assert "IMG_PRETRAIN" in report.summary()
    assert "pretrained_path" in report.summary()


def test_openpcdet_whole_detector_parts_carry_the_prefix(small, tmp_path):
    ckpt, _ = small
    report = export_image(ckpt, "openpcdet", tmp_path / "part.pth", prefix="image_backbone.")
    content = torch.load(tmp_path / "part.pth", weights_only=True)
    assert isinstance(content["version"], str)
    assert content["meta"]["tensors"] == len(content["model_state"]) == 120
    assert all(name.startswith("image_backbone.") for name in content["model_state"])
    assert "--pretrained_model" in report.summary()
    assert "normalises" in report.summary()


@pytest.mark.parametrize(
    ("block", "map"),
    [
        ({"name": "convnext_atto", "input": "caffe_bgr"}, 16),
        ({"name": "vit_tiny_patch16_224", "input": "caffe_bgr"}, -1),
        ({"name": "swin_tiny_patch4_window7_224", "model_args": {"depths": [2, 2, 2, 2]}}, 8),
        ({"name": "vit_small_patch14_dinov2", "model_args": {"depth": 2, "img_size": 70}}, -1),
        ({"name": "tf_efficientnet_b0", "bn_eps": 0.01}, -1),
        ({"name": "resnet18", "neck": "top_down", "output_stride": 16, "frozen_stages": 1}, 8),
    ],
)
def test_every_timm_backbone_goes_back_into_timm(tmp_path, block, map):
    ckpt = tmp_path / "last.ckpt"
    encoder = write_checkpoint(ckpt, map=map, **block)
    meta = export_image(ckpt, "timm", tmp_path / "hub").meta
    assert meta["untrained"] == list(encoder.untrained)
    assert [name for name in meta["dropped"] if name.startswith("neck.")] == [
        name for name in encoder.state_dict() if name.startswith("neck.")
    ]
    network = import_timm().create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    for name, value in encoder.trunk.state_dict().items():
        if "running_var" not in name and "patch_embed.proj" not in name and "stem.0" not in name:
            assert torch.equal(network.state_dict()[name], value), name


def test_stages_that_never_ran_are_left_out_and_listed(tmp_path):
    write_checkpoint(tmp_path / "last.ckpt", map=8, name="resnet18")
    report = export_image(tmp_path / "last.ckpt", "torchvision", tmp_path / "short.pth")
    state = torch.load(tmp_path / "short.pth", weights_only=True)
    assert len(state) == 60
    assert not any(name.startswith(("layer3", "layer4")) for name in state)
    assert len(report.meta["untrained"]) == 60
    assert "not in the file" in report.summary()


def test_an_older_run_that_has_the_map_in_its_matching_block_still_exports(tmp_path):
    write_checkpoint(tmp_path / "new.ckpt", map=8, name="resnet18")
    content = torch.load(tmp_path / "new.ckpt", weights_only=True)
    config = content["simipu3d"]["config"]
    config["matching"] = {"map": config["image_encoder"].pop("map")}
    torch.save(content, tmp_path / "old.ckpt")
    states = []
    for age in ("new", "old"):
        export_image(tmp_path / f"{age}.ckpt", "torchvision", tmp_path / f"{age}.pth")
        states.append(torch.load(tmp_path / f"{age}.pth", weights_only=True))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_dilated_training_exports_the_same_weights(tmp_path):
    encoder = write_checkpoint(tmp_path / "last.ckpt", map=8, name="resnet18", output_stride=8)
    report = export_image(tmp_path / "last.ckpt", "torchvision", tmp_path / "d.pth")
    state = torch.load(tmp_path / "d.pth", weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in encoder.trunk.state_dict().items())
    assert report.meta["architecture"]["output_stride_trained"] == 8
    assert "without dilation" in report.summary()


def test_a_text_beside_the_file_says_how_to_load_it(small, tmp_path):
    report = export_image(small[0], "torchvision", tmp_path / "x.pth")
    text = (tmp_path / "x.pth.txt").read_text()
    assert all(line in text for line in report.usage)
    assert "non-commercial" in text
    assert "epoch 3, step 30" in text


# ----------------------------------------------------------------------------------------------------- what is caught


def no_colour_swap(state, first_conv, source, target):
    folded = ORIGINAL_FOLD(state, first_conv, source, target)
    return {**folded, "conv1.weight": folded["conv1.weight"].flip(1)}


ORIGINAL_FOLD = convert.fold_input
ORIGINAL_COPY = convert.plain_copy


def without(name):
    def copy(state):
        return {key: value for key, value in ORIGINAL_COPY(state).items() if key != name}

    return copy


def transposed(state):
    copies = ORIGINAL_COPY(state)
    name = "layer4.1.conv2.weight"
    return {**copies, name: copies[name].transpose(2, 3).contiguous()}


def fresh_statistics(state):
    copies = ORIGINAL_COPY(state)
    return {name: torch.ones_like(v) if name == "layer2.0.bn1.running_var" else v for name, v in copies.items()}


FAULTS = {
    "swapped colours": (convert, "fold_input", no_colour_swap),
    "input not folded": (convert, "fold_input", lambda state, *_: state),
    "eps not folded": (convert, "fold_eps", lambda state, *_: state),
    "missing buffer": (convert, "plain_copy", without("layer3.1.bn1.running_mean")),
    "fresh buffer": (convert, "plain_copy", fresh_statistics),
    "transposed kernel": (convert, "plain_copy", transposed),
    "wrong prefix": (targets, "add_prefix", lambda state, _: {f"bakbone.{n}": v for n, v in state.items()}),
}
OUTPUTS = {"torchvision": "x.pth", "timm": "hub", "mmdet3d": "x.pth", "openpcdet": "x.pth"}


PREFIXED = ("mmdet3d", "openpcdet")
BROKEN = [(fault, to) for to in OUTPUTS for fault in FAULTS if fault != "wrong prefix" or to in PREFIXED]


@pytest.mark.parametrize(("fault", "target"), BROKEN)
def test_a_broken_conversion_leaves_no_file(small, tmp_path, monkeypatch, capsys, fault, target):
    monkeypatch.setattr(*FAULTS[fault])
    prefix = ["--prefix", "image_backbone."] if target == "openpcdet" else []
    out = tmp_path / OUTPUTS[target]
    arguments = ["--ckpt", str(small[0]), "--branch", "image", "--to", target, "--out", str(out), *prefix]
    assert main(arguments) == 2
    assert "error: the export failed its check" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_keeps_what_was_there(small, tmp_path, monkeypatch):
    out = tmp_path / "x.pth"
    export_image(small[0], "torchvision", out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(*FAULTS["eps not folded"])
    with pytest.raises(ExportError):
        export_image(small[0], "torchvision", out, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --------------------------------------------------------------------------------------------------- the command line


def test_command_line_says_what_was_written_and_overwrites_only_when_told(small, tmp_path, capsys):
    out = tmp_path / "hub"
    arguments = ["--ckpt", str(small[0]), "--branch", "image", "--to", "timm", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    folds = ("caffe_bgr -> imagenet_rgb", "0.001 -> 1e-05")
    for fact in ("timm folder", "120", "local-dir:", *folds, "left out: inter_image_head"):
        assert fact in printed, fact
    assert main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "metadata.json",
        "model.safetensors",
    ]


def test_metadata_is_plain_and_complete(small, tmp_path):
    meta = export_image(small[0], "torchvision", tmp_path / "x.safetensors").meta
    wanted = """format_version kind target target_version_checked created simipu3d_version git_commit git_dirty
        source_checkpoint method config config_sha256 datasets licence architecture input conversions weight_layout
        dropped untrained tensors tensors_sha256 verification"""
    assert set(wanted.split()) <= set(meta)
    assert json.loads(json.dumps(meta)) == meta
    assert meta["dropped"] == ["inter_image_head.*", "point_encoder.*"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "detectron"}, "no such target for images; there are openpcdet, mmdet3d, torchvision, timm"),
        ({"target": "mmdet3d", "convert_weights": True}, "is for a Swin"),
        ({"target": "torchvision", "out": "x.onnx"}, "reads .pth"),
        ({"target": "timm", "out": "x.pth"}, "gets a folder"),
        ({"target": "torchvision", "prefix": "backbone."}, "knows no prefixes"),
        ({"target": "mmdet3d", "prefix": "backbone"}, "with a dot"),
        ({"target": "openpcdet", "prefix": "backbone."}, "CaDDN"),
        ({"target": "openpcdet"}, "takes resnet50, resnet101"),
        ({"target": "torchvision", "input": "caffe_bgr"}, "--input caffe_bgr"),
        ({"target": "torchvision", "out": "file/x.pth"}, "cannot be written"),
    ],
)
def test_options_that_do_not_fit_are_refused(small, tmp_path, options, message):
    (tmp_path / "file").write_text("")
    out = tmp_path / options.pop("out", "x.pth")
    with pytest.raises(UserError, match=message):
        export_image(small[0], options.pop("target"), out, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def spoil(content, how):
    state, run = content["state_dict"], content["simipu3d"]
    conv = "method.image_encoder.trunk.conv1.weight"
    if how == "not ours":
        return {"state_dict": state}
    if how == "no image":
        content["state_dict"] = {name: v for name, v in state.items() if "image_encoder" not in name}
    if how == "missing":
        del state[conv]
    if how == "surplus":
        state["method.image_encoder.trunk.layer5.weight"] = torch.zeros(3)
    if how == "shape":
        state[conv] = torch.zeros(1)
    if how == "nan":
        state[conv] = state[conv] * float("nan")
    if how == "key":
        run["config"]["image_encoder"]["nme"] = "x"
    return content


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("not ours", "not a checkpoint"),
        ("no image", "no image branch"),
        ("missing", r"missing: trunk\.conv1\.weight"),
        ("surplus", r"surplus: trunk\.layer5\.weight"),
        ("shape", "shapes differ"),
        ("nan", "NaN"),
        ("key", r"image_encoder\.nme"),
    ],
)
def test_checkpoints_that_cannot_be_used_are_refused(small, tmp_path, how, message):
    torch.save(spoil(torch.load(small[0], weights_only=True), how), tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=message):
        export_image(tmp_path / "bad.ckpt", "torchvision", tmp_path / "x.pth")


def test_missing_and_damaged_checkpoints_are_refused(small, tmp_path):
    with pytest.raises(UserError, match="no such"):
        export_image(tmp_path / "none.ckpt", "torchvision", tmp_path / "x.pth")
    whole = Path(small[0]).read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        export_image(tmp_path / "half.ckpt", "torchvision", tmp_path / "x.pth")


def test_a_variance_too_small_for_the_fold_is_refused(tmp_path):
    state = {"bn.running_var": torch.tensor([1e-6, 1.0])}
    with pytest.raises(UserError, match="too small"):
        convert.fold_eps(state, {"bn": 1e-5}, {"bn": 1e-3})
