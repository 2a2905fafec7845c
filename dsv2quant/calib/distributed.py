"""Several processes on one calibration: ranks, of one machine or many, one GPU each.

Work is shared out by numbers, in contiguous shares. What must not depend on how many ranks there are is summed in a
fixed tree over chunks of the work (`TreeSum`), whoever computed them: floating-point sums in any other order differ.

CPU tensors and Python objects go over gloo, CUDA tensors over NCCL. Ranks meet over gloo before anything goes over
NCCL: there the end of a process closes its connections and is noticed at once, where NCCL would wait for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from dsv2quant.errors import Dsv2quantError, UsageError
from dsv2quant.planning.options import check_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import P2POp, Store

T = TypeVar("T")
# The others wait for rank 0 while it converts and writes, which may take hours. Where a process ends, none waits.
PATIENCE = timedelta(days=1)


class RankLostError(Dsv2quantError):
    """Another rank ended, or can't be reached."""


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and the device that it computes on. All ranks make the same calls in the same
    order. Of one rank every call is local, and copies nothing. Raises RankLostError where another has ended."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone reads what is asked, writes and prints."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """Of `count` items those of this rank, or another. Contiguous, and of lengths that differ by one at most: the
        shares of all ranks join to range(count), and rank 0 has an item if there is one."""
        rank = self.rank if rank is None else rank
        length, longer = divmod(count, self.size)
        first = rank * length + min(rank, longer)
        return range(first, first + length + (rank < longer))

    def span(self, batches: Sequence[slice]) -> slice:
        """What this rank's share of adjacent batches covers: whole ones, whose bits don't depend on the number of
        ranks. Raises UsageError where a rank would have none."""
        if self.size > len(batches):
            what = f"{self.size} ranks for {len(batches)} batches of windows"
            raise UsageError(what, fix=f"start {len(batches)} at most, or take more tokens")
        share = self.share(len(batches))
        return slice(batches[share[0]].start, batches[share[-1]].stop)

    def owner_of(self, item: int, count: int) -> int:
        """The rank in whose share of `count` items this one is."""
        length, longer = divmod(count, self.size)
        in_longer = longer * (length + 1)
        return item // (length + 1) if item < in_longer else longer + (item - in_longer) // length

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """The tensor of the rank `source`. Each passes one of its shape, dtype and kind of device, which is overwritten
        if it is contiguous."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        tensor = tensor.contiguous()
        self._meet(tensor.device)
        with _reaching():
            dist.broadcast(_bytes(tensor), source)
        return tensor

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send parts[i] to rank i; returns what each rank sent here. Parts are [n, ...] with any n, 0 too, and one
        dtype and one shape behind it everywhere; the own one is handed back as it is."""
        if self.size == 1:
            return list(parts)
        import torch
        import torch.distributed as dist

        lengths = torch.tensor([len(part) for part in parts])
        theirs = torch.empty_like(lengths)
        with _reaching():
            dist.all_to_all_single(theirs, lengths)
        received = [parts[self.rank].new_empty((int(n), *parts[self.rank].shape[1:])) for n in theirs]
        received[self.rank] = parts[self.rank]
        calls = []
        for rank, (sent, arriving) in enumerate(zip(parts, received, strict=True)):
            if rank == self.rank:
                continue
            if sent.numel():
                calls.append(dist.P2POp(dist.isend, _bytes(sent.contiguous()), rank))
            if arriving.numel():
                calls.append(dist.P2POp(dist.irecv, _bytes(arriving), rank))
        _transfer(calls)
        return received

    def send(self, tensors: Sequence[Tensor], to: int) -> None:
        """Send tensors to another rank, which receives them meanwhile."""
        import torch.distributed as dist

        _transfer([dist.P2POp(dist.isend, _bytes(tensor.contiguous()), to) for tensor in tensors])

    def receive(self, like: Sequence[Tensor], source: int) -> list[Tensor]:
        """What `source` sends, tensors of the shapes, dtypes and device of `like`."""
        import torch
        import torch.distributed as dist

        made = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like]
        _transfer([dist.P2POp(dist.irecv, _bytes(tensor), source) for tensor in made])
        return made

    def gather(self, value: T) -> list[T] | None:
        """At rank 0 the small Python objects of all ranks, in their order; None elsewhere."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.is_first else None
        with _reaching():
            dist.gather_object(value, found)
        return found

    def everywhere(self, value: T) -> list[T]:
        """The small Python objects of all ranks, in their order, at each."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _reaching():
            dist.all_gather_object(found, value)
        return found

    def agreed(self, value: Any) -> Any:
        """Rank 0's small Python object; what others pass doesn't matter."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        held = [value]
        with _reaching():
            dist.broadcast_object_list(held)
        return held[0]

    def announce(self, name: str, *about: object) -> None:
        """By rank 0: let the others do their part of a stage, which `follow` knows by its name."""
        self.agreed((name, *about))

    def dismiss(self) -> None:
        """By rank 0: there is no more to do together."""
        self.agreed(None)

    def follow(self, stages: Mapping[str, Callable[..., object]]) -> None:
        """By the other ranks: do what rank 0 announces, until it dismisses all."""
        while (announced := self.agreed(None)) is not None:
            name, *about = announced
            stages[name](*about)

    def _meet(self, device: torch.device) -> None:
        """Before something goes over NCCL: wait over gloo until all ranks are here."""
        import torch
        import torch.distributed as dist

        if device.type != "cpu":
            with _reaching():
                dist.all_reduce(torch.zeros(1))


ALONE = Ranks()  # one process, without torch.distributed


@contextmanager
def joined(device: str, rank: int, local_rank: int, size: int, store: Store) -> Iterator[Ranks]:
    """This process among `size`, which find each other by `store`. Of "cuda" each computes on the GPU numbered by its
    `local_rank`, its number on this machine. Raises UsageError for a device that can't be shared out so, and
    RankLostError where the others don't come."""
    import torch
    import torch.distributed as dist

    if device.startswith("cuda:"):
        raise UsageError(f"--device {device}: several ranks have a GPU each", fix="give --device cuda")
    if device != "cpu":
        device = f"{device}:{local_rank}"
        check_device(device)
        torch.cuda.set_device(device)
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    with _reaching():
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        dist.all_reduce(torch.zeros(1, device=device))  # connects all: NCCL does so at the first call of all ranks
    yield Ranks(rank, size, device)
    dist.destroy_process_group()  # where this is left early the process ends, and NCCL might wait for what never comes


@contextmanager
def _reaching() -> Iterator[None]:
    """What torch.distributed says of a rank that is gone is one line, of which the first sentence tells."""
    try:
        yield
    except RuntimeError as error:
        said = re.sub(r"^\[[^]]*\] ", "", str(error)).splitlines()[0].partition(". ")[0]
        raise RankLostError(f"another rank has ended or can't be reached: {said}") from error


def _transfer(calls: list[P2POp]) -> None:
    """Send and receive, all at once."""
    import torch.distributed as dist

    if calls:
        with _reaching():
            for call in dist.batch_isend_irecv(calls):
                call.wait()


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes: backends lack some dtypes."""
    import torch

    return tensor.view(-1).view(torch.uint8)


Node = tuple[int, int, Sequence["Tensor"]]  # level in the tree, number there, sums


class TreeSum:
    """The sum of `count` leaves, each some tensors of the same shapes, added up in a fixed tree: node k of a level is
    node 2k of the level below plus node 2k + 1, or the first alone where there is no second. The result has the same
    bits however the leaves are shared out. A rank holds as many unfinished sums as log2(count), at most."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._nodes: list[Node] = []

    def add(self, index: int, values: Sequence[Tensor]) -> None:
        """Leaf `index`, of this rank's share: all of it in rising order. Its tensors are overwritten."""
        _push(self._nodes, (0, index, values))

    def total(self, ranks: Ranks, owner: int = 0) -> Sequence[Tensor] | None:
        """The sums at the rank `owner`, None elsewhere. Each rank has added its `ranks.share(count)`."""
        like = self._nodes[0][2] if self._nodes else []
        if ranks.size > self._count:  # ranks without a leaf don't know what is summed
            like = _shaped(ranks.agreed([(tuple(x.shape), x.dtype) for x in like]), ranks.device, like)
        if ranks.size > 1 and like:
            ranks._meet(like[0].device)
        if ranks.rank != owner:
            for *_, values in self._nodes:
                ranks.send(values, owner)
            return None
        nodes: list[Node] = []
        for rank in range(ranks.size):
            if rank == owner:
                for node in self._nodes:
                    _push(nodes, node)
            else:
                for level, number in _subtrees(ranks.share(self._count, rank)):
                    _push(nodes, (level, number, ranks.receive(like, rank)))
        *_, total = nodes.pop()
        while nodes:  # what has no right neighbour goes up until it is one itself
            *_, left = nodes.pop()
            total = _added(left, total)
        return total


def _push(nodes: list[Node], node: Node) -> None:
    """Behind nodes that cover what is before it; pairs of neighbours become one."""
    level, number, values = node
    while nodes and number % 2 and nodes[-1][:2] == (level, number - 1):
        *_, left = nodes.pop()
        level, number, values = level + 1, number // 2, _added(left, values)
    nodes.append((level, number, values))


def _added(left: Sequence[Tensor], right: Sequence[Tensor]) -> Sequence[Tensor]:
    for into, values in zip(left, right, strict=True):
        into.add_(values)
    return left


def _subtrees(leaves: range) -> Iterator[tuple[int, int]]:
    """(level, number) of the largest whole subtrees that some leaves are made of, in order."""
    first = leaves.start
    while first < leaves.stop:
        level = 0
        while first % (2 << level) == 0 and first + (2 << level) <= leaves.stop:
            level += 1
        yield level, first >> level
        first += 1 << level


def _shaped(shapes: Sequence[tuple[tuple[int, ...], torch.dtype]], device: str, own: Sequence[Tensor]) -> list[Tensor]:
    import torch

    return list(own) or [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes]
