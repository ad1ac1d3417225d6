"""One training step of the decoder on one device, as lhcp/training takes it on one rank."""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from train_step_model import config_for

from lhcp.config import LighthouseConfig
from lhcp.layer.lighthouse import lighthouse_attention
from lhcp.layer.module import LighthouseAttention
from lhcp.testing.inputs import qkv
from lhcp.training.model import Decoder, Mode, ModelConfig, set_mode
from lhcp.training.stages import OptimConfig

PRECISION = (
    "fp32: weights, gradients, AdamW's two moments; bf16: the weights computed with, their "
    "gradients, activations (lhcp/training: FSDP2, param_dtype=bf16, reduce_dtype=fp32)"
)


@dataclass(frozen=True)
class Timing:
    """One step."""

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
        kernels: of the lighthouse stages.
    """

    def __init__(
        self,
        config: ModelConfig,
        backend: str,
        device: torch.device,
        *,
        compiler: str = "inductor",
        dtype: torch.dtype = torch.bfloat16,
        kernels: str = "auto",
        optim: OptimConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.config, self.device, self.optim = config, device, optim or OptimConfig()
        placeholder = LighthouseConfig()
        with device:
            self.model = Decoder(
                config,
                lambda dense: LighthouseAttention(
                    None if dense else placeholder, backend=backend, kernels=kernels
                ),
            )
        self.model.initialize(seed)
        self.weights = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
        self.model.to(dtype)
        self.copies = list(self.model.parameters())
        if compiler != "none":
            for block in self.model.blocks:
                block.compile(fullgraph=True, dynamic=False, backend=compiler)
        groups = [
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
                block.attention.core.config = lighthouse

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

    def timed(self, tokens: Tensor, labels: Tensor, mode: Mode) -> Timing:
        """Do one step and measure it.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if self.device.type != "cuda":
            begin = time.perf_counter()
            loss = self.step(tokens, labels, mode)
            seconds = time.perf_counter() - begin
            found = Timing(seconds, seconds, 0.0)
        else:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin = time.perf_counter()
            start.record()
            loss = self.step(tokens, labels, mode)
            stop.record()
            host = time.perf_counter() - begin
            stop.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30
            found = Timing(start.elapsed_time(stop) / 1e3, host, peak)
        if not loss.isfinite():
            raise FloatingPointError(f"loss {loss.item()} in a {mode} step of {tokens.shape[1]}")
        return found


def random_bytes(seqlen: int, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and labels [1, N], the same for each length."""
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


def gate(
    config: ModelConfig,
    lighthouse: LighthouseConfig,
    seqlen: int,
    backend: str,
    device: torch.device,
    compiler: str,
) -> dict[str, dict[str, float]]:
    """Compare loss and gradient of the compiled step with the eager one, both against fp32.

    Habit of the tests: ours may err from fp32 at most twice as far as plain eager bf16 does, and a
    rounding step. All three start from the same rounded weights.

    Returns:
        Mode -> errors of loss and whole gradient (relative), eager and compiled.

    Raises:
        SystemExit: the compiled step computes something else.
    """
    exact_backend = "math" if device.type == "cuda" else "cpu"

    def answers(compiler: str, dtype: torch.dtype) -> dict[Mode, tuple[float, Tensor]]:
        chosen = backend if dtype == torch.bfloat16 else exact_backend
        trainer = Trainer(config, chosen, device, compiler=compiler, dtype=dtype)
        trainer.use(lighthouse)
        if dtype != torch.bfloat16:
            trainer.model.bfloat16().to(dtype)
        found: dict[Mode, tuple[float, Tensor]] = {}
        modes: tuple[Mode, ...] = ("dense", "lighthouse")
        for mode in modes:
            set_mode(trainer.model, mode)
            loss = trainer.backward(*random_bytes(seqlen, config.vocab_size, device))
            grads = [p.grad for p in trainer.model.parameters()]
            found[mode] = (
                loss.item(),
                torch.cat([g.float().flatten() for g in grads if g is not None]),
            )
            trainer.model.zero_grad()
        return found

    ours, eager = answers(compiler, torch.bfloat16), answers("none", torch.bfloat16)
    exact = answers("none", torch.float32)
    report = {}
    for mode, (loss, grad) in exact.items():
        errors = {}
        for name, (low_loss, low_grad) in (("eager", eager[mode]), ("compiled", ours[mode])):
            errors[f"loss_{name}"] = abs(low_loss - loss) / loss
            errors[f"grad_{name}"] = float((low_grad - grad).norm() / grad.norm())
        eps = torch.finfo(torch.bfloat16).eps
        for what, band in (("loss", eps / 8), ("grad", eps)):
            got, allowed = errors[f"{what}_compiled"], 2 * (errors[f"{what}_eager"] + band)
            if not got <= allowed:
                raise SystemExit(
                    f"{mode}: {what} of the compiled step is {got:.2e} from fp32, allowed "
                    f"{allowed:.2e}: nothing is timed"
                )
        report[mode] = errors
    return report
