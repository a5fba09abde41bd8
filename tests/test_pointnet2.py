"""PointNet++: the released network's size and arithmetic, and what every point encoder promises."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simipu3d.config import parse_part
from simipu3d.contracts.batch import PointView
from simipu3d.encoders import row_norm
from simipu3d.encoders.pointnet2 import RELEASED_LAYERS, PointNet2Config, PointNet2MSG, PointNet2SSG, PointNet2SSGConfig
from simipu3d.errors import UserError
from simipu3d.ops.ball_query import ball_query, group_rows
from simipu3d.registry import POINT_ENCODERS

LAYERS = [
    {
        "sampler": "d_fps",
        "num_points": 64,
        "radii": [1.0, 2.0],
        "num_samples": [4, 8],
        "mlps": [[4, 5], [6]],
        "aggregation": 9,
    },
    {"sampler": "fs", "num_points": 16, "radii": [3.0], "num_samples": [8], "mlps": [[8, 7]], "aggregation": None},
    {"sampler": "split", "num_points": 8, "radii": [8.0], "num_samples": [6], "mlps": [[8]], "aggregation": 12},
]
SMALL = {"name": "pointnet2_msg", "ffps_range": 16, "layers": LAYERS}


def build(**keys) -> PointNet2MSG:
    config = parse_part("point_encoder", POINT_ENCODERS, {**SMALL, **keys})
    return POINT_ENCODERS["pointnet2_msg"].target(config, point_columns=("x", "y", "z", "intensity"))


def view_of(scenes: list[torch.Tensor]) -> PointView:
    sizes = torch.tensor([len(scene) for scene in scenes], dtype=torch.int64)
    return PointView(
        points=torch.cat(scenes),
        batch_index=torch.arange(len(scenes)).repeat_interleave(sizes),
        source_index=torch.cat([torch.arange(len(scene)).flip(0) * 3 for scene in scenes]),
        augmented_from_lidar=torch.eye(4, dtype=torch.float64).expand(len(scenes), 4, 4),
    )


def random_scenes(sizes=(200, 90), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 4, generator=generator) * torch.tensor([4, 4, 1, 1]) for size in sizes]


def settle(encoder: PointNet2MSG) -> PointNet2MSG:
    """Statistics and scales that are not those of a fresh network, in eval mode."""
    generator = torch.Generator().manual_seed(1)
    for module in encoder.modules():
        if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight.data, 0.5)):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return encoder.eval()


def test_the_released_network_has_its_number_of_parameters():
    """1,778,432; three more inputs to the first convolution of all nine MLPs are 2688 weights."""
    released = PointNet2MSG(PointNet2Config(use_xyz=False, ffps_range=512))
    assert sum(p.numel() for p in released.parameters()) == 1_778_432
    assert sum(p.numel() for p in PointNet2MSG(PointNet2Config()).parameters()) == 1_778_432 + 2688
    parts = [
        [sum(p.numel() for p in m.parameters()) for m in group]
        for group in (released.SA_modules, released.aggregation_mlps)
    ]
    assert parts == [[20_096, 109_568, 432_128], [33_152, 131_840, 1_051_648]]
    assert released.out_channels == 1024
    shapes = {name: tuple(tensor.shape) for name, tensor in released.state_dict().items()}
    assert shapes["SA_modules.0.mlps.2.layer0.conv.weight"] == (64, 1, 1, 1)
    assert shapes["SA_modules.2.mlps.2.layer2.conv.weight"] == (512, 256, 1, 1)
    assert shapes["SA_modules.1.mlps.0.layer1.bn.running_var"] == (64,)
    assert shapes["aggregation_mlps.2.conv.weight"] == (1024, 1024, 1)
    assert {shape for name, shape in shapes.items() if name.endswith("num_batches_tracked")} == {()}
    assert len(shapes) == (9 * 3 + 3) * 7


def slow_forward(encoder: PointNet2MSG, view: PointView, neighbourhood: str) -> torch.Tensor:
    """The network as published: gather everything, then 1x1 convolutions over (1, C, M, K)."""
    xyz, features = view.points[:, :3], view.points[:, 3:]
    offsets = torch.tensor([0, *torch.bincount(view.batch_index).cumsum(0).tolist()])
    norms = {"training": encoder.training, "momentum": 0.1}
    for number, abstraction in enumerate(encoder.SA_modules):
        rows, centre_offsets = abstraction.choose(xyz, features, offsets)
        pooled, inner = [], 0.0
        for mlp, radius, slots in zip(
            abstraction.mlps, LAYERS[number]["radii"], LAYERS[number]["num_samples"], strict=True
        ):
            least = inner if neighbourhood == "annulus" else 0.0
            index = ball_query(xyz, offsets, xyz[rows], centre_offsets, radius, slots, min_radius=least)
            inner = radius
            grouped = group_rows(features, index)
            if encoder.SA_modules[0].use_xyz:
                grouped = torch.cat([group_rows(xyz, index) - xyz[rows][:, None], grouped], dim=2)
            hidden = grouped.permute(2, 0, 1)[None]
            for stage in mlp:
                bn = stage.bn
                hidden = F.conv2d(hidden, stage.conv.weight, stage.conv.bias)
                mean, var = bn.running_mean.clone(), bn.running_var.clone()
                hidden = F.relu(F.batch_norm(hidden, mean, var, bn.weight, bn.bias, eps=1e-3, **norms))
            pooled.append(hidden.max(dim=3).values[0])
        hidden = torch.cat(pooled)[None]
        aggregation = encoder.aggregation_mlps[number]
        if LAYERS[number]["aggregation"]:
            bn = aggregation.bn
            hidden = F.conv1d(hidden, aggregation.conv.weight, aggregation.conv.bias)
            mean, var = bn.running_mean.clone(), bn.running_var.clone()
            hidden = F.relu(F.batch_norm(hidden, mean, var, bn.weight, bn.bias, eps=1e-5, **norms))
        xyz, features, offsets = xyz[rows], hidden[0].t(), centre_offsets
    return features


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use_xyz", [False, True])
@pytest.mark.parametrize("neighbourhood", ["annulus", "ball"])
def test_matrix_products_are_the_published_convolutions(training, use_xyz, neighbourhood):
    """Same features and, through them, the same gradients as the slow network with the same parameters."""
    encoder = settle(build(use_xyz=use_xyz, neighbourhood=neighbourhood)).train(training)
    view = view_of(random_scenes())
    expected = slow_forward(encoder, view, neighbourhood)
    tokens = encoder(view)
    torch.testing.assert_close(tokens.features, expected, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(expected)
    parameters = list(encoder.parameters())
    gradients = torch.autograd.grad((tokens.features * weight).sum(), parameters)
    for fast, slow in zip(gradients, torch.autograd.grad((expected * weight).sum(), parameters), strict=True):
        torch.testing.assert_close(fast, slow, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("chunk", [1 << 18, 20])
def test_counted_rows_are_batch_norm_of_their_copies(chunk, monkeypatch):
    """Values, gradients and running statistics, whole and in chunks, against torch's BatchNorm on the repeated rows."""
    monkeypatch.setattr(row_norm, "_CACHED_VALUES", chunk)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    copies = torch.randint(1, 6, (40,), generator=generator)
    weight = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    results = []
    for counted in (True, False):
        bn = torch.nn.BatchNorm1d(5, eps=1e-3, momentum=0.2).double()
        bn.weight.data, bn.bias.data = weight[0].abs() + 0.5, weight[1].clone()
        if counted:
            out = row_norm.norm_relu(rows, bn, copies)
        else:
            out = F.relu(bn(rows.repeat_interleave(copies, dim=0)))[copies.cumsum(0) - copies]
        gradients = torch.autograd.grad((out * weight).sum(), [rows, bn.weight, bn.bias])
        results.append([out, *gradients, *bn.buffers()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_is_close():
    encoder, view = build().train(), view_of(random_scenes())
    expected = encoder(view)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(view)
        tokens.features.float().sum().backward()
    assert (tokens.features - expected.features).abs().median() < 0.1
    assert all(p.grad is not None for p in encoder.parameters())


def test_running_statistics_are_those_of_all_slots():
    """Repeated slots count as often as they stand there, as in the published network."""
    encoder = build().train()
    view = view_of(random_scenes())
    stage = encoder.SA_modules[0].mlps[0].layer0
    encoder(view)
    xyz, offsets = view.points[:, :3], torch.tensor([0, 200, 290])
    rows, centre_offsets = encoder.SA_modules[0].choose(xyz, view.points[:, 3:], offsets)
    index = ball_query(xyz, offsets, xyz[rows], centre_offsets, 1.0, 4)
    grouped = torch.cat([group_rows(xyz, index) - xyz[rows][:, None], group_rows(view.points[:, 3:], index)], dim=2)
    seen = F.linear(grouped.flatten(0, 1), stage.conv.weight.flatten(1), stage.conv.bias)
    torch.testing.assert_close(stage.bn.running_mean, 0.1 * seen.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stage.bn.running_var, 0.9 + 0.1 * seen.var(0), rtol=1e-4, atol=1e-5)
    assert stage.bn.num_batches_tracked == 1


@pytest.mark.parametrize("use_xyz", [False, True])
def test_every_parameter_gets_a_gradient(use_xyz):
    """None is missing; only the biases that BatchNorm takes out again may be 0."""
    encoder = build(use_xyz=use_xyz).train()
    encoder(view_of(random_scenes())).features.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert name.endswith("conv.bias") or parameter.grad.abs().sum() > 0, name


def test_without_coordinates_a_turned_and_mirrored_scene_looks_the_same():
    """On a lattice a quarter turn is exact, so not a bit may change; with coordinates the features do change."""
    points = torch.randint(-6, 7, (300, 4), generator=torch.Generator().manual_seed(0)).float() / 2
    turned = torch.stack([-points[:, 1], points[:, 0], -points[:, 2], points[:, 3]], dim=1)
    for use_xyz in (False, True):
        encoder = settle(build(use_xyz=use_xyz))
        one, other = encoder(view_of([points])), encoder(view_of([turned]))
        assert torch.equal(one.features, other.features) != use_xyz
        if not use_xyz:
            assert torch.equal(one.source_index, other.source_index)


def test_batch_equals_singles():
    """Also for scenes with few points, with one (both halves of FS take it), and with none."""
    encoder = settle(build())
    scenes = random_scenes((200, 0, 30, 1, 300))
    together = encoder(view_of(scenes))
    assert torch.bincount(together.batch_index, minlength=5).tolist() == [16, 0, 16, 2, 16]
    for number, scene in enumerate(scenes):
        own = together.batch_index == number
        alone = encoder(view_of([scene]))
        assert torch.equal(together.xyz[own], alone.xyz)
        assert torch.equal(together.source_index[own], alone.source_index)
        torch.testing.assert_close(together.features[own], alone.features)


def test_tokens_sit_on_points_of_their_own_scene():
    scenes = random_scenes((120, 150))
    tokens = build()(view_of(scenes))
    assert tokens.features.shape == (32, 12)
    for xyz, source, scene in zip(tokens.xyz, tokens.source_index, tokens.batch_index, strict=True):
        assert torch.equal(xyz, scenes[scene][len(scenes[scene]) - 1 - source // 3, :3])


def test_twice_is_the_same_bit_for_bit():
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        encoder = build().train()
        features = encoder(view_of(random_scenes())).features
        features.square().sum().backward()
        results.append([features, *(p.grad for p in encoder.parameters()), *encoder.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("sizes", [(0,), (0, 0), (1,), (1, 0), (2, 1)])
def test_hardly_any_points_in_training_mode(sizes):
    encoder = build().train()
    tokens = encoder(view_of(random_scenes(sizes)))
    assert tokens.features.shape[1] == encoder.out_channels
    assert tokens.features.isfinite().all()
    assert (len(tokens.xyz) == 0) == (sum(sizes) == 0)
    tokens.features.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert all(buffer.isfinite().all() for buffer in encoder.buffers())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": [{**LAYERS[0], "radii": [1.0]}]}, "they have 1, 2 and 2"),
        ({"layers": [{**LAYERS[0], "radii": [2.0, 1.0]}]}, "radii must rise"),
        ({"layers": [{**LAYERS[0], "mlps": [[4], []]}]}, "at least one width"),
        ({"layers": [{**LAYERS[0], "sampler": "random"}]}, "layers.0.sampler"),
        ({"layers": []}, "layers"),
        ({"use_xzy": True}, "did you mean use_xyz"),
        ({"ffps_range": 0}, "ffps_range"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(UserError, match=message):
        build(**keys)


def build_ssg(**keys) -> PointNet2SSG:
    small = {"num_points": [64, 16], "radii": [2.0, 6.0], "num_samples": [4, 8], "mlps": [[4, 5], [6]]}
    config = parse_part("point_encoder", POINT_ENCODERS, {"name": "pointnet2_ssg", **small, **keys})
    return POINT_ENCODERS["pointnet2_ssg"].target(config, point_columns=("x", "y", "z", "intensity"))


def test_the_light_size_is_chosen_by_one_word():
    """The same names, shells that reach as far, a seventh of the parameters."""
    light, released = PointNet2MSG(PointNet2Config(size="light")), PointNet2MSG(PointNet2Config())
    assert sum(p.numel() for p in light.parameters()) == 246_816
    assert light.out_channels == 256
    reach = [net.SA_modules[-1].shells[-1].radius for net in (light, released)]
    assert reach[0] == reach[1]
    assert set(light.state_dict()) < set(released.state_dict())
    with pytest.raises(UserError, match="leave size out"):
        build(size="light")
    with pytest.raises(UserError, match="size"):
        build(size="tiny", layers=None)


def test_single_scale_parameters_are_counted_by_hand():
    """A layer of a MLP has in * out weights, and a bias and two BatchNorm numbers an output."""
    widths = [[4, 64, 64, 128], [131, 128, 128, 256], [259, 256, 512, 1024]]
    expected = sum(a * b + 3 * b for sizes in widths for a, b in pairwise(sizes))
    encoder = PointNet2SSG(PointNet2SSGConfig())
    assert sum(p.numel() for p in encoder.parameters()) == expected == 807_808
    assert encoder.out_channels == 1024
    assert {m.eps for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {1e-5}
    names = set(encoder.state_dict())
    assert "SA_modules.2.mlps.0.layer2.conv.weight" in names
    assert not any(name.startswith("aggregation") for name in names)


@pytest.mark.parametrize("use_xyz", [False, True])
def test_single_scale_tokens_by_a_loop(use_xyz):
    """Every centre, one after the other: the first neighbours within the radius, the MLP, the maximum."""
    encoder = settle(build_ssg(use_xyz=use_xyz))
    scenes = random_scenes((120, 40))
    tokens = encoder(view_of(scenes))
    for number, scene in enumerate(scenes):
        xyz, features = scene[:, :3], scene[:, 3:]
        for abstraction, radius, samples in zip(encoder.SA_modules, (2.0, 6.0), (4, 8), strict=True):
            rows = abstraction.choose(xyz, features, torch.tensor([0, len(xyz)]))[0]
            pooled = []
            for row in rows:
                near = ((xyz - xyz[row]).square().sum(1) < radius**2).nonzero().flatten()[:samples]
                hidden = torch.cat([xyz[near] - xyz[row], features[near]], 1) if use_xyz else features[near]
                for stage in abstraction.mlps[0]:
                    bn = stage.bn
                    hidden = F.linear(hidden, stage.conv.weight.flatten(1), stage.conv.bias)
                    hidden = F.relu(F.batch_norm(hidden, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-5))
                pooled.append(hidden.amax(0))
            xyz, features = xyz[rows], torch.stack(pooled)
        own = tokens.batch_index == number
        assert torch.equal(tokens.xyz[own], xyz)
        torch.testing.assert_close(tokens.features[own], features, rtol=1e-4, atol=1e-5)


def test_single_scale_gradients_and_few_points():
    encoder = build_ssg().train()
    encoder(view_of(random_scenes())).features.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert name.endswith("conv.bias") or parameter.grad.abs().sum() > 0, name
    for sizes in ((0,), (1, 0), (2, 1)):
        assert build_ssg().train()(view_of(random_scenes(sizes))).features.isfinite().all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"radii": [1.0]}, "num_points 2, radii 1, num_samples 2, mlps 2"),
        ({"mlps": [[4], []]}, "at least one width"),
        ({"num_points": []}, "num_points"),
        ({"radius": [1.0]}, "did you mean radii"),
    ],
)
def test_wrong_keys_of_the_single_scale_network_are_named(keys, message):
    with pytest.raises(UserError, match=message):
        build_ssg(**keys)
    with pytest.raises(UserError, match="pointnet2_ssg: points must begin"):
        PointNet2SSG(PointNet2SSGConfig(), ("intensity", "x", "y", "z"))


def test_columns_must_fit():
    with pytest.raises(UserError, match="use_xyz"):
        PointNet2MSG(PointNet2Config(use_xyz=False), ("x", "y", "z"))
    with pytest.raises(UserError, match="x, y, z"):
        PointNet2MSG(PointNet2Config(), ("intensity", "x", "y", "z"))
    with pytest.raises(ValueError, match="4 columns"):
        build()(view_of([torch.zeros(5, 5)]))
    bare = PointNet2MSG(PointNet2Config(layers=RELEASED_LAYERS[:1]), ("x", "y", "z"))
    assert bare(view_of([torch.randn(50, 3)])).features.shape == (50, 128)


def test_the_full_network_on_a_kitti_frame(samples):
    """16384 points become 1024 tokens, at most half of them copies, spread over the whole scene."""
    path = samples / "kitti" / "training" / "velodyne" / "000000.bin"
    points = torch.from_numpy(np.fromfile(path, dtype=np.float32).reshape(-1, 4).copy())
    low, high = torch.tensor([0.0, -40, -3]), torch.tensor([70.4, 40, 1])
    points = points[((points[:, :3] > low) & (points[:, :3] < high)).all(dim=1)]
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:16384]]
    encoder = PointNet2MSG(PointNet2Config()).train()
    with torch.no_grad():
        tokens = encoder(view_of([points]))
    assert tokens.features.shape == (1024, 1024)
    assert tokens.features.isfinite().all()
    assert 512 < len(tokens.source_index.unique()) <= 1024
    to_token = torch.cdist(points[:, :3], tokens.xyz).min(dim=1).values
    assert to_token.max() < 5
