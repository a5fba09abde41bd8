"""`--init` starts a run from the function that a foreign checkpoint computes, or says why it cannot."""

import logging
import pickle

import pytest
import torch
from exported import BALLS, RES, SHELLS, SINGLE, UNET, VOXEL, random_encoder, randomise, write_point_checkpoint
from helpers import BLOCKS, COLUMNS
from safetensors.torch import save_file
from torch import nn

from simipu3d.compat import import_timm, import_torchvision
from simipu3d.config import parse_block
from simipu3d.contracts.batch import PointView
from simipu3d.contracts.method import DataInfo
from simipu3d.errors import UserError
from simipu3d.export.image import verify
from simipu3d.export.image.write import export_image
from simipu3d.export.peers.unet import MinkowskiUNet
from simipu3d.export.peers.voxel import (
    MMDET3D_RESIDUAL,
    OPENPCDET_PLAIN,
    OPENPCDET_RESIDUAL,
    PeerEncoder,
    Style,
)
from simipu3d.export.points import verify as verify_points
from simipu3d.export.points.write import export_points
from simipu3d.methods.simipu import SimIPU
from simipu3d.weights.files import RUN_KEYS
from simipu3d.weights.load import load_weights

RESNET = {"name": "resnet18"}
RELEASED = {"bn_eps": 1e-3, "input": "caffe_bgr"}


def method_of(point=None, image=None):
    """A method with fresh weights in eval mode."""
    torch.manual_seed(5)
    blocks = BLOCKS | {"point_encoder": point or BLOCKS["point_encoder"], "image_encoder": image or RESNET}
    return SimIPU(parse_block("", SimIPU.Config, blocks), DataInfo(COLUMNS)).eval()


def resnet(eps=1e-5):
    """torchvision's ResNet-18 with random statistics."""
    torch.manual_seed(6)
    network = randomise(import_torchvision().models.resnet18(weights=None)).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    return network


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def assert_same_pictures(method, network, convention="imagenet_rgb"):
    """Both see the same pictures alike, each with its own normalisation."""
    encoder = method.image_encoder
    images, size = verify.fixed_pictures(encoder)
    with torch.no_grad():
        own = encoder(encoder.normalise(images, size))[-1].features
        wanted = verify.resnet_levels(network, verify.target_input(images, size, convention))[-1]
    assert (own - wanted).abs().max() < 1e-4 * wanted.abs().max()


# ------------------------------------------------------------------------------------------------------- image branch


@pytest.mark.parametrize("image", [RESNET, RESNET | RELEASED])
@pytest.mark.parametrize("form", ["torchvision", "safetensors", "timm", "mmdetection", "detector", "openpcdet"])
def test_a_resnet_of_any_origin_computes_what_it_did(tmp_path, image, form):
    network, path = resnet(), tmp_path / "x.pth"
    state = network.state_dict()
    if form == "safetensors":
        path = tmp_path / "x.safetensors"
        save_file(state, path)
    elif form == "timm":
        other = import_timm().create_model("resnet18", num_classes=0)
        other.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
        torch.save(other.state_dict(), path)
    elif form == "mmdetection":
        torch.save({"meta": {"epoch": 12}, "state_dict": under("backbone.", state)}, path)
    elif form == "detector":
        heads = {"bbox_head.weight": torch.zeros(3), "neck.conv1.weight": torch.zeros(3)}
        torch.save({"state_dict": under("backbone.", state) | heads}, path)
    elif form == "openpcdet":
        torch.save({"model_state": under("vfe.ffn.ddn.model.backbone.", state), "epoch": 3}, path)
    else:
        torch.save(state, path)
    method = method_of(image=image)
    load_weights(method, path)
    assert_same_pictures(method, network)


def moco(network):
    """As MoCo v2 saves: query and key encoder with a head of two layers, and the queue."""
    query = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    query |= {"fc.0.weight": torch.zeros(4, 4), "fc.2.weight": torch.zeros(4, 4)}
    key = {name: torch.zeros_like(value) for name, value in query.items()}
    state = under("module.encoder_q.", query) | under("module.encoder_k.", key) | {"module.queue": torch.zeros(4, 9)}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def test_moco_gives_its_query_encoder(tmp_path):
    network = resnet()
    torch.save(moco(network), tmp_path / "x.pth.tar")
    method = method_of()
    lines = load_weights(method, tmp_path / "x.pth.tar")
    assert_same_pictures(method, network)
    assert "used: image_encoder.conv1.weight from module.encoder_q.conv1.weight" in lines
    assert "not used: module.queue" in lines
    assert "not used: module.encoder_k.conv1.weight" in lines
    assert any(line.startswith("keeps its random initialisation: point_encoder.") for line in lines)


@pytest.mark.parametrize("image", [RESNET, RESNET | RELEASED])
def test_released_simipu_gives_both_branches(tmp_path, image):
    """BGR pictures and eps 1e-3 in its image branch, PointNet++ under `pts_backbone.`."""
    network = resnet(eps=1e-3)
    trunk = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    source, _ = random_encoder(SHELLS, seed=7)
    state = under("img_backbone.", trunk) | under("pts_backbone.", source.state_dict())
    state |= {"mlp_cross_img.layer1.0.weight": torch.zeros(2, 2), "img_conv1x1_1.weight": torch.zeros(2, 2)}
    torch.save({"meta": {"epoch": 80}, "state_dict": state}, tmp_path / "x.pth")
    method = method_of(point=SHELLS, image=image)
    load_weights(method, tmp_path / "x.pth")
    assert_same_pictures(method, network, "caffe_bgr")
    own = method.point_encoder.state_dict()
    assert all(torch.equal(own[name], value) for name, value in source.state_dict().items())


def test_our_own_image_exports_come_back_with_their_colours(tmp_path):
    from test_export_image import write_checkpoint

    encoder = write_checkpoint(tmp_path / "last.ckpt", name="resnet18", **RELEASED)
    for options in ({"input": "caffe_bgr"}, {"input": "imagenet_rgb"}):
        export_image(tmp_path / "last.ckpt", "mmdet3d", tmp_path / "x.pth", overwrite=True, **options)
        method = method_of(image=RESNET | RELEASED)
        load_weights(method, tmp_path / "x.pth")
        torch.testing.assert_close(method.image_encoder.trunk.conv1.weight, encoder.trunk.conv1.weight)
        torch.testing.assert_close(method.image_encoder.trunk.bn1.running_var, encoder.trunk.bn1.running_var)


# ------------------------------------------------------------------------------------------------------- point branch


def random_peer(peer):
    torch.manual_seed(8)
    for parameter in peer.parameters():
        nn.init.normal_(parameter, std=(2 / max(parameter.numel() // parameter.shape[-1], 8)) ** 0.5)
    return randomise(peer).eval()


def voxel_layers(encoder, x):
    outputs = []
    for layer in [encoder.conv_input, *encoder.conv1, *encoder.conv2, *encoder.conv3, *encoder.conv4]:
        x = layer(x)
        outputs.append(x)
    return outputs


VOXEL_SOURCES = {
    "VoxelBackBone8x": (VOXEL, OPENPCDET_PLAIN, Style(False, "spconv2"), "backbone_3d.", "model_state"),
    "VoxelBackBone8x, spconv 1": (VOXEL, OPENPCDET_PLAIN, Style(False, "spconv1"), "backbone_3d.", "model_state"),
    "VoxelResBackBone8x": (RES, OPENPCDET_RESIDUAL, Style(True, "spconv2", bias=True), "backbone_3d.", "model_state"),
    "without biases": (RES, OPENPCDET_RESIDUAL, Style(True, "spconv2"), "backbone_3d.", "model_state"),
    "SparseEncoder": (RES, MMDET3D_RESIDUAL, Style(True, "spconv1"), "pts_middle_encoder.", "state_dict"),
    "BEVFusion": (RES, MMDET3D_RESIDUAL, Style(True, "spconv1", axes="xyz"), "pts_middle_encoder.", "state_dict"),
}


@pytest.mark.parametrize("case", VOXEL_SOURCES)
def test_a_voxel_encoder_of_a_detector_computes_what_it_did(tmp_path, case):
    block, layer_names, style, prefix, key = VOXEL_SOURCES[case]
    peer = random_peer(PeerEncoder(layer_names, style, 4))
    torch.save({key: under(prefix, peer.state_dict()) | {"dense_head.w": torch.zeros(2)}}, tmp_path / "x.pth")
    method = method_of(point=block)
    lines = load_weights(method, tmp_path / "x.pth")
    x = verify_points.random_voxels()
    x = x.with_features(torch.rand(len(x), 4))
    with torch.no_grad():
        wanted = voxel_layers(method.point_encoder, x)
        given = peer(verify_points.to_peer(x, x.features, style.axes), len(wanted))
        assert verify_points.compare_sparse(wanted, given, style.axes)[0] < 1e-5
    assert "not used: dense_head.w" in lines
    assert any(line.startswith("not used: ") and "conv_out.0.weight" in line for line in lines)


@pytest.mark.parametrize("nesting", ["", "module."])
def test_pointcontrasts_network_computes_what_it_did(tmp_path, nesting):
    widths = tuple(UNET["planes"])
    square = UNET | {"out_channels": widths[7]}  # a 1x1 kernel whose shape does not tell in from out
    peer = random_peer(MinkowskiUNet(3, widths[7], (8, 3), widths, tuple(UNET["layers"])))
    content = {"state_dict": under(nesting, peer.state_dict()), "curr_iter": 60000, "config": {"net": "Res16UNet34C"}}
    torch.save(content, tmp_path / "x.pth")
    method = method_of(point=square)
    load_weights(method, tmp_path / "x.pth")
    x = verify_points.random_voxels()
    shape = tuple(-(-size // 16) * 16 for size in x.spatial_shape)
    x = type(x)(torch.rand(len(x), 3), x.voxel_bzyx, shape, 2)
    with torch.no_grad():
        wanted = verify_points._unet_outputs(method.point_encoder, x, 10)
        given = peer(verify_points.to_peer(x, x.features, "xyz"), 10)
        assert verify_points.compare_sparse(wanted, given, "xyz")[0] < 1e-5


@pytest.mark.parametrize(("block", "target"), [(BALLS, "openpcdet"), (BALLS, "mmdet3d"), (SHELLS, "mmdet3d")])
def test_pointnet_there_and_back(tmp_path, block, target):
    """What OpenPCDet has no place for (biases, another eps) is in the statistics; the features stay."""
    encoder = write_point_checkpoint(tmp_path / "last.ckpt", block)
    export_points(tmp_path / "last.ckpt", target, tmp_path / "x.pth")
    method = method_of(point=block)
    load_weights(method, tmp_path / "x.pth")
    from helpers import make_view, random_scene

    view = make_view(random_scene(1), random_scene(2))
    with torch.no_grad():
        wanted, given = encoder(view), method.point_encoder(view)
    torch.testing.assert_close(given.xyz, wanted.xyz)
    torch.testing.assert_close(given.features, wanted.features, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------- what it says


def test_the_table_counts_every_branch(tmp_path, caplog):
    torch.save({"state_dict": under("module.encoder_q.", resnet().state_dict())}, tmp_path / "x.pth")
    with caplog.at_level(logging.DEBUG, "simipu3d.weights.load"):
        lines = load_weights(method_of(), tmp_path / "x.pth")
    table = next(record.getMessage() for record in caplog.records if "found as" in record.getMessage())
    rows = [row.split() for row in table.splitlines()[2:]]
    assert rows[1][0] == "image_encoder"
    assert rows[1][-3:] == ["120", "0", "0"]
    assert rows[0][0] == "point_encoder"
    assert rows[0][1:3] == ["nothing", "used"]
    assert sum(line.startswith("used: ") for line in lines) == 120
    assert {"not used: module.encoder_q.fc.weight", "not used: module.encoder_q.fc.bias"} <= set(lines)
    assert sum(record.levelno == logging.DEBUG for record in caplog.records) == len(lines)


def test_a_tensor_of_another_shape_is_refused_or_named(tmp_path):
    state = resnet().state_dict()
    state["layer2.0.conv1.weight"] = torch.zeros(128, 64, 5, 5)
    torch.save(state, tmp_path / "x.pth")
    method = method_of()
    shapes = "(128, 64, 5, 5) in the file, (128, 64, 3, 3) here"
    assert f"1 tensors have another shape, first layer2.0.conv1.weight: {shapes}" in refused(tmp_path / "x.pth", method)
    before = method.image_encoder.trunk.layer2[0].conv1.weight.clone()
    lines = load_weights(method, tmp_path / "x.pth", partial=True)
    assert torch.equal(method.image_encoder.trunk.layer2[0].conv1.weight, before)
    assert f"keeps its random initialisation, another shape: image_encoder.layer2.0.conv1.weight: {shapes}" in lines


@pytest.mark.parametrize("partial", [False, True])
def test_no_random_first_layer_under_trained_ones(tmp_path, partial):
    state = resnet().state_dict()
    state["conv1.weight"] = torch.zeros(64, 4, 7, 7)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"first layer conv1\.weight is \(64, 4, 7, 7\) in the file"):
        load_weights(method_of(), tmp_path / "x.pth", partial=partial)


# ------------------------------------------------------------------------------------------------------- bad input


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def refused(path, method=None):
    method = method or method_of()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(method, path)
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    return " ".join(str(caught.value).split())


def test_pickled_objects_are_refused_and_not_executed(tmp_path):
    path, trap = tmp_path / "x.pth", tmp_path / "executed"
    torch.save({"state_dict": resnet().state_dict(), "hook": Bomb(trap)}, path)
    assert "pickled Python objects, which are never executed" in refused(path)
    path.write_bytes(pickle.dumps(Bomb(trap)))
    refused(path)
    assert not trap.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_and_missing_files_are_one_line(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    assert "no such file" in refused(path)
    save = save_file if suffix == ".safetensors" else torch.save
    save(resnet().state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in refused(path)
    path.write_bytes(b"")
    assert str(path) in refused(path)
    path.write_bytes(b"\x80not a checkpoint at all" * 9)
    assert str(path) in refused(path)


def test_a_file_of_which_nothing_fits_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3), "conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "x.pth")
    message = refused(tmp_path / "x.pth")
    assert "nothing in it fits" in message
    assert "image_encoder 1 of 60 trainable tensors" in message
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    assert "holds no named tensors" in refused(tmp_path / "x.pth")


def test_transposed_sparse_weights_are_refused_with_their_shape(tmp_path):
    """(k, k, k, out, in) of some spconv 2.0: where in = out it looks like spconv 1.x, the others tell."""
    source, _ = random_encoder(VOXEL)
    state = {n: v.permute(1, 2, 3, 0, 4) if v.dim() == 5 else v for n, v in source.state_dict().items()}
    torch.save({"model_state": under("backbone_3d.", state)}, tmp_path / "x.pth")
    assert "(3, 3, 3, 16, 4) in the file, (16, 3, 3, 3, 4) here" in refused(tmp_path / "x.pth", method_of(point=VOXEL))


def test_an_encoder_that_is_in_it_twice_is_refused(tmp_path):
    state = resnet().state_dict()
    torch.save(under("left.", state) | under("right.", state), tmp_path / "x.pth")
    assert "is in it 2 times, under 'left.', 'right.'" in refused(tmp_path / "x.pth")


def test_not_a_number_is_refused(tmp_path):
    state = resnet().state_dict()
    state["layer1.0.conv1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "x.pth")
    assert "NaN" in refused(tmp_path / "x.pth")


def test_an_export_for_another_intensity_is_refused(tmp_path):
    write_point_checkpoint(tmp_path / "last.ckpt", VOXEL)
    export_points(tmp_path / "last.ckpt", "openpcdet", tmp_path / "x.pth", intensity_scale=255.0)
    assert "255 times" in refused(tmp_path / "x.pth", method_of(point=VOXEL))


# ------------------------------------------------------------------------------------------------- another network


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
@pytest.mark.parametrize("given", ["resnet34", "resnet50"])
def test_a_deeper_resnet_is_refused_though_its_names_fit(tmp_path, given, prefix):
    """Every tensor of a ResNet-18 stands in a ResNet-34, with its shape, and computes something else without the others."""
    network = getattr(import_torchvision().models, given)(weights=None)
    torch.save(under(prefix, network.state_dict()), tmp_path / "x.pth")
    assert "image_encoder none, it is another network there: deeper, by layer1.2, layer2.2" in refused(
        tmp_path / "x.pth"
    )


def test_a_resnet_of_other_widths_is_refused(tmp_path):
    state = resnet().state_dict()
    state |= {f"layer{n}.0.conv1.weight": torch.zeros(1, 1, 3, 3) for n in (1, 2, 3)}
    torch.save(state, tmp_path / "x.pth")
    assert "3 other shapes, as of layer1.0.conv1.weight" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize("own", [False, True])
def test_a_deeper_unet_is_refused(tmp_path, own):
    shallow = UNET | {"output": "encoder", "out_channels": 32}
    deep = shallow | {"layers": [1, 2, 1, 1, 1, 1, 1, 1]}
    if own:
        save_run(tmp_path / "x.pth", method_of(point=deep, image={"name": "resnet34"}), deep, {"name": "resnet34"})
    else:
        torch.save(random_encoder(deep)[0].state_dict(), tmp_path / "x.pth")
    assert "point_encoder none, it is another network there: deeper, by enc2.1" in refused(
        tmp_path / "x.pth", method_of(point=shallow)
    )


def test_a_longer_row_of_set_abstractions_gives_its_beginning(tmp_path):
    longer, _ = random_encoder(BALLS | {"layers": [*BALLS["layers"], BALLS["layers"][0]]})
    torch.save(longer.state_dict(), tmp_path / "x.pth")
    method = method_of(point=BALLS)
    load_weights(method, tmp_path / "x.pth")
    for name, value in method.point_encoder.state_dict().items():
        assert torch.equal(value, longer.state_dict()[name]), name


def save_run(path, method, point, image):
    """As pre-training writes a checkpoint."""
    config = BLOCKS | {"method": "simipu", "point_encoder": point, "image_encoder": image}
    run = {"config": config, "point_columns": list(COLUMNS), "version": "0", "git_commit": "", "epoch": 1}
    run |= {key: None for key in RUN_KEYS if key not in run} | {"method": "simipu"}
    torch.save({"state_dict": under("method.", method.state_dict()), "simipu3d": run}, path)


def test_our_own_runs_keep_their_function_under_another_normalisation(tmp_path):
    """Pictures, eps and biases of the run that wrote the checkpoint are folded into those of the new one."""
    source = randomise(method_of(point=RES, image=RESNET | RELEASED)).eval()
    save_run(tmp_path / "x.ckpt", source, RES, RESNET | RELEASED)
    method = method_of(point=RES | {"use_bias": False}, image=RESNET)
    load_weights(method, tmp_path / "x.ckpt")
    images, size = verify.fixed_pictures(source.image_encoder)
    x = verify_points.random_voxels()
    x = x.with_features(torch.rand(len(x), 4))
    with torch.no_grad():
        wanted, given = (
            m.image_encoder(m.image_encoder.normalise(images, size))[-1].features for m in (source, method)
        )
        voxels, same_voxels = (m.point_encoder.stages(x)[-1].features for m in (source, method))
    assert (wanted - given).abs().max() < 1e-4 * wanted.abs().max()
    assert (voxels - same_voxels).abs().max() < 1e-4 * voxels.abs().max()


def test_biases_of_a_detector_go_into_the_means_of_an_encoder_without_them(tmp_path):
    source, _ = random_encoder(RES)
    torch.save({"model_state": under("backbone_3d.", source.state_dict())}, tmp_path / "x.pth")
    method = method_of(point=RES | {"use_bias": False})
    load_weights(method, tmp_path / "x.pth")
    x = verify_points.random_voxels()
    x = x.with_features(torch.rand(len(x), 4))
    with torch.no_grad():
        wanted, given = (encoder.stages(x)[-1].features for encoder in (source, method.point_encoder))
    assert (wanted - given).abs().max() < 1e-4 * wanted.abs().max()


def test_one_ball_there_and_back(tmp_path):
    source = write_point_checkpoint(tmp_path / "last.ckpt", SINGLE)
    for target in ("openpcdet", "mmdet3d"):
        export_points(tmp_path / "last.ckpt", target, tmp_path / "x.pth", overwrite=True)
        method = method_of(point=SINGLE)
        load_weights(method, tmp_path / "x.pth")
        view = PointView(torch.rand(300, 4) * 3, torch.zeros(300).long(), torch.arange(300), torch.eye(4)[None])
        with torch.no_grad():
            wanted, given = (encoder(view).features for encoder in (source, method.point_encoder))
        assert (wanted - given).abs().max() < 1e-4 * wanted.abs().max()


def test_a_folder_is_told_as_such(tmp_path):
    assert "is a folder; give the file in it" in refused(tmp_path)


def test_a_run_with_another_point_encoder_gives_its_image_branch(tmp_path, caplog):
    """Both have `conv_input` and `conv1` of equal shapes."""
    source = randomise(method_of(point=RES, image=RESNET))
    save_run(tmp_path / "x.ckpt", source, RES, RESNET)
    method = method_of(point=VOXEL)
    drawn = {name: value.clone() for name, value in method.point_encoder.state_dict().items()}
    lines = load_weights(method, tmp_path / "x.ckpt")
    assert all(torch.equal(value, drawn[name]) for name, value in method.point_encoder.state_dict().items())
    assert torch.equal(method.image_encoder.trunk.conv1.weight, source.image_encoder.trunk.conv1.weight)
    assert "keeps its random initialisation: point_encoder.conv_input.0.weight" in lines
    assert "another network there: voxel_res_backbone8x; it keeps its random initialisation" in caplog.text
