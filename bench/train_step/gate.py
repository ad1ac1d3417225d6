"""The gate of a training step: a compiled step that computes something else is not timed."""

import torch
from torch import Tensor

from bench.train_step.trainer import Trainer, random_bytes
from lhcp.config import LighthouseConfig
from lhcp.layer.mode import set_mode
from lhcp.layer.module import Mode
from lhcp.training.model_config import ModelConfig


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
    report: dict[str, dict[str, float]] = {}
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
