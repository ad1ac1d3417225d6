"""README's command for torchtitan, on real text and CPUs: for torchrun.

Arguments: the number of steps; "documents" to leave out the override that makes sequences whole,
"kept" to have documents kept apart too.

torchtitan 0.3 is for GPUs and a torch after 2.13. What a CPU, gloo or torch 2.13 lacks of what it
calls beside its model is put in its place here, before it is imported.
"""

import os
import re
import shlex
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import IterableDataset

SEQLEN, BATCH = 256, 8
README = (Path(__file__).parents[2] / "README.md").read_text()
TEXT = sorted((Path(__file__).parents[2] / "lhcp").rglob("*.py"))


def let_a_cpu_be_a_device() -> None:
    """Let torchtitan find a CPU, and torch 2.13 have what it calls."""

    def nothing(*_: Any) -> None:
        """A CPU has nothing to do here."""

    module = SimpleNamespace(
        **dict.fromkeys(("set_device", "synchronize", "empty_cache"), nothing),
        reset_peak_memory_stats=nothing,
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_device_name=lambda *_: "cpu",
        get_device_properties=lambda *_: SimpleNamespace(total_memory=2**34, name="cpu"),
        memory_stats=lambda *_: {},
    )
    torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[assignment]
    torch._utils._get_device_module = lambda _: module  # type: ignore[assignment]
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = nothing  # type: ignore[attr-defined]


let_a_cpu_be_a_device()

from torchtitan.components.dataloader import ParallelAwareDataloader  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402

from lhcp import LighthouseAttention  # noqa: E402


class Rows(IterableDataset):  # type: ignore[type-arg]
    """Sequences of the text in an order of their own, each once; documents are 100 bytes."""

    def __init__(self, seqlen: int) -> None:
        text = b"".join(path.read_bytes() for path in TEXT)
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        rows = data[: (len(data) - 1) // seqlen * seqlen + 1].unfold(0, seqlen + 1, seqlen)
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for i in torch.randperm(len(self.rows), generator=generator):
            row = self.rows[i]
            yield {"input": row[:-1], "positions": torch.arange(len(row) - 1) % 100}, row[1:]


class Bytes(ParallelAwareDataloader):
    """torchtitan's loader on `Rows`, on one data-parallel rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        """As its own."""

    def __init__(self, config: Any, *, dp_rank: int, dp_world_size: int, **options: Any) -> None:
        size = options["local_batch_size"]
        super().__init__(Rows(options["seq_len"]), dp_rank, dp_world_size, batch_size=size)


class NoTokenizer(BaseTokenizer):
    """Bytes are tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """As its own."""

    def __init__(self, config: Any, **_options: Any) -> None:
        super().__init__()

    def encode(self, *_: Any) -> list[int]:
        raise NotImplementedError

    def decode(self, *_: Any) -> str:
        raise NotImplementedError

    def get_vocab_size(self) -> int:
        return 256


def config_of(ranks: int, steps: int, words: Collection[str]) -> Any:
    """README's command line, with a model and data of a size for CPUs."""
    (command,) = re.findall(r"^torchrun .* torchtitan\.train (.*?)```", README, re.DOTALL | re.M)
    becomes = {
        "--config llama3_8b": "--config llama3_debugmodel",
        "context_parallel_degree 8": f"context_parallel_degree {ranks}",
        "seq_len 98304": f"seq_len {SEQLEN}",
        '"topk": 1536': '"topk": 16, "num_strata": 8',
        '"dense_layers": [0, 1, -2, -1]': '"dense_layers": [0]',
    }
    if "documents" in words:
        becomes["lhcp.integrations.torchtitan.whole_sequences"] = ""
    if "kept" in words:
        becomes['"topk": 16'] = '"documents": true, "topk": 16'
    for stands, other in becomes.items():
        assert stands in command, stands
        command = command.replace(stands, other)
    config = ConfigManager().parse_args(shlex.split(command.replace("\\\n", " ")))
    config.dump_folder = config.hf_assets_path = os.environ["TITAN_FOLDER"]
    config.tokenizer, config.dataloader = NoTokenizer.Config(), Bytes.Config()
    config.training.local_batch_size, config.training.steps = BATCH, steps
    config.training.mixed_precision_param = "float32"
    config.optimizer.param_groups[0].optimizer_kwargs["lr"] = 5e-3
    config.model_spec.model.layers = config.model_spec.model.layers[:2]
    config.debug.enable_structured_logging = config.checkpoint.enable = False
    # Its own default, spmd_types, needs an FSDP2 that torch 2.13 has not.
    if torch.__version__.startswith(("2.11", "2.12", "2.13")):
        config.parallelism.spmd_backend = "full_dtensor"
    return config


@torch.no_grad()
def same_start(model: torch.nn.Module) -> None:
    """Draw parameters anew: on CPUs, those that torchtitan draws depend on the ranks."""
    for i, parameter in enumerate(model.parameters()):
        if parameter.ndim < 2:
            continue
        drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.05
        if isinstance(parameter, DTensor):
            drawn = distribute_tensor(drawn, parameter.device_mesh, parameter.placements)
        parameter.copy_(drawn)


def main(steps: int, words: Collection[str]) -> None:
    """Train; print the modes of the layers, first loss and grad norm, and where the loss ends."""
    trainer = config_of(int(os.environ["WORLD_SIZE"]), steps, words).build()
    (model,) = trainer.model_parts
    same_start(model)
    for module in model.modules():
        # gloo has no sum that is multiplied on the way, which is how FSDP divides by 1.
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    losses, norms = [], []
    step, log = trainer.fwd_bwd_fn, trainer.metrics_processor.log

    def keep_loss(*args: Any) -> Tensor:
        loss: Tensor = step(*args)
        # What torchtitan logs with torch 2.13 is this times the ranks: it sums what is summed.
        whole = loss.full_tensor() if isinstance(loss, DTensor) else loss.detach().clone()
        if not isinstance(loss, DTensor):
            dist.all_reduce(whole)
        losses.append(whole.item())
        return loss

    def keep_norm(*args: Any, **named: Any) -> None:
        norms.append(float(args[3]))
        log(*args, **named)

    trainer.fwd_bwd_fn, trainer.metrics_processor.log = keep_loss, keep_norm
    trainer.train()
    text = Rows(SEQLEN).rows.flatten()
    share = text.bincount().double() / len(text)
    entropy = -(share * share.clamp(min=1e-9).log()).sum().item()
    modes = [m.mode for m in model.modules() if isinstance(m, LighthouseAttention)]
    last = losses[-8:]
    print(
        f"rank {dist.get_rank()}: {'-'.join(modes)} first {losses[0]:.6f} norm {norms[0]:.6f} "
        f"last {sum(last) / len(last):.4f} entropy {entropy:.4f}",
        flush=True,
    )
    trainer.close()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
