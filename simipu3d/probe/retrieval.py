"""Does a token find its own partner among all others?

Between the two views' tokens, or between tokens and pixels. Shapes: N pairs, C channels.
"""

import torch
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def retrieval_top1(queries: Tensor, keys: Tensor, ids: Tensor, chunk: int = 1024) -> float:
    """Share of the queries whose most similar key (cosine) is their own.

    Args:
        queries: (N, C); row n belongs to row n of `keys`.
        keys: (N, C).
        ids: (N,) whole numbers; rows with equal ids are copies of one thing (a raw point drawn twice), and finding a
            copy is no miss. Tokens of different frames need different ids.
        chunk: queries at a time.

    Returns:
        0 to 1; compare with `chance_top1(ids)`. Of equally similar keys the first counts.

    Raises:
        ValueError: no pairs, or shapes that do not belong together.
    """
    if len(queries) == 0:
        raise ValueError("retrieval needs at least one pair, got none")
    if queries.shape != keys.shape or ids.shape != queries.shape[:1]:
        raise ValueError(
            f"queries and keys must be (N, C) alike and ids (N,), got {tuple(queries.shape)}, {tuple(keys.shape)} and "
            f"{tuple(ids.shape)}"
        )
    queries, keys = functional.normalize(queries.float(), dim=1), functional.normalize(keys.float(), dim=1)
    found = torch.cat([(part @ keys.mT).argmax(dim=1) for part in queries.split(chunk)])
    return (ids.index_select(0, found) == ids).double().mean().item()


def chance_top1(ids: Tensor) -> float:
    """What `retrieval_top1` gives on average for features without meaning: 1 / N where all ids differ, more with
    copies.

    Raises:
        ValueError: no pairs.
    """
    if len(ids) == 0:
        raise ValueError("retrieval needs at least one pair, got none")
    counts = ids.unique(return_counts=True)[1].double()
    return ((counts / len(ids)).square().sum()).item()
