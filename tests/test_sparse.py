"""Sparse convolution agrees with dense convolution, and its two backends with each other."""

import logging
import sys

import pytest
import torch
from torch.nn import functional as F

from simipu3d.encoders.sparse import (
    SiteBatchNorm,
    SparseConv2d,
    SparseConv3d,
    SparseGlobalPool,
    SparseInverseConv2d,
    SparseInverseConv3d,
    SparseMaxPool,
    SparseSequential,
    SparseTensor,
    SubMConv2d,
    SubMConv3d,
    backends,
    rulebook,
)
from simipu3d.encoders.sparse.tensor import linear_key, split_key
from simipu3d.errors import UserError

SUBM = {2: SubMConv2d, 3: SubMConv3d}
STRIDE = {2: SparseConv2d, 3: SparseConv3d}
INVERSE = {2: SparseInverseConv2d, 3: SparseInverseConv3d}
CONV = {2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
STRIDED_2D = [
    {},
    {"padding": (0, 1)},
    {"kernel_size": (2, 2), "padding": 0},
    {"kernel_size": (2, 5), "stride": (3, 2), "padding": (0, 1)},
]
STRIDED = [
    {},
    {"padding": (0, 1, 1)},
    {"kernel_size": (3, 1, 1), "stride": (2, 1, 1), "padding": (0, 0, 0)},
    {"kernel_size": (2, 2, 2), "padding": (0, 0, 0)},
    {"kernel_size": (3, 2, 5), "stride": (1, 3, 2), "padding": (2, 0, 1)},
]


def random_sites(seed, shape, batch_size=2, share=0.15):
    """Sorted unique sites with about `share` of the cells active, the corners among them."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(batch_size, *shape, generator=generator) < share
    active.view(-1)[0] = active.view(-1)[-1] = True
    return active.nonzero()


def random_tensor(seed, shape=(5, 7, 6), channels=3, dtype=torch.float64, **kwargs):
    sites = random_sites(seed, shape, **kwargs)
    features = torch.randn(len(sites), channels, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return SparseTensor(features.requires_grad_(), sites, shape, int(sites[:, 0].max()) + 1)


def dense_weight(layer):
    return layer.weight.movedim(-1, 1)


def at_sites(dense, sites):
    return dense.movedim(1, -1)[sites.unbind(1)]


def assert_same_with_gradients(actual, expected, inputs):
    """Two ways to one result, and the gradients of a random scalar of it."""
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(actual)
    for a, b in zip(
        torch.autograd.grad(actual, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.fixture(params=["torch", "spconv"])
def backend(request):
    if request.param == "spconv":
        pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    return request.param


@pytest.mark.parametrize(
    ("kernel_size", "shape"),
    [
        *(((kernel, shape)) for kernel in [3, 5, (1, 3, 5)] for shape in [(5, 7, 6), (4, 1, 9), (1, 1, 1)]),
        *(((kernel, shape)) for kernel in [3, (1, 5)] for shape in [(7, 6), (1, 9), (1, 1)]),
    ],
)
def test_submanifold_is_dense_convolution_at_the_sites(kernel_size, shape, backend):
    x = random_tensor(1, shape)
    layer = SUBM[len(shape)](3, 4, "a", kernel_size=kernel_size, bias=True, backend=backend).double()
    out = layer(x)
    dense = CONV[len(shape)](x.dense(), dense_weight(layer), layer.bias, padding=layer.geometry.padding)
    assert out.voxel_bzyx is x.voxel_bzyx
    assert_same_with_gradients(out.features, at_sites(dense, x.voxel_bzyx), [x.features, layer.weight, layer.bias])


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        *((options, shape) for options in STRIDED for shape in [(5, 7, 6), (3, 8, 13)]),
        *((options, shape) for options in STRIDED_2D for shape in [(7, 6), (8, 13)]),
    ],
)
def test_strided_is_dense_convolution_and_reaches_every_site(options, shape, backend):
    x = random_tensor(2, shape, share=0.05)
    layer = STRIDE[len(shape)](3, 4, "a", backend=backend, **options).double()
    out = layer(x)
    geometry = layer.geometry
    conv, how = CONV[len(shape)], {"stride": geometry.stride, "padding": geometry.padding}
    dense = conv(x.dense(), dense_weight(layer), **how)
    assert out.spatial_shape == tuple(dense.shape[2:])
    assert_same_with_gradients(out.dense(), dense, [x.features, layer.weight])
    occupied = x.with_features(torch.ones_like(x.features[:, :1])).dense()
    reached = conv(occupied, torch.ones(1, 1, *geometry.kernel_size, dtype=torch.float64), **how)[:, 0] > 0
    assert torch.equal(out.voxel_bzyx, reached.nonzero())  # the same sites, and in lexicographic order


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (5, 7, 6)),
        ({"kernel_size": 2, "padding": 0}, (4, 8, 6)),
        ({}, (7, 6)),
        ({"kernel_size": 2, "padding": 0}, (8, 6)),
    ],
)
def test_inverse_is_transposed_convolution_at_the_first_sites(options, shape, backend):
    axes = len(shape)
    x = random_tensor(3, shape)
    down = STRIDE[axes](3, 4, "a", backend=backend, **options).double()
    up = INVERSE[axes](4, 2, "a", kernel_size=down.geometry.kernel_size, backend=backend).double()
    out = up(down(x))
    g = down.geometry
    sizes = zip(shape, down(x).spatial_shape, g.kernel_size, g.stride, g.padding, strict=True)
    rest = [size - ((n - 1) * s - 2 * p + k) for size, n, k, s, p in sizes]
    dense = TRANSPOSED[axes](
        down(x).dense(), up.weight.movedim(-1, 0), stride=g.stride, padding=g.padding, output_padding=rest
    )
    assert out.voxel_bzyx is x.voxel_bzyx
    assert out.spatial_shape == shape
    expected = at_sites(dense, x.voxel_bzyx)
    assert_same_with_gradients(out.features, expected, [x.features, down.weight, up.weight])


@pytest.mark.parametrize("width", [3, 5])
@pytest.mark.parametrize("axes", [2, 3])
def test_a_1x1_layer_multiplies_by_its_matrix(axes, width, backend):
    """Out from in in both backends, also where both are equally many and a transposed matrix would fit."""
    x = random_tensor(11, (5, 7, 6)[:axes])
    layer = SUBM[axes](3, width, "a", kernel_size=1, bias=True, backend=backend).double()
    expected = F.linear(x.features, layer.weight.view(width, 3), layer.bias)
    assert_same_with_gradients(layer(x).features, expected, [x.features, layer.weight, layer.bias])
    assert layer.weight.shape == (width, *(1,) * axes, 3)
    strided = STRIDE[axes](3, width, "b", kernel_size=1, padding=0, backend=backend).double()
    dense = CONV[axes](x.dense(), dense_weight(strided), stride=2)
    assert_same_with_gradients(strided(x).dense(), dense, [x.features, strided.weight])
    back = INVERSE[axes](width, 2, "b", kernel_size=1, backend=backend).double()
    assert back(strided(x)).voxel_bzyx is x.voxel_bzyx


@pytest.mark.parametrize(
    ("window", "shape"),
    [
        *(
            (window, (5, 7, 6))
            for window in [{}, {"kernel_size": (3, 3, 3), "stride": (2, 2, 2), "padding": (1, 1, 1)}]
        ),
        *((window, (7, 6)) for window in [{"kernel_size": (2, 2)}, {"kernel_size": (3, 2), "stride": (1, 2)}]),
    ],
)
def test_max_pooling_is_dense_pooling_of_the_active_cells(window, shape):
    """Features below 0, so that an empty cell that counted as 0 would win."""
    x = random_tensor(12, shape, share=0.3)
    below = x.with_features(x.features - 10)
    layer = SparseMaxPool("a", **window)
    out = layer(below)
    g = layer.geometry
    mask = x.with_features(torch.ones_like(x.features)).dense() > 0
    dense = below.dense().masked_fill(~mask, -torch.inf)
    dense = MAX_POOL[len(shape)](dense, g.kernel_size, g.stride, g.padding)
    assert out.spatial_shape == tuple(dense.shape[2:])
    assert torch.equal(out.voxel_bzyx, dense[:, 0].isfinite().nonzero())
    assert_same_with_gradients(out.features, at_sites(dense, out.voxel_bzyx), [x.features])


def test_a_pooling_layer_shares_the_rulebook_of_a_convolution_with_its_window():
    x = random_tensor(12)
    options = {"kernel_size": (2, 2, 2), "stride": (2, 2, 2), "padding": (0, 0, 0)}
    pooled = SparseMaxPool("a", kernel_size=(2, 2, 2))(x)
    convolved = SparseConv3d(3, 4, "a", backend="torch", **options).double()(x)
    assert convolved.voxel_bzyx is pooled.voxel_bzyx
    assert len(x.rulebooks) == 1
    back = SparseInverseConv3d(3, 2, "a", kernel_size=2, backend="torch").double()(pooled)
    assert back.voxel_bzyx is x.voxel_bzyx


@pytest.mark.parametrize("shape", [(5, 7, 6), (7, 6)])
def test_global_pooling_is_that_of_each_grid_alone(shape):
    sites = torch.cat([random_sites(1, shape, 1), random_sites(2, shape, 1) + torch.tensor([2] + [0] * len(shape))])
    features = (torch.randn(len(sites), 3, dtype=torch.float64) - 5).requires_grad_()
    x = SparseTensor(features, sites, shape, 4)  # grids 1 and 3 are empty
    for reduce, by_hand in (("max", lambda rows: rows.amax(0)), ("mean", lambda rows: rows.mean(0))):
        rows = [features[sites[:, 0] == item] for item in range(4)]
        expected = torch.stack([by_hand(own) if len(own) else features.new_zeros(3) for own in rows])
        assert_same_with_gradients(SparseGlobalPool(reduce)(x), expected, [features])


@pytest.mark.parametrize("shape", [(5, 7, 6), (7, 6), (9,)])
def test_numbers_of_cells_are_lexicographic_and_undone(shape):
    cells = torch.cartesian_prod(*(torch.arange(size) for size in (2, *shape)))
    keys = linear_key(cells, shape)
    assert torch.equal(keys, torch.arange(len(cells)))
    assert torch.equal(split_key(keys, shape), cells)


def test_two_axes_are_three_with_one_layer_of_cells():
    """A flat network in 2D gives what its weights give in 3D, one cell high: sites, features, and their order."""
    flat = random_tensor(13, (9, 12))
    tall_sites = torch.cat([flat.voxel_bzyx[:, :1], torch.zeros(len(flat), 1).long(), flat.voxel_bzyx[:, 1:]], 1)
    tall = SparseTensor(flat.features, tall_sites, (1, 9, 12), flat.batch_size)
    small, large = SubMConv2d(3, 4, "s", backend="torch"), SubMConv3d(3, 4, "s", kernel_size=(1, 3, 3), backend="torch")
    down = SparseConv2d(4, 5, "d", backend="torch")
    options = {"kernel_size": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)}
    deep = SparseConv3d(4, 5, "d", backend="torch", **options)
    large.weight.data, deep.weight.data = small.weight.data[:, None], down.weight.data[:, None]
    one, other = down.double()(small.double()(flat)), deep.double()(large.double()(tall))
    assert torch.equal(one.voxel_bzyx, other.voxel_bzyx[:, [0, 2, 3]])
    assert torch.equal(one.features, other.features)


def test_the_number_of_axes_must_fit():
    with pytest.raises(ValueError, match="2 axes"):
        SparseConv2d(3, 3, "a", kernel_size=(3, 3, 3))


def test_a_hand_made_pair():
    """Two neighbours along x on one line: each hears the other through the offset that points at it."""
    sites = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 2]])
    x = SparseTensor(torch.tensor([[10.0], [1.0]]), sites, (1, 1, 4), 1)
    layer = SubMConv3d(1, 1, "a", backend="torch")
    with torch.no_grad():
        layer.weight.copy_(torch.arange(27.0).view(1, 3, 3, 3, 1))  # offsets 12, 13, 14 are x - 1, x, x + 1
    assert layer(x).features.flatten().tolist() == [13 * 10 + 14 * 1, 13 * 1 + 12 * 10]


def small_net(backend, channels=3, axes=3):
    """Every kind of layer, a key used twice, and a skip connection's way back."""
    torch.manual_seed(5)
    subm, stride, inverse = SUBM[axes], STRIDE[axes], INVERSE[axes]
    last = {"kernel_size": (3, 1, 1)[:axes], "stride": (2, 1, 1)[:axes], "padding": 0}
    return SparseSequential(
        subm(channels, 4, "s1", bias=True, backend=backend),
        SiteBatchNorm(4),
        torch.nn.ReLU(),
        subm(4, 4, "s1", backend=backend),
        stride(4, 8, "d2", padding=(0, 1, 1)[:axes], backend=backend),
        subm(8, 8, "s2", bias=True, backend=backend),
        inverse(8, 4, "d2", backend=backend),
        subm(4, 4, "s1", backend=backend),
        subm(4, 4, "one", kernel_size=1, backend=backend),
        SparseMaxPool("pool", kernel_size=(1, 2, 1)[:axes]),
        stride(4, 6, "out", backend=backend, **last),
    )


def run_net(backend, seed=4, *, train=True, shape=(9, 21, 20), dtype=torch.float32):
    """Output and all gradients of `small_net` on random sites."""
    net = small_net(backend, axes=len(shape)).to(dtype).train(train)
    x = random_tensor(seed, shape, dtype=dtype)
    out = net(x)
    weights = torch.linspace(-1, 1, out.features.shape[1], dtype=dtype)
    (out.features.square() * weights).sum().backward()
    return out, [out.features.detach(), x.features.grad, *(p.grad for p in net.parameters())]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 21, 20), (31, 40)])
@pytest.mark.parametrize("train", [True, False])
def test_backends_agree(train, shape, dtype, two_threads):
    """Same sites and order, same features, same gradients; spconv also in eval mode with bias, and on two threads."""
    pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    ours, ours_numbers = run_net("torch", train=train, shape=shape, dtype=dtype)
    theirs, their_numbers = run_net("spconv", train=train, shape=shape, dtype=dtype)
    assert torch.equal(ours.voxel_bzyx, theirs.voxel_bzyx)
    assert ours.spatial_shape == theirs.spatial_shape
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for a, b in zip(ours_numbers, their_numbers, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("shape", [(9, 21, 20), (31, 40)])
def test_a_rulebook_is_built_once_a_level(shape, monkeypatch):
    """Four layers share the first level's, and going back up needs none of its own."""
    built = []
    for name in ("_submanifold_rulebook", "_strided_rulebook"):
        build = getattr(rulebook, name)

        def counting(x, geometry, build=build):
            built.append(geometry.indice_key)
            return build(x, geometry)

        monkeypatch.setattr(rulebook, name, counting)
    net, x = small_net("torch", axes=len(shape)), random_tensor(4, shape, dtype=torch.float32)
    for _ in range(2):
        net(x)
    assert built == ["s1", "d2", "s2", "one", "pool", "out"]


@pytest.mark.parametrize("options", STRIDED)
def test_backends_agree_on_odd_kernels(options):
    pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
    x = random_tensor(6, (5, 8, 7), dtype=torch.float32)
    layers = [SparseConv3d(3, 4, "a", backend=backend, **options) for backend in ("torch", "spconv")]
    layers[1].load_state_dict(layers[0].state_dict())
    ours, theirs = (layer(x) for layer in layers)
    assert torch.equal(ours.voxel_bzyx, theirs.voxel_bzyx)
    torch.testing.assert_close(ours.features, theirs.features)


def test_runs_repeat_bit_for_bit(backend, two_threads):
    """Thousands of sites, so that threads would have something to race for."""
    runs = [run_net(backend, shape=(20, 60, 50))[1] for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_a_layer_may_run_twice_on_one_tensor(backend):
    """The rulebooks are found again, and what follows still fits."""
    net = small_net(backend).eval()
    x = random_tensor(7, dtype=torch.float32)
    first = net(x)
    books = dict(x.rulebooks)
    assert torch.equal(net(x).features, first.features)
    assert {key for _, key in books} == {"s1", "d2", "s2", "one", "pool", "out"}
    assert set(x.rulebooks) == set(books)


def test_batch_equals_singles():
    net = small_net("torch").double().eval()
    x = random_tensor(8, (7, 9, 8), batch_size=3)
    together = net(x)
    for item in range(3):
        mine = x.voxel_bzyx[:, 0] == item
        sites = x.voxel_bzyx[mine] * torch.tensor([0, 1, 1, 1])
        alone = net(SparseTensor(x.features[mine], sites, x.spatial_shape, 1))
        theirs = together.voxel_bzyx[:, 0] == item
        assert torch.equal(alone.voxel_bzyx[:, 1:], together.voxel_bzyx[theirs, 1:])
        torch.testing.assert_close(alone.features, together.features[theirs])


@pytest.mark.parametrize("num_sites", [0, 1])
def test_nearly_nothing_survives_training_mode(backend, num_sites):
    net = small_net(backend).train()
    sites = torch.tensor([[1, 2, 3, 4]])[:num_sites]
    out = net(SparseTensor(torch.ones(num_sites, 3), sites, (5, 7, 6), 2))
    out.features.sum().backward()
    assert out.features.shape[1] == 6
    assert out.dense().shape[:2] == (2, 6)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert torch.equal(net[1].running_mean, torch.zeros(4))


def test_bfloat16_autocast_stays_near():
    exact, _ = run_net("torch")
    for backend in ("torch", "spconv"):
        if backend == "spconv":
            pytest.importorskip("spconv.pytorch", reason="spconv is not installed")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near, numbers = run_net(backend)
        assert near.features.dtype == torch.bfloat16
        assert (near.features.float() - exact.features).abs().max() < 0.05 * exact.features.abs().max()
        assert all(n.isfinite().all() for n in numbers)


def test_gradients_by_finite_differences():
    x = random_tensor(9, (3, 4, 3), channels=2)
    layer = SparseConv3d(2, 3, "a", backend="torch").double()

    def convolve(features, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x.with_features(features),)).features

    assert torch.autograd.gradcheck(convolve, (x.features, layer.weight))


def test_what_would_be_silently_wrong_is_refused():
    x = random_tensor(10, dtype=torch.float32)
    SubMConv3d(3, 3, "a", backend="torch")(x)
    with pytest.raises(ValueError, match="another kernel"):
        SubMConv3d(3, 3, "a", kernel_size=(5, 5, 5), backend="torch")(x)
    with pytest.raises(ValueError, match="nothing to invert"):
        SparseInverseConv3d(3, 3, "b", backend="torch")(x)
    with pytest.raises(ValueError, match="odd"):
        SubMConv3d(3, 3, "a", kernel_size=(2, 2, 2))
    shuffled = SparseTensor(x.features, x.voxel_bzyx.flip(0), x.spatial_shape, x.batch_size)
    with pytest.raises(AssertionError, match="sorted"):
        SubMConv3d(3, 3, "a", backend="torch")(shuffled)
    twice = SparseTensor(x.features[:2], x.voxel_bzyx[:1].repeat(2, 1), x.spatial_shape, x.batch_size)
    with pytest.raises(AssertionError, match="unique"):
        SubMConv3d(3, 3, "a", backend="torch")(twice)
    with pytest.raises(ValueError, match="leaves nothing"):
        SparseConv3d(3, 3, "c", kernel_size=(9, 1, 1), padding=(0, 0, 0), backend="torch")(x)


@pytest.fixture
def fresh_choice():
    """The choice is made and announced once a process; a test that changes what is installed needs it made anew."""
    caches = backends.spconv_problem, backends._say_once
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_only_an_explicit_spconv_fails_without_the_package(monkeypatch, fresh_choice):
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    SubMConv3d(3, 3, "a", backend="torch")
    SubMConv3d(3, 3, "a", backend="auto")
    with pytest.raises(UserError, match=r"pip install 'simipu3d\[cu126\]'") as error:
        SubMConv3d(3, 3, "a", backend="spconv")
    assert "\n" not in str(error.value)


def test_auto_takes_spconv_on_cuda_where_it_can_and_says_so_once(monkeypatch, fresh_choice, caplog):
    caplog.set_level(logging.INFO, "simipu3d.encoders")
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for _ in range(3):
        assert backends.choose_backend("auto", cpu) is backends.torch_backend.convolve
    assert len(caplog.records) == 1
    monkeypatch.setattr(backends, "spconv_problem", lambda on_cuda: None)
    assert backends.choose_backend("auto", cuda) is backends.spconv_backend.convolve
    monkeypatch.setattr(backends, "spconv_problem", lambda on_cuda: "not there")
    assert backends.choose_backend("auto", cuda) is backends.torch_backend.convolve
    assert "not there" in caplog.records[-1].message
    assert len(caplog.records) == 3
