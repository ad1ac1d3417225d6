"""How much of the GPUs a step uses: their memory, and the share of their arithmetic."""

import torch

from lhcp.config import LighthouseConfig
from lhcp.layer.module import Mode
from lhcp.training.model_config import ModelConfig
from lhcp.training.parallel import compute_dtype
from lhcp.training.placement import Placement
from lhcp.training.run import Run

PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200 NVL": 8.35e14,
    "H100 NVL": 8.35e14,
    "H100 PCIe": 7.56e14,
    "GH200": 9.89e14,
    "H200": 9.89e14,
    "H100": 9.89e14,
    "A100": 3.12e14,
    "L40S": 3.62e14,
}
"""Dense bf16 FLOP/s of the data sheets, by a part of a card's name; the first that fits counts."""


def peak_flops(card: str) -> float | None:
    """Return the dense bf16 FLOP/s of a card by its name, or None of one that is not known."""
    return next((peak for name, peak in PEAKS.items() if name in card), None)


def utilization(
    run: Run, mode: Mode, tokens_per_second: float, placement: Placement
) -> float | None:
    """Return the model FLOPs utilization (arXiv 2204.02311), or None where the peak is not known.

    In lighthouse mode the model's FLOPs are those of its short attention, so that a faster step of
    fewer FLOPs may show less.

    Args:
        run: The run.
        mode: How the layers attended.
        tokens_per_second: Of all ranks.
        placement: Of this rank.
    """
    device = placement.device
    if device.type != "cuda" or compute_dtype(run, device) != torch.bfloat16:
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    if peak is None:
        return None
    num_gpus = placement.dp_size * run.cp * run.tp
    return flops_per_second(run, mode, tokens_per_second) / (num_gpus * peak)


def flops_per_second(run: Run, mode: Mode, tokens_per_second: float) -> float:
    """Return what the model computes, forward and backward, over all ranks."""
    lighthouse = run.lighthouse if mode == "lighthouse" else None
    return flops_per_token(run.model, run.seqlen, lighthouse) * tokens_per_second


def peak_gib(device: torch.device) -> float | None:
    """Return the GiB that tensors of this process held at most so far; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def flops_per_token(
    config: ModelConfig, seqlen: int, lighthouse: LighthouseConfig | None = None
) -> float:
    """Estimate the FLOPs of forward and backward for one token.

    6 per weight of a matrix product, plus 6 * H * D * N per layer of causal attention over N
    tokens: 12 * H * D * N of arXiv 2204.02311, appendix B, halved because half the products are
    masked. A lighthouse layer attends over S entries instead: S * S / N in place of N.

    Args:
        config: Sizes.
        seqlen: N, tokens of the whole sequence.
        lighthouse: The lighthouse layers' config, or None where all layers are dense.
    """
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    layer = config.dim * (2 * heads + 2 * kv_heads + 3 * config.hidden_dim)
    weights = config.num_layers * layer + config.dim * config.vocab_size
    sparse = 0 if lighthouse is None else config.num_layers - len(set(config.dense_layers))
    attended = float((config.num_layers - sparse) * seqlen)
    if lighthouse is not None:
        attended += sparse * lighthouse.subsequence_length(seqlen) ** 2 / seqlen
    return 6.0 * weights + 6.0 * heads * attended
