"""What documents leave of a ring: who meets whom, what travels, and where calls are cut."""

import random

import pytest
import torch
from torch import Tensor

from lhcp.comm.layout import LAYOUTS, LayoutName, make_layout
from lhcp.documents import Cut, limits_of
from lhcp.ring.block.base import Bounds
from lhcp.ring.documents import Cuts
from lhcp.ring.parts import ring_route, ring_sources
from lhcp.ring.schedule import (
    Step,
    allgather_steps,
    hierarchical_steps,
    own_call,
    p2p_steps,
    round_chunks,
)
from lhcp.ring.shape import AttentionShape, Mask, Tuning

HEADS = 2


def shape_of(world: int, layout: LayoutName, mask: Mask, chunk: int = 4) -> AttentionShape:
    cut = make_layout(layout, world)
    return AttentionShape(
        seqlen=chunk * cut.num_chunks,
        layout=cut,
        num_heads=HEADS,
        num_kv_heads=HEADS,
        head_dim=8,
        batch=2,
        mask=mask,
        node_size=world // 2 if world % 2 == 0 else world,
        tuning=Tuning(round_length=max(1, min(2, world // 2))),
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize("reach", [0, 1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_chunks_meet_as_far_as_documents_reach(
    world: int, layout: LayoutName, reach: int, backward: bool
) -> None:
    """Fails if a chunk misses one that a document reaches, or fetches one that none does."""
    shape = shape_of(world, layout, Mask(True, 4, 16, reach))
    for rank in range(world):
        mine = shape.layout.chunks(rank)
        met = []
        for step in p2p_steps(shape, rank, backward)[1:]:
            for call in step.calls:
                keys = step.keys[slice(*call.kv)]
                met += [(c, key) for c in mine[slice(*call.q)] for key in keys]
            assert set(step.keys) == {key for _, key in met if key in step.keys}
        others = [c for c in range(shape.layout.num_chunks) if c not in mine]
        assert sorted(met) == [(c, key) for c in mine for key in others if 0 < c - key <= reach]


@pytest.mark.parametrize("reach", [0, 1, 2, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_what_is_sent_is_what_is_awaited(world: int, layout: LayoutName, reach: int) -> None:
    """Fails if ranks disagree about a message, forward or back, and so about the next ones."""
    shape = shape_of(world, layout, Mask(True, 4, 16, reach))
    cut, mask = shape.layout, shape.mask
    for distances in shape.rounds:
        routes = [ring_route(rank, cut, mask, distances) for rank in range(world)]
        for sender in range(world):
            for receiver in range(world):
                chunks = round_chunks(receiver, cut, mask, distances)
                wanted = [
                    c for c, o in zip(chunks, routes[receiver][0], strict=True) if o == sender
                ]
                sent = [cut.chunks(sender)[s] for s, to in routes[sender][1] if to == receiver]
                assert sent == wanted
                sources = ring_sources(sender, cut, mask, (distances,))
                back = [
                    c for c, of in zip(cut.chunks(sender), sources, strict=True) if receiver in of
                ]
                assert back == sorted(wanted)


def draw(
    batch: int, heads: int, seqlen: int, generator: random.Random, most: int
) -> list[list[list[int]]]:
    """First rows of documents of each batch row and head; now and then of one row, or edges'.

    most: rows of one, more or less; 0: any.
    """
    found = []
    for _ in range(batch):
        count = generator.choice([0, 1, 3, seqlen // 2, seqlen])
        all_starts = sorted({0, *generator.choices(range(seqlen), k=count)})
        if most:
            all_starts = sorted({*all_starts, *range(0, seqlen, most)})
        # Heads take some of the documents, as selections do, at rows of their own.
        found.append(
            [
                sorted({0, *(min(s + generator.randrange(2), seqlen - 1) for s in all_starts)})
                for _ in range(heads)
            ]
        )
    return found


def numbers_of(starts: list[list[list[int]]], seqlen: int) -> Tensor:
    """Numbers [B, heads, S] that ascend over the batch."""
    rows = []
    first = 0
    for of_row in starts:
        rows.append([[first + sum(s <= t for s in of) - 1 for t in range(seqlen)] for of in of_row])
        first += max(map(len, of_row))
    return torch.tensor(rows, dtype=torch.int32)


def met(bounds: Bounds, num_q: int, num_keys: int, segment: int) -> Tensor:
    """Which pairs of rows of a segment are in one run."""

    def runs(edges: Tensor, length: int) -> Tensor:
        rows = torch.arange(length, dtype=torch.int32) + segment * length
        return torch.searchsorted(edges, rows, right=True)

    return runs(bounds.q, num_q)[:, None] == runs(bounds.kv, num_keys)[None, :]


def steps_of(rotation: str, shape: AttentionShape, rank: int) -> tuple[Step, ...]:
    if shape.world_size == 1:
        return (own_call(shape, rank)[1],)
    if rotation.startswith("p2p"):
        return p2p_steps(shape, rank, rotation == "p2p back")
    return (allgather_steps if rotation == "allgather" else hierarchical_steps)(shape, rank)


@pytest.mark.parametrize("rotation", ["p2p", "p2p back", "allgather", "hierarchical"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_runs_are_documents(world: int, layout: LayoutName, causal: bool, rotation: str) -> None:
    """Fails if a call of some schedule joins two documents or parts one, or if two rows of one do
    not meet, or twice: random cuts, of short ones too."""
    generator = random.Random(f"{world} {layout} {causal} {rotation}")
    for trial in range(8):
        heads, chunk = 1 + trial % 2, (1, 3, 6, 9)[trial % 4]
        plain = shape_of(world, layout, Mask(causal), chunk)
        starts = draw(plain.batch, heads, plain.seqlen, generator, most=(0, 3)[trial // 4])
        numbers = numbers_of(starts, plain.seqlen)
        cut = Cut(plain.batch, plain.seqlen, plain.layout.num_chunks, (0,))
        ends = [
            [b * plain.seqlen + s for b, of in enumerate(starts) for s in of[h]]
            for h in range(heads)
        ]
        limits = torch.stack([limits_of(torch.tensor(e), cut) for e in ends]).amax(0)
        shape = shape_of(world, layout, Mask(causal, *limits.tolist()), chunk)
        assert (
            shape.met_rows < chunk if causal and trial >= 6 else causal or shape.met_rows == chunk
        )
        places = torch.arange(plain.seqlen).unflatten(0, (-1, chunk))
        pairs_met = torch.zeros(plain.batch, heads, plain.seqlen, plain.seqlen, dtype=torch.int32)
        for rank in range(world):
            cuts, mine = Cuts(numbers, shape, rank), shape.layout.chunks(rank)
            for step in steps_of(rotation, shape, rank):
                part = step.of_chunk(chunk)
                for call in step.calls:
                    bounds = cuts.bounds(call, step)
                    assert bounds.per_head == (heads > 1)
                    own = mine[slice(*call.q)]
                    keys = sorted(step.keys[slice(*call.kv)])
                    pairs = [([c], [c]) for c in own] if call.per_chunk else [([*own], keys)]
                    segments = [
                        (b, h, places[q, :part].flatten(), places[k, chunk - part :].flatten())
                        for b in range(plain.batch)
                        for q, k in pairs
                        for h in range(heads)
                    ]
                    for i, (b, h, q, k) in enumerate(segments):
                        seen = met(bounds, len(q), len(k), i)
                        assert torch.equal(seen, numbers[b, h, q][:, None] == numbers[b, h, k])
                        if call.mask.causal:
                            seen &= q[:, None] >= k
                        pairs_met[b, h, q[:, None], k] += seen
                    lengths = bounds.q.diff().max(), bounds.kv.diff().max()
                    assert lengths[0] <= bounds.longest_q and lengths[1] <= bounds.longest_kv
                    assert bounds.q[-1] == sum(len(q) for *_, q, _ in segments)
                    assert bounds.kv[-1] == sum(len(k) for *_, k in segments)
        may = numbers[..., :, None] == numbers[..., None, :]
        assert torch.equal(pairs_met, (may.tril() if causal else may).int())
