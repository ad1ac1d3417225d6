"""README's lines for accelerate or Trainer, on real text: for torchrun.

Prints the first gradient's norm and that of one rank with the same tokens; the held-out loss in the
mode that was trained, after the training, and the entropy of that text's bytes, which a model that
knows how often each comes, and nothing else, cannot pass.
"""

import copy
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import lhcp
from lhcp.integrations import hf

SEQLEN, STEPS, BATCH, RATE = 256, 64, 8, 5e-3
README = (Path(__file__).parents[2] / "README.md").read_text()
TEXT = (Path(__file__).parents[2] / "lhcp").rglob("*.py")


def let_a_cpu_have_fsdp() -> None:
    """Let accelerate 1.15 take ranks on CPUs as it takes those on GPUs.

    It has FSDP2 and meshes for a list of kinds of devices that lacks the CPU. Nothing else of it is
    touched: which device tensors are on was decided before.
    """
    own: Any = PartialState.__init__

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        own(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start


def rows(text: bytes) -> list[dict[str, Tensor]]:
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    whole = data[: len(data) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    return [{"input_ids": row, "labels": row} for row in whole]


def small() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )


def entropy(batch: Tensor) -> float:
    share = batch.flatten().bincount().double() / batch.numel()
    return -(share * share.clamp(min=1e-9).log()).sum().item()


def norm_of(parameters: Any) -> float:
    """The norm of whole gradients."""
    grads = [x.grad for x in parameters if x.grad is not None]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return torch.stack([g.norm() for g in whole]).norm().item()


def on_one_rank(model: Any, rows: list[dict[str, Tensor]]) -> float:
    """The norm of the gradient of the first step's tokens."""
    cp = lhcp.ContextParallel()
    hf.attach(model, cp, lhcp.LighthouseConfig.fit(SEQLEN, 2))
    whole = torch.stack([row["input_ids"] for row in rows])
    batch = cp.shard({"input_ids": whole, "labels": whole})
    cp.loss(model(**batch).logits, batch["shift_labels"], over=None).backward()
    return norm_of(model.parameters())


def main(stack: str) -> None:
    """Train by the lines of one stack."""
    (program,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if block.startswith(f"# {stack}")
    )
    let_a_cpu_have_fsdp()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    text = b"".join(path.read_bytes() for path in sorted(TEXT))
    data = rows(text)
    heldout = torch.stack([row["input_ids"] for row in data[::64]])
    training = [row for i, row in enumerate(data) if i % 64]
    dataset = [training[i] for i in torch.randperm(len(training))[: STEPS * BATCH]]
    model: Any = LlamaForCausalLM(small())
    options = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    norms: list[float] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not norms:
            norms.append(norm_of(x for group in optimizer.param_groups for x in group["params"]))

    register_optimizer_step_pre_hook(keep)
    untrained = copy.deepcopy(model)
    scope: dict[str, Any] = {
        "dp_size": 1,
        "cp_size": 2,
        "seqlen": SEQLEN,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=RATE),
        "loader": DataLoader(dataset, BATCH),
        "dataset": dataset,
        "options": options,
    }
    exec(program.replace('"cuda"', '"cpu"'), scope)
    trained, cp = scope["model"].eval(), scope["cp"]
    with torch.no_grad():
        batch = cp.shard({"input_ids": heldout, "labels": heldout})
        loss = cp.loss(trained(**batch).logits, batch["shift_labels"], over=scope["mesh"])
    print(
        f"rank {cp.rank}: {type(trained).__name__} norm {norms[0]:.4f} "
        f"expected {on_one_rank(untrained, dataset[:BATCH]):.4f} "
        f"loss {loss:.4f} entropy {entropy(heldout):.4f}",
        flush=True,
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
