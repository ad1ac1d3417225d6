"""The gate before any number: a way to attend across ranks that is wrong is not timed."""

from dataclasses import replace

import torch

from bench.common.problem import TENSORS, Answers, AttentionProblem, Choice
from lhcp.comm.mesh import Ranks
from lhcp.comm.sharding import shard
from lhcp.measure.rank_values import gathered
from lhcp.testing.inputs import small_config
from lhcp.testing.tolerance import assert_close_float64, assert_within_budget


def gate(choice: Choice, like: AttentionProblem, device: torch.device) -> str | None:
    """Compare a choice with one rank: out, dq, dk, dv; and the lighthouse layer, likewise.

    In float64 on a CPU; on a GPU in the dtype of `like` and dense attention only, by the error that
    one rank has against float64. A collective.

    Args:
        like: its heads, head_dim and dtype are taken, and lengths that take no time.

    Returns:
        None, or what is wrong on some rank.
    """
    wrong, world_size = None, choice.ranks.world_size
    dense = replace(like, seqlen=256 * world_size, config=None)
    if world_size == 1:
        choice = replace(choice, rotation="auto")
    try:
        if device.type == "cuda":
            if dense.dtype == torch.float64:
                choice = replace(choice, backend="math")
            _compare(dense, choice, device)
        else:
            config, seqlen = small_config(num_strata=2 * world_size)
            dense, choice = replace(dense, dtype=torch.float64), replace(choice, backend="auto")
            _compare(dense, choice, device)
            _compare(replace(dense, seqlen=seqlen, config=config, head_dim=16), choice, device)
    except AssertionError as error:
        wrong = f"rank {choice.ranks.rank}: {error}"
    return next((said for said in gathered(wrong, choice.ranks) if said), None)


def refuse(rotation: str, wrong: str | None) -> None:
    """Let a rotation through the gate.

    Raises:
        SystemExit: something is wrong.
    """
    if wrong is not None:
        raise SystemExit(f"{rotation} is wrong, so nothing is timed: {wrong}")


def _compare(problem: AttentionProblem, choice: Choice, device: torch.device) -> None:
    whole = problem.whole(device)

    def own(answers: Answers) -> list[torch.Tensor]:
        return [shard(x, choice.ranks, layout=choice.layout) for x in answers]

    ours = problem.answer(tuple(own(whole)), **choice.options)
    alone = Choice("auto", choice.backend, Ranks())
    one = own(problem.answer(whole, **alone.options))
    if problem.dtype == torch.float64:
        for name, got, single in zip(TENSORS, ours, one, strict=True):
            assert_close_float64(name, got, single)
        return
    math = replace(alone, backend="math") if device.type == "cuda" else alone
    true = own(problem.answer(tuple(x.double() for x in whole), **math.options))
    for name, got, single, exact in zip(TENSORS, ours, one, true, strict=True):
        assert_within_budget(name, got, single, exact)
