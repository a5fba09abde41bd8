"""One contract for every registered point encoder (contracts.tokens.PointEncoder).

A new encoder needs an entry in `CASES`: a small configuration for scenes of `random_scene` (a box of 8 x 6 x 6 m), and
what it promises beyond the contract.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from helpers import COLUMNS, make_view, random_scene, randomise_norms

import simipu3d.data
import simipu3d.encoders
import simipu3d.methods  # noqa: F401  (the three fill the registries)
from simipu3d.config import parse_part
from simipu3d.contracts.batch import PointView
from simipu3d.contracts.tokens import PointTokens
from simipu3d.registry import POINT_ENCODERS


@dataclass(frozen=True)
class Case:
    """A small network of one encoder.

    Attributes:
        block: its `point_encoder:` block without the name.
        order_free: the order of a scene's points changes no token (false where sampling begins at the first point).
        on_points: every token sits on a raw point (`source_index`), at exactly its place.
    """

    block: dict
    order_free: bool = True
    on_points: bool = False


VOXELS = {"voxel_size": [0.25, 0.25, 0.125], "point_range": [-8.0, -8.0, -6.0, 8.0, 8.0, 8.0], "num_tokens": 1000}
LAYERS = [
    {
        "sampler": "d_fps",
        "num_points": 64,
        "radii": [0.8, 2.0],
        "num_samples": [8, 16],
        "mlps": [[8], [8]],
        "aggregation": 16,
    },
    {"sampler": "fs", "num_points": 12, "radii": [3.0], "num_samples": [8], "mlps": [[16]], "aggregation": None},
]
TORCH = {"sparse_backend": "torch"}
CASES = {
    "pointnet2_msg": Case({"layers": LAYERS}, order_free=False, on_points=True),
    "pillar": Case(
        {"pillar_size": [0.25, 0.25], "point_range": [-8.0, -8.0, -6.0, 8.0, 8.0, 8.0], "num_tokens": 1000, **TORCH}
    ),
    "pointnet2_ssg": Case(
        {"num_points": [64, 12], "radii": [0.8, 3.0], "num_samples": [8, 8], "mlps": [[8], [16]]},
        order_free=False,
        on_points=True,
    ),
    "sparse_unet34": Case(
        {
            "variant": "14A",
            "planes": [8] * 8,
            "stem_channels": 8,
            "voxel_size": [0.125] * 3,
            "num_tokens": 1000,
            **TORCH,
        }
    ),
    "voxel_backbone8x": Case({**VOXELS, **TORCH}),
    "voxel_res_backbone8x": Case({**VOXELS, **TORCH}),
}
EVERY = pytest.mark.parametrize("name", sorted(CASES))
SIZES = (300, 37, 1, 150)


def test_every_registered_encoder_has_a_case():
    own = {n for n in POINT_ENCODERS.names() if POINT_ENCODERS[n].target.__module__.startswith("simipu3d.")}
    assert own == set(CASES), "give every registered point encoder an entry in CASES of this file, and no other"


def encoder(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = parse_part("point_encoder", POINT_ENCODERS, {"name": name, **CASES[name].block})
    return POINT_ENCODERS[name].target(config, point_columns=COLUMNS)


def trained(name: str) -> torch.nn.Module:
    """In eval mode, with statistics that are not those of a fresh network."""
    return randomise_norms(encoder(name)).eval()


def scenes() -> list[torch.Tensor]:
    return [random_scene(seed, num) for seed, num in enumerate(SIZES)]


def tokens_of_scene(tokens: PointTokens, scene: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = tokens.batch_index == scene
    return tokens.xyz[rows], tokens.features[rows], tokens.source_index[rows]


def check_tokens(tokens: PointTokens, view: PointView, channels: int, dtype: torch.dtype = torch.float32) -> None:
    count = len(tokens.xyz)
    assert tokens.xyz.shape == (count, 3)
    assert tokens.xyz.dtype == dtype
    assert tokens.features.shape == (count, channels)
    assert tokens.features.dtype == dtype
    assert tokens.features.isfinite().all()
    assert tokens.batch_index.dtype == tokens.source_index.dtype == torch.int64
    assert tokens.batch_index.shape == tokens.source_index.shape == (count,)
    assert (tokens.batch_index.diff() >= 0).all()
    assert set(tokens.batch_index.tolist()) <= set(view.batch_index.tolist())
    assert (tokens.source_index >= -1).all()


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_shapes_types_and_ragged_batches(name, training):
    network = encoder(name).train(training)
    view = make_view(*scenes())
    tokens = network(view)
    check_tokens(tokens, view, network.out_channels)
    assert set(tokens.batch_index.tolist()) == {0, 1, 2, 3}
    assert len({int((tokens.batch_index == scene).sum()) for scene in range(4)}) > 1


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_empty_scenes_give_no_token_and_no_crash(name, training):
    network = encoder(name).train(training)
    empty = torch.zeros(0, 4)
    for parts in ([empty, random_scene(1), empty, random_scene(2, 50), empty], [empty, empty], [empty]):
        view = make_view(*parts)
        tokens = network(view)
        check_tokens(tokens, view, network.out_channels)
        full = {scene for scene, points in enumerate(parts) if len(points)}
        assert set(tokens.batch_index.tolist()) == full
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network(make_view(empty))
    for key, value in network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(before[key], value), f"an empty batch changes {key}"


@EVERY
def test_an_empty_batch_can_still_be_trained_on(name):
    """Such a batch gives zero loss; its backward pass must run where the features have a graph."""
    network = encoder(name)
    features = network(make_view(torch.zeros(0, 4))).features
    assert features.sum() == 0
    if features.requires_grad:
        features.sum().backward()


@EVERY
def test_every_trainable_parameter_gets_a_gradient(name):
    network = encoder(name).train()
    features = network(make_view(random_scene(1), random_scene(2, 200))).features
    torch.nn.functional.cosine_similarity(features, torch.randn_like(features)).sum().backward()
    for key, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), key
            # A bias before BatchNorm has no gradient by nature.
            assert key.endswith("bias") or parameter.grad.abs().sum() > 0, key


@EVERY
def test_a_batch_gives_what_its_scenes_give_one_by_one(name):
    network = trained(name)
    parts = [*scenes(), torch.zeros(0, 4)]
    with torch.no_grad():
        together = network(make_view(*parts))
        for scene, points in enumerate(parts):
            alone = network(make_view(points))
            for given, wanted in zip(tokens_of_scene(together, scene), tokens_of_scene(alone, 0), strict=True):
                torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


@EVERY
def test_float64(name):
    single, double = trained(name), trained(name).double()
    view = make_view(*scenes())
    with torch.no_grad():
        given = double(replace(view, points=view.points.double()))
        wanted = single(view)
    check_tokens(given, view, double.out_channels, torch.float64)
    torch.testing.assert_close(given.xyz.float(), wanted.xyz, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(given.features.float(), wanted.features, rtol=1e-3, atol=1e-4)


@EVERY
def test_the_same_twice_gradients_included(name):
    found = []
    for _ in range(2):
        network = encoder(name).train()
        tokens = network(make_view(*scenes()))
        torch.manual_seed(3)
        (tokens.features * torch.randn_like(tokens.features)).sum().backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        found.append([tokens.xyz, tokens.features.detach(), tokens.source_index, *gradients, *network.buffers()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@EVERY
def test_the_order_of_the_points_changes_no_token(name):
    if not CASES[name].order_free:
        pytest.skip(f"{name} begins its sampling at the first point")
    network = trained(name)
    points = random_scene(4)
    with torch.no_grad():
        one, other = (network(make_view(p)) for p in (points, points[torch.randperm(len(points))]))
    torch.testing.assert_close(one.xyz, other.xyz, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.features, other.features, rtol=1e-3, atol=1e-4)


@EVERY
def test_tokens_stand_among_the_points_of_the_view(name):
    """In the view's own frame: a token is a point, or stands between points of its scene and near one (2 m: a cell)."""
    network = trained(name)
    view = make_view(*scenes())
    view = replace(view, source_index=view.source_index * 3 + 7)  # raw rows, of which the view drew some
    tokens = network(view)
    for scene, points in enumerate(scenes()):
        xyz, _, source = tokens_of_scene(tokens, scene)
        gap = torch.cdist(xyz, points[:, :3]).amin(dim=1)
        if CASES[name].on_points:
            rows = (source - 7) // 3
            assert torch.equal(source, rows * 3 + 7)
            assert torch.equal(xyz, points[rows, :3])
        else:
            assert (source == -1).all()
            assert (gap < 2.0).all()
            inside = (xyz >= points[:, :3].amin(0) - 1e-4) & (xyz <= points[:, :3].amax(0) + 1e-4)
            assert inside.all()


@EVERY
def test_moving_the_scene_by_whole_cells_moves_the_tokens(name):
    """xyz comes back in the frame of the points, whatever the network does to them inside."""
    network = trained(name)
    points = random_scene(5, low=(-4.0, -2.0, -2.0), high=(2.0, 2.0, 3.0))
    shift = torch.tensor([8.0, 8.0, 8.0]) / 4  # whole cells of the coarsest grid of each network above
    moved = torch.cat([points[:, :3] + shift, points[:, 3:]], dim=1)
    with torch.no_grad():
        one, other = network(make_view(points)), network(make_view(moved))
    torch.testing.assert_close(other.xyz, one.xyz + shift, rtol=1e-5, atol=1e-5)
    assert torch.equal(other.source_index, one.source_index)
