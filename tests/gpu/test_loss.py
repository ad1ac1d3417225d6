"""The loss of a long shard and a large vocabulary on a GPU: what it holds at most."""

import pytest
import torch

import lhcp

TOKENS, VOCABULARY, DIM = 131_072, 131_072, 4096
"""Of a rank of eight that share 1M tokens."""


def test_linear_loss_holds_what_it_says() -> None:
    """Fails if more of the logits is held than a chunk: they would take 32 GiB alone."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    make = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    hidden = torch.randn(1, TOKENS, DIM, **make)
    weight = torch.randn(VOCABULARY, DIM, **make)
    labels = torch.randint(VOCABULARY, (1, TOKENS), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = lhcp.ContextParallel().linear_loss(hidden, weight, labels, over=None)
    loss.backward()
    held = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"linear_loss of {TOKENS} tokens, {VOCABULARY} words: {held:.2f} GiB at most")
    assert loss.isfinite()
    # 2 + 3 + 0.5 of its docstring, and the gradient of weight that stays, in bfloat16: 1.
    assert held <= 6.5
