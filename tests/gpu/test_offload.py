"""Activations that wait in the host's memory: equal gradients, and a lower peak on the GPU."""

import torch

from lhcp import LighthouseAttention
from lhcp.training.model import Decoder
from lhcp.training.model_config import ModelConfig

CONFIG = ModelConfig(
    dim=1024, num_layers=8, num_heads=8, head_dim=128, hidden_dim=1024, dense_layers=()
)
SEQLEN = 16_384


def step(offload: bool) -> tuple[list[torch.Tensor], int]:
    """Return the gradients of a step, and the bytes that tensors held at most in it."""
    with torch.device("cuda"):
        model = Decoder(
            CONFIG, lambda _: LighthouseAttention(None), recompute=True, offload=offload
        )
    model.initialize(0)
    model.bfloat16()
    tokens = torch.arange(SEQLEN, device="cuda")[None] % 256
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(tokens, torch.arange(SEQLEN, device="cuda")).float().square().mean().backward()
    peak = torch.cuda.max_memory_allocated() - before
    return [p.grad for p in model.parameters() if p.grad is not None], peak


def test_offloading_keeps_gradients_and_frees_the_inputs_of_layers(deterministic: None) -> None:
    """Fails if a copy is read before it is there, or inputs stay on the GPU too."""
    (kept, peak), (again, _), (offloaded, less) = step(False), step(False), step(True)
    assert all(map(torch.equal, kept, again)), "without offloading, runs differ already"
    assert all(map(torch.equal, kept, offloaded))
    one = SEQLEN * CONFIG.dim * 2
    assert peak - less >= (CONFIG.num_layers - 3) * one
