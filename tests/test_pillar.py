"""The pillar encoder is PointPillars' features under PillarNet's backbone, and the traps of sparse grids do not catch it."""

import numpy as np
import pytest
import torch
from helpers import make_view, random_scene, randomise_norms
from torch.nn import functional as F

from simipu3d.config import parse_part
from simipu3d.encoders.pillar import PillarEncoder
from simipu3d.encoders.sparse import SparseTensor
from simipu3d.encoders.sparse.tensor import linear_key
from simipu3d.errors import UserError
from simipu3d.registry import POINT_ENCODERS

# Powers of two, so that moving a scene by whole cells is exact in floating point: 48 x 64 pillars, half of them at
# negative coordinates.
SMALL = {"pillar_size": [0.125, 0.125], "point_range": [-4.0, -2.0, -2.0, 4.0, 4.0, 4.0], "widths": [4, 5, 6, 8]}
COLUMNS = ("x", "y", "z", "intensity", "time")


def build(columns=COLUMNS[:4], **keys):
    torch.manual_seed(0)
    block = {"name": "pillar", "sparse_backend": "torch", **SMALL, **keys}
    return PillarEncoder(parse_part("point_encoder", POINT_ENCODERS, block), point_columns=columns)


def expected_shapes(columns, blocks):
    """OpenPCDet's names and shapes of DynamicPillarVFE and of the sparse stages of its two pillar backbones."""
    shapes = {"vfe.pfn_layers.0.linear.weight": (32, columns + 6)}

    def norm(name, width):
        shapes.update({f"{name}.{key}": (width,) for key in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    norm("vfe.pfn_layers.0.norm", 32)
    for stage, width in enumerate((32, 64, 128, 256), start=1):
        if stage > 1:
            shapes[f"conv{stage}.0.0.weight"] = (width, 3, 3, width // 2)
            norm(f"conv{stage}.0.1", width)
        for block in (0, 1) if stage == 1 else (1, 2):
            name = f"conv{stage}.{block}"
            if blocks == "plain":
                shapes[f"{name}.0.weight"] = (width, 3, 3, width)
                norm(f"{name}.1", width)
                continue
            for half in "12":
                shapes[f"{name}.conv{half}.weight"] = (width, 3, 3, width)
                shapes[f"{name}.conv{half}.bias"] = (width,)
                norm(f"{name}.bn{half}", width)
    return shapes


@pytest.mark.parametrize(("blocks", "parameters"), [("residual", 3_527_552), ("plain", 1_956_992)])
@pytest.mark.parametrize("columns", [3, 4, 5])
def test_names_and_shapes_are_openpcdets(blocks, parameters, columns):
    net = build(COLUMNS[:columns], blocks=blocks, widths=[32, 64, 128, 256])
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == expected_shapes(columns, blocks)
    assert sum(p.numel() for p in net.parameters()) == parameters + 32 * (columns - 4)
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    assert net.out_channels == 256
    assert POINT_ENCODERS["pillar"].target is PillarEncoder


class DenseNet:
    """The whole way from points to conv4 on dense grids, from the tensors of a state dict alone (eval mode)."""

    def __init__(self, net):
        self.state, self.config, self.shape = net.state_dict(), net.config, net.sparse_shape

    def norm(self, x, name):
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.{key}"] for key in keys), eps=1e-3)

    def conv(self, x, name, **options):
        return F.conv2d(x, self.state[f"{name}.weight"].movedim(-1, 1), self.state.get(f"{name}.bias"), **options)

    def layer(self, x, mask, name, **options):
        return torch.relu(self.norm(self.conv(x, f"{name}.0", **options), f"{name}.1")) * mask

    def block(self, x, mask, name):
        if f"{name}.0.weight" in self.state:
            return self.layer(x, mask, name, padding=1)
        inner = torch.relu(self.norm(self.conv(x, f"{name}.conv1", padding=1), f"{name}.bn1")) * mask
        return torch.relu(self.norm(self.conv(inner, f"{name}.conv2", padding=1), f"{name}.bn2") + x) * mask

    def pillars(self, scenes):
        """The image of pillar features, point by point and pillar by pillar, and its mask."""
        low, high = np.array(self.config.point_range).reshape(2, 3)
        size = np.array([*self.config.pillar_size, high[2] - low[2]])
        image = torch.zeros(len(scenes), self.config.widths[0], *self.shape, dtype=torch.float64)
        mask = torch.zeros(len(scenes), 1, *self.shape, dtype=torch.float64)
        for item, scene in enumerate(scenes):
            groups = {}
            for point in np.asarray(scene, dtype=np.float64):
                if ((point[:3] >= low) & (point[:3] < high)).all():
                    groups.setdefault(tuple(np.floor((point[:3] - low) / size).astype(int)), []).append(point)
            for cell, group in groups.items():
                group = np.array(group)
                from_mean = group[:, :3] - group[:, :3].mean(axis=0)
                from_centre = group[:, :3] - (low + (np.array(cell) + 0.5) * size)
                rows = torch.from_numpy(np.concatenate([group, from_mean, from_centre], axis=1))
                rows = rows @ self.state["vfe.pfn_layers.0.linear.weight"].T
                rows = torch.relu(self.norm(rows, "vfe.pfn_layers.0.norm"))
                image[item, :, cell[1], cell[0]] = rows.amax(0)
                mask[item, :, cell[1], cell[0]] = 1
        return image, mask

    def stages(self, x, mask):
        outputs = []
        for stage in (1, 2, 3, 4):
            names = [f"conv{stage}.{i}" for i in ((0, 1) if stage == 1 else (1, 2))]
            if stage > 1:
                options = {"stride": 2, "padding": 1}
                mask = (F.conv2d(mask, torch.ones(1, 1, 3, 3, dtype=mask.dtype), **options) > 0).to(mask.dtype)
                x = self.layer(x, mask, f"conv{stage}.0", **options)
            for name in names:
                x = self.block(x, mask, name)
            outputs.append((x, mask))
        return outputs


# 48 x 64 pillars shrink evenly; 45 x 59 are odd at every level: 23 x 30, 12 x 15, 6 x 8.
ODD = {"point_range": [-4.0, -2.0, -2.0, 3.375, 3.625, 4.0]}


@pytest.mark.parametrize("grid", [{}, ODD])
@pytest.mark.parametrize("blocks", ["residual", "plain"])
def test_every_stage_equals_a_dense_network(blocks, grid):
    """Points to pillars (duplicates, points outside and at negative coordinates among them) and all four stages."""
    net = randomise_norms(build(blocks=blocks, **grid)).double().eval()
    first = random_scene(1, 150, low=(-5.0, -3.0, -3.0), high=(5.0, 5.0, 5.0))
    scenes = [torch.cat([first, first[:20]]), random_scene(2, 60)]
    pillars, in_range = net.voxelize(make_view(*scenes))
    dense = DenseNet(net)
    image, mask = dense.pillars(scenes)
    # The offsets are computed in float32, as the points are.
    torch.testing.assert_close(pillars.dense(), image, atol=1e-5, rtol=0)
    assert torch.equal(pillars.voxel_bzyx, mask[:, 0].nonzero())
    assert 0 < int(in_range.sum()) < len(in_range)
    for stage, (expected, active) in zip(net.stages(pillars), dense.stages(pillars.dense(), mask), strict=True):
        assert torch.equal(stage.voxel_bzyx, active[:, 0].nonzero())
        torch.testing.assert_close(stage.dense(), expected)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grid", [{}, ODD])
def test_backends_agree_on_the_whole_network(train, grid):
    pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    view = make_view(random_scene(1), random_scene(2))
    results = []
    for backend in ("torch", "spconv"):
        net = randomise_norms(build(sparse_backend=backend, **grid)).train(train)
        tokens = net(view)
        readout = torch.linspace(-1, 1, tokens.features.numel()).view_as(tokens.features)
        (tokens.features * readout).sum().backward()
        results.append((tokens, {key: p.grad for key, p in net.named_parameters()}))
    (ours, gradients), (theirs, their_gradients) = results
    assert torch.equal(ours.xyz, theirs.xyz)
    assert torch.equal(ours.batch_index, theirs.batch_index)
    assert (ours.features - theirs.features).abs().max() <= 1e-4 * ours.features.abs().max()
    for key, gradient in gradients.items():
        if train and key.endswith(("conv1.bias", "conv2.bias")):
            continue  # zero but for rounding: the BatchNorm behind takes the bias out
        assert (gradient - their_gradients[key]).abs().max() <= 1e-4 * gradient.abs().max(), key


@pytest.mark.parametrize("blocks", ["residual", "plain"])
def test_every_parameter_gets_a_gradient(blocks):
    net = build(blocks=blocks)
    net(make_view(random_scene(1), random_scene(2))).features.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def slow_tokens(net, points, shape):
    """One scene's token places by the definition: a loop over points and over all receptive centres of the grid."""
    low, high = np.array(net.config.point_range).reshape(2, 3)
    centres = [low[i] + (8 * np.arange(shape[1 - i]) + 0.5) * net.config.pillar_size[i] for i in range(2)]
    groups = {}
    for point in np.asarray(points, dtype=np.float64):
        if ((point[:3] >= low) & (point[:3] < high)).all():
            x, y = (int(np.argmin(np.round(np.abs(centres[i] - point[i]), 9))) for i in range(2))
            groups.setdefault((y, x), []).append(point[:3])
    return {cell: np.mean(group, axis=0) for cell, group in sorted(groups.items())}


@pytest.mark.parametrize("grid", [{}, ODD])
@pytest.mark.parametrize("seed", range(3))
def test_a_token_is_the_mean_of_the_points_nearest_to_its_receptive_centre(seed, grid):
    """Every point in range is owned, also those behind the last receptive centre of an odd grid."""
    net = build(**grid).eval()
    points = random_scene(seed, low=(-5.0, -3.0, -3.0), high=(5.0, 5.0, 5.0)) + 1 / 1024
    view = make_view(points)
    pillars, in_range = net.voxelize(view)
    conv4 = net.stages(pillars)[-1]
    assert net.owners(view, conv4)[in_range].min() >= 0
    tokens = net(view)
    expected = slow_tokens(net, points, conv4.spatial_shape)
    assert len(expected) > 30
    torch.testing.assert_close(tokens.xyz.double(), torch.tensor(np.array(list(expected.values()))), atol=1e-6, rtol=0)
    cells = torch.tensor([(0, *cell) for cell in expected])
    rows = torch.searchsorted(linear_key(conv4.voxel_bzyx, conv4.spatial_shape), linear_key(cells, conv4.spatial_shape))
    assert torch.equal(tokens.features, conv4.features[rows])
    assert (tokens.source_index == -1).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_receptive_centres_are_where_gradients_come_from(axis):
    """A row of active pillars along one axis: those that reach an inner conv4 cell lie evenly round its centre."""
    cells = [16, 16]
    cells[axis] = 240
    net = build(pillar_size=[1.0, 1.0], point_range=[0, 0, 0, cells[1], cells[0], 1], blocks="plain").double().eval()
    for parameter in net.parameters():
        parameter.data.abs_()
    sites = torch.full((240, 3), 8)
    sites[:, 0] = 0
    sites[:, axis + 1] = torch.arange(240)
    features = torch.ones(240, 4, dtype=torch.float64, requires_grad=True)
    conv4 = net.stages(SparseTensor(features, sites, net.sparse_shape, 1))[-1]
    conv4.features[(conv4.voxel_bzyx[:, axis + 1] == 14).nonzero()[0]].sum().backward()
    reached = features.grad.abs().sum(1).nonzero().flatten()
    stride, centre = net.receptive_grid()
    assert 0 < reached.min() < reached.max() < 239
    assert (reached[0] + reached[-1]) / 2 == centre[axis] + 14 * stride[axis]


def test_batch_equals_scenes_one_by_one():
    net = randomise_norms(build(num_tokens=32)).eval()
    empty, outside = torch.zeros(0, 4), torch.full((5, 4), 100.0)
    scenes = [random_scene(1, 300), empty, random_scene(2, 7), outside, random_scene(3, 500), empty]
    tokens = net(make_view(*scenes))
    assert torch.equal(tokens.batch_index, tokens.batch_index.sort().values)
    counts = torch.bincount(tokens.batch_index, minlength=6).tolist()
    assert counts[1] == counts[3] == counts[5] == 0
    assert counts[0] == counts[4] == 32
    for item, scene in enumerate(scenes):
        alone = net(make_view(scene))
        mine = tokens.batch_index == item
        assert torch.equal(alone.xyz, tokens.xyz[mine])
        torch.testing.assert_close(alone.features, tokens.features[mine])


def test_duplicates_and_the_order_of_points_change_nothing():
    """The mean and the maximum of a pillar do not hear how often or in which order its points come."""
    net = randomise_norms(build()).eval()
    scene = random_scene(4)
    order = torch.randperm(2 * len(scene), generator=torch.Generator().manual_seed(0))
    alone, double = net(make_view(scene)), net(make_view(torch.cat([scene, scene])[order]))
    torch.testing.assert_close(alone.xyz, double.xyz)
    torch.testing.assert_close(alone.features, double.features)


def without_coordinates(net):
    """The same network, deaf to absolute x, y, z."""
    net.vfe.pfn_layers[0].linear.weight.data[:, :3] = 0
    return net


@pytest.mark.parametrize("cells", [(1, 0), (0, -1), (2, 1)])
def test_moving_the_scene_by_whole_cells_moves_the_tokens(cells):
    """8 pillars are one cell: the tokens go along and features stay, on either side of the origin."""
    net = without_coordinates(randomise_norms(build(point_range=[-16.0, -16.0, -2.0, 16.0, 16.0, 4.0]))).eval()
    scene = random_scene(5)
    shift = torch.tensor([cells[0] * 8 * 0.125, cells[1] * 8 * 0.125, 0, 0])
    here, there = net(make_view(scene)), net(make_view(scene + shift))
    torch.testing.assert_close(there.xyz, here.xyz + shift[:3], atol=1e-6, rtol=0)
    torch.testing.assert_close(there.features, here.features)


def test_the_phase_within_a_cell_matters():
    """One pillar further, the strided layers see others: what moves the tokens by less than a cell changes them."""
    net = without_coordinates(randomise_norms(build(num_tokens=5000))).eval()
    levels = [
        net.stages(net.voxelize(make_view(random_scene(3) + torch.tensor([step, 0, 0, 0])))[0]) for step in (0.0, 0.125)
    ]
    inner = [stages[0].voxel_bzyx[:, 2] for stages in levels]
    assert torch.equal(inner[0][inner[0] < 60] + 1, inner[1][(inner[1] > 0) & (inner[1] < 61)])
    sums = [stages[-1].features.sum(0) for stages in levels]
    assert (sums[0] - sums[1]).abs().max() > 1e-3


@pytest.mark.parametrize("points", [0, 1])
@pytest.mark.parametrize("blocks", ["residual", "plain"])
@pytest.mark.parametrize("backend", ["torch", "spconv"])
def test_nearly_nothing_survives_training_mode(points, blocks, backend):
    """One pillar with one point has no variance: BatchNorm would raise, or write NaN."""
    if backend == "spconv":
        pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    net = build(blocks=blocks, sparse_backend=backend)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    tokens = net(make_view(torch.full((points, 4), -0.0625), torch.zeros(0, 4)))
    assert tokens.xyz.shape == (points, 3)
    assert tokens.features.shape == (points, net.out_channels)
    tokens.features.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())
    if points == 0:
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_steps_repeat_bit_for_bit():
    def step():
        net = build()
        tokens = net(make_view(random_scene(1, 1000), random_scene(2, 800)))
        tokens.features.square().sum().backward()
        return [tokens.xyz, tokens.features, *(p.grad for p in net.parameters()), *net.buffers()]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


def test_thinning_takes_the_farthest_tokens_in_order():
    scene = random_scene(6, 2000)
    everything, tokens = (build(num_tokens=num).eval()(make_view(scene)) for num in (5000, 30))
    chosen, nearest = [0], torch.full((len(everything.xyz),), torch.inf)
    for _ in range(29):
        nearest = torch.minimum(nearest, (everything.xyz - everything.xyz[chosen[-1]]).square().sum(1))
        chosen.append(int(nearest.argmax()))
    assert torch.equal(tokens.xyz, everything.xyz[sorted(chosen)])
    assert torch.equal(tokens.features, everything.features[sorted(chosen)])


def test_wrong_keys_are_named():
    def message(**keys):
        with pytest.raises(UserError) as error:
            build(**keys)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "whole number of pillars" in message(pillar_size=[0.3, 0.125])
    assert "point_range along y" in message(point_range=[-4, 2, -2, 4, -2, 4])
    assert "point_range along z must rise" in message(point_range=[-4, -2, 4, 4, 4, 4])
    assert "(y, x) and shrinks by 8" in message(point_range=[-4, -2, -2, 4, -1.5, 4])
    assert "did you mean pillar_size" in message(voxel_size=[0.1, 0.1])
    assert "blocks" in message(blocks="dense")
    assert "widths" in message(widths=[32, 64])
    with pytest.raises(ValueError, match="x, y, z"):
        build(("intensity", "x", "y", "z"))


@pytest.mark.parametrize("frame", ["000000", "000001"])
def test_a_real_frame(samples, frame):
    """KITTI's grid and a whole scan: the shapes OpenPCDet notes, a site for every point, tokens over the whole range."""
    points = np.fromfile(samples / f"kitti/training/velodyne/{frame}.bin", dtype=np.float32).reshape(-1, 4)
    keys = {"pillar_size": [0.05, 0.05], "point_range": [0, -40, -3, 70.4, 40, 1]}
    net = build(**keys).eval()
    view = make_view(torch.from_numpy(points))
    with torch.no_grad():
        pillars, in_range = net.voxelize(view)
        stages = net.stages(pillars)
        tokens = net(view)
    assert [stage.spatial_shape for stage in stages] == [(1600, 1408), (800, 704), (400, 352), (200, 176)]
    assert net.owners(view, stages[-1])[in_range].min() >= 0
    assert len(tokens.xyz) == 1024
    low, high = torch.tensor([0, -40, -3.0]), torch.tensor([70.4, 40, 1])
    assert ((tokens.xyz >= low) & (tokens.xyz <= high)).all()
    ranges = view.points[in_range, :3].aminmax(dim=0)
    assert (tokens.xyz.amax(0)[:2] > ranges.max[:2] - 3).all()
