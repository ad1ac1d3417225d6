"""The rows of check_ranks: each way to attend across ranks, held against one rank.

Three kinds: against float64 by the error budget of lhcp/testing/tolerance.py; at lengths that
float64 does not reach by distance to one rank; under torch.compile against eager. A row is right
where all ranks say so. All functions are collectives.
"""

from collections.abc import Sequence
from typing import Any

import torch

from bench.common.problem import PEER, TENSORS, Answers, Choice
from lhcp.comm.mesh import Ranks
from lhcp.layer.choices import Choices
from lhcp.layer.plan import make_plan
from lhcp.measure.rank_values import gathered
from lhcp.testing.tolerance import assert_close_float64, assert_within_budget
from tests.evidence.check_problem import Own, attempt, distances, select

Row = dict[str, Any]
Errors = dict[str, float]

_MOST_ROUNDINGS = 32
"""Relative l2 error that one rank may have, in eps of its dtype."""


def against_float64(own: Own, chosen: Sequence[Choice], ranks: Ranks) -> tuple[list[Row], Errors]:
    """Return a row a choice, and one rank's own errors, relative l2 distances to float64.

    The first row is one rank itself: were it far from float64, every budget would be wide.
    """
    assert own.exact is not None
    one = distances(own.alone, own.exact, ranks)
    rows = [_one_rank_row(own, one)]
    for choice in chosen:
        row, ours = _row("float64", own, choice, ranks)
        if ours is not None:
            row["error"] = distances(ours, own.exact, ranks)
            row["one_rank"] = one
            _settle(row, _over_budget(ours, own.alone, own), ranks)
        rows.append(row)
    return rows, one


def against_one_rank(
    own: Own, chosen: Sequence[Choice], ranks: Ranks, one: Errors, slack: float = 1.0
) -> list[Row]:
    """Return a row a choice: its relative l2 distances to one rank's answers, and what they may be.

    If one rank errs by e from float64 and W ranks by at most twice (e + a rounding), as the budget
    says, they are at most 3 e + 2 roundings apart; a rounding moves an element by eps / 4 at most
    twice over.

    Args:
        one: errors of one rank against float64 at a length that affords it, by tensor.
        slack: times the bound.
    """
    eps = torch.finfo(own.problem.dtype).eps
    bounds = {name: slack * (3 * one[name] + eps / 2) for name in TENSORS}
    if own.problem.dtype == torch.float64:
        bounds = dict.fromkeys(TENSORS, 1e-10)
    rows = []
    for choice in chosen:
        row, ours = _row("one rank", own, choice, ranks)
        if ours is not None:
            row["error"] = distances(ours, own.alone, ranks)
            row["bound"] = bounds
            far = [
                f"{name} is {row['error'][name]:.2e} from one rank, bound {bounds[name]:.2e}"
                for name in TENSORS
                if not row["error"][name] <= bounds[name]
            ]
            _settle(row, "; ".join(far) or None, ranks)
        rows.append(row)
    return rows


def compiled(own: Own, ranks: Ranks, compiler: str) -> Row:
    """Hold the method and its backward, compiled with fullgraph=True, against the eager run.

    Args:
        compiler: backend of torch.compile.
    """
    assert own.exact is not None
    choice = Choice("auto", "auto", Ranks(ranks.flat))
    row, eager = _row("compiled", own, choice, ranks)
    row["compiler"] = compiler
    if eager is None:
        return row
    graph = torch.compile(own.problem.attend, fullgraph=True, dynamic=False, backend=compiler)
    ours, error = attempt(lambda: own.problem.answer(own.inputs, graph, **choice.options))
    _settle(row, error, ranks)
    if row["wrong"] or ours is None:
        return row
    row["error"] = distances(ours, own.exact, ranks)
    row["one_rank"] = distances(eager, own.exact, ranks)
    row["bit_equal"] = all(
        gathered(all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True)), ranks)
    )
    _settle(row, _over_budget(ours, eager, own), ranks)
    return row


def over_peer(rows: Sequence[Row], goal: float) -> list[Row]:
    """Return errors of our rows over those of ring-flash-attn on the same tensors, by tensor.

    Args:
        rows: of `against_float64`.
        goal: the most that a ratio may be.
    """
    peers = {row["kind"]: row for row in rows if row["rotation"] == PEER and "error" in row}
    found = []
    for row in rows:
        peer = peers.get(row["kind"])
        if peer is None or row["rotation"] in (PEER, "one rank") or "error" not in row:
            continue
        ratio = {name: row["error"][name] / peer["error"][name] for name in TENSORS}
        worst = max(ratio, key=lambda name: ratio[name])
        wrong = None
        if not ratio[worst] <= goal:
            wrong = f"{worst}: error {ratio[worst]:.3f} of {PEER}'s, goal {goal}"
        keys = ("kind", "seqlen", "rotation", "took", "backend")
        found.append({**{k: row[k] for k in keys}, "check": "peer", "ratio": ratio, "wrong": wrong})
    return found


def _one_rank_row(own: Own, one: Errors) -> Row:
    limit = _MOST_ROUNDINGS * torch.finfo(own.problem.dtype).eps
    far = [f"{name} is {error:.2e}" for name, error in one.items() if not error <= limit]
    return {
        "check": "float64",
        "kind": own.problem.kind,
        "seqlen": own.problem.seqlen,
        "rotation": "one rank",
        "took": "one rank",
        "backend": "",
        "error": one,
        "wrong": f"{', '.join(far)} from the reference, at most {limit:.2e}" if far else None,
    }


def _row(check: str, own: Own, choice: Choice, ranks: Ranks) -> tuple[Row, Answers | None]:
    """Attend, and check the selection; the answers only where every rank has them."""
    problem, inputs = own.problem, own.inputs
    row: Row = {
        "check": check,
        "kind": problem.kind,
        "seqlen": problem.seqlen,
        "rotation": choice.rotation,
        "took": choice.rotation,
        "backend": choice.backend,
        "wrong": None,
    }

    def run() -> tuple[Answers, str | None]:
        choices = Choices(rotation=choice.rotation, backend=choice.backend)
        local = problem.attended // choice.ranks.world_size
        packed = bool(problem.num_documents)
        plan = make_plan(inputs[0], inputs[1], choice.ranks, choices, tokens=local, packed=packed)
        row["took"], row["backend"] = plan.rotation, plan.backend
        if choice.rotation == PEER:
            row["backend"] = "flash_attn"
        ours = problem.answer(inputs, **choice.options)
        entries = select(problem, inputs, choice.ranks)
        if entries is None or own.entries is None:
            return ours, None
        same = all(torch.equal(a, b) for a, b in zip(entries, own.entries, strict=True))
        return ours, None if same else "selects other entries than one rank"

    done, error = attempt(run)
    _settle(row, error, ranks)
    if row["wrong"] or done is None:
        return row, None
    ours, selected = done
    _settle(row, selected, ranks)
    return row, ours


def _settle(row: Row, said: str | None, ranks: Ranks) -> None:
    """Let every rank know what is wrong on any."""
    for rank, text in enumerate(gathered(said, ranks)):
        if text is not None and row["wrong"] is None:
            row["wrong"] = f"rank {rank}: {text}"


def _over_budget(ours: Answers, same_dtype: Answers, own: Own) -> str | None:
    """Say what this rank's part misses the error budget by, if it does."""
    assert own.exact is not None
    for name, got, low, true in zip(TENSORS, ours, same_dtype, own.exact, strict=True):
        try:
            if got.dtype == torch.float64:
                assert_close_float64(name, got, true)
            else:
                largest = true.abs().max().item()
                assert_within_budget(name, got, low, true, own.handed_on * largest)
        except AssertionError as error:
            return str(error)
    return None
