"""Sequences of any length: what the padding holds reaches no real token, and no gradient of one."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lhcp
from lhcp.layer.module import Mode
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool
from tests import llama
from tests.cases import LAYOUTS

CONFIG, SEQLEN = small_config(num_strata=8, picks=2)
REAL = SEQLEN - SEQLEN // 8 - 5
"""Real tokens: the last stratum is padding, and the one before ends with some, inside a window."""


def answers(
    group: Any, layout: Any, filler: float, kernels: str = "auto", mode: str = "lighthouse"
) -> list[Tensor]:
    """Output and gradients of the real tokens; the padding holds `filler` times noise."""
    cp = lhcp.ContextParallel(group, layout=layout, kernels=kernels)
    noise = qkv(SEQLEN, num_kv_heads=2, seed=9)
    whole = []
    for x, other in zip(qkv(REAL, num_kv_heads=2), noise, strict=True):
        x = lhcp.pad_to_length(x, SEQLEN)
        x[:, REAL:] = other[:, REAL:] * filler
        whole.append(x)
    # The loss does not reach the padding.
    whole[3][:, REAL:] = 0
    valid = cp.shard((torch.arange(SEQLEN) < REAL).expand(whole[0].shape[0], -1))
    q, k, v, do = (cp.shard(x) for x in whole)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    layer = cp.attention(CONFIG)
    lhcp.set_mode(layer, mode)  # type: ignore[arg-type]
    o = layer(*leaves, valid=valid)
    grads = torch.autograd.grad(o, leaves, do)
    return [cp.unshard(x, length=REAL) for x in (o.detach(), *grads)]


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
@pytest.mark.parametrize("filler", [1.0, 1e4], ids=str)
def test_what_the_padding_holds_changes_no_bit(filler: float, mode: str, one_thread: None) -> None:
    """Fails if padding is selected for its size, or a gradient comes from it."""
    with_zeros, with_noise = (answers(None, "zigzag", f, "torch", mode=mode) for f in (0.0, filler))
    for x, y in zip(with_zeros, with_noise, strict=True):
        assert torch.equal(x, y)


def test_without_valid_it_does() -> None:
    """Fails if the test above could not fail: loud padding changes the selection."""
    outputs = []
    for size in (0.0, 10.0):
        q, k, v, _ = qkv(SEQLEN, num_kv_heads=2)
        for x in (q, k, v):
            x[:, REAL:] *= size
        o = lhcp.lighthouse_attention(q, k, v, config=CONFIG)
        outputs.append(o[:, :REAL])
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_ranks_as_on_one(ranks: RankPool, layout: Any, one_thread: None) -> None:
    """Fails if a rank that holds padding alone selects, or sends, something else."""
    expected = answers(None, layout, 1.0)
    for found in ranks.run(answers, 4, layout, 1e3):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_in_one_graph(one_thread: None) -> None:
    """Fails if a compiled model breaks its graph at the padding."""
    layer = lhcp.ContextParallel().attention(CONFIG)
    q, k, v, _ = qkv(SEQLEN, num_kv_heads=2)
    valid = (torch.arange(SEQLEN) < REAL).expand(q.shape[0], -1)
    torch._dynamo.reset()
    graph = torch.compile(lambda *x: layer(*x[:3], valid=x[3]), fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(q, k, v, valid), layer(q, k, v, valid=valid))


def test_padding_is_taken_last() -> None:
    """Fails if an entry of padding alone is taken while one with a real token is left."""
    q, k, _, _ = qkv(SEQLEN, num_kv_heads=2)
    valid = (torch.arange(SEQLEN) < REAL).expand(q.shape[0], -1)
    for x in (q, k):
        x[:, REAL:] *= 1e3
    chosen = lhcp.select(q, k, config=CONFIG, valid=valid)
    # Expanded entries are those whose first child is in the sub-sequence.
    window, per_stratum = CONFIG.coarsest_window, SEQLEN // CONFIG.num_strata
    level_1 = chosen.row_of_entry[..., SEQLEN : SEQLEN + SEQLEN // 2]
    children = level_1.unflatten(2, (-1, CONFIG.pool_factor))[..., 0] >= 0
    straddling = children.unflatten(2, (CONFIG.num_strata, -1))[:, :, REAL // per_stratum]
    real = -(-(REAL % per_stratum) // window)
    assert real >= CONFIG.picks
    assert not straddling[..., real:].any() and (straddling.sum(-1) == CONFIG.picks).all()


def trained(group: Any, pad_id: int, mode: Mode) -> list[Tensor]:
    """The loss of a model on padded sequences, and its gradients summed over ranks."""
    cp = lhcp.ContextParallel(group)
    model = llama.make(lambda layer: cp.attention(CONFIG if layer else None), torch.float64)
    lhcp.set_mode(model, mode)
    lengths = torch.tensor([REAL, REAL - 40])
    mask = torch.arange(REAL) < lengths[:, None]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (2, REAL), generator=generator)
    labels = ids.clone()
    ids = ids.where(mask, pad_id)
    whole = {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}
    batch = cp.shard(whole, pad_to=SEQLEN)
    logits = model(batch["input_ids"], batch["position_ids"], None, batch["valid"])
    loss = cp.loss(logits, batch["shift_labels"], over=group)
    grads = list(torch.autograd.grad(loss, list(model.parameters())))
    if group is not None:
        for grad in grads:
            torch.distributed.all_reduce(grad, group=group)
            grad /= group.size()
    return [loss.detach(), *grads]


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
def test_a_model_learns_nothing_from_its_padding(ranks: RankPool, mode: Mode) -> None:
    """Fails if the id of padding, in rows of several lengths, moves a loss or a gradient."""
    expected = trained(None, 0, mode)
    padded = [trained(None, 55, mode), *ranks.run(trained, 2, 55, mode)]
    for found in padded:
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    # Neither id is in the text, so neither embedding has a gradient.
    assert not expected[1][[0, 55]].any()


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        (torch.ones(2, SEQLEN), "must be torch.bool"),
        (torch.ones(2, 3, dtype=torch.bool), "valid is .2, 3."),
        ([True], "valid must be a tensor, got list"),
    ],
    ids=["dtype", "shape", "type"],
)
def test_another_mask_is_refused(valid: Any, message: str) -> None:
    q, k, v, _ = qkv(SEQLEN)
    with pytest.raises((TypeError, ValueError), match=message):
        lhcp.LighthouseAttention(CONFIG)(q, k, v, valid=valid)


def test_the_dilated_scorer_refuses_padding() -> None:
    """Fails if its scores, which attend, let padding in."""
    config, seqlen = small_config(scorer="dilated", dilation=2)
    q, k, v, _ = qkv(seqlen)
    valid = torch.ones(q.shape[:2], dtype=torch.bool)
    with pytest.raises(ValueError, match='use scorer="norm"'):
        lhcp.lighthouse_attention(q, k, v, config=config, valid=valid)


def one_rank_s_mask(group: Any) -> str:
    q, k, v, _ = (lhcp.shard(x, group) for x in qkv(SEQLEN))
    valid = torch.ones(q.shape[:2], dtype=torch.bool if group.rank() == 0 else torch.int64)
    try:
        lhcp.LighthouseAttention(CONFIG, group)(q, k, v, valid=valid)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def test_one_rank_s_wrong_mask_is_an_error_on_every_rank(ranks: RankPool) -> None:
    """Fails, by hanging, if a rank goes on to send to one that has raised."""
    assert all("torch.bool" in told for told in ranks.run(one_rank_s_mask, 2))
