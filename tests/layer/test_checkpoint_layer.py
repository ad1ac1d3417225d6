"""torch.utils.checkpoint around the layer: equal gradients; what a policy keeps is not redone."""

from collections import Counter
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lhcp.layer.lighthouse  # noqa: F401  defines the operators
from lhcp.testing.tolerance import assert_within_budget
from tests.devices import PLACES, Place
from tests.transformer import answer, exact_answer, make_block

KEPT = (torch.ops.lhcp.ring_forward.default, torch.ops.lhcp.select.default)


class Calls(TorchDispatchMode):
    """Counts calls of the library's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lhcp":
            self.count[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def keep_attention_and_selection(context: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointed(nn.Module):
    """A block under torch.utils.checkpoint; offloaded, its inputs wait on the host."""

    def __init__(self, block: nn.Module, selective: bool, offloaded: bool = False) -> None:
        super().__init__()
        self.block, self.offloaded = block, offloaded
        self.choices = {}
        if selective:
            contexts = partial(create_selective_checkpoint_contexts, keep_attention_and_selection)
            self.choices["context_fn"] = contexts

    def forward(self, *inputs: Tensor) -> Tensor:
        with save_on_cpu(pin_memory=True) if self.offloaded else nullcontext():
            return checkpoint(self.block, *inputs, use_reentrant=False, **self.choices)


@pytest.mark.parametrize(
    ("selective", "offloaded"),
    [(False, False), (True, False), (False, True)],
    ids=["all", "selective", "offloaded"],
)
@pytest.mark.parametrize("place", PLACES)
def test_equal_gradients_and_what_is_done_again(
    place: Place, selective: bool, offloaded: bool
) -> None:
    block, inputs, dout = make_block(place)
    plain, exact = answer(block, inputs, dout), exact_answer(block, inputs, dout)
    for i, results in enumerate(
        zip(
            answer(Checkpointed(block, selective, offloaded), inputs, dout),
            plain,
            exact,
            strict=True,
        )
    ):
        assert_within_budget(f"result {i}", *results)

    out = Checkpointed(block, selective, offloaded)(*inputs)
    with Calls() as calls:
        out.backward(dout)
    assert calls.count["ring_backward"] == calls.count["gather_backward"] == 1
    assert calls.count["pool_and_score"] == calls.count["gather"] == 1
    again = 0 if selective else 1
    assert calls.count["ring_forward"] == again, calls.count
    assert calls.count["select"] == again, calls.count


@pytest.mark.parametrize("place", PLACES)
def test_selective_under_compile(place: Place) -> None:
    torch._dynamo.reset()
    block, inputs, dout = make_block(place)
    compiled = torch.compile(
        Checkpointed(block, selective=True), backend=place.compiler, fullgraph=True
    )
    plain, exact = answer(block, inputs, dout), exact_answer(block, inputs, dout)
    for i, results in enumerate(zip(answer(compiled, inputs, dout), plain, exact, strict=True)):
        assert_within_budget(f"result {i}", *results)
    torch._dynamo.reset()
