"""What a call may be given anew: not compared at each call, found by the trail."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

import lhcp
from lhcp.comm.mesh import Ranks
from lhcp.comm.trail import Calls, calls_in, leave_uncounted
from lhcp.comm.whereabouts import calls_in_words
from lhcp.packing import read_packing
from lhcp.testing.ranks import RankPool

WORLD, SEQLEN, LAYERS = 4, 128, 32
CALLS = [[30, 70], [30, 70], [31, 70], [31, 70]]
"""First tokens of each call; limits are the same in all."""


def trails(group: Any, culprit: int, uncounted: bool, compiled: bool) -> tuple[list[int], Calls]:
    """Attend to new documents in each step, the culprit to others in the third; return each
    step's number, and the calls after the third."""
    own = dist.new_group(range(WORLD))
    ranks = Ranks(own)
    if uncounted:
        leave_uncounted(ranks)
    q, k, v = (torch.randn(1, SEQLEN // WORLD, 2, 8) for _ in range(3))
    attend = lhcp.LighthouseAttention(None, own, rotation="p2p")
    if compiled:
        attend = torch.compile(attend, fullgraph=True, backend="eager")
    numbers, after = [], Calls()
    for number, starts in enumerate(CALLS):
        if number == 2 and own.rank() == culprit:
            starts = [starts[0] + 1, *starts[1:]]
        cu_seqlens = torch.tensor([0, *starts, SEQLEN], dtype=torch.int32)
        before = calls_in(own)
        for _ in range(2 if compiled else LAYERS):
            attend(q, k, v, cu_seqlens=cu_seqlens)
        numbers.append(calls_in(own).since(before) & 0xFFF)
        if number == 2:
            after = calls_in(own)
    return numbers, after


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("uncounted", [False, True], ids=["counted", "as graphs"])
def test_other_documents_at_a_later_call_are_found(
    ranks: RankPool, uncounted: bool, compiled: bool
) -> None:
    """Fails if a rank that is given other documents makes the same trail, or is not named."""
    found = ranks.run(trails, WORLD, 2, uncounted, compiled)
    for step, numbers in enumerate(zip(*(numbers for numbers, _ in found), strict=True)):
        others = {n for rank, n in enumerate(numbers) if rank != 2}
        assert len(others) == 1
        assert (numbers[2] in others) == (step != 2)
    said = calls_in_words({rank: calls for rank, (_, calls) in enumerate(found)})
    assert said.startswith("the ranks' attention calls differ: ranks 0, 1 and 3 are at ")
    assert said.count("(cu_seqlens: 3 documents of digest ") == 2


@pytest.mark.parametrize("layers", [1, 2, 8, 30, 32, 64])
def test_a_step_s_number_differs_whatever_the_layers(layers: int) -> None:
    """Fails if equal numbers of many layers cancel in the few bits that a step compares."""
    same = 0
    for other in range(200):
        found = []
        for document in (1, other + 2):
            digest = hash_of(document)
            calls = Calls()
            for _ in range(layers):
                calls = calls.and_given(digest, {}).and_then(7, {})
            found.append(calls.since(Calls()) & 0xFFF)
        same += found[0] == found[1]
    assert same <= 2


def hash_of(document: int) -> int:
    return read_packing(torch.tensor([0, document, 999]), 1, 999).digest
