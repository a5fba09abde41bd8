"""An exported point encoder computes in the target what it computed in pre-training, or there is no file."""

import json
from functools import partial

import pytest
import torch
from exported import BALLS, FLAT_UNET, RES, SHELLS, SINGLE, UNET, VOXEL, random_encoder, write_point_checkpoint
from torch import nn

from simipu3d.encoders.sparse import SparseTensor
from simipu3d.errors import UserError
from simipu3d.export.image import convert
from simipu3d.export.image.verify import ExportError
from simipu3d.export.peers.pointnet import neighbours
from simipu3d.export.peers.sparse import Grid, PeerConv, PeerTensor
from simipu3d.export.points import verify as verify_points
from simipu3d.export.points.write import export_points
from simipu3d.registry import POINT_ENCODERS
from simipu3d.tools.export import main
from simipu3d.weights import foreign_names

OUT = {"output_conv": True}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "exports" / "x.pth"


def exported(tmp_path, out, block, target, columns=("x", "y", "z", "intensity"), **options):
    encoder = write_point_checkpoint(tmp_path / "last.ckpt", block, columns)
    return encoder, export_points(tmp_path / "last.ckpt", target, out, **options)


# ------------------------------------------------------------------------------------------------- what arrives where

CASES = {
    "VoxelBackBone8x": (VOXEL, "openpcdet", {}, 66, 6),
    "whole VoxelBackBone8x, spconv 1": (VOXEL | OUT, "openpcdet", {"layout": "spconv1"}, 72, 0),
    "UNetV2": (VOXEL, "openpcdet", {"network": "UNetV2"}, 66, 102),
    "VoxelResBackBone8x": (RES | OUT, "openpcdet", {}, 142, 0),
    "USE_BIAS False": (RES | OUT, "openpcdet", {"bias": False}, 126, 0),
    "zeros for biases": (RES | OUT | {"use_bias": False}, "openpcdet", {}, 142, 0),
    "without biases on both sides": (RES | {"use_bias": False}, "openpcdet", {"bias": False}, 120, 6),
    "SparseEncoder": (VOXEL | OUT, "mmdet3d", {"prefix": "middle_encoder."}, 72, 0),
    "SparseEncoder-basicblock": (RES | OUT, "mmdet3d", {}, 126, 0),
    "BEVFusionSparseEncoder": (RES, "mmdet3d", {"network": "BEVFusionSparseEncoder"}, 120, 6),
    "more columns": (VOXEL, "openpcdet", {"channels": 6, "intensity_scale": 255.0}, 66, 6),
    "fewer columns": (VOXEL, "openpcdet", {"channels": 3}, 66, 6),
    "PointNet2MSG": (BALLS, "openpcdet", {"channels": 5}, 48, 12),
    "PointNet2SAMSG": (SHELLS, "mmdet3d", {}, 91, 0),
    "the light PointNet2SAMSG": ({"name": "pointnet2_msg", "size": "light"}, "mmdet3d", {}, 147, 0),
    "one ball in PointNet2MSG": (SINGLE, "openpcdet", {}, 24, 12),
    "one ball in PointNet2SAMSG": (SINGLE, "mmdet3d", {}, 28, 0),
    "Res16UNet": (UNET, "minkowski", {"prefix": "module."}, 188, 0),
    "Res16UNet encoder": (UNET | {"output": "encoder", "out_channels": 32}, "minkowski", {"channels": 4}, 90, 98),
    "SpUNet": (FLAT_UNET, "pointcept", {"channels": 6}, 188, 0),
    "part of SpUNet": (UNET, "pointcept", {"partial": True}, 42, 134),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_holds_what_the_target_has_and_says_what_stays_fresh(tmp_path, out, case):
    block, target, options, count, fresh = CASES[case]
    _, report = exported(tmp_path, out, block, target, **options)
    content = torch.load(out, weights_only=True)
    state = content["model_state" if target == "openpcdet" else "state_dict"]
    meta = json.loads((out.parent / "x.pth.json").read_text())
    text = (out.parent / "x.pth.txt").read_text()
    assert (len(state), len(meta["fresh_in_target"])) == (count, fresh)
    assert meta == json.loads(json.dumps(report.meta)) == content["meta"]
    assert meta["verification"]["largest_relative_difference"] < 1e-5
    assert meta["source_checkpoint"]["epoch"] == 3
    assert "non-commercial" in meta["licence"]
    assert "How to load it" in text
    assert str(out) in text
    assert all(type(v) is torch.Tensor and v.is_contiguous() for v in state.values())
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.pth", "x.pth.json", "x.pth.txt"]


def test_the_whole_network_of_pointcontrast_has_its_names_and_kernels(tmp_path, out):
    encoder, _ = exported(tmp_path, out, {"name": "sparse_unet34"}, "minkowski")
    state = torch.load(out, weights_only=True)["state_dict"]
    for name, shape in {
        "conv0p1s1.kernel": (27, 3, 32),
        "conv4p8s2.kernel": (8, 128, 128),
        "block2.0.downsample.0.kernel": (32, 64),
        "block2.0.downsample.1.bn.running_mean": (64,),
        "block8.1.norm2.bn.weight": (96,),
        "convtr4p16s2.kernel": (8, 256, 256),
        "bntr7.bn.bias": (96,),
        "final.kernel": (96, 32),
        "final.bias": (1, 32),
    }.items():
        assert tuple(state[name].shape) == shape, name
    own = encoder.stem[0].weight  # (out, kz, ky, kx, in): x runs fastest in the kernel's slices
    assert torch.equal(state["conv0p1s1.kernel"][1 + 3 * 2 + 9 * 0], own[:, 0, 2, 1].T)
    parameters = sum(v.numel() for n, v in state.items() if not n.endswith(("mean", "var", "tracked")))
    assert parameters == 37_847_808


# ---------------------------------------------------------------------------------- peers against the libraries themselves


def spconv_modules():
    return pytest.importorskip("spconv.pytorch")


def run_spconv(network, x, axes="zyx"):
    """A spconv network on our voxels, on one thread; (V, C) in the order of the output's cells."""
    spconv = spconv_modules()
    cells, shape = x.voxel_bzyx, x.spatial_shape
    if axes == "xyz":
        cells, shape = cells[:, [0, 3, 2, 1]], shape[::-1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            y = network(spconv.SparseConvTensor(x.features, cells.int().contiguous(), list(shape), x.batch_size))
    finally:
        torch.set_num_threads(threads)
    indices = y.indices.long() if axes == "zyx" else y.indices.long()[:, [0, 3, 2, 1]]
    return y.features[verify_points._rising(indices)]


def opcdet_like(spconv, in_channels):
    """VoxelBackBone8x on spconv's own layers."""
    norm = partial(nn.BatchNorm1d, eps=1e-3)

    def unit(kind, a, b, key, **geometry):
        return spconv.SparseSequential(kind(a, b, 3, bias=False, indice_key=key, **geometry), norm(b), nn.ReLU())

    sub, down = spconv.SubMConv3d, spconv.SparseConv3d
    net = spconv.SparseSequential()
    net.add_module("conv_input", unit(sub, in_channels, 16, "subm1", padding=1))
    net.add_module("conv1", spconv.SparseSequential(unit(sub, 16, 16, "subm1", padding=1)))
    for stage, a, b, pad in ((2, 16, 32, 1), (3, 32, 64, 1), (4, 64, 64, (0, 1, 1))):
        layers = [unit(down, a, b, f"spconv{stage}", stride=2, padding=pad)]
        layers += [unit(sub, b, b, f"subm{stage}", padding=1) for _ in range(2)]
        net.add_module(f"conv{stage}", spconv.SparseSequential(*layers))
    return net.eval()


def test_spconv_itself_computes_the_same_from_an_openpcdet_file(tmp_path, out):
    spconv = spconv_modules()
    encoder, _ = exported(tmp_path, out, VOXEL, "openpcdet")
    state = torch.load(out, weights_only=True)["model_state"]
    net = opcdet_like(spconv, 4)
    net.load_state_dict({name.removeprefix("backbone_3d."): value for name, value in state.items()})
    x = verify_points.random_voxels()
    x = x.with_features(torch.rand(len(x), 4))
    with torch.no_grad():
        torch.testing.assert_close(run_spconv(net, x), encoder.stages(x)[-1].features, rtol=1e-4, atol=1e-4)


def test_spconv_itself_reads_pointcepts_one_by_one_layer(tmp_path, out):
    spconv = spconv_modules()
    encoder, _ = exported(tmp_path, out, FLAT_UNET, "pointcept")
    state = torch.load(out, weights_only=True)["state_dict"]
    layer = spconv.SubMConv3d(6, 5, kernel_size=1, padding=1, bias=True).eval()
    layer.load_state_dict({"weight": state["final.weight"], "bias": state["final.bias"]})
    x = verify_points.random_voxels()
    x = x.with_features(torch.randn(len(x), 6))
    with torch.no_grad():
        torch.testing.assert_close(run_spconv(layer, x), encoder.final(x.features))


@pytest.mark.parametrize("kind", ["submanifold", "strided", "inverse"])
def test_a_peers_convolution_is_a_dense_one_at_its_sites(kind):
    shape, generator = (6, 7, 9), torch.Generator().manual_seed(3)
    dense = torch.rand(2, 3, *shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, *shape, generator=generator) < 0.2
    cells = mask.nonzero()
    x = PeerTensor(dense.permute(0, 2, 3, 4, 1)[mask], Grid(cells, shape, 2))
    dense = dense * mask[:, None]
    stride = (1, 1, 1) if kind == "submanifold" else (2, 2, 2)
    conv = PeerConv("submanifold" if kind == "submanifold" else "strided", (3, 4), stride=stride, key="k").double()
    nn.init.normal_(conv.weight, generator=generator)
    y = conv(x)
    kernel = conv.weight.permute(0, 4, 1, 2, 3)
    wanted = nn.functional.conv3d(dense, kernel, stride=stride, padding=1)
    batch, z, a, b = y.grid.cells.T
    torch.testing.assert_close(y.features, wanted[batch, :, z, a, b])
    if kind == "inverse":
        back = PeerConv("inverse", (4, 3), stride=stride, key="k").double()
        nn.init.normal_(back.weight, generator=generator)
        full = torch.zeros(2, 4, *y.grid.shape, dtype=torch.float64)
        full[batch, :, z, a, b] = y.features
        # transposed convolution: (in, out, kernel); its output may miss the last plane of an even grid
        over = nn.functional.conv_transpose3d(
            full, back.weight.permute(4, 0, 1, 2, 3), stride=2, padding=1, output_padding=1
        )
        batch, z, a, b = cells.T
        torch.testing.assert_close(back(y).features, over[batch, :, z, a, b])


def test_neighbours_are_the_first_ones_inside_and_repeat_the_first():
    xyz = torch.tensor([[0.0, 0, 0], [3, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0.5]])
    assert neighbours(xyz, xyz[:1], (0.0, 1.5, 3)).tolist() == [[0, 2, 3]]
    assert neighbours(xyz, xyz[1:2], (0.0, 1.5, 3)).tolist() == [[1, 1, 1]]
    assert neighbours(xyz, xyz[:1], (0.6, 1.5, 4)).tolist() == [[0, 2, 3, 0]]


# ----------------------------------------------------------------------------------------------------- what is caught

ORIGINAL_COPY, ORIGINAL_LAYOUT, ORIGINAL_MINKOWSKI = (
    convert.plain_copy,
    foreign_names.to_layout,
    foreign_names.to_minkowski,
)


def changed(name_end, change):
    """plain_copy, with the first tensor whose name ends so changed."""

    def copy(state):
        copies = ORIGINAL_COPY(state)
        name = next(name for name in copies if name.endswith(name_end))
        return {**copies, name: change(copies[name]).contiguous()}

    return copy


def without(name_end):
    def copy(state):
        copies = ORIGINAL_COPY(state)
        return {n: v for n, v in copies.items() if n != next(name for name in copies if name.endswith(name_end))}

    return copy


def transposed_kernel(weight, layout):
    weight = weight.transpose(0, 4) if weight.shape[0] == weight.shape[4] else weight
    return ORIGINAL_LAYOUT(weight, layout)


def mirrored(weight, layout):
    return ORIGINAL_LAYOUT(weight.flip(1), layout)


def z_first(weight):
    return ORIGINAL_MINKOWSKI(weight.permute(0, 3, 2, 1, 4) if weight.dim() == 5 else weight)


SWAP = changed("conv_input.0.weight", lambda weight: weight[..., [2, 1, 0, 3]])
FAULTS = {
    "transposed kernel": (foreign_names, "to_layout", transposed_kernel, [("v", "openpcdet"), ("r", "mmdet3d")]),
    "mirrored kernel": (foreign_names, "to_layout", mirrored, [("v", "mmdet3d"), ("r", "openpcdet")]),
    "kernel slices the other way": (foreign_names, "to_minkowski", z_first, [("u", "minkowski")]),
    "swapped columns": (convert, "plain_copy", SWAP, [("v", "openpcdet"), ("v", "mmdet3d")]),
    "wrong prefix": (
        convert,
        "add_prefix",
        lambda state, _: {f"backbone3d.{n}": v for n, v in state.items()},
        [("v", "openpcdet"), ("r", "mmdet3d"), ("p", "openpcdet"), ("s", "mmdet3d")],
    ),
    "missing buffer": (
        convert,
        "plain_copy",
        without("running_mean"),
        [("v", "openpcdet"), ("v", "mmdet3d"), ("s", "mmdet3d"), ("u", "minkowski"), ("f", "pointcept")],
    ),
    "fresh buffer": (
        convert,
        "plain_copy",
        changed("running_var", torch.ones_like),
        [("v", "openpcdet"), ("p", "openpcdet"), ("u", "minkowski"), ("f", "pointcept")],
    ),
    "eps": (convert, "fold_eps", lambda state, *_, **__: state, [("p", "openpcdet"), ("f", "pointcept")]),
    "lost biases": (
        convert,
        "fold_bias",
        lambda state, conv, _: {n: v for n, v in state.items() if n != f"{conv}.bias"},
        [("r", "mmdet3d"), ("p", "openpcdet")],
    ),
}
BLOCKS = {"v": VOXEL, "r": RES, "p": BALLS, "s": SHELLS, "u": UNET, "f": FLAT_UNET}
BROKEN = [(fault, *case) for fault, (*_, cases) in FAULTS.items() for case in cases]


@pytest.mark.parametrize(("fault", "block", "target"), BROKEN)
def test_a_broken_conversion_leaves_no_file(tmp_path, out, monkeypatch, capsys, fault, block, target):
    module, name, replacement, _ = FAULTS[fault]
    write_point_checkpoint(tmp_path / "last.ckpt", BLOCKS[block])
    monkeypatch.setattr(module, name, replacement)
    arguments = ["--ckpt", str(tmp_path / "last.ckpt"), "--branch", "points", "--to", target, "--out", str(out)]
    assert main(arguments) == 2
    assert not out.parent.exists() or list(out.parent.iterdir()) == []
    assert "Traceback" not in capsys.readouterr().err


def test_a_transposed_one_by_one_layer_is_caught(tmp_path, out, monkeypatch):
    write_point_checkpoint(tmp_path / "last.ckpt", UNET)
    same = foreign_names.to_minkowski

    def square(weight):
        return weight.contiguous() if weight.dim() == 2 and weight.shape[0] == weight.shape[1] else same(weight)

    encoder, _ = random_encoder(UNET | {"out_channels": 6})
    assert encoder.final.weight.shape == (6, 6)
    write_point_checkpoint(tmp_path / "last.ckpt", UNET | {"out_channels": 6})
    monkeypatch.setattr(foreign_names, "to_minkowski", square)
    with pytest.raises(ExportError, match="output 10"):
        export_points(tmp_path / "last.ckpt", "minkowski", out)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("block", "target", "options", "message"),
    [
        (VOXEL, "tensorflow", {}, "no such target for points; there are openpcdet, mmdet3d, pointcept, minkowski"),
        (
            VOXEL,
            "minkowski",
            {},
            "no network for the point encoder voxel_backbone8x; it has Res16UNet from sparse_unet34",
        ),
        (VOXEL, "openpcdet", {"network": "PointNet2MSG"}, "takes voxel_backbone8x as VoxelBackBone8x, UNetV2"),
        (VOXEL, "openpcdet", {"prefix": "backbone."}, "expected backbone_3d."),
        (VOXEL, "mmdet3d", {"prefix": "middle_encoder"}, "with a dot"),
        (VOXEL, "mmdet3d", {"layout": "spconv2"}, "SparseEncoder reads spconv1"),
        (VOXEL, "openpcdet", {"channels": 2}, "expected 3 to 64; the run had 4"),
        (VOXEL, "openpcdet", {"intensity_scale": -1.0}, "expected a positive number"),
        (VOXEL, "openpcdet", {"bias": False}, "has no biases"),
        (VOXEL, "openpcdet", {"partial": True}, "takes the whole encoder"),
        (UNET, "minkowski", {"intensity_scale": 255.0}, "does not read"),
        (UNET, "pointcept", {}, r"down\.2\.0\.weight is \(12, 2, 2, 2, 8\) there and \(8, 2, 2, 2, 8\) in the run"),
        (SHELLS, "openpcdet", {}, "use_xyz: false; OpenPCDet's PointNet2MSG has no counterpart"),
        (BALLS | {"neighbourhood": "annulus"}, "openpcdet", {}, "neighbourhood: annulus"),
        ({"name": "pointnet2_msg"}, "openpcdet", {}, "neighbourhood: annulus"),
        (SHELLS, "mmdet3d", {"channels": 3}, "expected 4 to 64; the run had 4"),
        (VOXEL | OUT | {"last_pad": 1}, "mmdet3d", {}, "last_pad: 1; conv_out has no padding there"),
        ({"name": "pillar"}, "openpcdet", {}, "no network for the point encoder pillar; it has VoxelBackBone8x from"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, out, block, target, options, message):
    write_point_checkpoint(tmp_path / "last.ckpt", block)
    with pytest.raises(UserError, match=message):
        export_points(tmp_path / "last.ckpt", target, out, **options)
    assert not out.parent.exists()


def spoiled(content, how):
    state, run = content["state_dict"], content["simipu3d"]
    name = "method.point_encoder.conv2.0.0.weight"
    if how == "no points":
        content["state_dict"] = {n: v for n, v in state.items() if "point_encoder" not in n}
    if how == "missing":
        del state[name]
    if how == "shape":
        state[name] = state[name].transpose(0, 4)
    if how == "nan":
        state[name] = state[name] * float("nan")
    if how == "unknown":
        run["config"]["point_encoder"]["name"] = "no_such_encoder"
    return content


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no points", "no point branch"),
        ("missing", r"missing: conv2\.0\.0\.weight"),
        ("shape", r"shapes differ from its configuration's: conv2\.0\.0\.weight"),
        ("nan", "NaN"),
        ("unknown", "no point encoder is called 'no_such_encoder'"),
    ],
)
def test_checkpoints_that_cannot_be_used_are_refused(tmp_path, out, how, message):
    path = tmp_path / "last.ckpt"
    write_point_checkpoint(path, VOXEL)
    torch.save(spoiled(torch.load(path, weights_only=True), how), path)
    with pytest.raises(UserError, match=message):
        export_points(path, "openpcdet", out)


def test_an_encoder_that_no_target_knows_is_refused(tmp_path, out, monkeypatch):
    entry = POINT_ENCODERS["voxel_backbone8x"]
    monkeypatch.setitem(POINT_ENCODERS._entries, "my_encoder", entry)
    write_point_checkpoint(tmp_path / "last.ckpt", {"name": "my_encoder"})
    with pytest.raises(UserError, match="openpcdet: has no network for the point encoder my_encoder; it has VoxelBack"):
        export_points(tmp_path / "last.ckpt", "openpcdet", out)


def test_options_of_the_other_branch_are_refused(tmp_path, capsys):
    common = ["--ckpt", "x.ckpt", "--to", "openpcdet", "--out", str(tmp_path / "x.pth")]
    assert main([*common, "--branch", "points", "--input", "caffe_bgr"]) == 2
    assert "--input: does not belong to --branch points" in capsys.readouterr().err
    assert main([*common, "--branch", "image", "--layout", "spconv1"]) == 2
    assert "--layout: does not belong to --branch image" in capsys.readouterr().err


def test_a_checkpoint_without_columns_is_taken_as_kittis(tmp_path, out):
    path = tmp_path / "last.ckpt"
    write_point_checkpoint(path, VOXEL)
    content = torch.load(path, weights_only=True)
    del content["simipu3d"]["point_columns"]
    torch.save(content, path)
    assert export_points(path, "openpcdet", out).meta["input"]["columns"] == ["x", "y", "z", "intensity"]


def test_padding_and_cutting_are_written_down(tmp_path, out):
    columns = ("x", "y", "z", "intensity", "time")
    encoder, report = exported(tmp_path, out, VOXEL, "openpcdet", columns, channels=4, intensity_scale=255.0)
    state = torch.load(out, weights_only=True)["model_state"]
    wanted = encoder.conv_input[0].weight[..., :4].clone()
    wanted[..., 3] /= 255
    assert torch.equal(state["backbone_3d.conv_input.0.weight"], wanted)
    assert "without the input columns time" in report.summary()
    assert "255" in report.summary()


def test_spconv_1_layout_is_the_permuted_one(tmp_path, out):
    encoder, _ = exported(tmp_path, out, VOXEL, "openpcdet", layout="spconv1")
    state = torch.load(out, weights_only=True)["model_state"]
    assert torch.equal(state["backbone_3d.conv2.0.0.weight"], encoder.conv2[0][0].weight.permute(1, 2, 3, 4, 0))


def test_sites_and_voxels_are_what_the_check_says():
    x = verify_points.random_voxels()
    assert isinstance(x, SparseTensor)
    assert len(torch.unique(x.voxel_bzyx, dim=0)) == len(x) == 3400
    assert x.voxel_bzyx[:, 0].unique().tolist() == [0, 1]
    assert all(size % 2 for size in x.spatial_shape)


@pytest.mark.parametrize("length", [246, 300])
def test_a_name_that_no_disk_takes_is_one_line(tmp_path, out, length):
    write_point_checkpoint(tmp_path / "last.ckpt", VOXEL)
    with pytest.raises(UserError, match="cannot be written"):
        export_points(tmp_path / "last.ckpt", "openpcdet", tmp_path / f"{'x' * length}.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_padding_of_the_last_layer_is_told(tmp_path, out):
    _, report = exported(tmp_path, out, VOXEL | OUT | {"last_pad": 1}, "openpcdet")
    assert any("last_pad: 1" in line for line in report.usage)
