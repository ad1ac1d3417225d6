"""Is each layer's selection alive? What `lhcp.diagnose` says of a model's q and k in training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lhcp
from lhcp.layer.mode import set_mode
from lhcp.layer.module import LighthouseAttention, Mode
from lhcp.measure import SelectionReport
from lhcp.training.parallel import Trainee
from lhcp.training.run import Run
from lhcp.training.sequences import Sequences


@dataclass(frozen=True)
class SelectionRecord:
    """What one diagnosis found of one lighthouse layer; means over the run's held-out sequences."""

    step: int
    """Steps done."""
    layer: int
    """Number of the block in the model."""
    mode: Mode
    """How the layers attended, which shapes the q and k of those after them."""
    spread_q: float
    """Standard deviation over mean of the query scores, mean over levels and kv heads."""
    spread_k: float
    near_ties: float
    """Share of picks within a thousandth of the best that is not picked."""
    overlap: float | None
    """Jaccard index of two kv heads' picks; None: one kv head."""


@torch.no_grad()
def diagnose_layers(
    run: Run, trainee: Trainee, heldout: Sequences, mode: Mode, step: int
) -> list[SelectionRecord]:
    """Return the records of all lighthouse layers after `step` steps; every rank calls it.

    One forward in `mode` of the first part of an evaluation, of its size so that CUDA graphs and
    memory are those of evaluations, whose attention cores are watched. It draws nothing and leaves
    weights and gradients alone.
    """
    set_mode(trainee.model, mode)
    place = trainee.placement
    whole = heldout.batch(0, place.dp_rank, place.dp_size, run.eval_sequences)
    batch = whole.rows(0, max(run.global_batch // place.dp_size // run.accumulate, 1))
    positions = place.rope_positions(run.seqlen, batch.cu_seqlens)
    with watched(run, trainee) as reports, torch.compiler.set_stance("force_eager"):
        tokens = batch.tokens.to(place.device)[:, place.positions]
        trainee.model(tokens, positions, batch.cu_seqlens)
    trainee.sharded.reshard()
    rows = [[r.spread_q, r.spread_k, r.near_ties, r.overlap or 0.0] for r in reports.values()]
    if not rows:
        return []
    # Ranks of one sequence have equal reports, or each of its heads, so this is the mean over all.
    total = torch.tensor(rows, dtype=torch.float64, device=place.device)
    dist.all_reduce(total)
    means = (total / dist.get_world_size()).tolist()
    records = []
    for (layer, report), (spread_q, spread_k, near_ties, overlap) in zip(
        reports.items(), means, strict=True
    ):
        shared = None if report.overlap is None else overlap
        records.append(SelectionRecord(step, layer, mode, spread_q, spread_k, near_ties, shared))
    return records


@contextmanager
def watched(run: Run, trainee: Trainee) -> Iterator[dict[int, SelectionReport]]:
    """Diagnose what enters each lighthouse layer meanwhile; the reports are by number of the block.

    Compiled blocks have their hooks traced in, so only an eager forward is seen.
    """
    reports: dict[int, SelectionReport] = {}
    handles = []

    def hook(layer: int, config: lhcp.LighthouseConfig) -> Any:
        def look(
            module: nn.Module, qkv: tuple[Tensor, Tensor, Tensor], given: dict[str, Any]
        ) -> None:
            q, k, v = qkv
            reports[layer] = lhcp.diagnose(
                q,
                k,
                config,
                group=trainee.placement.ranks,
                layout=run.layout,
                v=v,
                kernels=run.kernels,
                cu_seqlens=given.get("cu_seqlens"),
            )

        return look

    for layer, block in enumerate(trainee.model.blocks):
        core = block.get_submodule("attention.core")
        if isinstance(core, LighthouseAttention) and core.config is not None:
            handles.append(
                core.register_forward_pre_hook(hook(layer, core.config), with_kwargs=True)
            )
    try:
        yield reports
    finally:
        for handle in handles:
            handle.remove()
