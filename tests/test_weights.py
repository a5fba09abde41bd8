"""Laws of weights from elsewhere: every wrapper is looked through, `--init` and `pretrained` give the same network, and a
first layer fits exactly or the file is refused."""

import argparse
import pickle

import numpy as np
import pytest
import torch
from exported import BALLS, RES, SHELLS, UNET, VOXEL, random_encoder, randomise
from helpers import make_view, random_scene
from safetensors.torch import save_file
from torch import nn

from simipu3d.config import parse_block
from simipu3d.encoders.image import ImageEncoder, ImageEncoderConfig
from simipu3d.errors import UserError
from simipu3d.export.image import verify
from simipu3d.weights.files import read_file
from simipu3d.weights.folding import CONVENTIONS, Pictures, fold_eps, fold_pictures
from simipu3d.weights.load import load_weights

TINY = {"name": "resnet18", "model_args": {"channels": [8, 16, 24, 32], "stem_width": 8}}
VIT = {"name": "vit_tiny_patch16_224", "model_args": {"depth": 2, "embed_dim": 24, "num_heads": 2}}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "model_args": {"depths": [2, 2, 2, 2], "embed_dim": 12, "num_heads": [1, 2, 2, 2]},
}


def image(block=TINY, **changes):
    return ImageEncoder(parse_block("image_encoder", ImageEncoderConfig, {**block, **changes})).eval()


class Pair(nn.Module):
    """A method whose encoders have names of their own."""

    def __init__(self, camera=None, lidar=None):
        super().__init__()
        self.inner = nn.ModuleDict({k: m for k, m in {"camera": camera, "lidar": lidar}.items() if m is not None})


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def features(encoder, seed=0):
    images, size = verify.fixed_pictures(encoder, (64, 96))
    with torch.no_grad():
        return encoder(encoder.normalise(images, size))[-1].features


def assert_alike(one, other):
    assert (one - other).abs().max() < 1e-4 * other.abs().max()


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(3)
    return randomise(image())


def save_run(path, encoder, block):
    run = {"config": {"image_encoder": block}, "method": "simipu", "global_step": 1}
    torch.save({"state_dict": under("method.image_encoder.", encoder.state_dict()), "simipu3d": run}, path)


def wrapped(state):
    """Real shapes of files, and the prefix or wrapper that is meant."""
    zero = {name: torch.zeros_like(value) for name, value in state.items()}
    return {
        "net": {"net": state, "acc": np.float64(0.5), "epoch": np.int64(3)},
        "ema_state_dict": {"ema_state_dict": under("module.", state), "epoch": 1},
        "state_dict and its average": {"state_dict": state, "state_dict_ema": zero},
        "DINO": {
            "student": under("module.backbone.", zero),
            "teacher": under("backbone.", state) | {"head.mlp.0.weight": torch.zeros(2, 2)},
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []},
            "args": argparse.Namespace(arch="x", lr=0.1),
        },
        "MoCo v2": {"state_dict": under("module.encoder_q.", state) | under("module.encoder_k.", zero)},
        "mmdetection": {"meta": {"epoch": 12}, "state_dict": under("backbone.", state)},
    }


@pytest.mark.parametrize(
    "form", ["net", "ema_state_dict", "state_dict and its average", "DINO", "MoCo v2", "mmdetection"]
)
def test_init_and_pretrained_read_the_same_files_alike(tmp_path, source, form):
    path = tmp_path / "x.pth"
    torch.save(wrapped(source.trunk.state_dict())[form], path)
    method = Pair(image())
    load_weights(method, path)
    given = image(pretrained=str(path))
    for name, value in source.trunk.state_dict().items():
        assert torch.equal(given.trunk.state_dict()[name], value), name
        assert torch.equal(method.inner["camera"].trunk.state_dict()[name], value), name


@pytest.mark.parametrize("form", ["run", "released", "stated"])
def test_pretrained_folds_as_init_does(tmp_path, form):
    """BGR pictures and eps 1e-3 of a run of ours, of the release, and of a flat file about which the user says so."""
    block = {**TINY, "bn_eps": 1e-3, "input": "caffe_bgr"}
    torch.manual_seed(4)
    trained, path, said = randomise(image(block)), tmp_path / "x.pth", {}
    if form == "run":
        save_run(path, trained, block)
    else:
        prefix = "img_backbone." if form == "released" else "backbone."
        state = under(prefix, trained.trunk.state_dict())
        if form == "released":
            state["mlp_cross_img.layer1.0.weight"] = torch.zeros(2, 2)
        else:
            said = {"weights": {"input": "caffe_bgr", "norm_eps": 1e-3}}
        torch.save({"state_dict": state}, path)
    assert_alike(features(image(pretrained=str(path), **said)), features(trained))
    method = Pair(image(**said))
    load_weights(method, path)
    assert_alike(features(method.inner["camera"]), features(trained))


def test_what_a_run_says_of_itself_counts_more_than_a_statement(tmp_path, caplog):
    block = {**TINY, "bn_eps": 1e-3, "input": "caffe_bgr"}
    torch.manual_seed(4)
    trained = randomise(image(block))
    save_run(tmp_path / "x.ckpt", trained, block)
    given = image(pretrained=str(tmp_path / "x.ckpt"), weights={"input": "imagenet_rgb", "norm_eps": 1e-5})
    assert_alike(features(given), features(trained))
    assert "says that its pictures were caffe_bgr; image_encoder.weights.input is not read" in caplog.text


def test_what_a_file_does_not_say_is_said_to_be_assumed(tmp_path, source, caplog):
    torch.save(under("backbone.", source.trunk.state_dict()), tmp_path / "x.pth")
    image(pretrained=str(tmp_path / "x.pth"))
    assert "does not say what its pictures were (taken as imagenet_rgb; mmdetection's caffe models" in caplog.text
    assert "its BatchNorm eps (taken as 1e-05)" in caplog.text
    caplog.clear()
    image(pretrained=str(tmp_path / "x.pth"), weights={"input": "imagenet_rgb", "norm_eps": 1e-5})
    assert "does not say" not in caplog.text


def test_a_stated_mean_and_std_are_folded_where_it_is_exact(tmp_path):
    """Patches do not overlap and are not padded: another mean goes into their bias. A padded convolution is refused."""
    weights = {"input": "imagenet_rgb", "mean": [0.5, 0.4, 0.3], "std": [0.5, 0.25, 0.2]}
    torch.manual_seed(5)
    trained = image(VIT)
    torch.save(trained.trunk.state_dict(), tmp_path / "x.pth")
    given = image(VIT, pretrained=str(tmp_path / "x.pth"), weights=weights)
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    by_hand = (images / 255 - torch.tensor(weights["mean"]).view(3, 1, 1)) / torch.tensor(weights["std"]).view(3, 1, 1)
    with torch.no_grad():
        wanted = trained(by_hand)[-1].features
        assert_alike(given(given.normalise(images, torch.tensor([[32, 48]])))[-1].features, wanted)
    torch.save(image().trunk.state_dict(), tmp_path / "y.pth")
    with pytest.raises(UserError, match="another mean"):
        image(pretrained=str(tmp_path / "y.pth"), weights=weights)
    with pytest.raises(UserError, match="set input as well"):
        image(weights={"mean": [0.5, 0.5, 0.5]})


def test_pictures_fold_there_and_back():
    state = {"c.weight": torch.randn(4, 3, 2, 2), "c.bias": torch.randn(4)}
    other = Pictures("BGR", (100.0, 110.0, 120.0), (50.0, 40.0, 30.0))
    there = fold_pictures(state, "c", CONVENTIONS["imagenet_rgb"], other, pads=False)
    back = fold_pictures(there, "c", other, CONVENTIONS["imagenet_rgb"], pads=False)
    for name, value in state.items():
        torch.testing.assert_close(back[name], value)
        assert not torch.equal(there[name], value)


@pytest.mark.parametrize(("trained", "wanted"), [(1e-3, 1e-5), (1e-5, 1e-3)])
def test_fold_eps_keeps_the_function_also_where_a_variance_is_smaller_than_the_difference(trained, wanted):
    """1e-5 -> 1e-3 with variances below 1e-3: the variance cannot go below 0, the weight takes up the rest."""
    before, after = nn.BatchNorm1d(5, eps=trained).double().eval(), nn.BatchNorm1d(5, eps=wanted).double().eval()
    before.running_var.copy_(torch.tensor([1e-6, 1e-4, 9e-4, 1e-2, 1.0]))
    before.running_mean.normal_()
    nn.init.uniform_(before.weight, 0.5, 2)
    state = {f"bn.{name}": value for name, value in before.state_dict().items()}
    folded = fold_eps(state, {"bn": trained}, {"bn": wanted}, rescale=True)
    assert (folded["bn.running_var"] >= 0).all()
    after.load_state_dict({name.removeprefix("bn."): value for name, value in folded.items()})
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-6)
    if wanted > trained:
        with pytest.raises(UserError, match="too small to move its eps"):
            fold_eps(state, {"bn": trained}, {"bn": wanted})


# -------------------------------------------------------------------------------------------------------------- shares


def test_a_shallower_network_is_refused_unless_partial(tmp_path):
    """Every tensor of a ResNet-18 fits into a ResNet-34."""
    deep = {"name": "resnet34", "model_args": TINY["model_args"]}
    torch.save(image().trunk.state_dict(), tmp_path / "x.pth")
    words = r"the file fills 63 of 111 trainable tensors \(57 %\); missing: layer1\.2"
    with pytest.raises(UserError, match=words):
        image(deep, pretrained=str(tmp_path / "x.pth"))
    method = Pair(image(deep))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with pytest.raises(UserError, match=words):
        load_weights(method, tmp_path / "x.pth")
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    image(deep, pretrained=str(tmp_path / "x.pth"), weights={"partial": True})
    lines = load_weights(method, tmp_path / "x.pth", partial=True)
    assert "keeps its random initialisation: inner.camera.layer1.2.conv1.weight" in lines


def test_tensors_that_the_network_lacks_inside_its_layers_are_another_network(tmp_path):
    state = image(VIT).trunk.state_dict()
    state |= {"blocks.0.ls1.gamma": torch.ones(24), "blocks.1.ls1.gamma": torch.ones(24)}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"another network there: it also has blocks\.0\.ls1\.gamma"):
        image(VIT, pretrained=str(tmp_path / "x.pth"))


def test_position_tables_of_another_size_are_interpolated(tmp_path):
    """timm's way: a table that varies along one axis only still does, and keeps its ends' order."""
    small = image({**VIT, "model_args": {**VIT["model_args"], "img_size": 64}})
    ramp = torch.linspace(0, 1, 4).view(1, 1, 4, 1).expand(1, 4, 4, 24).reshape(1, 16, 24)
    state = small.trunk.state_dict()
    state["pos_embed"] = torch.cat([torch.full((1, 1, 24), 7.0), ramp], 1)
    torch.save(state, tmp_path / "x.pth")
    given = image(VIT, pretrained=str(tmp_path / "x.pth")).trunk.pos_embed.detach()
    assert given.shape == (1, 14 * 14 + 1, 24)
    assert (given[:, 0] == 7).all()
    table = given[0, 1:, 0].view(14, 14)
    torch.testing.assert_close(table, table[:1].expand(14, 14), rtol=0, atol=1e-4)
    assert (table[0].diff() > -1e-4).all()
    assert table[0, -1] - table[0, 0] > 0.8


@pytest.mark.parametrize("spelling", ["microsoft", "mmdetection"])
def test_a_swin_of_microsoft_or_mmdetection_computes_the_same(tmp_path, spelling):
    from simipu3d.weights import foreign_names as names

    torch.manual_seed(6)
    trained = image(SWIN)
    rename = names.swin_microsoft if spelling == "microsoft" else names.swin_mmdet
    state = {}
    for name, value in trained.trunk.state_dict().items():
        merged = spelling == "mmdetection" and ".downsample." in name
        state[rename(name)] = names.unfold_order(value).contiguous() if merged else value
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    torch.save({"model": state}, tmp_path / "x.pth")
    given = image(SWIN, pretrained=str(tmp_path / "x.pth"))
    for name, value in trained.trunk.state_dict().items():
        assert torch.equal(given.trunk.state_dict()[name], value), name


def test_names_of_the_authors_are_converted_by_timm(tmp_path):
    """ConvNeXt as its authors name it."""
    block = {"name": "convnext_atto", "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}}
    trained, state = image(block), {}
    for name, value in trained.trunk.state_dict().items():
        name = name.replace("stem.", "downsample_layers.0.").replace("conv_dw", "dwconv")
        name = name.replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2").replace(".blocks.", ".")
        if ".downsample." in name:
            _, stage, _, rest = name.split(".", 3)
            name = f"downsample_layers.{stage}.{rest}"
        state[name] = value
    torch.save({"model": state}, tmp_path / "x.pth")
    given = image(block, pretrained=str(tmp_path / "x.pth"))
    assert all(torch.equal(given.trunk.state_dict()[n], v) for n, v in trained.trunk.state_dict().items())


# -------------------------------------------------------------------------------------------------------- first layers


def lidar(block, columns=("x", "y", "z", "intensity"), seed=0):
    return random_encoder(block, columns, seed)[0]


def test_a_file_without_coordinates_gets_zero_columns_and_computes_what_it_did(tmp_path):
    """The released PointNet++ has no offsets; with weight 0 on them, and the same neighbours, nothing changes."""
    trained = lidar(SHELLS)
    torch.save(under("pts_backbone.", trained.state_dict()), tmp_path / "x.pth")
    method = Pair(lidar=lidar({**SHELLS, "use_xyz": True}, seed=1))
    load_weights(method, tmp_path / "x.pth")
    view = make_view(random_scene(1), random_scene(2))
    with torch.no_grad():
        wanted, given = trained(view), method.inner["lidar"](view)
    torch.testing.assert_close(given.features, wanted.features, rtol=1e-4, atol=1e-5)
    first = method.inner["lidar"].SA_modules[1].mlps[0][0].conv.weight
    assert (first[:, :3] == 0).all()
    assert torch.equal(first[:, 3:], trained.SA_modules[1].mlps[0][0].conv.weight)


def test_offsets_that_an_encoder_does_not_read_cannot_be_cut(tmp_path):
    torch.save(lidar({**SHELLS, "use_xyz": True}).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"reads the offsets.*set point_encoder\.use_xyz: true"):
        load_weights(Pair(lidar=lidar(SHELLS)), tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("theirs", "ours", "stated"),
    [
        ("xyzit", "xyzi", False),
        ("xyzi", "xyzit", False),
        ("xyzet", "xyzite", True),
        ("xyzti", "xyzit", True),
        ("xyzit", "xyzite", False),
    ],
)
def test_columns_are_padded_and_cut_by_name(tmp_path, theirs, ours, stated):
    """A column that both know keeps its weight; what the file lacks has 0. Without names only the first four are known."""
    words = {"i": "intensity", "t": "time", "e": "elongation"}
    theirs, ours = (tuple(words.get(letter, letter) for letter in letters) for letters in (theirs, ours))
    trained = lidar(VOXEL, theirs)
    if stated:
        config = {"point_encoder": VOXEL}
        run = {"config": config, "method": "simipu", "global_step": 1, "point_columns": list(theirs)}
        content = {"state_dict": under("method.lidar.", trained.state_dict()), "simipu3d": run}
    else:
        content = {"model_state": under("backbone_3d.", trained.state_dict())}
    torch.save(content, tmp_path / "x.pth")
    method = Pair(lidar=lidar(VOXEL, ours, seed=1))
    load_weights(method, tmp_path / "x.pth")
    given = method.inner["lidar"].conv_input[0].weight
    for place, column in enumerate(ours):
        known = column in (theirs if stated else theirs[:4])
        wanted = trained.conv_input[0].weight[..., theirs.index(column)] if known else torch.zeros(16, 3, 3, 3)
        assert torch.equal(given[..., place], wanted), column
    assert torch.equal(method.inner["lidar"].conv4[0][0].weight, trained.conv4[0][0].weight)


def test_kernels_grow_exactly_and_shrink_only_where_the_rim_is_zero(tmp_path):
    small, large = UNET, {**UNET, "stem_kernel": 5}
    trained = lidar(small)
    torch.save(trained.state_dict(), tmp_path / "x.pth")
    method = Pair(lidar=lidar(large, seed=1))
    load_weights(method, tmp_path / "x.pth")
    grown = method.inner["lidar"]
    assert torch.equal(grown.stem[0].weight[:, 1:4, 1:4, 1:4], trained.stem[0].weight)
    assert grown.stem[0].weight.count_nonzero() == trained.stem[0].weight.count_nonzero()
    torch.save(grown.state_dict(), tmp_path / "x.pth")
    method = Pair(lidar=lidar(small, seed=2))
    load_weights(method, tmp_path / "x.pth")
    assert torch.equal(method.inner["lidar"].stem[0].weight, trained.stem[0].weight)
    torch.save(lidar(large, seed=3).state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"stem\.0\.weight has a 5\^3 kernel.*set point_encoder\.stem_kernel: 5"):
        load_weights(method, tmp_path / "x.pth")


def test_voxelnexts_backbone_is_another_network(tmp_path):
    state = lidar(RES).state_dict() | {"conv6.0.0.weight": torch.zeros(1), "shared_conv.0.weight": torch.zeros(1)}
    torch.save({"model_state": under("backbone_3d.", state)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="VoxelNeXt's, whose stage 4 pads"):
        load_weights(Pair(lidar=lidar(RES)), tmp_path / "x.pth")


def test_a_longer_input_of_pointnet_is_cut_by_name(tmp_path):
    trained = lidar(BALLS, ("x", "y", "z", "intensity", "time"))
    torch.save({"model_state": under("backbone_3d.", trained.state_dict())}, tmp_path / "x.pth")
    method = Pair(lidar=lidar(BALLS, seed=1))
    load_weights(method, tmp_path / "x.pth")
    given = method.inner["lidar"].SA_modules[0].mlps[1][0].conv.weight
    assert torch.equal(given, trained.SA_modules[0].mlps[1][0].conv.weight[:, :4])


# --------------------------------------------------------------------------------------------- what is no weights file


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.pth", b"<!DOCTYPE html>\n<html><head><title>Sign in", "is a web page"),
        ("x.pth", b"\n  <html lang='en'>", "is a web page"),
        ("x.safetensors", b"<!doctype html><html>", "is a web page"),
        ("x.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("x.pth", b'{"message": "not found"}', "is a JSON text"),
        ("x.pth", b"\x1f\x8b\x08\x00", "is a compressed archive"),
        ("x.pth", b"", "is empty"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_file(tmp_path / name, "--init")


def test_a_wrong_ending_is_said(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.bin")
    with pytest.raises(UserError, match=r"is a safetensors file; name it x\.safetensors"):
        read_file(tmp_path / "x.bin", "--init")
    torch.save({"a": torch.zeros(2)}, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match=r"is a torch file, no safetensors; name it y\.pth"):
        read_file(tmp_path / "y.safetensors", "--init")


class Pickled:
    """A numpy scalar of objects or records, or a call: what the stand-ins must not answer."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def test_numpys_numbers_are_read_and_nothing_else_of_numpy(tmp_path):
    path = tmp_path / "x.pth"
    values = [np.float64(0.25), np.float32(1.5), np.int64(-7), np.bool_(True), np.uint8(200), np.float16(0.5)]
    torch.save({"state_dict": {"a": torch.zeros(2)}, "best": values, "big": np.dtype(">i4").type(5)}, path)
    from simipu3d.weights.files import read_torch_file

    assert read_torch_file(path, "--init")["best"] == [0.25, 1.5, -7, True, 200, 0.5]
    scalar = np.float64(0).__reduce__()[0]
    records = np.dtype([("a", "O")])
    for bad in (
        np.zeros(2),
        records,
        Pickled(scalar, (np.dtype("O"), b"12345678")),
        Pickled(scalar, (records, b"0" * 8)),
    ):
        torch.save({"state_dict": {"a": torch.zeros(2)}, "bad": bad}, path)
        with pytest.raises(UserError):
            read_torch_file(path, "--init")
    path.write_bytes(pickle.dumps(Pickled(print, ("executed",))))
    with pytest.raises(UserError):
        read_torch_file(path, "--init")
