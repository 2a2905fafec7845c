"""Ranks: shares, what they send each other, and sums that don't depend on how many there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ranked import on_ranks

from dsv2quant.calib.distributed import ALONE, RankLostError, Ranks, TreeSum, joined
from dsv2quant.errors import UsageError

LEAVES = (1, 2, 3, 7, 12)  # fewer than ranks, powers of two and others
DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 5, 8, 160])
def test_shares_join_to_the_whole_and_each_item_has_its_owner(size: int, count: int) -> None:
    shares = [Ranks(rank, size).share(count) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [Ranks(0, size).owner_of(item, count) for item in range(count)] == [
        rank for rank, share in enumerate(shares) for _ in share
    ]


def test_alone_nothing_is_copied() -> None:
    x = torch.ones(3)
    assert ALONE.broadcast(x, 0) is x
    assert ALONE.exchange([x])[0] is x
    assert ALONE.gather(x) == [x]
    assert ALONE.agreed(x) is x


def leaf(index: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Numbers of many magnitudes: any other order of adding gives other bits."""
    generator = torch.Generator().manual_seed(index)
    noise = torch.randn(2, 257, generator=generator, dtype=dtype)
    return [noise[0] * 10 ** noise[1], noise[:, :3].clone()]


def totals(ranks: Ranks, owner: int) -> list[Any]:
    found = []
    for count in LEAVES:
        for dtype in DTYPES:
            tree = TreeSum(count)
            for index in ranks.share(count):
                tree.add(index, leaf(index, dtype))
            total = tree.total(ranks, owner)
            found.append(None if total is None else [x.numpy() for x in total])
    return found


def by_definition(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tree's rule, level by level."""
    level = [leaf(index, dtype) for index in range(count)]
    while len(level) > 1:
        pairs = [level[k : k + 2] for k in range(0, len(level), 2)]
        level = [[sum(parts[1:], parts[0]) for parts in zip(*pair, strict=True)] for pair in pairs]
    return level[0]


def test_sums_of_one_rank_are_those_of_the_tree() -> None:
    expected = [by_definition(count, dtype) for count in LEAVES for dtype in DTYPES]
    for found, wanted in zip(totals(ALONE, 0), expected, strict=True):
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(found, wanted, strict=True))
    plain = sum((leaf(i, torch.float32)[0] for i in range(1, 12)), leaf(0, torch.float32)[0])
    assert not torch.equal(plain, by_definition(12, torch.float32)[0])  # else the order would not be tested


def everything(ranks: Ranks) -> dict[str, Any]:
    """All that ranks do together."""
    rank, size = ranks.rank, ranks.size
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int16, torch.bool, torch.int64)
    held = torch.full((2,), rank)
    ranks.broadcast(held, 1)
    striped = torch.full((4, 6), float(rank)).T
    parts = [torch.full(((rank + to) % size, 2, 3), 10 * rank + to, dtype=torch.bfloat16) for to in range(size)]
    received = ranks.exchange(parts)
    return {
        "broadcast": [ranks.broadcast(torch.full((3, 2), rank).to(dtype), 1).long().tolist() for dtype in dtypes],
        "scalar": ranks.broadcast(torch.tensor(float(rank)), 1).item(),
        "in place": held.tolist(),
        "striped": ranks.broadcast(striped, 1).tolist(),
        "received": [x.tolist() for x in received],
        "shapes": [tuple(x.shape) for x in received],
        "own": received[rank] is parts[rank],
        "nothing": [len(x) for x in ranks.exchange([torch.empty(0, 4)] * size)],
        "gathered": ranks.gather({"rank": rank, "array": np.arange(rank)}),
        "agreed": ranks.agreed(f"of {rank}"),
        "totals": [totals(ranks, owner) for owner in range(size)],
    }


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_give_each_other_what_they_have_and_sums_keep_their_bits(size: int) -> None:
    found = on_ranks(size, everything)
    alone = totals(ALONE, 0)
    for rank, seen in enumerate(found):
        assert all(values in ([[1, 1]] * 3, [[1, 1]] * 3) for values in seen["broadcast"])
        assert (seen["scalar"], seen["in place"], seen["striped"]) == (1.0, [1, 1], [[1.0] * 4] * 6)
        for source, values in enumerate(seen["received"]):
            assert values == [[[float(10 * source + rank)] * 3] * 2] * ((source + rank) % size)
        assert seen["shapes"] == [((source + rank) % size, 2, 3) for source in range(size)]
        assert seen["own"]
        assert seen["nothing"] == [0] * size
        assert seen["agreed"] == "of 0"
        for owner, of_owner in enumerate(seen["totals"]):
            if rank != owner:
                assert of_owner == [None] * len(alone)
                continue
            for total, expected in zip(of_owner, alone, strict=True):
                assert all(a.tobytes() == b.tobytes() for a, b in zip(total, expected, strict=True))
    assert [seen["gathered"] is None for seen in found] == [rank > 0 for rank in range(size)]
    for rank, value in enumerate(found[0]["gathered"]):
        assert value["rank"] == rank
        assert value["array"].tolist() == list(range(rank))


def one_leaves(ranks: Ranks) -> str:
    if ranks.rank == 1:
        return "left"
    with pytest.raises(RankLostError, match="another rank has ended"):
        ranks.agreed(0)
    return "noticed"


def test_a_rank_that_ends_is_noticed_at_once() -> None:
    assert on_ranks(2, one_leaves) == ["noticed", "left"]


def test_ranks_have_a_gpu_each() -> None:
    with pytest.raises(UsageError, match="several ranks have a GPU each"), joined("cuda:0", 0, 0, 2, None):
        pass
