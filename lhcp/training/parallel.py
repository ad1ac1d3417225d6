"""The model and its optimiser on the ranks of a run: a mesh dp x cp x tp, FSDP2 over dp x cp."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule

import lhcp
from lhcp.comm.layout import LayoutName
from lhcp.comm.marks import Marks
from lhcp.comm.torch_private import flat_mesh
from lhcp.layer.recording import Graphs
from lhcp.training.fsdp import shard_weights
from lhcp.training.model import AttentionFactory, Decoder
from lhcp.training.run import Run
from lhcp.training.stages import OptimConfig
from lhcp.training.tensor_parallel import cut, cut_rows, is_cut


@dataclass(frozen=True)
class Placement:
    """The sequences, and those of their tokens, that this rank holds."""

    device: torch.device
    dp_rank: int
    dp_size: int
    tp_size: int
    """The ranks that hold the same tokens, each for its heads."""
    cp_group: dist.ProcessGroup | None
    """The ranks that share a sequence; None where one rank holds it whole."""
    positions: torch.Tensor
    """int64 [n], global positions of this rank's tokens, on `device`."""
    layout: LayoutName
    restart_positions: bool
    """Whether RoPE's positions begin at 0 in each document."""

    def rope_positions(self, seqlen: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """Return the positions that RoPE turns by: int64 [n], or [B, n] where documents restart."""
        if cu_seqlens is None or not self.restart_positions:
            return self.positions
        return lhcp.positions(seqlen, self.cp_group, self.layout, self.device, cu_seqlens)


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


def make_mesh(run: Run, device: torch.device) -> DeviceMesh:
    """Lay the ranks out as dp x cp x tp: neighbours share a layer, and those next a sequence."""
    shape = (dist.get_world_size() // (run.cp * run.tp), run.cp, run.tp)
    return init_device_mesh(device.type, shape, mesh_dim_names=("dp", "cp", "tp"))


def place(run: Run, mesh: DeviceMesh, device: torch.device) -> Placement:
    """Return what this rank of the run's mesh holds."""
    group = mesh["cp"].get_group() if run.cp > 1 else None
    positions = lhcp.positions(run.seqlen, group, layout=run.layout).to(device)
    return Placement(
        device,
        dp_rank=mesh["dp"].get_local_rank(),
        dp_size=mesh["dp"].size(),
        tp_size=run.tp,
        cp_group=group,
        positions=positions,
        layout=run.layout,
        restart_positions=run.data.restart_positions,
    )


def attention_factory(
    run: Run, group: dist.ProcessGroup | None, timers: lhcp.Timers | None = None
) -> AttentionFactory:
    """Return what makes one layer's attention on `group`; see `AttentionFactory`."""

    cp = lhcp.ContextParallel(
        group,
        layout=run.layout,
        rotation=run.rotation,
        backend=run.backend,
        kernels=run.kernels,
        timers=timers,
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


def wants_graphs(run: Run, device: torch.device) -> bool:
    """Return whether the attention runs as CUDA graphs.

    Raises:
        ValueError: they are asked for where there is no GPU.
    """
    if run.graphs == "on" and device.type != "cuda":
        raise ValueError(f"graphs='on': CUDA graphs need a GPU, and this run is on {device.type}")
    return run.graphs != "off" and device.type == "cuda"


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
    mesh = make_mesh(run, device)
    placement = place(run, mesh, device)
    by_graph = wants_graphs(run, device)
    timers = None if by_graph or run.compile else lhcp.Timers()
    factory = attention_factory(run, placement.cp_group, timers)
    model = Decoder(run.model, factory, recompute=run.recompute, offload=run.offload)
    model.initialize(run.seed)
    model.to(device)
    if run.tp > 1:
        cut(model, mesh["tp"])
    dtype = compute_dtype(run, device)
    if run.compile:
        for block in model.blocks:
            block.compile(dynamic=False)
    sharded = shard_weights(model, dtype, flat_mesh(mesh["dp", "cp"]))
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
    model = Decoder(run.model, attention_factory(run, None))
    model.load_state_dict(state)
    return model.to(trainee.placement.device)
