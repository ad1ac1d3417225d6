"""README's lines for Trainer with its own checkpoints and evaluation: for torchrun.

Each rank writes to the folder the losses of a run and of one that goes on from its checkpoint in
the middle, and what Trainer's evaluation and `ContextParallel.loss` say of held-out text.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM
from transformers.utils import logging

from tests.launch.train_hf import README, TEXT, let_a_cpu_have_fsdp, rows, small

STEPS = 6


def trained(program: str, folder: str, data: list[Any], checkpoint: str | None) -> dict[str, Any]:
    """Run README's lines, with an evaluation and checkpoints; return their names."""
    torch.manual_seed(0)
    options = {
        "output_dir": folder,
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3,
        "train_sampling_strategy": "sequential",
        "save_strategy": "steps",
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "prediction_loss_only": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    scope = {
        "dp_size": 1,
        "cp_size": 2,
        "seqlen": len(data[0]["input_ids"]),
        "model": LlamaForCausalLM(small()),
        "dataset": data[: 4 * STEPS],
        "options": options,
        "checkpoint": checkpoint,
    }
    exec(program, scope)
    return scope


def main(folder: str) -> None:
    """Train, and train again from the middle."""
    let_a_cpu_have_fsdp()
    logging.set_verbosity_error()
    (program,) = (x for x in re.findall(r"```python\n(.*?)```", README, re.S) if "# Trainer" in x)
    data = rows(b"".join(path.read_bytes() for path in sorted(TEXT)))
    becomes = {
        '"cuda"': '"cpu"',
        "trainer.train()": "trainer.train(resume_from_checkpoint=checkpoint)",
    }
    for stands, other in becomes.items():
        assert stands in program
        program = program.replace(stands, other)
    middle = f"{folder}/checkpoint-{STEPS // 2}"
    runs = [trained(program, folder, data, checkpoint) for checkpoint in (None, middle)]
    losses = []
    for scope in runs:
        logged = {x["step"]: x["loss"] for x in scope["trainer"].state.log_history if "loss" in x}
        losses.append([logged[step] for step in range(1, STEPS + 1)])
    cp, heldout = scope["cp"], data[-2:]
    evaluated = scope["trainer"].evaluate(heldout)["eval_loss"]
    whole = torch.stack([row["input_ids"] for row in heldout])
    batch = cp.shard({"input_ids": whole, "labels": whole})
    with torch.no_grad():
        logits = scope["trainer"].model_wrapped.eval()(**batch).logits
        own = cp.loss(logits, batch["shift_labels"], over=scope["mesh"]).item()
    said = {"losses": losses, "evaluated": evaluated, "own": own}
    Path(folder, f"rank{cp.rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
