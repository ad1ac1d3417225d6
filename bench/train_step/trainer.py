"""One training step of the decoder on one device, as lhcp/training takes it on one rank."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.train_step.arithmetic import config_for
from lhcp.config import LighthouseConfig
from lhcp.layer.lighthouse import lighthouse_attention
from lhcp.layer.mode import set_mode
from lhcp.layer.module import LighthouseAttention, Mode
from lhcp.measure.clock import elapsed
from lhcp.testing.inputs import qkv
from lhcp.training.model import Decoder
from lhcp.training.model_config import ModelConfig
from lhcp.training.stages import OptimConfig

PRECISION = (
    "fp32: weights, gradients, AdamW's two moments; bf16: the weights computed with, their "
    "gradients, activations (lhcp/training: FSDP2, param_dtype=bf16, reduce_dtype=fp32)"
)


@dataclass(frozen=True)
class StepTime:
    """What one step took."""

    seconds: float
    host_seconds: float
    """Until the host had enqueued the step: near `seconds`, the host is what limits."""
    peak_gib: float


class Trainer:
    """Model and optimiser; fp32 weights in the optimiser, bf16 copies in the model.

    Args:
        config: sizes of the decoder.
        backend: attention of both modes, and of the layers that are always dense.
        device: where all of it lives.
        compiler: backend of torch.compile for each block, fullgraph; "none" for eager.
        dtype: of the computation.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: str,
        device: torch.device,
        *,
        compiler: str = "inductor",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.config, self.device, self.optim = config, device, OptimConfig()
        placeholder = LighthouseConfig()
        with device:
            self.model = Decoder(
                config,
                lambda dense: LighthouseAttention(None if dense else placeholder, backend=backend),
            )
        self.model.initialize(0)
        self.weights = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
        self.model.to(dtype)
        self.copies: list[Tensor] = list(self.model.parameters())
        if compiler != "none":
            for block in self.model.blocks:
                block.compile(fullgraph=True, dynamic=False, backend=compiler)
        groups: list[dict[str, Any]] = [
            {"params": [w for w in self.weights if w.ndim > 1]},
            {"params": [w for w in self.weights if w.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=self.optim.rate(0, 1),
            betas=self.optim.betas,
            weight_decay=self.optim.weight_decay,
            fused=device.type == "cuda",
        )

    def use(self, lighthouse: LighthouseConfig, *, recompute: bool = False) -> None:
        """Give every lighthouse layer this config, and choose activation checkpointing."""
        self.model.recompute = recompute
        for block in self.model.blocks:
            if not block.always_dense:
                attention: Any = block.attention
                attention.core.config = lighthouse

    def backward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Set the gradients of the copies; return the mean loss."""
        positions = torch.arange(tokens.shape[1], device=self.device)
        logits = self.model(tokens, positions).float().flatten(0, 1)
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum") / labels.numel()
        loss.backward()
        return loss.detach()

    def step(self, tokens: Tensor, labels: Tensor, mode: Mode) -> Tensor:
        """Forward, backward, clip and optimiser; return the mean loss. Does not wait."""
        set_mode(self.model, mode)
        loss = self.backward(tokens, labels)
        for weight, copy in zip(self.weights, self.copies, strict=True):
            assert copy.grad is not None
            weight.grad, copy.grad = copy.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.weights, self.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.weights)
        return loss

    def timed(self, tokens: Tensor, labels: Tensor, mode: Mode) -> StepTime:
        """Do one step and measure it.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        host, loss = 0.0, torch.empty(0)

        def run() -> None:
            nonlocal host, loss
            begin = time.perf_counter()
            loss = self.step(tokens, labels, mode)
            host = time.perf_counter() - begin

        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = elapsed(run, self.device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        if not loss.isfinite():
            raise FloatingPointError(f"loss {loss.item()} in a {mode} step of {tokens.shape[1]}")
        return StepTime(seconds, host, peak)


def random_bytes(seqlen: int, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw tokens and labels [1, N], the same for each length."""
    generator = torch.Generator().manual_seed(seqlen)
    text = torch.randint(vocab_size, (1, seqlen + 1), generator=generator).to(device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def introduce_operators(backend: str, device: torch.device) -> None:
    """Compile one small layer alone.

    Inductor knows that our operators want their inputs in memory once it has seen them; the first
    graph it compiles in a process would copy q and k twice.
    """
    config, seqlen = config_for(1024), 1024
    *inputs, _ = qkv(seqlen, num_heads=2, head_dim=64, dtype=torch.bfloat16)
    q, k, v = (x.to(device).requires_grad_() for x in inputs)
    layer = torch.compile(lighthouse_attention, fullgraph=True, dynamic=False)
    layer(q, k, v, config=config, backend=backend).sum().backward()
