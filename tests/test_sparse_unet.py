"""The sparse U-Net is PointContrast's network, the traps of sparse grids do not catch it, and its tokens are the points'."""

import math

import numpy as np
import pytest
import torch
from helpers import make_view, random_scene, randomise_norms
from torch.nn import functional as F

from simipu3d.config import parse_part
from simipu3d.encoders.sparse import SparseTensor
from simipu3d.encoders.sparse_unet import ShortcutBlock, SparseUNet
from simipu3d.errors import UserError
from simipu3d.registry import POINT_ENCODERS

# A power of two, so that moving a scene by whole voxels is exact in floating point.
SMALL = {
    "voxel_size": [0.25, 0.25, 0.25],
    "planes": [5, 6, 7, 8, 6, 5, 4, 3],
    "layers": [2, 1, 1, 2, 1, 2, 1, 1],
    "stem_channels": 4,
    "out_channels": 2,
}


def configure(**keys):
    block = {"name": "sparse_unet34", "sparse_backend": "torch", **keys}
    if block.get("output") == "encoder":
        block.pop("out_channels", None)
    return parse_part("point_encoder", POINT_ENCODERS, block)


def build(columns=("x", "y", "z", "intensity"), **keys):
    torch.manual_seed(0)
    return SparseUNet(configure(**{**SMALL, **keys}), point_columns=columns)


def build_on_meta(**keys):
    """The whole network, without its memory."""
    with torch.device("meta"):
        return SparseUNet(configure(**keys))


def two_scenes():
    """Negative coordinates, odd extents, and corners that lie differently within 16 voxels (of 0.25 m)."""
    first = random_scene(1, 250, low=(-4.0, -3.25, -1.0), high=(2.75, 3.5, 3.0))
    return first, random_scene(2, 200, low=(0.5, -2.25, -4.0), high=(4.0, 4.0, 0.25))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_module_by_module():
    """The table of the reference implementation."""
    net = build_on_meta()
    table = {
        "stem": 2_656,
        "down1": 8_256,
        "enc1": 110_848,
        "down2": 8_256,
        "enc2": 611_200,
        "down3": 32_896,
        "enc3": 3_328_256,
        "down4": 131_328,
        "enc4": 20_388_352,
        "up1": 524_800,
        "dec1": 8_063_488,
        "up2": 262_400,
        "dec2": 2_016_512,
        "up3": 98_496,
        "dec3": 1_091_520,
        "up4": 73_920,
        "dec4": 1_091_520,
        "final": 3_104,
    }
    assert {name: count(child) for name, child in net.named_children()} == table
    assert count(net) == 37_847_808
    kinds = [name for name, _ in net.named_parameters() if name.endswith("bias")]
    assert [name for name in kinds if "bn" not in name and ".1." not in name] == [
        "final.bias"
    ]  # no convolution has one


@pytest.mark.parametrize(
    ("keys", "parameters"),
    [
        ({"variant": "14A"}, 8_016_256),
        ({"variant": "18A"}, 15_484_928),
        ({"variant": "34A"}, 36_598_784),
        ({"variant": "34C", "stem_kernel": 5}, 37_857_216),
        ({"out_channels": 20}, 37_846_644),
        ({"out_channels": 256}, 37_869_536),
        ({"in_channels": 1, "stem_kernel": 5, "out_channels": 64}, 37_852_320),
    ],
)
def test_parameters_of_the_variants(keys, parameters):
    assert count(build_on_meta(**keys)) == parameters


def test_without_decoder_there_is_none():
    full, encoder = build_on_meta(), build_on_meta(output="encoder")
    decoder = [name for name, _ in full.named_children() if name.startswith(("up", "dec", "final"))]
    assert len(decoder) == 9
    assert count(full) - count(encoder) == sum(count(getattr(full, name)) for name in decoder)
    assert (full.out_channels, encoder.out_channels) == (32, 256)
    assert set(encoder.state_dict()) == {key for key in full.state_dict() if not key.startswith(("up", "dec", "final"))}
    with pytest.raises(ValueError, match="output: full"):
        encoder.decode([])


def test_shortcuts_and_batch_norms():
    net = build_on_meta()
    widening = {
        name for name, block in net.named_modules() if isinstance(block, ShortcutBlock) and count(block.shortcut)
    }
    assert widening == {"enc2.0", "enc3.0", "enc4.0", "dec1.0", "dec2.0", "dec3.0", "dec4.0"}
    norms = {name: m for name, m in net.named_modules() if isinstance(m, torch.nn.BatchNorm1d)}
    assert {m.eps for m in norms.values()} == {1e-5}
    in_blocks = {name for name in norms if name.endswith(("bn1", "bn2"))}
    assert len(in_blocks) == 2 * 23
    assert len(norms) == 2 * 23 + 9 + 7
    assert {norms[name].momentum for name in in_blocks} == {0.1}
    assert {norms[name].momentum for name in norms.keys() - in_blocks} == {0.05}


def test_initial_weights():
    """Uniform in +-1/sqrt(inputs * cells); a transposed convolution counts its outputs. BatchNorm starts at 1 and 0."""
    net = build(stem_channels=16, planes=[24, 32, 40, 48, 56, 24, 16, 24], out_channels=8)
    for name, parameter in net.named_parameters():
        weight = parameter.detach()
        if weight.ndim == 1:
            if name != "final.bias":
                assert (weight == (0 if name.endswith("bias") else 1)).all(), name
            continue
        transposed = name.startswith("up")
        width = weight.shape[0] if transposed else weight.shape[-1]
        bound = 1 / math.sqrt(width * math.prod(weight.shape[1:-1]))
        assert 0.95 * bound < weight.abs().max() <= bound, name
        assert abs(float(weight.mean())) < 0.1 * bound, name


class DenseUNet:
    """The network on dense grids with masks of the active cells, from named tensors alone."""

    def __init__(self, net, train):
        self.tensors = {**dict(net.named_parameters()), **{k: v.clone() for k, v in net.named_buffers()}}
        self.depths, self.train = SMALL["layers"], train

    def conv(self, x, name, **options):
        return F.conv3d(x, self.tensors[f"{name}.weight"].permute(0, 4, 1, 2, 3), **options)

    def norm(self, x, mask, name):
        """Statistics of the active cells alone."""
        sites = mask[:, 0].nonzero(as_tuple=True)
        keys = ("running_mean", "running_var", "weight", "bias")
        tensors = [self.tensors[f"{name}.{key}"] for key in keys]
        rows = F.batch_norm(x.permute(0, 2, 3, 4, 1)[sites], *tensors, training=self.train, eps=1e-5)
        out = x.new_zeros(*mask[:, 0].shape, x.shape[1]).index_put(sites, rows)
        return out.permute(0, 4, 1, 2, 3)

    def stage(self, x, mask, name, depth):
        for block in (f"{name}.{i}" for i in range(depth)):
            inner = torch.relu(self.norm(self.conv(x, f"{block}.conv1", padding=1), mask, f"{block}.bn1"))
            inner = self.norm(self.conv(inner, f"{block}.conv2", padding=1), mask, f"{block}.bn2")
            if f"{block}.shortcut.0.weight" in self.tensors:
                x = torch.einsum("bizyx,oi->bozyx", x, self.tensors[f"{block}.shortcut.0.weight"])
                x = self.norm(x, mask, f"{block}.shortcut.1")
            x = torch.relu(inner + x)
        return x

    def __call__(self, x, mask):
        kernel = self.tensors["stem.0.weight"].shape[1]
        x = torch.relu(self.norm(self.conv(x, "stem.0", padding=kernel // 2), mask, "stem.1"))
        levels = [(x, mask)]
        for level in range(1, 5):
            mask = F.max_pool3d(mask, 2)
            x = torch.relu(self.norm(self.conv(x, f"down{level}.0", stride=2), mask, f"down{level}.1"))
            x = self.stage(x, mask, f"enc{level}", self.depths[level - 1])
            levels.append((x, mask))
        for number in range(1, 5):
            skip, mask = levels[4 - number]
            weight = self.tensors[f"up{number}.0.weight"].permute(4, 0, 1, 2, 3)
            x = torch.relu(self.norm(F.conv_transpose3d(x, weight, stride=2), mask, f"up{number}.1"))
            x = self.stage(torch.cat([x, skip], 1), mask, f"dec{number}", self.depths[3 + number])
        x = torch.einsum("bizyx,oi->bozyx", x, self.tensors["final.weight"])
        return levels, (x + self.tensors["final.bias"].view(1, -1, 1, 1, 1)) * mask


def dense_input(scenes, channels=3):
    """Ones in the cells floor(xyz / 0.25) of [-4, 4) m, and where they lie."""
    mask = torch.zeros(len(scenes), 1, 32, 32, 32, dtype=torch.float64)
    for item, scene in enumerate(scenes):
        x, y, z = torch.floor(scene[:, :3].double() / 0.25).long().T + 16
        mask[item, 0, z, y, x] = 1
    return mask.expand(-1, channels, -1, -1, -1), mask


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("stem_kernel", [3, 5])
def test_forward_and_gradients_equal_a_dense_network(train, stem_kernel):
    """Wiring, sites, parents and weights, on a grid without any shift of the scenes but one by 16 voxels for both."""
    net = randomise_norms(build(stem_kernel=stem_kernel)).double().train(train)
    scenes = two_scenes()
    dense_levels, expected = DenseUNet(net, train)(*dense_input(scenes))
    voxels, _ = net.voxelize(make_view(*scenes))
    assert voxels.spatial_shape[0] % 16 == voxels.spatial_shape[1] % 16 == voxels.spatial_shape[2] % 16 == 0
    levels = net.encode(voxels)
    ours = net.decode(levels)
    assert torch.equal(ours.voxel_bzyx, voxels.voxel_bzyx)
    for (dense, mask), level in zip(dense_levels, levels, strict=True):
        sites = mask[:, 0].nonzero()
        assert torch.equal(level.voxel_bzyx[:, 0], sites[:, 0])
        torch.testing.assert_close(level.features, dense.permute(0, 2, 3, 4, 1)[sites.unbind(1)])
    wanted = expected.permute(0, 2, 3, 4, 1)[dense_levels[0][1][:, 0].nonzero(as_tuple=True)]
    torch.testing.assert_close(ours.features, wanted)
    readout = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names, parameters = zip(*net.named_parameters(), strict=True)
    pairs = [torch.autograd.grad((out * readout).sum(), parameters) for out in (ours.features, wanted)]
    for name, a, b in zip(names, *pairs, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("output", ["full", "encoder"])
def test_backends_agree(train, output):
    pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    view = make_view(*two_scenes())
    results = []
    for backend in ("torch", "spconv"):
        net = randomise_norms(build(sparse_backend=backend, output=output, stem_kernel=5)).double().train(train)
        tokens = net(view)
        readout = torch.linspace(-1, 1, tokens.features.numel(), dtype=torch.float64).view_as(tokens.features)
        (tokens.features * readout).sum().backward()
        results.append((tokens, {key: p.grad for key, p in net.named_parameters()}, net.state_dict()))
    (ours, gradients, state), (theirs, their_gradients, their_state) = results
    assert torch.equal(ours.xyz, theirs.xyz)
    assert torch.equal(ours.batch_index, theirs.batch_index)
    torch.testing.assert_close(ours.features, theirs.features)
    torch.testing.assert_close(gradients, their_gradients)
    torch.testing.assert_close(state, their_state)  # running statistics too


@pytest.mark.parametrize("extent", [1, 5, 15, 16, 17])
def test_every_voxel_of_an_odd_extent_gets_its_parents_features(extent):
    """A grid that ends at an odd voxel would lose its last plane on the way down and get zeros on the way up."""
    net = build()
    line = torch.zeros(extent, 4)
    line[:, 0] = (torch.arange(extent) - 3 + 0.5) * 0.25
    for axis in range(3):
        scene = torch.cat([line[:, :3].roll(axis, 1), line[:, 3:]], 1)
        levels = net.encode(net.voxelize(make_view(scene))[0])
        for level in levels[1:]:
            assert len(level) == len(set(torch.floor((torch.arange(extent) - 3) / (2 ** levels.index(level))).tolist()))
        for number, level in enumerate((4, 3, 2, 1), start=1):
            # One input for all: rows differ from 0 wherever there is a parent.
            x = levels[level].with_features(torch.ones(len(levels[level]), net.config.widths[2 + number]))
            up = getattr(net, f"up{number}")[0](x)
            assert torch.equal(up.voxel_bzyx, levels[level - 1].voxel_bzyx)
            assert (up.features != 0).any(dim=1).all()


@pytest.mark.parametrize("output", ["full", "encoder"])
@pytest.mark.parametrize("steps", [(16, 0, 0), (0, -16, 32), (-160, 48, -16)])
def test_moving_the_scene_by_16_voxels_moves_the_tokens(output, steps):
    net = randomise_norms(build(output=output, num_tokens=100)).eval()
    scene = random_scene(3, low=(-7.0, -7.0, -3.0), high=(7.0, 7.0, 3.0))
    shift = torch.tensor([*steps, 0]) * 0.25
    here, there = net(make_view(scene)), net(make_view(scene + shift))
    assert torch.equal(here.features, there.features)
    torch.testing.assert_close(here.xyz + shift[:3], there.xyz, atol=1e-4, rtol=0)


def test_scenes_far_from_each_other_share_a_small_grid():
    """Every scene is moved on its own; one move for all would make the grid as large as the distance between them."""
    near, far = random_scene(1), random_scene(1) + torch.tensor([4000.0, -4000.0, 0, 0])
    voxels, point_voxel = build().voxelize(make_view(near, far))
    assert max(voxels.spatial_shape) <= 48
    first, second = voxels.voxel_bzyx.tensor_split(2)
    assert torch.equal(first[:, 1:], second[:, 1:])
    assert torch.equal(point_voxel[: len(near)] + len(first), point_voxel[len(near) :])


def test_the_phase_within_16_voxels_matters():
    """One voxel further, parents are others: the shift of a scene must not hide that."""
    net = randomise_norms(build(num_tokens=5000)).eval()
    scene = random_scene(3)
    here, there = net(make_view(scene)), net(make_view(scene + torch.tensor([0.25, 0, 0, 0])))
    assert here.features.shape == there.features.shape
    assert (here.features - there.features).abs().max() > 1e-3


@pytest.mark.parametrize("feature", ["ones", "intensity", "offset"])
def test_duplicates_and_the_order_of_points_change_nothing(feature):
    net = randomise_norms(build(point_feature=feature)).eval()
    scene = random_scene(4)
    alone = net(make_view(scene))
    order = torch.randperm(2 * len(scene), generator=torch.Generator().manual_seed(0))
    double = net(make_view(torch.cat([scene, scene])[order]))
    torch.testing.assert_close(alone.xyz, double.xyz)
    torch.testing.assert_close(alone.features, double.features)


@pytest.mark.parametrize("output", ["full", "encoder"])
@pytest.mark.parametrize("points", [0, 1])
@pytest.mark.parametrize("backend", ["torch", "spconv"])
def test_nearly_nothing_survives_training_mode(output, points, backend):
    """One voxel has no variance: BatchNorm would raise, or write NaN."""
    if backend == "spconv":
        pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    net = build(output=output, sparse_backend=backend)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    tokens = net(make_view(torch.full((points, 4), -0.5), torch.zeros(0, 4)))
    assert tokens.xyz.shape == (points, 3)
    assert tokens.features.shape == (points, net.out_channels)
    tokens.features.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("width", [3, 5])
def test_the_1x1_layer_multiplies_by_its_matrix(width):
    """Out from in, also where both are equally many and a transposed matrix would fit."""
    block = ShortcutBlock(3, 5, "a", configure()).eval()
    block.shortcut[0] = torch.nn.Linear(3, width, bias=False)
    block.shortcut[1] = torch.nn.Identity()
    features = torch.randn(4, 3)
    with torch.no_grad():
        block.shortcut[0].weight.copy_(torch.arange(3.0 * width).view(width, 3))
    expected = [[sum(3 * o * v + i * v for i, v in enumerate(row)) for o in range(width)] for row in features.tolist()]
    torch.testing.assert_close(block.shortcut(features), torch.tensor(expected))


@pytest.mark.parametrize("output", ["full", "encoder"])
def test_batch_equals_scenes_one_by_one(output):
    net = randomise_norms(build(output=output, num_tokens=40, point_range=[-9, -9, -9, 9, 9, 9])).eval()
    empty, outside = torch.zeros(0, 4), torch.full((5, 4), 100.0)
    wide = random_scene(3, 300, low=(-8.0, -8.0, -8.0), high=(8.0, 8.0, 8.0))
    scenes = [two_scenes()[0], empty, random_scene(2, 7), outside, wide, empty]
    tokens = net(make_view(*scenes))
    assert torch.equal(tokens.batch_index, tokens.batch_index.sort().values)
    counts = torch.bincount(tokens.batch_index, minlength=6).tolist()
    assert counts[1] == counts[3] == counts[5] == 0
    assert counts[4] == 40
    for item, scene in enumerate(scenes):
        alone = net(make_view(scene))
        mine = tokens.batch_index == item
        assert torch.equal(alone.xyz, tokens.xyz[mine])
        torch.testing.assert_close(alone.features, tokens.features[mine])


@pytest.mark.parametrize("output", ["full", "encoder"])
def test_every_parameter_of_the_whole_network_gets_a_gradient(output):
    torch.manual_seed(0)
    net = SparseUNet(configure(output=output, voxel_size=[0.25, 0.25, 0.25]))
    scene = random_scene(1, 100, low=(-10.0, -10.0, -4.0), high=(10.0, 10.0, 4.0))
    tokens = net(make_view(scene))
    readout = torch.linspace(-1, 1, tokens.features.numel()).view_as(tokens.features)
    (tokens.features * readout).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_steps_repeat_bit_for_bit():
    def step():
        net = build(point_feature="offset")
        tokens = net(make_view(random_scene(1, 1000), random_scene(2, 800)))
        tokens.features.square().sum().backward()
        return [tokens.xyz, tokens.features, *(p.grad for p in net.parameters()), *net.buffers()]

    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))


@pytest.mark.parametrize(("output", "stride"), [("full", 1), ("encoder", 16)])
def test_a_token_is_the_mean_of_the_points_of_its_cell(output, stride):
    net = build(output=output, num_tokens=5000, point_range=[-9, -9, -9, 9, 9, 9]).eval()
    scenes = [random_scene(seed, low=(-10.0, -8.0, -3.0), high=(8.0, 10.0, 4.0)) for seed in (5, 6)]
    tokens = net(make_view(*scenes))
    expected = []
    for item, scene in enumerate(scenes):
        groups = {}
        for point in scene[:, :3].double().numpy():
            if ((point >= -9) & (point < 9)).all():
                groups.setdefault(tuple(np.floor(point / 0.25 / stride).astype(int))[::-1], []).append(point)
        expected += [(item, *np.mean(group, axis=0)) for _, group in sorted(groups.items())]
    wanted = torch.tensor(np.array(expected))
    assert torch.equal(tokens.batch_index.double(), wanted[:, 0])
    torch.testing.assert_close(tokens.xyz.double(), wanted[:, 1:], atol=1e-6, rtol=0)
    assert (tokens.source_index == -1).all()


def test_too_many_tokens_are_thinned_by_farthest_point_sampling():
    scene = random_scene(7)
    everything, tokens = (build(num_tokens=num).eval()(make_view(scene)) for num in (5000, 30))
    chosen, nearest = [0], torch.full((len(everything.xyz),), torch.inf)
    for _ in range(29):
        nearest = torch.minimum(nearest, (everything.xyz - everything.xyz[chosen[-1]]).square().sum(1))
        chosen.append(int(nearest.argmax()))
    assert torch.equal(tokens.xyz, everything.xyz[sorted(chosen)])
    assert torch.equal(tokens.features, everything.features[sorted(chosen)])


def test_input_features():
    """Two points in one voxel, from -0.25 to 0 m, one in another, by hand."""
    scene = torch.tensor([[-0.125, -0.0625, -0.25, 0.25], [-0.125, -0.1875, -0.125, 0.75], [0.125, 0.0, 0.1875, 0.5]])
    expected = {
        "ones": [[1.0, 1, 1], [1, 1, 1]],
        "intensity": [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]],
        "offset": [[0, 0, -0.25], [0, -0.5, 0.25]],
    }
    for feature, values in expected.items():
        voxels, point_voxel = build(point_feature=feature).voxelize(make_view(scene))
        assert isinstance(voxels, SparseTensor)
        assert point_voxel.tolist() == [0, 0, 1]
        assert voxels.voxel_bzyx.tolist() == [[0, 15, 15, 15], [0, 16, 16, 16]]
        torch.testing.assert_close(voxels.features, torch.tensor(values))
    assert build(in_channels=1).voxelize(make_view(scene))[0].features.shape == (2, 1)


def test_normalised_features_have_unit_length():
    scene = make_view(random_scene(1))
    plain, unit = (build(normalize_feature=switch).eval()(scene).features for switch in (False, True))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(unit)))
    torch.testing.assert_close(unit, plain / plain.norm(dim=1, keepdim=True))


def test_wrong_keys_are_named():
    def message(**keys):
        with pytest.raises(UserError) as error:
            build(**keys)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "variant" in message(variant="50")
    assert "stem_kernel" in message(stem_kernel=4)
    assert "in_channels" in message(point_feature="offset", in_channels=4)
    assert "no intensity" in message(point_feature="intensity", columns=("x", "y", "z"))
    assert "point_range along y" in message(point_range=[0, 1, 0, 1, 1, 1])
    assert "output: full" in message(output="encoder", normalize_feature=True)
    assert "did you mean planes" in message(plane=[1])
    with pytest.raises(UserError, match=r"output: full"):
        parse_part("p", POINT_ENCODERS, {"name": "sparse_unet34", "output": "encoder", "out_channels": 64})
    with pytest.raises(ValueError, match="x, y, z"):
        build(columns=("intensity", "x", "y", "z"))
    far = torch.tensor([[0.0, 0, 0, 0], [1e7, 1e7, 1e7, 0]])
    with pytest.raises(UserError, match="point_range"):
        build()(make_view(far))
    assert len(build(point_range=[-1, -1, -1, 1, 1, 1]).eval()(make_view(far)).xyz) == 1


def test_a_real_frame(samples):
    """A whole scan without bounds: every point is in a voxel, the tokens are spread over all of it."""
    points = np.fromfile(samples / "kitti/training/velodyne/000000.bin", dtype=np.float32).reshape(-1, 4)
    net = build(voxel_size=[0.1, 0.1, 0.1], output="encoder").eval()
    view = make_view(torch.from_numpy(points))
    with torch.no_grad():
        voxels, point_voxel = net.voxelize(view)
        tokens = net(view)
    assert point_voxel.min() == 0
    assert len(point_voxel.unique()) == len(voxels)
    cells = len(np.unique(np.floor(points[:, :3].astype(np.float64) / 0.1 / 16), axis=0))
    assert len(tokens.xyz) == min(cells, 1024)
    reach = view.points[:, :3].aminmax(dim=0)
    assert (tokens.xyz.amin(0) - reach.min < 5).all()
    assert (reach.max - tokens.xyz.amax(0) < 5).all()
