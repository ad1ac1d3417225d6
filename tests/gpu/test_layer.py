"""The layer by Triton kernels and each backend against the oracle in float64, by its error."""

import dataclasses

import pytest
import torch

import lhcp
from lhcp.ring.block import BLOCKS
from tests.gpu.problems import NAMES, LayerProblem, distance

DIMS = {
    "cudnn": (64, 96, 128),
    "flash": (64, 96, 128, 256),
    "fa4": (64, 128),
    "flash_attn": (64, 128),
    "math": (40, 256),
}


@pytest.mark.parametrize(
    "backend, head_dim", [(name, dim) for name, dims in DIMS.items() for dim in dims]
)
@pytest.mark.parametrize("groups", [1, 4])
def test_within_the_error_budget(backend, head_dim, groups):
    if (why := BLOCKS[backend].missing) is not None:
        pytest.skip(why)
    problem = LayerProblem(num_heads=2 * groups, num_kv_heads=2, head_dim=head_dim, batch=2)
    problem.check(backend=backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(dtype):
    LayerProblem(dtype=dtype, num_heads=2, num_kv_heads=1).check()


def test_same_scores_select_the_same_on_any_path():
    problem = LayerProblem(num_heads=4, num_kv_heads=2, batch=2)
    q, k, _, _ = problem.draw()
    ours, torchs = (problem.select(q, k, kernels) for kernels in ("triton", "torch"))
    assert torch.equal(ours.entries, torchs.entries)
    assert torch.equal(ours.row_of_entry, torchs.row_of_entry)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_scores_that_are_not_finite(bad):
    """They rank first; selection stays in range and the same on both paths."""
    problem = LayerProblem(num_heads=4, num_kv_heads=2)
    q, k, v, dout = problem.draw()
    score_q, score_k = q.detach().clone(), k.detach().clone()
    score_q[:, 5::97, 1, 3] = bad
    score_k[:, 7::89, 0, 0] = bad
    scored = {"score_q": score_q, "score_k": score_k}
    ours = problem.select(q, k, **scored)
    assert torch.equal(ours.entries, problem.select(q, k, **scored).entries)
    assert torch.equal(ours.entries, problem.select(q, k, "torch", **scored).entries)
    assert ours.entries.min() >= 0 and ours.entries.max() < problem.geom.pyramid_size
    for x in problem.answer(q, k, v, dout, **scored):
        assert x.isfinite().all()


def test_equal_scores_go_to_the_lower_index():
    problem = LayerProblem()
    q, k, v, dout = problem.draw()
    equal = {"score_q": torch.ones_like(q), "score_k": torch.ones_like(k)}
    ours, torchs = (problem.select(q, k, kernels, **equal) for kernels in ("triton", "torch"))
    assert torch.equal(ours.entries, torchs.entries)
    assert problem.answer(q, k, v, dout, **equal)[0].isfinite().all()


def test_more_entries_than_a_grid_axis_holds():
    """S > 65,535, k at its largest, against the torch path on the same selection."""
    config = lhcp.LighthouseConfig(topk=8192)
    problem = LayerProblem(1, 1, 64, config=config, seqlen=131072)
    assert problem.geom.subsequence > 65535
    q, k, v, dout = problem.draw()
    selection = problem.select(q, k)
    ours = problem.answer(q, k, v, dout, backend="cudnn")
    torchs = problem.answer(q, k, v, dout, "torch", backend="cudnn", selection=selection)
    for name, a, b in zip(NAMES, ours, torchs, strict=True):
        assert distance(a, b) < 5e-3, name


def test_more_elements_than_int32_counts():
    """Heads do not depend on each other: the last two of many, beyond 2**31, have the same bits."""
    from lhcp.lighthouse.kernel_set import QKV
    from lhcp.lighthouse.kernels import gather, pool, scatter, scatter_backward, select

    config = lhcp.LighthouseConfig(topk=2048)
    problem = LayerProblem(num_heads=34, num_kv_heads=1, head_dim=128, config=config, seqlen=2**19)
    geom = problem.geom
    q = torch.randn(1, 2**19, 34, 128, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, 1, 2**19, 1, 128, dtype=torch.bfloat16, device="cuda").unbind(0)
    assert q.numel() > 2**31
    tokens, last = QKV(q, k, v), QKV(q[:, :, -2:].contiguous(), k, v)
    means, sq, sk = pool.pool_and_score(tokens, geom)
    entries, row_of_entry = select.select(sq, sk, geom)
    sub = gather.gather(tokens, means, entries, geom)
    means_last, *_ = pool.pool_and_score(last, geom)
    assert torch.equal(means.q[:, :, -2:], means_last.q)
    sub_last = gather.gather(last, means._replace(q=means_last.q), entries, geom)
    assert torch.equal(sub.q[:, :, -2:], sub_last.q)
    out = scatter.scatter(sub.q, row_of_entry, geom)
    assert torch.equal(out[:, :, -2:], scatter.scatter(sub_last.q, row_of_entry, geom))
    do = scatter_backward.scatter_backward(q, row_of_entry, geom)
    do_last = scatter_backward.scatter_backward(last.q, row_of_entry, geom)
    assert torch.equal(do[:, :, -2:], do_last)
    dq, *_ = gather.gather_backward(sub, row_of_entry, geom)
    dq_last, *_ = gather.gather_backward(sub_last, row_of_entry, geom)
    assert torch.equal(dq[:, :, -2:], dq_last)


@pytest.mark.parametrize(
    "backend, change, able",
    [
        ("cudnn", {"head_dim": 256}, "flash"),
        ("cudnn", {"dtype": torch.float32}, "math"),
        ("flash", {"dtype": torch.float32}, "math"),
        ("cpu", {}, "cudnn"),
    ],
)
def test_a_backend_that_cannot_names_those_that_can(backend, change, able):
    problem = dataclasses.replace(LayerProblem(), **change)
    with pytest.raises(ValueError, match=f"backends that can: .*{able}"):
        problem.answer(*problem.draw(), backend=backend)
