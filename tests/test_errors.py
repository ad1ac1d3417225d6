"""Bad input: each rule broken on purpose, with a message whose advice is then followed."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lhcp
from lhcp import LighthouseConfig
from lhcp.comm.layout import make_layout
from lhcp.lighthouse.geometry import Geometry
from lhcp.testing.inputs import qkv, small_config
from lhcp.testing.ranks import RankPool

CONFIG, SEQLEN = small_config()


def inputs(**changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _ = qkv(SEQLEN, **changes)
    return q, k, v


@pytest.mark.parametrize(
    ("field", "bad", "others"),
    [
        ("pool_factor", 1, {}),
        ("num_levels", 1, {}),
        ("num_strata", 0, {}),
        ("topk", 0, {"num_strata": 4}),
        ("topk", 7, {"num_strata": 4}),
        ("topk", 12, {"num_strata": 4}),
        ("scorer_window", 6, {"dilation": 4}),
        ("dilation", 0, {}),
    ],
    ids=lambda x: str(x),
)
def test_a_field_names_value_rule_and_what_fits(
    field: str, bad: int, others: dict[str, int]
) -> None:
    """Fails if a rule is not checked, or if what the message offers does not fit."""
    with pytest.raises(ValueError, match=f"{field}={bad}: must be") as raised:
        LighthouseConfig(**{field: bad} | others)  # type: ignore[arg-type]
    offered = [int(n) for n in re.findall(r"\d+", str(raised.value).split("for example")[1])]
    assert offered
    for value in offered:
        LighthouseConfig(**{field: value} | others)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["layout", "rotation", "backend", "kernels"])
def test_a_name_that_is_none_is_refused_where_a_layer_is_made(what: str) -> None:
    """Fails if a mistyped choice is heard of in the first step alone."""
    choice: dict[str, Any] = {what: "p3p"}
    for make in (lhcp.ContextParallel, lambda **c: lhcp.LighthouseAttention(None, **c)):
        with pytest.raises(ValueError, match=f"{what}='p3p': must be one of"):
            make(**choice)


def test_unknown_scorer_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="scorer='loud': must be one of norm, dilated"):
        LighthouseConfig(scorer="loud")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["3", 3.0, True], ids=str)
def test_a_field_of_another_type_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match="num_levels must be an int"):
        LighthouseConfig(num_levels=value)


def test_numpys_integers_are_integers() -> None:
    """Fails if a size that was computed by numpy is refused, or stays numpy's in the config."""
    config = LighthouseConfig(num_levels=np.int64(3), topk=np.int32(1536))
    assert config == LighthouseConfig(num_levels=3, topk=1536)
    assert type(config.num_levels) is int and type(config.topk) is int


@pytest.mark.parametrize("seqlen", [0, 1, 100, 1000, 24_577, 98_303, 98_305])
def test_seqlen_that_does_not_cut_names_what_keeps_every_rule(seqlen: int) -> None:
    """Fails if a length or a config that the message offers is refused in its turn."""
    config = LighthouseConfig()
    with pytest.raises(ValueError, match=f"seqlen={seqlen}: must be a positive multiple") as raised:
        config.subsequence_length(seqlen)
    lengths, _, other = str(raised.value).split("for example")[1].partition("; or ")
    for offered in map(int, re.findall(r"\d+", lengths.split(";")[0])):
        assert config.subsequence_length(offered) > 0
        assert abs(offered - seqlen) <= 256 or offered == config.min_seqlen
    assert bool(other) == (0 < seqlen < config.min_seqlen)
    if other:
        length, topk = map(int, re.findall(r"(?:seqlen|topk)=(\d+)", other))
        assert seqlen <= length < config.min_seqlen
        assert replace(config, topk=topk).subsequence_length(length) < length


def test_the_smallest_config_offers_no_other() -> None:
    """Fails if an offer names a config that is the same."""
    config = LighthouseConfig(num_levels=2, pool_factor=2, topk=2, num_strata=1)
    with pytest.raises(ValueError, match="for example 4;") as raised:
        config.check_seqlen(3)
    assert "LighthouseConfig.fit" not in str(raised.value)


def test_seqlen_too_short_for_topk_offers_a_topk_that_fits() -> None:
    config = LighthouseConfig()
    seqlen = config.min_seqlen - config.seqlen_multiple
    with pytest.raises(ValueError, match="coarsest entries but must take") as raised:
        config.subsequence_length(seqlen)
    (topk,) = re.findall(r"topk=(\d+)", str(raised.value))
    assert replace(config, topk=int(topk)).subsequence_length(seqlen) > 0
    (longer,) = re.findall(r"seqlen >= (\d+)", str(raised.value))
    assert config.subsequence_length(int(longer)) > 0


@pytest.mark.parametrize(("window", "dilation"), [(96, 4), (64, 3), (8192, 3)], ids=str)
def test_scorer_window_that_does_not_divide_offers_what_does(window: int, dilation: int) -> None:
    window -= window % dilation
    config = LighthouseConfig(
        topk=32, num_strata=8, scorer="dilated", scorer_window=window, dilation=dilation
    )
    seqlen = 8 * 320
    with pytest.raises(ValueError, match=f"scorer_window={window}: the block of") as raised:
        config.check_seqlen(seqlen)
    advice = str(raised.value).split("for example")[1]
    fields = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", advice)}
    replace(config, **fields).check_seqlen(seqlen)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("world_size", "num_chunks", "unit"), [(2, 2, 4), (3, 2, 6), (3, 1, 3), (16, 2, 32)]
)
def test_strata_that_do_not_divide_over_chunks(world_size: int, num_chunks: int, unit: int) -> None:
    """Zigzag needs C % (2W) == 0, contiguous C % W == 0."""
    config = LighthouseConfig(topk=2 * (unit + 1), num_strata=unit + 1)
    tokens = config.min_seqlen
    with pytest.raises(ValueError, match=f"num_strata={unit + 1}: must be a multiple") as raised:
        Geometry.local(config, tokens, world_size, num_chunks, 0)
    offered = re.findall(r"\d+", str(raised.value).split("for example")[1])
    assert {int(n) % unit for n in offered} == {0}


def test_dense_length_that_the_layout_does_not_divide() -> None:
    with pytest.raises(ValueError, match="seqlen=10: the zigzag layout on 4 ranks needs"):
        make_layout("zigzag", 4).check_seqlen(10)


BAD_TENSORS: dict[str, tuple[Any, type[Exception], str]] = {
    "not-a-tensor": (lambda q, k, v: (q, None, v), TypeError, "k must be a tensor"),
    "three-axes": (lambda q, k, v: (q[0], k, v), ValueError, "must be .batch, seqlen, heads"),
    "integers": (lambda q, k, v: (q.int(), k, v), TypeError, "must be one of"),
    "two-dtypes": (lambda q, k, v: (q.float(), k, v), TypeError, "must have one dtype"),
    "empty-batch": (lambda q, k, v: (q[:0], k[:0], v[:0]), ValueError, "no axis may be empty"),
    "k-unlike-v": (lambda q, k, v: (q, k, v[:, :, :1]), ValueError, "k and v must have the same"),
    "other-length": (lambda q, k, v: (q[:, 1:], k, v), ValueError, "q and k must agree"),
    "other-head-dim": (lambda q, k, v: (q[..., 1:], k, v), ValueError, "q and k must agree"),
    "head-count": (
        lambda q, k, v: (q, k[:, :, :3], v[:, :, :3]),
        ValueError,
        "kv heads that fit: 1, 2, 4",
    ),
    "torchs-order": (
        lambda q, k, v: tuple(x.transpose(1, 2) for x in (q, k[:, :, :2], v[:, :, :2])),
        ValueError,
        r"axes are \[batch, seqlen, heads, head_dim\]",
    ),
    "torchs-order-of-equal-heads": (
        lambda q, k, v: (torch.zeros(1, 4, 512, 8),) * 3,
        ValueError,
        r"512 heads of 4 tokens; axes are \[batch, seqlen, heads, head_dim\]",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS, ids=str)
@pytest.mark.parametrize("function", ["lighthouse", "ring", "select", "module"])
def test_tensors_that_do_not_belong_together(case: str, function: str) -> None:
    """Fails if a mismatch gets past the door, into an index or a kernel."""
    spoil, error, message = BAD_TENSORS[case]
    q, k, v = spoil(*inputs())
    with pytest.raises(error, match=message):
        if function == "lighthouse":
            lhcp.lighthouse_attention(q, k, v, config=CONFIG)
        elif function == "ring":
            lhcp.ring_attention(q, k, v)
        elif function == "select":
            lhcp.select(q, k, config=CONFIG, v=v)
        else:
            lhcp.LighthouseAttention(CONFIG)(q, k, v)


@pytest.mark.parametrize("name", ["score_q", "score_k"])
def test_scores_must_be_shaped_like_what_they_replace(name: str) -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=f"{name} is .* like what it replaces"):
        lhcp.lighthouse_attention(q, k, v, config=CONFIG, **{name: q[:, 1:]})
    with pytest.raises(TypeError, match=f"{name} is .*: must be floating point"):
        lhcp.lighthouse_attention(q, k, v, config=CONFIG, **{name: q.int()})


def test_selection_of_other_sizes_is_refused() -> None:
    q, k, v = inputs()
    other = replace(CONFIG, topk=2 * CONFIG.topk)
    selection = lhcp.select(q, k, config=other)
    with pytest.raises(ValueError, match=r"selection.entries is .* make it with lhcp.select"):
        lhcp.lighthouse_attention(q, k, v, config=CONFIG, selection=selection)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"layout": "stripe"}, "layout='stripe': must be one of zigzag, contiguous"),
        ({"rotation": "walk"}, "rotation='walk': must be one of auto, p2p, allgather"),
        ({"backend": "best"}, "backend='best': must be one of auto, cpu, cudnn, flash"),
        ({"kernels": "cuda"}, "kernels='cuda': must be one of auto, torch, triton"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_unknown_names_list_the_known_ones(argument: dict[str, Any], message: str) -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=re.escape(message)):
        lhcp.lighthouse_attention(q, k, v, config=CONFIG, **argument)


def test_a_backend_that_cannot_names_those_that_can() -> None:
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"'cudnn': inputs are on cpu.*can: cpu, math"):
        lhcp.ring_attention(q, k, v, backend="cudnn")


def test_a_missing_package_names_the_extra() -> None:
    q, k, v = inputs()
    with pytest.raises(ImportError, match=r"fa4.*pip install 'lhcp"):
        lhcp.ring_attention(q, k, v, backend="fa4")


def test_triton_refuses_float64() -> None:
    pytest.importorskip("triton", reason="the check for Triton comes first")
    q, k, v = inputs()
    with pytest.raises(ValueError, match="inputs are float64; use kernels='torch'"):
        lhcp.lighthouse_attention(q, k, v, config=CONFIG, kernels="triton")


def test_modes() -> None:
    layer = lhcp.LighthouseAttention(CONFIG)
    with pytest.raises(ValueError, match="mode='sparse': must be 'lighthouse' or 'dense'"):
        layer.mode = "sparse"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="needs a config"):
        lhcp.LighthouseAttention(None).mode = "lighthouse"


def test_group_of_another_type() -> None:
    with pytest.raises(TypeError, match="group must be a ProcessGroup, a DeviceMesh or None"):
        lhcp.positions(8, "world")  # type: ignore[arg-type]


def test_dilated_scorer_asks_for_values() -> None:
    config, seqlen = small_config(scorer="dilated", dilation=2)
    q, k, _, _ = qkv(seqlen)
    with pytest.raises(ValueError, match="pass v="):
        lhcp.select(q, k, config=config)


def test_a_config_that_shortens_nothing_is_warned_about() -> None:
    config = LighthouseConfig(num_levels=2, pool_factor=2, topk=16, num_strata=2)
    q, k, v, _ = qkv(config.min_seqlen)
    with pytest.warns(UserWarning, match="shortens nothing"):
        lhcp.lighthouse_attention(q, k, v, config=config)


def call_and_catch(group: Any, changes: dict[int, str]) -> str:
    """Call the layer on this rank, with this rank's mistake if it has one; return the error."""
    rank = group.rank()
    config, seqlen = small_config()
    layout = "contiguous" if changes.get(rank) == "layout" else "zigzag"
    if changes.get(rank) == "config":
        config = replace(config, topk=config.topk * 2)
    layer = lhcp.LighthouseAttention(config, group, layout=layout)
    q, k, v, _ = qkv(seqlen // 2)
    if changes.get(rank) == "shape":
        q = q[:, 1:]
    if changes.get(rank) == "heads":
        k, v = k[:, :, :2], v[:, :, :2]
    try:
        layer(q, k, v)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("mistake", ["layout", "config", "shape", "heads"])
def test_one_rank_s_mistake_is_an_error_on_every_rank(ranks: RankPool, mistake: str) -> None:
    """Fails, by hanging, if a rank goes on to send to one that has raised."""
    errors = ranks.run(call_and_catch, 2, {1: mistake})
    assert all(errors), errors
    assert "rank 1" in errors[0].lower()


def test_without_a_mistake_nobody_raises(ranks: RankPool) -> None:
    assert ranks.run(call_and_catch, 2, {}) == ["", ""]


@pytest.mark.parametrize("poisoned", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_in_the_inputs_spread_as_in_the_reference(poisoned: float) -> None:
    """Fails if a NaN changes an index, or is lost on the way."""
    from lhcp import reference

    q, k, v = inputs(batch=1)
    q[0, SEQLEN // 2, 0, 0] = poisoned
    v[0, 3 * SEQLEN // 4, 1, 2] = poisoned
    ours = lhcp.lighthouse_attention(q, k, v, config=CONFIG, backend="math")
    theirs = reference.lighthouse_attention(q, k, v, config=CONFIG)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    finite = ours.isfinite()
    assert finite.any() and not finite.all()
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-10, atol=1e-10)


def test_inputs_in_any_stride(one_thread: None) -> None:
    """Fails if a stage reads memory in its own idea of an order."""
    q, k, v = inputs(batch=2)
    packed = torch.stack((q, k, v), 3)
    strided = [packed[:, :, :, i] for i in range(3)]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    whole = lhcp.lighthouse_attention(q, k, v, config=CONFIG)
    for other in (strided, swapped):
        assert not other[0].is_contiguous()
        assert torch.equal(lhcp.lighthouse_attention(*other, config=CONFIG), whole)
