"""Collectives under one name each, whatever torch and its backends call and refuse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lhcp.comm.torch_private import coalesces, coalescing, is_fake, receive, send

all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""all_gather(output, input, group, async_op): inputs of all ranks, one after another on axis 0."""

reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
"""reduce_scatter(output, input, group=, async_op=): this rank's run of axis 0 of the sum."""


class Works:
    """Several messages under way; what is sent is kept until they were waited for."""

    def __init__(self, works: Sequence[Any] = (), sent: Sequence[Any] = ()) -> None:
        self._works, self._sent = works, sent

    def wait(self) -> None:
        """Wait for all of them; on a GPU the current stream does."""
        for work in self._works:
            work.wait()
        self._sent = ()


Peered = tuple[Tensor, int]
"""What a message is read from or written to, and the rank of the group at its other end."""


def exchange(
    outgoing: Sequence[Peered], incoming: Sequence[Peered], group: dist.ProcessGroup
) -> Works:
    """Start messages to other ranks and from them, as one where the backend can.

    Several between the same two ranks arrive in the order in which they are given.
    """
    # A group that sends nothing copies what it would send: the compute-only twin of a rotation
    # would count the copies, so nothing is asked of it, here and below.
    if is_fake(group) or not (outgoing or incoming):
        return Works()
    device = (*outgoing, *incoming)[0][0].device
    if not coalesces(group, device):
        return Works(_post(outgoing, incoming, group), outgoing)
    with coalescing(group, device) as together:
        _post(outgoing, incoming, group)
    return Works((together,), outgoing)


def _post(
    outgoing: Sequence[Peered], incoming: Sequence[Peered], group: dist.ProcessGroup
) -> list[Any]:
    # Receives first: after a send, gloo's link between two ranks runs one way at a time.
    works = [receive(x, peer, group) for x, peer in incoming]
    return works + [send(x, peer, group) for x, peer in outgoing]


def all_gathers(pairs: Sequence[tuple[Tensor, Tensor]], group: dist.ProcessGroup) -> Works:
    """Start the gathers of (output, input): as one collective where the backend can, else as
    messages.

    As collectives of their own they would be as many kernels on a GPU, and each but the first would
    wait until whatever computes meanwhile leaves a multiprocessor free; gloo's would go one after
    another, and each one way at a time.
    """
    if is_fake(group) or not pairs:
        return Works()
    device = pairs[0][0].device
    if coalesces(group, device):
        with coalescing(group) as together:
            for output, given in pairs:
                all_gather(output, given, group=group, async_op=True)
        return Works((together,), pairs)
    rank, world = group.rank(), group.size()
    outgoing: list[Peered] = []
    incoming: list[Peered] = []
    for output, given in pairs:
        parts = output.chunk(world)
        parts[rank].copy_(given)
        for distance in range(1, world):
            to, back = (rank + distance) % world, (rank - distance) % world
            outgoing.append((given, to))
            incoming.append((parts[back], back))
    return exchange(outgoing, incoming, group)


@dataclass(frozen=True)
class Rows:
    """One all-to-all of rows of axis 0; either side may be empty."""

    output: Tensor
    output_rows: list[int]
    """Rows from each rank."""
    input: Tensor
    input_rows: list[int]
    """Rows for each rank."""


def all_to_alls(exchanges: Sequence[Rows], group: dist.ProcessGroup) -> Works:
    """Start all-to-alls: as one collective where the backend can, else as a message a part."""
    if is_fake(group) or not exchanges:
        return Works()
    device = exchanges[0].output.device
    if not coalesces(group, device):
        return _part_by_part(exchanges, group)
    with coalescing(group, device) as together:
        for rows in exchanges:
            dist.all_to_all_single(
                rows.output,
                rows.input,
                output_split_sizes=rows.output_rows,
                input_split_sizes=rows.input_rows,
                group=group,
                async_op=True,
            )
    return Works((together,), exchanges)


def swap(
    output: Tensor,
    given: Tensor,
    group: dist.ProcessGroup,
    to: Sequence[int],
    sources: Sequence[int],
) -> None:
    """Exchange equal parts of axis 0 by all-to-all, and wait for it.

    Args:
        to: for each part of `given` the rank that gets it; sources: for each part of `output` the
            rank that it is from; both ascending.
    """
    if is_fake(group):
        return
    if len(to) == len(sources) == group.size():
        dist.all_to_all_single(output, given, group=group)
        return
    rows_from, rows_to = ([int(r in ends) for r in range(group.size())] for ends in (sources, to))
    dist.all_to_all_single(
        output, given, output_split_sizes=rows_from, input_split_sizes=rows_to, group=group
    )


def _part_by_part(exchanges: Sequence[Rows], group: dist.ProcessGroup) -> Works:
    """Start all-to-alls as messages that are all under way at once.

    Gloo carries out collectives one after another: each would take as long as its busiest rank.
    """
    rank = group.rank()
    outgoing: list[Peered] = []
    incoming: list[Peered] = []
    own: list[tuple[Tensor, Tensor]] = []
    for rows in exchanges:
        received, given = rows.output.split(rows.output_rows), rows.input.split(rows.input_rows)
        own.append((received[rank], given[rank]))
        for messages, parts in ((incoming, received), (outgoing, given)):
            messages += [(x, peer) for peer, x in enumerate(parts) if peer != rank and len(x)]
    works = exchange(outgoing, incoming, group)
    for into, part in own:
        into.copy_(part)
    return works
