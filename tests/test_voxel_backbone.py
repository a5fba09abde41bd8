"""The voxel backbones are OpenPCDet's networks, and their tokens stand where the points are."""

import numpy as np
import pytest
import torch
from helpers import make_view, random_scene, randomise_norms
from torch.nn import functional as F

from simipu3d.config import parse_part
from simipu3d.encoders.sparse import SparseTensor
from simipu3d.encoders.sparse.tensor import linear_key
from simipu3d.encoders.voxel_backbone import VoxelBackbone8x, VoxelResBackbone8x
from simipu3d.errors import UserError
from simipu3d.registry import POINT_ENCODERS

NAMES = ["voxel_backbone8x", "voxel_res_backbone8x"]
# Powers of two, so that moving a scene by whole cells is exact in floating point: 64 x 48 x 24 voxels.
SMALL = {"voxel_size": [0.125, 0.125, 0.25], "point_range": [-4.0, -2.0, -2.0, 4.0, 4.0, 4.0]}


def build(name, columns=("x", "y", "z", "intensity"), **keys):
    entry = POINT_ENCODERS[name]
    torch.manual_seed(0)
    block = {"name": name, "sparse_backend": "torch", **SMALL, **keys}
    return entry.target(parse_part("point_encoder", POINT_ENCODERS, block), point_columns=columns)


def expected_shapes(columns, residual, bias, output_conv):
    """The table of OpenPCDet's names and shapes, written out."""
    shapes = {}

    def norm(name, width):
        shapes.update({f"{name}.{key}": (width,) for key in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    def convolution(name, out, kernel, into):
        shapes[f"{name}.0.weight"] = (out, *kernel, into)
        norm(f"{name}.1", out)

    cube = (3, 3, 3)
    convolution("conv_input", 16, cube, columns)
    widths = {1: 16, 2: 32, 3: 64, 4: 128 if residual else 64}
    for stage, width in widths.items():
        if stage > 1:
            convolution(f"conv{stage}.0", width, cube, widths[stage - 1])
        first = 0 if stage == 1 else 1
        for block in range(first, first + (1 if stage == 1 and not residual else 2)):
            if not residual:
                convolution(f"conv{stage}.{block}", width, cube, width)
                continue
            for half in ("1", "2"):
                shapes[f"conv{stage}.{block}.conv{half}.weight"] = (width, *cube, width)
                if bias:
                    shapes[f"conv{stage}.{block}.conv{half}.bias"] = (width,)
                norm(f"conv{stage}.{block}.bn{half}", width)
    if output_conv:
        convolution("conv_out", 128, (3, 1, 1), widths[4])
    return shapes


@pytest.mark.parametrize(
    ("name", "keys", "tensors", "parameters"),
    [
        ("voxel_backbone8x", {"output_conv": True}, 72, 711_872),
        ("voxel_backbone8x", {}, 66, 687_040),
        ("voxel_res_backbone8x", {"output_conv": True}, 142, 2_694_880),
        ("voxel_res_backbone8x", {"output_conv": True, "use_bias": False}, 126, None),
        ("voxel_res_backbone8x", {}, 136, 2_645_472),
    ],
)
@pytest.mark.parametrize("columns", [4, 5])
def test_names_and_shapes_are_openpcdets(name, keys, tensors, parameters, columns):
    net = build(name, ("x", "y", "z", "intensity", "time")[:columns], **keys)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    residual, output_conv = "res" in name, keys.get("output_conv", False)
    assert shapes == expected_shapes(columns, residual, keys.get("use_bias", True), output_conv)
    assert len(shapes) == tensors
    if columns == 4 and parameters:
        assert sum(p.numel() for p in net.parameters()) == parameters
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d)} == {1e-3}
    assert {m.momentum for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d)} == {0.01}


class DenseNet:
    """Both backbones on dense grids with a mask of active cells, from the tensors of a state dict alone (eval mode)."""

    def __init__(self, state, residual):
        self.state, self.residual = state, residual

    def conv(self, x, name, **options):
        return F.conv3d(
            x, self.state[f"{name}.weight"].permute(0, 4, 1, 2, 3), self.state.get(f"{name}.bias"), **options
        )

    def norm(self, x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.{key}"] for key in keys), eps=1e-3)

    def layer(self, x, mask, name, **options):
        return torch.relu(self.norm(self.conv(x, f"{name}.0", **options), f"{name}.1")) * mask

    def block(self, x, mask, name):
        inner = torch.relu(self.norm(self.conv(x, f"{name}.conv1", padding=1), f"{name}.bn1")) * mask
        return torch.relu(self.norm(self.conv(inner, f"{name}.conv2", padding=1), f"{name}.bn2") + x) * mask

    def stages(self, x, mask):
        outputs = []
        for stage in (1, 2, 3, 4):
            if stage == 1:
                x, names = self.layer(x, mask, "conv_input", padding=1), ["conv1.0", "conv1.1"]
            else:
                options = {"stride": 2, "padding": (0, 1, 1) if stage == 4 else 1}
                mask = (F.conv3d(mask, torch.ones(1, 1, 3, 3, 3, dtype=mask.dtype), **options) > 0).to(mask.dtype)
                x, names = self.layer(x, mask, f"conv{stage}.0", **options), [f"conv{stage}.1", f"conv{stage}.2"]
            for name in names:
                if self.residual:
                    x = self.block(x, mask, name)
                elif f"{name}.0.weight" in self.state:
                    x = self.layer(x, mask, name, padding=1)
            outputs.append((x, mask))
        options = {"stride": (2, 1, 1)}
        mask = (F.conv3d(mask, torch.ones(1, 1, 3, 1, 1, dtype=mask.dtype), **options) > 0).to(mask.dtype)
        return outputs, self.layer(x, mask, "conv_out", **options)


@pytest.mark.parametrize("name", NAMES)
def test_stages_and_map_equal_a_dense_network(name):
    """The wiring, written again without sparse tensors: every stage, its sites, and the bird's-eye-view map."""
    # 41, 21, 11, 5 and, after conv_out, 2 cells high, as in the real grids.
    keys = {"voxel_size": [0.5, 0.5, 0.1], "point_range": [0, 0, 0, 9, 12, 4.0], "output_conv": True}
    net = randomise_norms(build(name, **keys)).double().eval()
    sites = (torch.rand(2, *net.sparse_shape, generator=torch.Generator().manual_seed(3)) < 0.004).nonzero()
    features = torch.randn(len(sites), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    voxels = SparseTensor(features, sites, net.sparse_shape, 2)
    mask = voxels.with_features(torch.ones_like(features[:, :1])).dense()
    outputs, bev = DenseNet(net.state_dict(), "res" in name).stages(voxels.dense(), mask)
    stages = net.stages(voxels)
    assert all(0 < len(stage) < stage.batch_size * np.prod(stage.spatial_shape) for stage in stages[:3])
    for stage, (dense, active) in zip(stages, outputs, strict=True):
        assert torch.equal(stage.voxel_bzyx, active[:, 0].nonzero())
        torch.testing.assert_close(stage.dense(), dense)
    ours = net.bev_map(stages[-1])
    assert ours.shape == (2, 128 * bev.shape[2], *bev.shape[3:])
    torch.testing.assert_close(ours.view(bev.shape), bev)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [True, False])
def test_backends_agree_on_the_whole_network(name, train):
    pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    # Not any two scenes: in some, as 1 and 2, a value before a ReLU lies within float32's rounding of 0, and its side depends on
    # the number of threads. In float64 the gradients of those scenes agree with spconv's to 3e-6, as they do here in float32.
    view = make_view(random_scene(7), random_scene(8))
    tokens, gradients = {}, {}
    for backend in ("torch", "spconv"):
        net = randomise_norms(build(name, sparse_backend=backend)).train(train)
        tokens[backend] = net(view)
        # Fixed weights: in training mode a plain sum would have next to no gradient behind BatchNorm.
        readout = torch.linspace(-1, 1, tokens[backend].features.numel()).view_as(tokens[backend].features)
        (tokens[backend].features * readout).sum().backward()
        gradients[backend] = {key: p.grad for key, p in net.named_parameters()}
    ours, theirs = tokens["torch"], tokens["spconv"]
    assert torch.equal(ours.xyz, theirs.xyz)
    assert torch.equal(ours.batch_index, theirs.batch_index)
    assert (ours.features - theirs.features).abs().max() <= 1e-4 * ours.features.abs().max()
    for key, gradient in gradients["torch"].items():
        if train and key.endswith(("conv1.bias", "conv2.bias")):
            continue  # zero but for rounding: the BatchNorm behind takes the bias out
        assert (gradient - gradients["spconv"][key]).abs().max() <= 1e-4 * gradient.abs().max(), key


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    net = build(name, use_bias=False) if "res" in name else build(name)
    net(make_view(random_scene(1), random_scene(2))).features.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
    net = build(name, output_conv=True)
    net.bev_map(net.stages(net.voxelize(make_view(random_scene(1)))[0])[-1]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_steps_repeat_bit_for_bit(name):
    def step():
        net = build(name)
        tokens = net(make_view(random_scene(1, 1000), random_scene(2, 800)))
        tokens.features.square().sum().backward()
        return [tokens.xyz, tokens.features, *(p.grad for p in net.parameters())]

    first, second = step(), step()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def slow_tokens(net, points, shape):
    """One scene's token places by the definition: a loop over points and over all receptive centres of the grid."""
    size = np.array(net.config.voxel_size)
    low = np.array(net.config.point_range[:3])
    high = np.array(net.config.point_range[3:])
    # x and y: stride 8 from the centre of voxel 0; z: the unpadded last layer starts one level-3 cell (4 voxels) up.
    centres = [low[i] + (8 * np.arange(shape[2 - i]) + (0, 0, 4)[i] + 0.5) * size[i] for i in range(3)]
    groups = {}
    for point in np.asarray(points, dtype=np.float64):
        if ((point[:3] >= low) & (point[:3] < high)).all():
            x, y, z = (int(np.argmin(np.round(np.abs(centres[i] - point[i]), 9))) for i in range(3))
            groups.setdefault((z, y, x), []).append(point[:3])
    return {cell: np.mean(group, axis=0) for cell, group in sorted(groups.items())}


# 59 x 45 x 23 voxels, odd at every level but one; 64 x 48 x 24 shrink evenly.
ODD = {"point_range": [-4.0, -2.0, -2.0, 3.375, 3.625, 3.75]}


@pytest.mark.parametrize("grid", [{}, ODD])
@pytest.mark.parametrize("seed", range(3))
def test_a_token_is_the_mean_of_the_points_nearest_to_its_receptive_centre(seed, grid):
    net = build("voxel_backbone8x", **grid).eval()
    # Some points beyond the range on every side, none exactly between two centres.
    points = random_scene(seed, low=(-5.0, -3.0, -3.0), high=(5.0, 5.0, 5.0)) + 1 / 1024
    view = make_view(points)
    conv4 = net.stages(net.voxelize(view)[0])[-1]
    tokens = net(view)
    expected = slow_tokens(net, points, conv4.spatial_shape)
    assert len(expected) > 50
    torch.testing.assert_close(tokens.xyz.double(), torch.tensor(np.array(list(expected.values()))), atol=1e-6, rtol=0)
    cells = torch.tensor([(0, *cell) for cell in expected])
    rows = torch.searchsorted(linear_key(conv4.voxel_bzyx, conv4.spatial_shape), linear_key(cells, conv4.spatial_shape))
    assert torch.equal(conv4.voxel_bzyx[rows], cells)  # the nearest cell is always active
    assert torch.equal(tokens.features, conv4.features[rows])
    assert (tokens.source_index == -1).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_receptive_centres_are_where_gradients_come_from(axis):
    """A row of active voxels along one axis: the voxels that reach an inner conv4 cell lie evenly round its centre."""
    length = 160
    cells = [16, 16, 16]
    cells[axis] = length
    z, y, x = cells
    net = build("voxel_backbone8x", voxel_size=[1.0, 1.0, 1.0], point_range=[0, 0, 0, x, y, z]).double().eval()
    for parameter in net.parameters():
        parameter.data.abs_()
    sites = torch.zeros(length, 4, dtype=torch.int64)
    sites[:, 1:] = 8
    sites[:, axis + 1] = torch.arange(length)
    features = torch.ones(length, 4, dtype=torch.float64, requires_grad=True)
    conv4 = net.stages(SparseTensor(features, sites, net.sparse_shape, 1))[-1]
    middle = (conv4.voxel_bzyx[:, axis + 1] == 9).nonzero()[0]
    conv4.features[middle].sum().backward()
    reached = features.grad.abs().sum(1).nonzero().flatten()
    stride, centre = net.receptive_grid()
    assert reached.min() > 0
    assert reached.max() < length - 1
    assert (reached[0] + reached[-1]) / 2 == centre[axis] + 9 * stride[axis]


@pytest.mark.parametrize("name", NAMES)
def test_batch_equals_scenes_one_by_one(name):
    net = randomise_norms(build(name, num_tokens=64)).eval()
    empty, outside = torch.zeros(0, 4), torch.full((5, 4), 100.0)
    scenes = [random_scene(1, 300), empty, random_scene(2, 7), outside, random_scene(3, 500), empty]
    tokens = net(make_view(*scenes))
    assert torch.equal(tokens.batch_index, tokens.batch_index.sort().values)
    counts = torch.bincount(tokens.batch_index, minlength=6).tolist()
    assert counts[1] == counts[3] == counts[5] == 0
    assert counts[0] == counts[4] == 64
    assert 0 < counts[2] <= 7
    for item, scene in enumerate(scenes):
        alone = net(make_view(scene))
        mine = tokens.batch_index == item
        assert torch.equal(alone.xyz, tokens.xyz[mine])
        torch.testing.assert_close(alone.features, tokens.features[mine])


@pytest.mark.parametrize("name", NAMES)
def test_duplicates_and_the_order_of_points_change_nothing(name):
    net = randomise_norms(build(name)).eval()
    scene = random_scene(4)
    order = torch.randperm(2 * len(scene), generator=torch.Generator().manual_seed(0))
    alone, double = net(make_view(scene)), net(make_view(torch.cat([scene, scene])[order]))
    torch.testing.assert_close(alone.xyz, double.xyz)
    torch.testing.assert_close(alone.features, double.features)


@pytest.mark.parametrize("name", NAMES)
def test_the_phase_within_a_cell_matters(name):
    """One voxel further, the strided layers see others; only whole cells (the test below) leave the features alone."""
    net = randomise_norms(build(name)).eval()
    net.conv_input[0].weight.data[..., :3] = 0
    sums = []
    for step in (0.0, 0.125):
        scene = random_scene(3, low=(-3.0, -1.0, -2.0), high=(3.0, 3.0, 4.0)) + torch.tensor([step, 0, 0, 0])
        sums.append(net.stages(net.voxelize(make_view(scene))[0])[-1].features.sum(0))
    assert (sums[0] - sums[1]).abs().max() > 1e-3


def test_points_out_of_range_change_nothing():
    net = build("voxel_backbone8x").eval()
    scene = random_scene(1)
    far = random_scene(2, low=(4.0, 4.0, 4.0), high=(9.0, 9.0, 9.0))
    alone, beside = net(make_view(scene)), net(make_view(torch.cat([far, scene, far])))
    assert torch.equal(alone.xyz, beside.xyz)
    assert torch.equal(alone.features, beside.features)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("points", [0, 1])
@pytest.mark.parametrize("backend", ["torch", "spconv"])
def test_nearly_nothing_survives_training_mode(name, points, backend):
    if backend == "spconv":
        pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    net = build(name, sparse_backend=backend)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    tokens = net(make_view(torch.full((points, 4), 0.5), torch.zeros(0, 4)))
    assert tokens.xyz.shape == (points, 3)
    assert tokens.features.shape == (points, net.out_channels)
    tokens.features.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())
    if points == 0:
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("cells", [(1, 0), (0, -1), (2, 1)])
def test_moving_the_scene_by_whole_cells_moves_the_tokens(cells):
    """8 voxels are one cell: the tokens go along; with the coordinate inputs switched off, features stay the same."""
    net = randomise_norms(build("voxel_backbone8x", point_range=[-16.0, -16.0, -2.0, 16.0, 16.0, 4.0])).eval()
    net.conv_input[0].weight.data[..., :3] = 0
    scene = random_scene(5)
    shift = torch.tensor([cells[0] * 8 * 0.125, cells[1] * 8 * 0.125, 0, 0])
    here, there = net(make_view(scene)), net(make_view(scene + shift))
    torch.testing.assert_close(there.xyz, here.xyz + shift[:3], atol=1e-6, rtol=0)
    assert torch.equal(there.features, here.features)


def test_thinning_takes_the_farthest_tokens_in_order():
    scene = random_scene(6, 2000)
    everything = build("voxel_backbone8x").eval()(make_view(scene))
    tokens = build("voxel_backbone8x", num_tokens=50).eval()(make_view(scene))
    assert len(tokens.xyz) == 50 < len(everything.xyz)
    chosen, nearest = [0], torch.full((len(everything.xyz),), torch.inf)
    for _ in range(49):
        nearest = torch.minimum(nearest, (everything.xyz - everything.xyz[chosen[-1]]).square().sum(1))
        chosen.append(int(nearest.argmax()))
    assert torch.equal(tokens.xyz, everything.xyz[sorted(chosen)])
    assert torch.equal(tokens.features, everything.features[sorted(chosen)])


def test_wrong_keys_are_named():
    def message(**keys):
        with pytest.raises(UserError) as error:
            build("voxel_backbone8x", **keys)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "whole number of voxels" in message(voxel_size=[0.3, 0.125, 0.25])
    assert "whole number of voxels" in message(point_range=[4.0, -2.0, -2.0, -4.0, 4.0, 4.0])
    assert "shrinks by 8" in message(point_range=[-4.0, -2.0, -2.0, 4.0, 4.0, -1.5])
    assert "output_conv" in message(last_pad=1)
    assert "use_bias" in message(use_bias=True)
    assert "sparse_backend" in message(sparse_backend="cuda")
    with pytest.raises(ValueError, match="x, y, z"):
        build("voxel_backbone8x", columns=("intensity", "x", "y", "z"))
    net = build("voxel_backbone8x")
    conv4 = net.stages(net.voxelize(make_view(random_scene(1)))[0])[-1]
    with pytest.raises(ValueError, match="output_conv: true"):
        net.bev_map(conv4)


def test_registered_classes():
    assert POINT_ENCODERS["voxel_backbone8x"].target is VoxelBackbone8x
    assert POINT_ENCODERS["voxel_res_backbone8x"].target is VoxelResBackbone8x
    assert [build(name).out_channels for name in NAMES] == [64, 128]


@pytest.mark.parametrize("frame", ["000000", "000001", "000002"])
def test_a_real_frame(samples, frame):
    """KITTI's grid and a whole scan: every point in range has a site, more than half of the sites have no point."""
    points = np.fromfile(samples / f"kitti/training/velodyne/{frame}.bin", dtype=np.float32).reshape(-1, 4)
    net = build("voxel_backbone8x", voxel_size=[0.05, 0.05, 0.1], point_range=[0, -40, -3, 70.4, 40, 1]).eval()
    view = make_view(torch.from_numpy(points))
    with torch.no_grad():
        voxels, in_range = net.voxelize(view)
        stages = net.stages(voxels)
        owners = net.owners(view, stages[-1])[in_range]
        tokens = net(view)
    shapes = [stage.spatial_shape for stage in stages]
    assert shapes == [(41, 1600, 1408), (21, 800, 704), (11, 400, 352), (5, 200, 176)]
    assert owners.min() >= 0
    share_without = 1 - len(owners.unique()) / len(stages[-1])
    assert 0.5 < share_without < 0.7
    assert len(tokens.xyz) == 1024
    low, high = torch.tensor([0, -40, -3.0]), torch.tensor([70.4, 40, 1])
    assert ((tokens.xyz >= low) & (tokens.xyz <= high)).all()
