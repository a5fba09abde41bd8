"""One contract for every point encoder that makes a map seen from above (contracts.tokens.BevEncoder).

Encoders, and their small configurations, are those of test_encoder_contract; who makes no map is skipped here.
"""

from dataclasses import replace

import pytest
import torch
from helpers import COLUMNS, make_view, random_scene, randomise_norms
from test_encoder_contract import CASES, EVERY, scenes

from simipu3d.config import parse_part
from simipu3d.contracts.batch import PointView
from simipu3d.contracts.tokens import BevEncoder
from simipu3d.errors import UserError
from simipu3d.registry import POINT_ENCODERS

MAKES_MAPS = ("pillar", "voxel_backbone8x", "voxel_res_backbone8x")
OWN = pytest.mark.parametrize("name", MAKES_MAPS)
# x and y differ in everything; powers of two, so that sums are exact. 40 x 64 x 24 cells along x, y, z.
RANGE = [-5.0, -3.0, -2.0, 5.0, 5.0, 4.0]
GRIDS = {name: {"point_range": RANGE, "voxel_size": [0.25, 0.125, 0.25]} for name in MAKES_MAPS[1:]}
GRIDS["pillar"] = {"point_range": RANGE, "pillar_size": [0.25, 0.125], "widths": [4, 5, 6, 8]}


def build(name, **keys) -> torch.nn.Module:
    """With all that a map needs."""
    entry = POINT_ENCODERS[name]
    if "output_conv" in entry.config.model_fields:
        keys = {"output_conv": True, **keys}
    torch.manual_seed(0)
    block = {"name": name, "sparse_backend": "torch", **keys}
    return entry.target(parse_part("point_encoder", POINT_ENCODERS, block), point_columns=COLUMNS)


def case(name, **keys) -> torch.nn.Module:
    """The network of the contract's case; a reason to skip where it makes no map."""
    if not hasattr(POINT_ENCODERS[name].target, "bev"):
        pytest.skip(f"{name} makes no map")
    return build(name, **{**CASES[name].block, **keys})


def without_coordinates(net: torch.nn.Module) -> torch.nn.Module:
    """The same network, blind to absolute x, y, z."""
    weight = net.vfe.pfn_layers[0].linear.weight[:, :3] if hasattr(net, "vfe") else net.conv_input[0].weight[..., :3]
    weight.data.zero_()
    return net


def no_frames() -> PointView:
    view = make_view(torch.zeros(0, 4))
    return replace(view, augmented_from_lidar=view.augmented_from_lidar[:0])


def test_who_makes_maps():
    assert {name for name in CASES if hasattr(POINT_ENCODERS[name].target, "bev")} == set(MAKES_MAPS)
    for name in MAKES_MAPS:
        assert isinstance(build(name, **GRIDS[name]), BevEncoder)
    plain = build("voxel_backbone8x", output_conv=False)
    assert not isinstance(plain, BevEncoder)
    with pytest.raises(ValueError, match="output_conv: true"):
        plain.bev(make_view(random_scene(0)))


# --------------------------------------------------------------------------------------------------------- every encoder


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_shape_type_and_empty_scenes(name, training):
    net = case(name).train(training)
    empty = torch.zeros(0, 4)
    shapes = set()
    for parts in ([empty, random_scene(1), empty], scenes(), [empty], [empty, empty]):
        made = net.bev(make_view(*parts))
        assert made.features.shape[:2] == (len(parts), net.bev_channels)
        assert made.features.dtype == torch.float32
        assert made.features.isfinite().all()
        shapes.add((made.features.shape[2:], made.origin, made.cell))
        for features, points in zip(made.features, parts, strict=True):
            assert bool(features.any()) == bool(len(points))
    assert len(shapes) == 1, "the map covers the range, whatever lies in it"
    assert len(net.bev(no_frames()).features) == 0


@EVERY
def test_a_batch_gives_what_its_scenes_give_one_by_one(name):
    net = randomise_norms(case(name)).eval()
    parts = [*scenes(), torch.zeros(0, 4), torch.full((3, 4), 100.0)]
    with torch.no_grad():
        together = net.bev(make_view(*parts)).features
        for features, points in zip(together, parts, strict=True):
            torch.testing.assert_close(features, net.bev(make_view(points)).features[0], rtol=1e-4, atol=1e-5)


@EVERY
@pytest.mark.parametrize("cells", [(1, 0), (0, -1), (-1, 1)])
def test_whole_cells_move_the_map_and_nothing_in_it(name, cells):
    """Points alone: what they make moves by as many cells. Points and range: the map is the same, from another origin."""
    net = without_coordinates(randomise_norms(case(name))).eval()
    points = random_scene(5, low=(-4.0, -4.0, -2.0), high=(4.0, 4.0, 4.0))
    with torch.no_grad():
        here = net.bev(make_view(points))
        step = [number * size for number, size in zip(cells, here.cell, strict=True)]
        moved = make_view(points + torch.tensor([*step, 0, 0]))
        there = net.bev(moved)
        low_high = net.config.point_range
        shifted = [edge + (*step, 0, *step, 0)[i] for i, edge in enumerate(low_high)]
        other = without_coordinates(randomise_norms(case(name, point_range=shifted))).eval()
        same = other.bev(moved)
    assert (there.origin, there.cell) == (here.origin, here.cell)
    torch.testing.assert_close(there.features, here.features.roll((cells[1], cells[0]), (2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same.features, here.features, rtol=1e-5, atol=1e-6)
    assert same.cell == here.cell
    assert same.origin == pytest.approx([one + by for one, by in zip(here.origin, step, strict=True)])
    assert not torch.allclose(there.features, here.features)


@EVERY
@pytest.mark.parametrize("sizes", [(400, 200), (1,), (0, 0), ()])
def test_a_gradient_reaches_every_parameter(name, sizes):
    """A head that reads nothing but the map trains all that is built, and a batch without points breaks no process."""
    net = case(name).train()
    view = make_view(*(random_scene(seed, size) for seed, size in enumerate(sizes))) if sizes else no_frames()
    features = net.bev(view).features
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if len(sizes) > 1 and sizes[0]:
            # A bias before BatchNorm has no gradient by nature.
            assert key.endswith("bias") or parameter.grad.abs().sum() > 0, key


@EVERY
def test_float64(name):
    net = randomise_norms(case(name)).eval()
    view = make_view(*scenes())
    with torch.no_grad():
        wanted = net.bev(view).features
        given = net.double().bev(replace(view, points=view.points.double())).features
    assert given.dtype == torch.float64
    torch.testing.assert_close(given.float(), wanted, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------- our own, place by place


@OWN
@pytest.mark.parametrize("pad", [0, 1])
def test_a_cell_holds_what_the_sparse_features_at_its_centre_hold(name, pad):
    """By brute force over the sites of the last layer; `last_pad` puts cells round the map, and the origin further out."""
    if pad and name == "pillar":
        pytest.skip("pillars have no conv_out")
    net = randomise_norms(build(name, **GRIDS[name], **({"last_pad": pad} if pad else {}))).eval()
    view = make_view(random_scene(1), torch.zeros(0, 4), random_scene(2, 60))
    made = net.bev(view)
    last = net.stages(net.voxelize(view)[0])[-1]
    if name != "pillar":
        last = net.conv_out(last)
    left = made.features.clone()
    depth = net.bev_channels // last.features.shape[1]
    for features, (scene, *height, row, column) in zip(last.features, last.voxel_bzyx.tolist(), strict=True):
        # A site of stride 8 sits over the voxel 8 * index, at its middle; each padded cell is 8 voxels to the left.
        x, y = -5.0 + (8 * (column - pad) + 0.5) * 0.25, -3.0 + (8 * (row - pad) + 0.5) * 0.125
        own_column, own_row = ((at - o) / c for at, o, c in zip((x, y), made.origin, made.cell, strict=True))
        assert own_column == column
        assert own_row == row
        cell = made.features[scene, :, row, column].view(-1, depth)[:, height[0] if height else 0]
        assert torch.equal(cell, features)
        left[scene, :, row, column].view(-1, depth)[:, height[0] if height else 0] = 0
    assert not left.any()
    assert made.features.shape[2:] == (8 + 2 * pad, 5 + 2 * pad)


@OWN
@pytest.mark.parametrize("axis", [0, 1])
def test_what_a_cell_sees_lies_evenly_round_its_centre(name, axis):
    """A scene a voxel: the voxels that light a cell up are as many on either side of origin + index * cell."""
    keys = {"point_range": [8.0, 4.0, 0.0, 24.0, 20.0, 6.0], "output_conv": True, "voxel_size": [0.5, 0.25, 0.25]}
    if name == "pillar":
        keys = {"point_range": keys["point_range"], "pillar_size": [0.5, 0.25], "widths": [4, 4, 4, 4]}
    net = build(name, **keys).eval()
    for parameter in net.parameters():
        parameter.data.abs_()  # nothing cancels
    size = (0.5, 0.25)[axis]
    places = torch.arange(8.0, 24.0, size) if axis == 0 else torch.arange(4.0, 20.0, size)
    points = torch.tensor([[16.0, 12.0, 3.0, 1.0]]).repeat(len(places), 1)
    points[:, axis] = places
    points[:, :3] += torch.tensor([0.25, 0.125, 0.125])  # middles of voxels
    with torch.no_grad():
        made = net.bev(make_view(*points.split(1)))
    lit = made.features.any(1)  # (scene, row, column)
    lit = lit.any(1 if axis == 0 else 2)
    for index in range(1, lit.shape[1] - 1):
        seen = points[lit[:, index], axis]
        assert len(seen) == 15
        assert float(seen.mean()) == pytest.approx(made.origin[axis] + index * made.cell[axis])


def test_tokens_stand_in_the_cells_that_hold_their_features():
    """Pillars: both come from conv4, and a token is the mean of the points nearest to its cell's centre."""
    net = randomise_norms(build("pillar", **GRIDS["pillar"])).eval()
    view = make_view(random_scene(3, 700), random_scene(4, 300))
    tokens, made = net(view), net.bev(view)
    place = (tokens.xyz[:, :2] - torch.tensor(made.origin)) / torch.tensor(made.cell)
    highest = torch.tensor(made.features.shape[:1:-1]) - 1  # points behind the last centre belong to it
    column, row = torch.minimum((place + 0.5).floor().long().clamp(min=0), highest).unbind(1)
    assert len(tokens.xyz) > 40
    assert torch.equal(made.features[tokens.batch_index, :, row, column], tokens.features)


@OWN
@pytest.mark.parametrize("train", [True, False])
def test_backends_agree(name, train):
    pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    view = make_view(random_scene(1), random_scene(2))
    maps, gradients = {}, {}
    for backend in ("torch", "spconv"):
        net = randomise_norms(build(name, **GRIDS[name], sparse_backend=backend)).train(train)
        maps[backend] = net.bev(view).features
        (maps[backend] * torch.linspace(-1, 1, maps[backend].numel()).view_as(maps[backend])).sum().backward()
        gradients[backend] = {key: parameter.grad for key, parameter in net.named_parameters()}
    assert (maps["torch"] - maps["spconv"]).abs().max() <= 1e-4 * maps["torch"].abs().max()
    for key, gradient in gradients["torch"].items():
        if train and key.endswith(("conv1.bias", "conv2.bias")):
            continue  # zero but for rounding: the BatchNorm behind takes the bias out
        assert (gradient - gradients["spconv"][key]).abs().max() <= 1e-4 * gradient.abs().max(), key


@pytest.mark.parametrize("name", MAKES_MAPS[1:])
@pytest.mark.parametrize(("cells", "pad", "depth"), [(24, 0, 1), (40, 0, 2), (40, 1, 3), (8, 1, 1)])
def test_heights_become_channels(name, cells, pad, depth):
    keys = {"point_range": [0, 0, 0, 4, 4, cells * 0.125], "voxel_size": [0.25, 0.25, 0.125], "last_pad": pad}
    net = build(name, **keys).eval()
    assert net.bev_channels == 128 * depth
    made = net.bev(make_view(torch.full((1, 4), 0.5)))
    assert made.features.shape == (1, 128 * depth, 2 + 2 * pad, 2 + 2 * pad)


def test_a_grid_too_low_for_the_output_convolution_is_refused():
    keys = {"point_range": [0, 0, 0, 4, 4, 23 * 0.125], "voxel_size": [0.25, 0.25, 0.125]}
    with pytest.raises(UserError, match="output_conv: of 23 voxels along z") as error:
        build("voxel_backbone8x", **keys)
    assert "\n" not in str(error.value)
    build("voxel_backbone8x", **keys, output_conv=False)
