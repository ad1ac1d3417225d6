"""Exactly which messages a rank sends: how many, how large, in which order, the same on all ranks.

What is counted is what reaches c10d, below every Python name that could hide it.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lhcp
from lhcp.comm.collectives import Rows, all_to_alls
from lhcp.comm.layout import Layout, LayoutName, make_layout
from lhcp.testing.ranks import RankPool
from tests.cases import LAYOUTS, ROTATIONS, TWO_AXES, Problem

Message = tuple[str, int, torch.dtype, int]
"""What kind, how many elements this rank gives (or, reduced, gets), their dtype, and to whom: for a
send the distance to its receiver round the group, else the group's size."""


class MessageRecorder(TorchDispatchMode):
    """Record every message that this rank posts.

    A dispatch mode does not look into operators: give what is called an `lhcp.Timers`, with which
    the ring and the exchange of rows do not go through any. The all-to-all always does, so its
    Python function is wrapped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []
        self.ops: list[str] = []
        """What c10d was called for, receives too."""

    def __enter__(self) -> "MessageRecorder":
        original = self._all_to_all = dist.all_to_all_single

        def wrapped(
            output: Tensor, given: Tensor, group: dist.ProcessGroup, **splits: list[int]
        ) -> Any:
            self.messages.append(("alltoall", given.numel(), given.dtype, group.size()))
            return original(output, given, group=group, **splits)

        dist.all_to_all_single = wrapped
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        dist.all_to_all_single = self._all_to_all

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.ops.append(func._schema.name.removeprefix("c10d::"))
            self._record(self.ops[-1], args)
        return func(*args, **(kwargs or {}))

    def _record(self, op: str, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        size = group.size()
        given: Tensor
        if op in ("recv_", "alltoall_base_"):
            return
        if op == "send":
            (given,), distance = args[0], (args[2] - group.rank()) % size
            self.messages.append(("send", given.numel(), given.dtype, distance))
            return
        kinds = {"_allgather_base_": ("gather", 1), "_reduce_scatter_base_": ("reduce", 0)}
        assert op in kinds, f"a message that this test does not know: {op}"
        kind, argument = kinds[op]
        given = args[argument]
        self.messages.append((kind, given.numel(), given.dtype, size))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One attention with its backward."""

    rotation: str
    layout: LayoutName
    world_size: int
    lighthouse: bool
    dtype: torch.dtype

    @property
    def problem(self) -> Problem:
        return Problem(
            num_strata=12 if self.world_size == 3 else 8,
            batch=2,
            num_kv_heads=12,
            groups=2,
            head_dim=4,
            dtype=self.dtype,
        )

    @property
    def nodes(self) -> int | None:
        shape = TWO_AXES.get(self.rotation, {}).get(self.world_size)
        return None if shape is None else shape[0]


def record(group: Any, call: Asked) -> tuple[list[Message], list[Message]]:
    """Messages of this rank's forward and of its backward."""
    q, k, v, do = (lhcp.shard(x, group, layout=call.layout) for x in call.problem.inputs())
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    where: dict[str, Any] = {
        "group": group,
        "layout": call.layout,
        "rotation": call.rotation,
        "timers": lhcp.Timers(),
    }
    with MessageRecorder() as forward:
        if call.lighthouse:
            o = lhcp.lighthouse_attention(q, k, v, config=call.problem.config, **where)
        else:
            o = lhcp.ring_attention(q, k, v, **where)
    with MessageRecorder() as backward:
        torch.autograd.grad(o, (q, k, v), do)
    return forward.messages, backward.messages


def parts(layout: LayoutName, world: int, rank: int, keys: range) -> Counter[int]:
    """Parts of gradients of the keys of ranks `keys` that `rank` gives, by distance to the owner.

    Query chunks that see the same keys share a call; a call makes one part of each chunk that it
    sees. The exchange is of as many ranks as `keys`; what is for the rank itself stays.
    """
    cut, size = make_layout(layout, world), len(keys)
    calls = {frozenset(k for r in keys for k in cut.chunks(r) if k < q) for q in cut.chunks(rank)}
    found = Counter((cut.owner(k)[0] - rank) % size for call in calls for k in call)
    del found[0]
    return found


def ring(
    forward: Counter[Message],
    backward: Counter[Message],
    call: Asked,
    cut: Layout,
    rank: int,
    kv: int,
) -> None:
    """Count what p2p sends: keys to whoever attends to them, gradients to whose keys they are.

    Chunk by chunk; `kv` elements of a rank's keys.
    """
    chunk = kv // cut.chunks_per_rank
    for other in set(range(cut.world_size)) - {rank}:
        asked, given = (
            sum(k < cut.chunks(queries)[-1] for k in cut.chunks(owner))
            for queries, owner in ((other, rank), (rank, other))
        )
        distance = (other - rank) % cut.world_size
        forward["send", chunk, call.dtype, distance] += 2 * asked
        backward["send", chunk, call.dtype, distance] += 2 * (asked + given)


def expected(call: Asked, rank: int) -> tuple[Counter[Message], Counter[Message]]:
    """What a rank should send, from sizes alone."""
    p, world = call.problem, call.world_size
    slots = 2 if call.layout == "zigzag" else 1
    whole = p.config.subsequence_length(p.seqlen) if call.lighthouse else p.seqlen
    tokens = whole // world
    heads = p.num_kv_heads * p.groups
    kv = p.batch * tokens * p.num_kv_heads * p.head_dim
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    forward: Counter[Message] = Counter()
    backward: Counter[Message] = Counter()
    if call.rotation == "p2p":
        ring(forward, backward, call, make_layout(call.layout, world), rank, kv)
    elif call.rotation == "allgather":
        for distance in range(1, world):
            forward["send", kv // slots, call.dtype, distance] = 2 * slots
        backward.update(forward)
        for distance, count in parts(call.layout, world, rank, range(world)).items():
            backward["send", kv // slots, call.dtype, distance] += 2 * count
    elif call.rotation == "hierarchical":
        nodes, size = TWO_AXES["hierarchical"][world]
        forward["send", 2 * kv, call.dtype, 1] = nodes - 1
        for distance in range(1, size):
            forward["send", kv // slots, call.dtype, distance] += 2 * slots * nodes
        backward.update(forward)
        own = rank // size
        for node in range(nodes):
            keys = range(node * size, (node + 1) * size)
            for distance, count in parts(call.layout, world, rank, keys).items():
                backward["send", kv // slots, call.dtype, distance] += 2 * count
            if node != own:
                backward["send", kv, wide, (node - own) % nodes] += 2
    else:
        # How many ranks share heads, in a group of how many; how many are left in a ring.
        nodes, size = TWO_AXES.get(call.rotation, {}).get(world, (1, world))
        sharing, group, left = {
            "alltoall": (world, world, 1),
            "hybrid": (size, size, nodes),
            "hybrid_context_first": (nodes, world, size),
        }[call.rotation]
        row = p.batch * tokens
        out, packed = row * heads * p.head_dim, row * (heads + 2 * p.num_kv_heads) * p.head_dim
        if sharing > 1:
            for sent in (forward, backward):
                sent["alltoall", packed, call.dtype, group] += 1
                sent["alltoall", out, call.dtype, group] += 1
        if left > 1:
            # The ring of fewer ranks: as many elements of keys, of longer chunks and fewer heads.
            mine = rank // size if call.rotation == "hybrid" else rank % size
            ring(forward, backward, call, make_layout(call.layout, left), mine, kv)
    if call.lighthouse:
        # The first chunk owes the next rank, the second one the previous.
        rows = p.batch * (p.num_levels - 1) * heads * p.head_dim
        for distance in (1, world - 1)[:slots]:
            forward["send", rows, call.dtype, distance] += 1
            backward["send", rows, wide, world - distance] += 1
    return forward, backward


CALLS = [
    Asked(
        rotation=rotation,
        layout=layout,
        world_size=world_size,
        lighthouse=lighthouse,
        dtype=torch.bfloat16,
    )
    for rotation in ROTATIONS
    for layout in LAYOUTS
    for world_size in (2, 3, 4)
    for lighthouse in (True, False)
    # The dense mode differs by its length alone: once is enough.
    if lighthouse or world_size == 4
]


def name(call: Asked) -> str:
    mode = "lighthouse" if call.lighthouse else "dense"
    return f"W{call.world_size}-{call.layout}-{call.rotation}-{mode}"


@pytest.mark.parametrize("call", CALLS, ids=name)
def test_every_message_is_accounted_for(ranks: RankPool, call: Asked) -> None:
    """Fails if kv travels repeated or twice, parts that no one needs travel, or ranks differ."""
    recorded = ranks.run(record, call.world_size, call, num_nodes=call.nodes)
    for rank, (forward, backward) in enumerate(recorded):
        assert (Counter(forward), Counter(backward)) == expected(call, rank)
        # What p2p sends, and gradients, depend on who may see what; the rest is every rank's.
        rings = ("p2p", "hybrid", "hybrid_context_first")
        assert recorded[0][0] == forward or call.rotation in rings
        collectives = [[m for m in sent if m[0] != "send"] for sent in (recorded[0][1], backward)]
        assert collectives[0] == collectives[1]


def test_float64_travels_as_float64(ranks: RankPool) -> None:
    """Fails if sums over ranks of exact inputs are rounded to float32 on the way."""
    call = Asked(
        rotation="p2p", layout="zigzag", world_size=2, lighthouse=True, dtype=torch.float64
    )
    for rank, (forward, backward) in enumerate(ranks.run(record, 2, call)):
        assert (Counter(forward), Counter(backward)) == expected(call, rank)


def quiet(group: Any, layout: LayoutName) -> list[Message]:
    """Messages of everything that should send nothing."""
    problem = Problem()
    with MessageRecorder() as recorder:
        q, k, _, _ = (lhcp.shard(x, group, layout=layout) for x in problem.inputs())
        lhcp.positions(problem.seqlen, group, layout=layout)
        lhcp.select(q, k, config=problem.config, group=group, layout=layout)
    return recorder.messages


@pytest.mark.parametrize("layout", LAYOUTS)
def test_selection_and_sharding_send_nothing(ranks: RankPool, layout: LayoutName) -> None:
    """Fails if steps 1 to 4 need another rank."""
    assert ranks.run(quiet, 4, layout) == [[]] * 4


def test_one_rank_sends_nothing(ranks: RankPool) -> None:
    """Fails if a group of one rank talks to itself."""
    for rotation in set(ROTATIONS) - set(TWO_AXES):
        call = Asked(
            rotation=rotation, layout="zigzag", world_size=1, lighthouse=True, dtype=torch.float32
        )
        assert ranks.run(record, 1, call) == [([], [])]


def exchange_rows(group: Any) -> tuple[list[str], list[Message], list[list[int]]]:
    """Two all-to-alls at once, in which rank r gives rank p the row 10 r + p, p % 3 times.

    In the second one everything is negative.
    """
    rank, world = group.rank(), group.size()
    exchanges = []
    for sign in (1, -1):
        given = [sign * (10 * rank + p) for p in range(world) for _ in range(p % 3)]
        output = torch.empty(world * (rank % 3), 2)
        rows = torch.tensor(given, dtype=torch.float32).unsqueeze(1).expand(-1, 2).contiguous()
        exchanges.append(Rows(output, [rank % 3] * world, rows, [p % 3 for p in range(world)]))
    with MessageRecorder() as recorder:
        works = all_to_alls(exchanges, group)
    works.wait()
    return recorder.ops, recorder.messages, [e.output[:, 1].int().tolist() for e in exchanges]


def test_all_to_alls_are_a_message_a_part(ranks: RankPool) -> None:
    """Fails if parts mix, if a send goes before a receive, or if own or empty parts travel."""
    for rank, (ops, messages, received) in enumerate(ranks.run(exchange_rows, 4)):
        rows = [10 * giver + rank for giver in range(4) for _ in range(rank % 3)]
        assert received == [rows, [-row for row in rows]]
        peers = [p for p in range(4) if p != rank and p % 3]
        sends = [("send", 2 * (p % 3), torch.float32, (p - rank) % 4) for p in peers]
        assert messages == 2 * sends
        assert ops == ["recv_"] * (2 * 3 * (rank % 3 > 0)) + ["send"] * len(messages)


def gathers(group: Any) -> tuple[list[Message], list[Message]]:
    """Messages of `unshard` and of its backward."""
    part = torch.ones(2, 6, 3, requires_grad=True)
    with MessageRecorder() as forward:
        whole = lhcp.unshard(part, group)
    with MessageRecorder() as backward:
        whole.sum().backward()
    return forward.messages, backward.messages


def test_unshard_is_one_gather(ranks: RankPool) -> None:
    """Fails if unshard sends more than each part once, or its backward more than a sum of them."""
    # Parts travel as bytes, sums as numbers.
    gather, reduce = ("gather", 4 * 36, torch.uint8, 3), ("reduce", 36, torch.float32, 3)
    assert ranks.run(gathers, 3) == [([gather], [reduce])] * 3
