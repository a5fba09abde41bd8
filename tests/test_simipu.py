"""The method as a whole: gradients, switches, invariances."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import batch_of, small_method

from simipu3d.config import parse_block, to_plain
from simipu3d.engine.callbacks import pictures_of
from simipu3d.errors import UserError
from simipu3d.methods.simipu import SimIPU


def gradients(method, batch):
    method.zero_grad()
    method(batch)["loss"].backward()
    return {name: p.grad for name, p in method.named_parameters()}


@pytest.mark.parametrize(
    "contrast",
    [
        {},
        {"inter_direction": "points_to_image"},
        {"inter_direction": "symmetric"},
        {"negatives": "scene", "mask_duplicates": False},
        {"inter_detach": "after_head"},
        {"intra_weight": 0.0},
        {"inter_weight": 0.0},
    ],
)
def test_every_trainable_parameter_gets_a_gradient(contrast):
    method = small_method(contrast={"dim": 8, **contrast})
    for name, gradient in gradients(method, batch_of([1, 2])).items():
        parameter = dict(method.named_parameters())[name]
        assert (gradient is not None) == parameter.requires_grad, name
        if gradient is not None and not name.endswith("bias"):  # a bias before BatchNorm has zero gradient by nature
            assert gradient.abs().sum() > 0, name


def test_released_detach_freezes_the_point_side_head():
    method = small_method(contrast={"dim": 8, "inter_detach": "after_head"})
    frozen = [name for name, parameter in method.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all(name.startswith("inter_point_head.") for name in frozen)


def test_the_inter_loss_sends_no_gradient_into_the_point_encoder():
    """With the intra loss weighed down to nothing measurable, the point encoder's gradient vanishes with it."""
    batch = batch_of([1, 2])
    full = gradients(small_method(contrast={"dim": 8, "intra_weight": 1.0}), batch)
    tiny = gradients(small_method(contrast={"dim": 8, "intra_weight": 1e-6}), batch)
    for name, gradient in full.items():
        if name.startswith("point_encoder."):
            torch.testing.assert_close(tiny[name], gradient * 1e-6, rtol=1e-3, atol=1e-12)


def test_weights_multiply_the_losses():
    batch = batch_of([1, 2])
    metrics = small_method(contrast={"dim": 8, "intra_weight": 0.25, "inter_weight": 3.0})(batch)
    expected = 0.25 * metrics["intra_loss"] + 3.0 * metrics["inter_loss"]
    torch.testing.assert_close(metrics["loss"], expected)


def test_ceilings_are_the_log_of_the_rows():
    metrics = small_method()(batch_of([1, 2, 3]))
    assert float(metrics["intra_ceiling"]) == pytest.approx(math.log(float(metrics["intra_rows"])), abs=1e-5)
    assert float(metrics["inter_ceiling"]) == pytest.approx(math.log(float(metrics["inter_rows"])), abs=1e-5)
    assert float(metrics["intra_rows"]) == 3 * 24


def test_a_method_computes_the_same_twice():
    batch = batch_of([1, 2])
    one, two = (gradients(small_method(), batch) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one if one[name] is not None)


def test_invisible_tokens_never_enter_the_loss():
    """Half of the scan lies behind the camera: those tokens are matched, but no pixel is asked of them."""
    batch = batch_of([1, 2])
    behind = batch.views[0].points.clone()
    behind[::2, 0] *= -1
    batch = replace(batch, views=(replace(batch.views[0], points=behind), batch.views[1]))
    embedded = small_method().embed(batch)
    assert embedded.inter.used.visible.all()
    assert (embedded.first.xyz[embedded.inter.used.token, 0] > 0).all()
    kept = small_method(matching={"invisible": "keep"}).embed(batch)
    assert len(kept.inter.used.token) == len(kept.first.xyz)
    assert not kept.inter.used.visible.all()


def test_a_batch_without_a_visible_point_costs_nothing_and_still_has_gradients():
    batch = batch_of([1, 2])
    images = batch.images[0]
    turned = images.camera_from_lidar * torch.tensor([-1.0, 1, -1, 1])[:, None]
    away = (replace(images, camera_from_lidar=turned),)
    metrics = small_method(contrast={"dim": 8})(replace(batch, images=away))
    assert float(metrics["inter_loss"]) == 0
    method = small_method()
    assert all(g is not None for g in gradients(method, replace(batch, images=away)).values())


def test_an_empty_scene_makes_no_pair():
    batch = batch_of([1, 2])
    views = []
    for view in batch.views:
        keep = view.batch_index == 1
        views.append(
            replace(
                view,
                points=view.points[keep],
                batch_index=view.batch_index[keep],
                source_index=view.source_index[keep],
            )
        )
    embedded = small_method().embed(replace(batch, views=tuple(views)))
    assert (embedded.first.tokens.batch_index == 1).all()
    assert (embedded.inter.used.image == 1).all()


def test_turning_the_second_view_moves_no_match():
    """Matching happens in the lidar frame: the same draw under another rotation gives the same pairs, features aside."""
    first = batch_of([3])
    turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    second = first.views[1]
    xyz = second.points[:, :3].double() @ turn[:3, :3].T
    turned = replace(
        second,
        points=torch.cat([xyz.float(), second.points[:, 3:]], 1),
        augmented_from_lidar=turn @ second.augmented_from_lidar,
    )
    one, two = small_method().embed(first), small_method().embed(replace(first, views=(first.views[0], turned)))
    assert torch.equal(one.intra.pairs.first, two.intra.pairs.first)
    assert torch.equal(one.intra.pairs.second, two.intra.pairs.second)


def test_copies_of_a_point_are_told_apart_from_others():
    embedded = small_method().embed(batch_of([1, 2]))
    tokens, copies = embedded.first.tokens, embedded.first.copies
    same = copies[:, None] == copies[None]
    expected = (tokens.batch_index[:, None] == tokens.batch_index[None]) & (
        tokens.source_index[:, None] == tokens.source_index[None]
    )
    assert torch.equal(same, expected)


def test_unknown_names_are_one_line():
    for changes, words in (
        ({"matching": {"assignment": "hungry"}}, "no assignment is called 'hungry'; there are greedy, hungarian"),
        ({"point_encoder": {"name": "pointnet3"}}, "no point encoder is called 'pointnet3'"),
        ({"contrast": {"temprature": 1.0}}, "did you mean temperature"),
        ({"contrast": {"temperature": -1.0}}, "contrast.temperature"),
    ):
        with pytest.raises(UserError, match=words):
            small_method(**changes)


def test_blocks_are_read_and_written_alike():
    method = small_method()
    assert parse_block("", SimIPU.Config, to_plain(method.config)) == method.config


def test_pictures_leave_weights_and_statistics_alone():
    method, batch = small_method(), batch_of([1, 2])
    before = {name: value.clone() for name, value in method.state_dict().items()}
    drawn = pictures_of(method, batch)
    assert set(drawn) == {"matches", "projected_tokens", "features"}
    assert method.training
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())


@pytest.mark.parametrize("weights", [{"intra_weight": 0.0}, {"inter_weight": 0.0}])
def test_a_loss_without_weight_leaves_no_half_of_itself(weights):
    """The paper's Table 5 rows: rows, pictures and metrics name the other task alone."""
    method, batch = small_method(contrast={"dim": 8, **weights}), batch_of([1, 2])
    other = "inter" if "intra_weight" in weights else "intra"
    assert set(method.rows(batch)) == {other}
    assert {name for name in method(batch) if name.endswith("_loss")} == {f"{other}_loss"}
    assert ("matches" in pictures_of(method, batch)) == (other == "intra")
    assert method.needs_of(method.config).image_views == (1 if other == "inter" else 0)


def test_rows_are_what_the_loss_compares():
    method, batch = small_method().eval(), batch_of([1, 2, 3])
    metrics, rows = method(batch), method.rows(batch)
    for name, (query, key, ids, batch_index) in rows.items():
        assert len(query) == len(key) == len(ids) == len(batch_index) == int(metrics[f"{name}_rows"])
        assert query.shape[1] == 8


def test_no_query_of_greedy_has_its_own_lidar_point_among_its_negatives():
    """Only rows whose key another row took count here; the exact assignment never leaves one (a point is nearest to itself)."""
    batch = batch_of([1, 2, 3], num_points=60)
    for assignment in ("greedy", "hungarian"):
        method = small_method(matching={"assignment": assignment}).eval()
        embedded = method.embed(batch)
        first, second, rows = embedded.first.tokens, embedded.intra.second.tokens, embedded.intra.pairs
        own = torch.stack([first.batch_index, first.source_index], 1)[rows.first]
        others = torch.stack([second.batch_index, second.source_index], 1)[rows.second]
        left = (own[:, None] == others[None]).all(2) & ~torch.eye(len(own), dtype=torch.bool)
        left &= own[:, 1, None] != others[:, 1][:, None]  # the row itself sits on another point
        if assignment == "hungarian":
            assert not left.any()
        else:
            assert left.any(), "the case is in the data"
            kept = method._intra_result(embedded.first, embedded.intra).loss
            plain = small_method(matching={"assignment": assignment}, contrast={"mask_duplicates": False}).eval()
            assert float(kept.detach()) < float(plain._intra_result(embedded.first, embedded.intra).loss.detach())
