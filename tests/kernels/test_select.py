"""The selection kernels against the torch path: equal integers, whatever the scores."""

import dataclasses

import pytest
import torch

from lhcp.lighthouse import select as torch_path
from lhcp.lighthouse.kernels import select as kernels
from tests.kernels.cases import CASES, KernelCase

KINDS = ["random", "equal", "ties", "signed", "special"]
FEW_KINDS = [
    x if x in ("ties", "special") else pytest.param(x, marks=pytest.mark.slow) for x in KINDS
]


def check(case: KernelCase, kind: str, **options: int) -> None:
    sq, sk = case.scores(kind)
    entries, row_of_entry = kernels.select(sq, sk, case.geom, **options)
    want = torch_path.select(sq, sk, case.geom)
    assert torch.equal(entries, want.entries)
    assert torch.equal(row_of_entry, want.row_of_entry)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["p2_deep", "p3"])
def test_equals_torch_path(name, kind):
    check(CASES[name], kind)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"p2_deep", "p3"}))
def test_equals_torch_path_at_other_sizes(name):
    check(CASES[name], "ties")


@pytest.mark.parametrize("kind", FEW_KINDS)
def test_more_candidates_than_a_block(kind):
    check(KernelCase(3, 4, 6, 37, num_kv_heads=1, num_strata=1), kind, max_block=16)
    case = KernelCase(4, 2, 10, 18, num_kv_heads=1, num_strata=1, has_first=False)
    check(case, kind, max_block=16)


def test_first_entry_is_forced_only_in_the_first_stratum():
    case = KernelCase(3, 4, 2, 4, num_kv_heads=1)
    scores = torch.arange(1.0, case.geom.pooled_size + 1).expand(1, 1, -1)
    scores = scores.to(case.scores()[0].device)
    with_first, _ = kernels.select(scores, scores, case.geom)
    without = dataclasses.replace(case, has_first=False)
    without_first, _ = kernels.select(scores, scores, without.geom)
    half = case.geom.stratum_subsequence
    assert 0 in with_first[0, 0, :half] and 0 not in without_first[0, 0, :half]
    assert torch.equal(with_first[0, 0, half:], without_first[0, 0, half:])


def test_same_bits_every_run():
    sq, sk = CASES["p8"].scores("ties")
    first = kernels.select(sq, sk, CASES["p8"].geom)
    second = kernels.select(sq, sk, CASES["p8"].geom)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
