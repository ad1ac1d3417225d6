"""The losses against torch's own: values, gradients, what is held, and what is averaged."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import lhcp
from lhcp.context.loss import cross_entropy_sum, linear_cross_entropy_sum
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_close_float64, assert_within_budget

TOKENS, DIM, VOCABULARY = 37, 12, 29


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [1, n, dim], weight, bias, labels, of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight, bias = draw(1, TOKENS, DIM), draw(VOCABULARY, DIM), draw(VOCABULARY)
    labels = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
    labels[0, ::5] = -100
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), labels


def torchs(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 8, TOKENS, None], ids=str)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_value_and_gradients_are_torchs(
    linear: bool, chunk_tokens: int | None, poison: None
) -> None:
    """Fails if a chunk is lost, counted twice or not written, or an ignored label counts."""
    hidden, weight, bias, labels = problem()
    expected = torchs(hidden, weight, bias, labels)
    if linear:
        found = linear_cross_entropy_sum(
            hidden, weight, labels, bias=bias, chunk_tokens=chunk_tokens
        )
    else:
        logits = F.linear(hidden, weight, bias)
        found = cross_entropy_sum(logits, labels, chunk_tokens=chunk_tokens)
    assert_close_float64("loss", found.detach(), expected.detach(), 1e-14)
    # A factor, so that a backward that forgets the incoming gradient shows.
    leaves = (hidden, weight, bias)
    ours = torch.autograd.grad(3 * found, leaves)
    theirs = torch.autograd.grad(3 * expected, leaves)
    for name, x, y in zip(("hidden", "weight", "bias"), ours, theirs, strict=True):
        assert_close_float64(name, x, y, 1e-14)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(frozen: int) -> None:
    """Fails if a frozen head, or a frozen body, changes the others' gradients."""
    *tensors, labels = problem()
    tensors[frozen].requires_grad_(False)
    leaves = [x for x in tensors if x.requires_grad]
    hidden, weight, bias = tensors
    found = linear_cross_entropy_sum(hidden, weight, labels, bias=bias, chunk_tokens=8)
    ours = torch.autograd.grad(found, leaves)
    theirs = torch.autograd.grad(torchs(hidden, weight, bias, labels), leaves)
    for x, y in zip(ours, theirs, strict=True):
        assert_close_float64("gradient", x, y, 1e-14)


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_bfloat16_is_summed_wide(linear: bool) -> None:
    """Fails if a sum over tokens or chunks is rounded to bfloat16, as torch's linear one is."""
    leaves = [x.detach() for x in problem(torch.bfloat16)]
    labels = leaves.pop()

    def answer(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        hidden, weight, bias = (x.to(dtype).requires_grad_() for x in leaves)
        if not ours:
            loss = torchs(hidden, weight, bias, labels)
        elif linear:
            loss = linear_cross_entropy_sum(hidden, weight, labels, bias=bias, chunk_tokens=1)
        else:
            loss = cross_entropy_sum(F.linear(hidden, weight, bias), labels, chunk_tokens=1)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight, bias))]

    found, theirs, exact = (
        answer(dtype, ours)
        for dtype, ours in (
            (torch.bfloat16, True),
            (torch.bfloat16, False),
            (torch.float64, False),
        )
    )
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(exact[0].item(), rel=1e-3)
    for i, name in enumerate(("hidden", "weight", "bias"), 1):
        assert_within_budget(name, found[i], theirs[i], exact[i])


def test_what_is_ignored_may_hold_anything() -> None:
    """Fails if a NaN of the padding reaches the loss, or the gradient of a logit."""
    hidden, weight, _, labels = problem()
    with torch.no_grad():
        hidden[0, ::5] = torch.nan
    found = linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=8)
    logits = F.linear(hidden, weight).detach().requires_grad_()
    also = cross_entropy_sum(logits, labels, chunk_tokens=8)
    assert found.isfinite() and torch.allclose(found, also, rtol=1e-13)
    (dlogits,) = torch.autograd.grad(also, [logits])
    assert dlogits.isfinite().all() and not dlogits[0, ::5].any()


def test_autocast_casts_as_for_a_linear_layer() -> None:
    """Fails if float32 weights of a model under autocast are refused, or lose their dtype."""
    hidden, weight, _, labels = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy_sum(hidden.bfloat16(), weight, labels)
    assert torch.autograd.grad(found, [weight])[0].dtype == torch.float32


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, _, labels = problem()
    found = linear_cross_entropy_sum(hidden, weight, labels)
    (first,) = torch.autograd.grad(found, [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="does not differentiate twice"):
        first.sum().backward()


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that an operator returns, in elements, and the number of products."""

    largest = products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_an_evaluation_makes_no_gradients() -> None:
    """Fails if a loss without gradients takes the memory and the time of one with them."""
    hidden, weight, bias, labels = problem()
    hidden, labels = hidden[:, :20], labels[:, :20]
    expected = torchs(hidden, weight, bias, labels).item()
    with torch.no_grad(), Peak() as peak:
        found = linear_cross_entropy_sum(hidden, weight, labels, bias=bias, chunk_tokens=1)
    assert found.item() == pytest.approx(expected, rel=1e-13)
    # One a chunk; gradients take two more.
    assert peak.products == 20


def test_no_tensor_holds_all_logits() -> None:
    """Fails if logits of more than a chunk are made, forward or backward."""
    hidden = torch.randn(1, 512, 8, requires_grad=True)
    weight = torch.randn(64, 8, requires_grad=True)
    with Peak() as peak:
        labels = torch.zeros(1, 512, dtype=torch.long)
        linear_cross_entropy_sum(hidden, weight, labels, chunk_tokens=32).backward()
    assert peak.largest == max(hidden.numel(), 32 * 64) < 512 * 64


def loss_on_a_rank(group: Any, how: str) -> tuple[float, Tensor]:
    """Value, and the gradient of hidden's source averaged over ranks as FSDP does it."""
    hidden, weight, _, labels = problem()
    cp = lhcp.ContextParallel(group, layout="contiguous")
    world = 1 if group is None else group.size()
    # Rank 0 holds 36 tokens of which few are valid: counts differ between ranks.
    labels[0, : 36 // world - 2] = -100
    hidden, labels = hidden[:, :36], labels[:, :36]
    mine, target = cp.shard(hidden), cp.shard(labels)
    if how == "logits":
        loss = cp.loss(F.linear(mine, weight), target, over=group)
    elif how == "linear":
        loss = cp.linear_loss(mine, weight, target, over=group)
    elif how == "own":
        total = torchs(mine, weight, None, target)
        loss = cp.average(total, (target != -100).sum(), over=group)
    else:
        halves = zip(mine.split(3, 1), target.split(3, 1), strict=True)
        count = (labels != -100).sum().item()
        parts = [cp.linear_loss(x, weight, y, over=group, num_valid=count) for x, y in halves]
        loss = torch.stack(parts).sum()
    (grad,) = torch.autograd.grad(loss, [weight])
    if group is not None:
        torch.distributed.all_reduce(grad, group=group)
    return loss.item(), grad / world


@pytest.mark.parametrize("how", ["logits", "linear", "accumulated", "own"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_mean_is_over_all_valid_tokens(ranks: RankPool, world_size: int, how: str) -> None:
    """Fails if ranks with few valid tokens count for more, or the average is not undone."""
    hidden, weight, _, labels = problem()
    labels[0, : 36 // world_size - 2] = -100
    logits = F.linear(hidden[:, :36], weight).flatten(0, 1)
    expected = F.cross_entropy(logits, labels[0, :36])
    (grad,) = torch.autograd.grad(expected, [weight])
    for value, found in ranks.run(loss_on_a_rank, world_size, how):
        assert value == pytest.approx(expected.item(), rel=1e-13)
        assert_close_float64("gradient", found, grad, 1e-14)


def test_a_batch_without_a_label_has_loss_and_gradient_zero() -> None:
    """Fails if 0 / 0 becomes a NaN in the weights."""
    hidden, weight, _, labels = problem()
    loss = lhcp.ContextParallel().linear_loss(
        hidden, weight, torch.full_like(labels, -100), over=None
    )
    assert loss.item() == 0 and not torch.autograd.grad(loss, [weight])[0].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(1, TOKENS + 1, dtype=torch.long)}, "shift_labels"),
        ({"labels": torch.zeros(1, TOKENS)}, "must be torch.int64"),
        ({"weight": torch.zeros(VOCABULARY, DIM + 1)}, "must be .vocabulary, 12"),
        ({"weight": torch.zeros(VOCABULARY, DIM)}, "must have one dtype"),
        ({"bias": torch.zeros(3)}, "bias is"),
        ({"hidden": torch.zeros(1, TOKENS, DIM, dtype=torch.long)}, "floating point"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    hidden, weight, bias, labels = problem()
    given = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels} | changes
    with pytest.raises((TypeError, ValueError), match=message):
        linear_cross_entropy_sum(
            given.pop("hidden"), given.pop("weight"), given.pop("labels"), **given
        )


def over_too_few(group: Any) -> list[str]:
    cp, told = lhcp.ContextParallel(group), []
    for over in (None, "dp"):
        try:
            cp.loss(torch.zeros(1, 4, 3), torch.zeros(1, 4, dtype=torch.long), over=over)
        except (TypeError, ValueError) as error:
            told.append(str(error))
    return told


def test_over_must_hold_the_ranks_of_the_sequence(ranks: RankPool) -> None:
    """Fails if a mean over a part of the sequence passes for the whole one."""
    for missing, name in ranks.run(over_too_few, 2):
        assert "which share this sequence" in missing
        assert "over must be a DeviceMesh, a ProcessGroup or None, got str" in name


def compiled_on_a_rank(group: Any, linear: bool) -> tuple[float, float]:
    """The loss of a graph and without one, over a mesh of two axes."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "cp"))
    cp = lhcp.ContextParallel(mesh["cp"])
    hidden, weight, _, labels = problem()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        if linear:
            return cp.linear_loss(hidden, weight, labels, over=mesh, chunk_tokens=8)
        return cp.loss(F.linear(hidden, weight), labels, over=mesh, chunk_tokens=8)

    torch._dynamo.reset()
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    return graph(hidden, weight).item(), loss(hidden, weight).item()


def test_a_graph_holds_the_whole_loss() -> None:
    """Fails if a graph breaks in the loss, or its messages go missing."""
    # Ranks of its own: an empty that holds NaN cannot be traced.
    pool = RankPool(2)
    for linear in (False, True):
        for graph, eager in pool.run(compiled_on_a_rank, 2, linear):
            assert graph == pytest.approx(eager, rel=1e-13)
    pool.close()
