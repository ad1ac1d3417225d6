"""Does one layer of 1,048,576 tokens run on 32 ranks, and does it equal the method's formula?

    python -m tests.evidence.long_cpu --out bench/results/long_cpu_DATE        # .md and .json
    python -m tests.evidence.long_cpu --seqlen 65536 --topk 256                # the same, small

gloo ranks on a CPU: cp 32, zigzag, L=4, p=4, k=4096, forward and backward, by p2p and by
hierarchical. One process computes the same from all tokens: the selection with lhcp/reference.py
from float64 scores, which must have the same entries in the same order; output and gradients at
sampled positions with long_formula.py in float64, from the same rounded inputs.

The tolerance is lhcp/testing/tolerance.py's error budget: twice the sum of the error that the same
formula has in plain torch in the ranks' dtype, one rounding, and the rounding of the lse that ring
steps hand on. float64 ranks must be within 1e-10. Ends with status 1, naming what differs.
"""

import argparse
import time
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

import lhcp
from bench.common.arguments import add_heads, add_layer, config_of, make_parser
from bench.common.card import dated_card
from bench.common.page import Page
from bench.common.problem import Answers, AttentionProblem
from lhcp import reference
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.console import escape_unprintable
from lhcp.ring.heads import TWO_AXES
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64, assert_within_budget
from tests.evidence import check_problem
from tests.evidence.long_formula import SampledRows, at_positions
from tests.evidence.whole import equal, peak_mb, whole_selection

CPU = torch.device("cpu")


def answer(
    group: Group | Ranks, problem: AttentionProblem, rotation: str, positions: Tensor
) -> dict[str, Any]:
    """Run one rank's layer: entries, the sampled rows that it holds, and what the run took.

    A rank draws its own strata and never holds the whole.
    """
    ranks, own = as_ranks(group), lhcp.positions(problem.seqlen, as_ranks(group))
    size = stratum(problem)
    inputs = problem.inputs((own[::size] // size).tolist(), num_strata(problem), CPU)
    begin = time.perf_counter()
    answers = problem.answer(inputs, group=ranks, rotation=rotation)
    seconds = time.perf_counter() - begin
    held, samples = (own[:, None] == positions).nonzero().unbind(1)
    return {
        "entries": check_problem.select(problem, inputs, ranks),
        "samples": samples,
        "rows": [x[0, held] for x in answers],
        "finite": all(bool(x.isfinite().all()) for x in answers),
        "seconds": seconds,
        "peak_mb": peak_mb(),
    }


def num_strata(problem: AttentionProblem) -> int:
    """Return the strata of a layer, which are drawn one by one."""
    assert problem.config is not None
    return problem.config.num_strata


def stratum(problem: AttentionProblem) -> int:
    """Return the tokens of one stratum."""
    return problem.seqlen // num_strata(problem)


def sample(
    selection: reference.ReferenceSelection, problem: AttentionProblem, count: int
) -> Tensor:
    """Choose positions: both ends, starts of strata, tokens that are entries, any others.

    A chunk is whole strata, and its first tokens get rows from another rank; few of all tokens are
    in the sub-sequence themselves, and only those have terms at every level.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(x: Tensor) -> Tensor:
        return x[torch.randperm(x.shape[0], generator=generator)[: count // 4]]

    starts = draw(torch.arange(0, problem.seqlen, stratum(problem)))
    entries = draw(selection.indices[selection.levels == 0])
    ends = torch.tensor([0, 1, problem.seqlen - 1])
    others = torch.randint(problem.seqlen, (count,), generator=generator)
    parts = torch.cat([ends, starts, starts + 1, entries, others])
    # Each once, the first `count` of them in this order.
    return torch.tensor(list(dict.fromkeys(parts.tolist()))[:count])


def select(problem: AttentionProblem, whole: Answers) -> reference.ReferenceSelection:
    """Select by the reference from float64 scores: free of the order of sums that ranks have."""
    assert problem.config is not None
    q, k, v, _ = (x.double() for x in whole)
    return reference.select(*reference.token_scores(q, k, v, problem.config), problem.config)


def compare(
    page: Page, rotation: str, parts: list[Any], truth: SampledRows, plain: SampledRows, lse: float
) -> list[Any]:
    """Show a row a tensor: largest error at the samples beside the budget's parts."""
    records: list[Any] = []
    order = torch.cat([part["samples"] for part in parts])
    if not torch.equal(order.sort().values, torch.arange(truth.out.shape[0])):
        page.wrong.append(f"{rotation}: a sampled position is on no rank, or on two")
        return records
    for i, name in enumerate(SampledRows._fields):
        ours = torch.cat([part["rows"][i] for part in parts])[order.argsort()]
        exact, same = truth[i], plain[i]
        eps, largest = torch.finfo(ours.dtype).eps, exact.abs().max().item()
        problem = ""
        try:
            if ours.dtype == torch.float64:
                assert_close_float64(name, ours, exact)
            else:
                assert_within_budget(name, ours, same, exact, handed_on=eps * lse * largest)
        except AssertionError as error:
            problem = str(error)
            page.wrong.append(f"{rotation}, {problem}")
        numbers = {
            "value": largest,
            "error": (ours.double() - exact).abs().max().item(),
            "plain torch": (same.double() - exact).abs().max().item(),
            "rounding": eps * largest,
            "lse": eps * lse * largest,
        }
        verdict = "WRONG" if problem else "equal"
        page.row(rotation, name, *(f"{x:.2e}" for x in numbers.values()), verdict)
        records.append({"rotation": rotation, "tensor": name, **numbers, "verdict": verdict})
    return records


def measure(
    page: Page, args: argparse.Namespace, problem: AttentionProblem, pool: RankPool
) -> list[Any]:
    """Compute the formula first, then on the ranks, by each rotation."""
    begin, config = time.perf_counter(), problem.config
    assert config is not None
    whole = problem.inputs(range(config.num_strata), config.num_strata, CPU)
    selection = select(problem, whole)
    positions = sample(selection, problem, args.samples)
    plain, _ = at_positions(whole, config, selection, positions)
    whole = tuple(x.double() for x in whole)
    truth, lse = at_positions(whole, config, selection, positions)
    del whole
    formula = time.perf_counter() - begin
    name = str(problem.dtype).removeprefix("torch.")
    page.table(
        f"{name}: {positions.shape[0]} sampled positions",
        "Largest value and error; plain torch, rounding and lse are the parts of the budget.",
        ("rotation", "tensor", "value", "error", "plain torch", "rounding", "lse", "verdict"),
    )
    records, runs = [], []
    for rotation in args.rotations:
        nodes = args.nodes if rotation in TWO_AXES else None
        begin = time.perf_counter()
        parts = pool.run(answer, args.ranks, problem, rotation, positions, num_nodes=nodes)
        seconds = time.perf_counter() - begin
        records += compare(page, rotation, parts, truth, plain, lse)
        same = equal(whole_selection([part["entries"] for part in parts]), selection)
        finite = all(part["finite"] for part in parts)
        if not (same and finite):
            page.wrong.append(f"{rotation}: selection equal {same}, all finite {finite}")
        runs.append(
            {
                "rotation": rotation,
                "selection": "equal" if same else "WRONG",
                "all finite": finite,
                "layer s": round(max(part["seconds"] for part in parts), 1),
                "run s": round(seconds, 1),
                "MB of the largest rank": f"{max(part['peak_mb'] for part in parts):.0f}",
                "MB of all ranks": f"{sum(part['peak_mb'] for part in parts):.0f}",
            }
        )
    page.table(
        f"{name}: runs",
        f"S={selection.levels.shape[2]:,}. The formula took {formula:.0f} s, {peak_mb():.0f} MB. "
        "Ranks share the cores: the seconds say what the check costs and nothing of speed.",
        runs[0],
    )
    for run in runs:
        page.row(*run.values())
    return [*records, *runs]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--seqlen", type=int, default=2**20)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--nodes", type=int, default=4, help="of rotations that want two axes")
    parser.add_argument("--rotations", nargs="*", default=["p2p", "hierarchical"])
    parser.add_argument("--dtypes", nargs="*", default=["float32"], choices=("float32", "float64"))
    add_layer(parser, topk=4096, levels=4, strata=64)
    add_heads(parser, heads=2, head_dim=16)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=900, help="seconds of one rotation")
    parser.add_argument("--out", help="write <out>.md and <out>.json")
    return parser.parse_args(arguments)


def report(args: argparse.Namespace, pool: RankPool) -> None:
    """Measure and print everything; ends the program with status 1 if something differs."""
    config = config_of(args)
    heads = f"H={args.heads}, Hk={args.kv_heads}, head_dim {args.head_dim}"
    facts = dated_card(
        CPU,
        ranks=f"{args.ranks}, gloo on one machine; two axes as {args.nodes} nodes",
        sizes=f"B=1, {heads}, zigzag, {config}",
    )
    page = Page(
        f"One layer of {args.seqlen:,} tokens on {args.ranks} gloo ranks, against the formula",
        facts,
    )
    records = []
    for dtype in args.dtypes:
        sizes = {"seqlen": args.seqlen, "config": config}
        problem = AttentionProblem.of(args, getattr(torch, dtype), **sizes)
        records += measure(page, args, problem, pool)
    page.close(args.out, records)


def main() -> None:
    args = parse()
    with closing(RankPool(args.ranks, timeout=args.timeout)) as pool:
        report(args, pool)


if __name__ == "__main__":
    escape_unprintable()
    main()
