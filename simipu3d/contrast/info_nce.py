"""How well does each query find its own key among all the others?

Shapes: N rows of this process, R rows of all processes that take part (R = N without `all_ranks`), C channels.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class ContrastResult(NamedTuple):
    """A contrastive loss beside what makes it readable.

    Attributes:
        loss: scalar, mean over the rows.
        accuracy: scalar, share of the queries whose own key is the most similar one (true top-1).
        ceiling: ln of the number of keys a query chooses from: the loss of a network that knows nothing.
    """

    loss: Tensor
    accuracy: Tensor
    ceiling: Tensor


def info_nce(
    query: Tensor,
    key: Tensor,
    temperature: float,
    *,
    ids: Sequence[Tensor] = (),
    cross_ids: tuple[Tensor, Tensor] | None = None,
    scene: Tensor | None = None,
    all_ranks: bool = False,
) -> ContrastResult:
    """Cross-entropy of the cosine similarities against the diagonal: row i of `key` belongs to row i of `query`.

    Args:
        query: (N, C); gradient flows into whatever the caller did not detach.
        key: (N, C).
        temperature: divides the similarities.
        ids: (N,) int64 tensors. Two rows that share a value in any of them are copies of each other and no negatives
            of each other; a negative value is nobody's copy.
        cross_ids: (N,) int64 of the queries and of the keys. A key of another row that has the query's own value is no
            negative of it; a negative value is nobody's.
        scene: (N,) int64. If given, only rows of the same scene are negatives.
        all_ranks: keys of all processes are negatives, gathered with their gradient; processes may hold different N.
            A no-op without an initialised process group.

    Returns:
        loss, accuracy and ceiling; for N = 0 a loss of 0 that still hangs on the inputs' graph.

    Source: InfoNCE, arXiv:1807.03748, Eq. 4; SimIPU Eqs. 4 and 7 with the mean in place of the sum.
    """
    # Similarities are divided by a small temperature: half precision would lose what distinguishes them.
    query, key = F.normalize(query.float(), dim=1), F.normalize(key.float(), dim=1)
    num_rows, first = len(query), 0
    sides = [(values, values) for values in ids] + ([cross_ids] if cross_ids is not None else [])
    keys, key_scene = key, scene
    if all_ranks and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        # Ids and scenes are numbered per process: a stride that no process reaches keeps them apart.
        sides = [(_globally_unique(own), gather_rows(_globally_unique(others))[0]) for own, others in sides]
        scene = _globally_unique(scene) if scene is not None else None
        keys, first = gather_rows(key)
        key_scene = gather_rows(scene)[0] if scene is not None else None
    if num_rows == 0:
        zero = query.sum() + keys.sum() * 0
        return ContrastResult(zero, zero.detach(), zero.detach())
    with torch.autocast(query.device.type, enabled=False):
        logits = query @ keys.mT / temperature
    target = torch.arange(first, first + num_rows, device=query.device)
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    if scene is not None and key_scene is not None:
        excluded |= scene[:, None] != key_scene[None]
    rows_to_choose_from = (~excluded).sum(dim=1)
    for own, others in sides:
        excluded |= (own[:, None] == others[None]) & (own[:, None] >= 0)
    excluded[torch.arange(num_rows, device=query.device), target] = False
    logits = logits.masked_fill(excluded, -torch.inf)
    loss = F.cross_entropy(logits, target)
    accuracy = (logits.argmax(dim=1) == target).float().mean()
    return ContrastResult(loss, accuracy, rows_to_choose_from.float().log().mean())


def _globally_unique(values: Tensor) -> Tensor:
    stride = 1 << 40
    return torch.where(values >= 0, values + dist.get_rank() * stride, values)


class _AllGather(torch.autograd.Function):
    """(n, ...) of every process as (processes, n, ...); the gradient of each part is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes, in the order of the ranks, with their gradient.

    Args:
        rows: (N, ...) of this process; N may differ between processes, and may be 0.

    Returns:
        all rows (R, ...), and where this process's own begin.
    """
    mine = torch.tensor([len(rows), int(rows.requires_grad and torch.is_grad_enabled())], device=rows.device)
    facts = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(facts, mine)
    sizes = [int(fact[0]) for fact in facts]
    padded = torch.cat([rows, rows.new_zeros((max(sizes) - len(rows), *rows.shape[1:]))])
    if any(int(fact[1]) for fact in facts) and not padded.requires_grad:
        # Rows without a gradient here (none at all, say): the others' backward still waits for this process's part.
        padded.requires_grad_()
    parts = _AllGather.apply(padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sum(sizes[: dist.get_rank()])


def chance(ceiling: float) -> float:
    """Top-1 accuracy of guessing, from the ceiling ln(N)."""
    return math.exp(-ceiling)
