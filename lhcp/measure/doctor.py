"""The doctor: what ranks have, what would be chosen and why, how fast they are, what is wrong."""

import os
from dataclasses import dataclass
from statistics import median

import torch

from lhcp.comm.layout import make_layout
from lhcp.comm.mesh import Ranks
from lhcp.config import LighthouseConfig
from lhcp.cost.choose import choose
from lhcp.cost.tables import built_in
from lhcp.layer.module import LighthouseAttention
from lhcp.layer.plan import choose_backend, choose_kernels, why_not
from lhcp.measure.examine import Facts, Trouble, differences, hardware, own_troubles, software
from lhcp.measure.links import gather_rate, islands, link, pair_rates
from lhcp.measure.rank_values import gathered, slowest
from lhcp.measure.runs import Recorder, differentiable, take_sample
from lhcp.ring.shape import AttentionShape

SLOW_PAIR = 0.5
"""Of the pairs' median rate: a slower pair is named."""
GAP = 4.0
"""Between the rates of a node's pairs and those of others."""
MOST_PAIRS = 16
"""Ranks up to which each pair is measured alone."""


@dataclass(frozen=True, kw_only=True)
class Patient:
    """The layer that is asked about."""

    seqlen: int
    """N, tokens of the whole sequence."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found; equal on every rank."""

    facts: list[Facts]
    """By rank."""
    choices: list[str]
    """What would be chosen for the layer, and why; a line each."""
    speeds: list[str]
    troubles: list[Trouble]

    def __str__(self) -> str:
        """Return all of it; what is wrong comes last."""
        lines = [f"{name:<10}{value}" for name, value in self.facts[0].items()]
        if len(self.facts) > 1:
            lines += ["", "ranks"]
            lines += [
                f"  {rank:<4}{facts['device']}, {facts['cores']} on {facts['host']}"
                for rank, facts in enumerate(self.facts)
            ]
        for title, part in (("chosen", self.choices), ("measured", self.speeds)):
            lines += ["", title, *(f"  {line}" for line in part)]
        wrong = [f"  {number}. {it}" for number, it in enumerate(self.troubles, 1)]
        return "\n".join([*lines, "", "wrong", *(wrong or ["  nothing was found"])])


def examine(ranks: Ranks, device: torch.device, patient: Patient) -> Diagnosis:
    """Look at all ranks and measure their links and one layer; a collective, some seconds."""
    config = LighthouseConfig.fit(patient.seqlen, ranks.world_size)
    own = software(device) | hardware(device) | {"host": os.uname().nodename}
    facts = gathered(own, ranks)
    local_ranks = sum(one["host"] == own["host"] for one in facts)
    by_rank = gathered(own_troubles(device, local_ranks, os.environ), ranks)
    said: dict[Trouble, list[int]] = {}
    for rank, found in enumerate(by_rank):
        for trouble in found:
            said.setdefault(trouble, []).append(rank)
    troubles = [
        trouble
        if len(on) == ranks.world_size
        else Trouble(f"on ranks {on}: {trouble.what}", trouble.change)
        for trouble, on in said.items()
    ] + differences(facts)
    speeds: list[str] = []
    if ranks.world_size > 1:
        links, slow = _links(ranks, device)
        speeds += links
        troubles += slow
    layer, host_bound = _layer(ranks, device, patient, config)
    return Diagnosis(
        facts, _choices(ranks, device, patient, config), [*speeds, layer], troubles + host_bound
    )


def _choices(
    ranks: Ranks, device: torch.device, patient: Patient, config: LighthouseConfig
) -> list[str]:
    """Return what "auto" means for the layer, and why not the others."""
    length = config.padded_length(patient.seqlen)
    entries = config.subsequence_length(length)
    padded = "" if length == patient.seqlen else f" (padded from {patient.seqlen:,})"
    lines = [
        f"layer     N={length:,}{padded}, S={entries:,}, {patient.num_heads} heads of "
        f"{patient.head_dim}, {str(patient.dtype).removeprefix('torch.')}, W={ranks.world_size}: "
        f"num_levels={config.num_levels}, topk={config.topk}, num_strata={config.num_strata}"
    ]
    chosen = choose_backend("auto", patient.dtype, patient.head_dim, device).name
    for name, reason in why_not(patient.dtype, patient.head_dim, device).items():
        if name == chosen:
            why = "taken: the preferred of those that can"
        else:
            why = "can, and another is preferred" if reason is None else f"cannot: {reason}"
        lines.append(f"backend   {name:<12}{why}")
    lines.append(f"kernels   {choose_kernels('auto', patient.dtype, device)}")
    if ranks.world_size == 1:
        return [*lines, "rotation  none: one rank"]
    shape = AttentionShape(
        seqlen=entries,
        layout=make_layout("zigzag", ranks.world_size),
        num_heads=patient.num_heads,
        num_kv_heads=patient.num_kv_heads,
        head_dim=patient.head_dim,
        element_bytes=patient.dtype.itemsize,
    )
    table = built_in(device.type)
    rotation, reason = choose(shape, table)
    return [
        *lines,
        f"rotation  {rotation}: {reason}",
        f"          by the table of {table.name}; `lhcp calibrate` measures one of these ranks",
    ]


def _links(ranks: Ranks, device: torch.device) -> tuple[list[str], list[Trouble]]:
    found = link(ranks, device)
    gather = gather_rate(ranks, device) / 1e9
    lines = [
        f"messages round the ring of ranks: {found['latency_us']:.1f} us, {found['gb_s']:.2f} GB/s "
        "each way",
        f"all-gather: {gather:.2f} GB/s received by each rank",
    ]
    if ranks.world_size > MOST_PAIRS:
        return [*lines, f"pairs: not measured, more than {MOST_PAIRS} ranks"], []
    rates = pair_rates(ranks, device)
    middle = median(rates.values())
    low, high = min(rates.values()) / 1e9, max(rates.values()) / 1e9
    lines.append(f"pairs, one at a time: {low:.2f} to {high:.2f} GB/s, median {middle / 1e9:.2f}")
    groups = islands(rates, GAP)
    if len(groups) > 1:
        across = [rate for (a, b), rate in rates.items() if not any({a, b} <= {*g} for g in groups)]
        said = ", ".join(map(str, groups))
        return lines, [
            Trouble(
                f"links between the ranks {said} are slow: {max(across) / 1e9:.3f} GB/s at most, "
                f"where others have {high:.2f}",
                "If these are nodes, cp ranks of one node share a sequence best; across nodes, put "
                "them on a mesh of two axes with rotation='hierarchical' or 'hybrid'. On one node "
                "look at `nvidia-smi topo -m`",
            )
        ]
    slow = {pair: rate for pair, rate in rates.items() if rate < SLOW_PAIR * middle}
    if not slow:
        return lines, []
    said = ", ".join(f"{a}-{b} {rate / 1e9:.2f}" for (a, b), rate in slow.items())
    return lines, [
        Trouble(
            f"some pairs of ranks are slower than half the others (GB/s: {said}; median "
            f"{middle / 1e9:.2f})",
            "Put ranks that share a sequence inside a node, or on a mesh of two axes with "
            "rotation='hierarchical'; on one node look at `nvidia-smi topo -m`",
        )
    ]


def _layer(
    ranks: Ranks, device: torch.device, patient: Patient, config: LighthouseConfig
) -> tuple[str, list[Trouble]]:
    """Time one layer, forward and backward, and its host."""
    # A CPU computes itself: there the smallest layer shows what is not attention.
    length = config.padded_length(patient.seqlen)
    if device.type == "cpu":
        config = LighthouseConfig.fit(1, ranks.world_size)
        length = config.padded_length(1)
    layer = LighthouseAttention(config, ranks)
    heads = (patient.num_heads, patient.num_kv_heads, patient.num_kv_heads)
    q, k, v = (
        torch.randn(
            1, length // ranks.world_size, n, patient.head_dim, dtype=patient.dtype, device=device
        )
        for n in heads
    )
    runner, spans = differentiable(layer, q, k, v), Recorder(device)
    samples = [take_sample(runner, "both", spans, 1) for _ in range(8)][3:]
    seconds = slowest(median(s.seconds for s in samples), ranks)
    if device.type == "cpu":
        return (
            f"the smallest layer that fits (N={length:,}), forward + backward: "
            f"{1e3 * seconds:.2f} ms",
            [],
        )
    host = slowest(median(s.host or 0.0 for s in samples), ranks)
    line = (
        f"one layer at N={length:,}, forward + backward: {1e3 * seconds:.2f} ms, of which its host "
        f"launches for {1e3 * host:.2f} ms"
    )
    if seconds > 1.15 * host:
        return line, []
    return line, [
        Trouble(
            f"the host binds: launching a layer of N={length:,} takes it {1e3 * host:.2f} ms, and "
            "the GPUs wait for it",
            "lhcp.graphed(model), once before training; or more tokens a rank",
        )
    ]
