"""The model and its optimiser on the ranks of a run: a mesh dp x cp x tp, FSDP2 over dp x cp."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

import lhcp
from lhcp.comm.marks import Marks
from lhcp.comm.torch_private import flat_mesh
from lhcp.layer.graphs import Graphs
from lhcp.training.fsdp import shard_weights
from lhcp.training.model import AttentionFactory, Decoder
from lhcp.training.placement import (
    Placement,
    chosen_rotation,
    make_mesh,
    place,
    sequence_axes,
    wants_graphs,
)
from lhcp.training.run import Run
from lhcp.training.stages import OptimConfig
from lhcp.training.tensor_parallel import cut, cut_rows, is_cut


@dataclass(frozen=True)
class Trainee:
    """All that training changes, and where it lives."""

    model: Decoder
    sharded: FSDPModule
    """`model`, as FSDP names it."""
    optimizer: torch.optim.Optimizer
    placement: Placement
    timers: lhcp.Timers | None
    """Seconds that this rank waits in rotations, over all layers; None: not timed."""
    graphs: Graphs | None
    """The CUDA graphs of the attention; None: it runs as it is."""
    marks: Marks = field(default_factory=Marks)
    """Where this rank is, for the other ranks' watchdogs."""

    def release(self) -> None:
        """Drop the graphs, which training records anew: before the process group goes."""
        if self.graphs is not None:
            self.graphs.release()


def attention_factory(
    run: Run, placement: Placement | None = None, timers: lhcp.Timers | None = None
) -> AttentionFactory:
    """Return what makes one layer's attention; see `AttentionFactory`.

    Args:
        placement: whose ranks share a sequence; None: this one has it whole.
    """
    cp = lhcp.ContextParallel(
        None if placement is None else placement.ranks,
        layout=run.layout,
        rotation="auto" if placement is None else placement.rotation,
        backend=run.backend,
        kernels=run.kernels,
        timers=timers,
        debug=run.debug,
    )
    return lambda always_dense: cp.attention(None if always_dense else run.lighthouse)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimiser; norms (one dimension) do not decay."""
    # Torch updates a group's tensors in one call, which those of two meshes may not share.
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        kinds.setdefault((parameter.ndim > 1, is_cut(parameter)), []).append(parameter)
    groups = [
        {"params": kinds[kind], "weight_decay": config.weight_decay if kind[0] else 0.0}
        for kind in sorted(kinds, reverse=True)
    ]
    if config.kind == "sgd":
        return torch.optim.SGD([{"params": group["params"]} for group in groups], lr=config.lr)
    # Fused: ten kernels in place of some hundred, which the GPU waits for at the end of a step.
    fused = next(model.parameters()).device.type == "cuda"
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=fused)


def compute_dtype(run: Run, device: torch.device) -> torch.dtype:
    """Return the dtype that activations and attention are computed in."""
    bf16 = run.dtype == "bf16" or (run.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if bf16 else torch.float32


def check_kernels(run: Run, device: torch.device) -> None:
    """Check that the run's kernels run on the device.

    Raises:
        ValueError: Triton's are asked for on a CPU, and not for its interpreter.
    """
    # Triton reads the variable itself, when a kernel is made.
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
    if run.kernels == "triton" and device.type == "cpu" and not interpreted:
        raise ValueError(
            "kernels='triton': Triton's kernels need a GPU, and this run is on cpu; take 'auto' or "
            "'torch' (or TRITON_INTERPRET=1, which is very slow)"
        )


def build(run: Run, device: torch.device, marks: Marks | None = None) -> Trainee:
    """Return the model, drawn from the run's seed and sharded over all ranks, and its optimiser.

    Training says with `marks` where it is.

    Raises:
        ValueError: the kernels or CUDA graphs that the run asks for are not for this device.
    """
    check_kernels(run, device)
    rotation = chosen_rotation(run, device)
    mesh = make_mesh(run, rotation, device)
    placement = place(run, rotation, mesh, device)
    by_graph = wants_graphs(run, device)
    timers = None if by_graph or run.compile else lhcp.Timers()
    factory = attention_factory(run, placement, timers)
    model = Decoder(run.model, factory, recompute=run.recompute, offload=run.offload)
    model.initialize(run.seed)
    model.to(device)
    if run.tp > 1:
        cut(model, mesh["tp"])
    dtype = compute_dtype(run, device)
    if run.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    sharded = shard_weights(model, dtype, flat_mesh(mesh["dp", *sequence_axes(mesh)]))
    # Recomputed layers run again just before their backward: one pair of graphs serves them all.
    graphs = lhcp.graphed(model, shared=run.recompute) if by_graph else None
    optimizer = make_optimizer(model, run.optim)
    return Trainee(model, sharded, optimizer, placement, timers, graphs, marks or Marks())


def whole_model(run: Run, trainee: Trainee) -> Decoder | None:
    """Return rank 0 a whole copy of the model that needs no other rank, and the others None."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(trainee.model, options=options)
    if dist.get_rank() != 0:
        return None
    for name, rows in cut_rows(trainee.model).items():
        state[name] = state[name][rows.argsort()]
    model = Decoder(run.model, attention_factory(run))
    model.load_state_dict(state)
    return model.to(trainee.placement.device)
