"""Export of a trained decoder: a folder that `LlamaForCausalLM.from_pretrained` reads."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader

from lhcp.layer.module import LighthouseAttention
from lhcp.training.byte_tokenizer import tokenizer, tokenizer_config
from lhcp.training.checkpoint_reader import TensorReader
from lhcp.training.llama import llama_config, llama_tensors
from lhcp.training.model import Decoder
from lhcp.training.model_config import ModelConfig
from lhcp.training.trained import find_checkpoint, trained_run

NOTE = """# {name}
A byte-level decoder trained with lhcp for {steps:,} steps ({stages}), at {seqlen:,} tokens.

```python
from transformers import AutoTokenizer, LlamaForCausalLM

model = LlamaForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")  # or list(text.encode())
```

A token is a byte of UTF-8 and its id is the byte's value, 0 to 255; a text has no mark at its begin
or end. Attention is dense and causal, at every length. Positions above some 100,000: transformers
computes the angles of RoPE in float32 (wrong by 0.06 rad at 1M), the training in float64.
"""


def model_tensors(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Read the decoder's tensors from the checkpoint at `path`, whole, on the CPU.

    Raises:
        ValueError: the checkpoint's model has other tensors than a decoder of these sizes.
        UnsafeCheckpointError: it holds more than tensors.
    """

    def attention(always_dense: bool) -> nn.Module:
        return LighthouseAttention(None)

    with torch.device("meta"):
        decoder = Decoder(config, attention)
    wanted = {name: (*tensor.shape,) for name, tensor in decoder.state_dict().items()}
    metadata: Any = TensorReader(path).read_metadata().state_dict_metadata
    there: dict[str, Any] = {
        name.removeprefix("model."): (*entry.size,)
        for name, entry in metadata.items()
        if name.startswith("model.")
    }
    differ = [n for n in {**wanted, **there} if wanted.get(n) != there.get(n)]
    if differ:
        said = "; ".join(
            f"{name}: {there.get(name, 'not there')}, a decoder has {wanted.get(name, 'none')}"
            for name in sorted(differ)[:5]
        )
        raise ValueError(f"{path}: its model is no decoder of its own sizes: {said}")
    state = {name: torch.empty(shape) for name, shape in wanted.items()}
    state_dict_loader.load({"model": state}, storage_reader=TensorReader(path))
    return state


def export(
    place: Path, out: Path, *, dtype: torch.dtype = torch.float32, any_stage: bool = False
) -> Path:
    """Write the decoder of a checkpoint to `out`, in the layout of Llama; return the checkpoint.

    One rank calls it, with a process group of itself. Written are config.json, model.safetensors,
    tokenizer.json, tokenizer_config.json, generation_config.json and README.md.

    Args:
        place: A checkpoint, or a folder with the checkpoints of one arm: then its newest.
        out: The folder to make; files of these names in it are replaced.
        dtype: Of the tensors; training keeps them in float32.
        any_stage: Whether to export a model whose last stage was not dense.

    Raises:
        FileNotFoundError, DamagedCheckpoint, NoCheckpointLeft: as `find_checkpoint`.
        ValueError: the last stage was lighthouse: Llama attends densely, which this model has not
            been trained to; or the model is none that Llama expresses.
        ImportError: the package safetensors is missing.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("export needs safetensors: pip install 'lhcp[train]'") from error
    path = find_checkpoint(place)
    run, steps, stages = trained_run(path, 1)
    last = stages[-1][0] if stages else "none"
    if last != "dense" and not any_stage:
        raise ValueError(
            f"{path}: its last stage is {last}, and a Llama attends densely: its loss would be "
            "that before the recovery. Train the dense stage first, or pass --any-stage"
        )
    tensors = llama_tensors(run.model, model_tensors(path, run.model))
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "config.json": llama_config(run.model, run.seqlen, dtype),
        "generation_config.json": {"do_sample": True, "temperature": 0.7},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": tokenizer_config(run.seqlen),
    }
    for name, content in texts.items():
        (out / name).write_text(json.dumps(content, indent=1, ensure_ascii=True) + "\n")
    # Parts of one product are views of it; a file has each in memory of its own.
    whole = {name: tensor.to(dtype).contiguous().clone() for name, tensor in tensors.items()}
    save_file(whole, str(out / "model.safetensors"), metadata={"format": "pt"})
    said = ", ".join(f"{count:,} {mode}" for mode, count in stages) or "none"
    note = NOTE.format(name=out.name, steps=steps, stages=said, seqlen=run.seqlen, folder=out)
    (out / "README.md").write_text(note, encoding="utf-8")
    return path
