"""The measurements of a training step: kinds of step in turn, the attention kernel alone."""

import argparse
import statistics
import time
from dataclasses import asdict

import torch

from bench.train_step.arithmetic import AttentionSeconds, Row, config_for
from bench.train_step.profile import Profile, profile
from bench.train_step.trainer import StepTime, Trainer, random_bytes
from lhcp.layer.module import Mode
from lhcp.measure.clock import sustained_seconds
from lhcp.ring.block import BLOCKS
from lhcp.ring.block.base import BackwardInputs
from lhcp.ring.kv import KV
from lhcp.ring.shape import CAUSAL
from lhcp.training.model_config import ModelConfig


def attention_seconds(
    seqlen: int, config: ModelConfig, backend: str, device: torch.device
) -> AttentionSeconds:
    """Time the attention kernel alone over `seqlen` tokens."""
    shape = (1, seqlen, config.num_heads, config.head_dim)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    block, scale, kv = BLOCKS[backend], config.head_dim**-0.5, KV(k, v)
    forward = sustained_seconds(lambda: block.forward(q, kv, CAUSAL, scale), device, 0.3)
    out, lse = (x.contiguous() for x in block.forward(q, kv, CAUSAL, scale))
    inputs = BackwardInputs(dout, q, kv, out, lse)
    backward = sustained_seconds(lambda: block.backward(inputs, CAUSAL, scale), device, 0.3)
    return AttentionSeconds(forward, backward)


def summary(timings: list[StepTime], seqlen: int) -> Row:
    """Sum up one kind of step: median and extremes."""
    seconds = [timing.seconds for timing in timings]
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "least": min(seconds),
        "most": max(seconds),
        "repeats": len(seconds),
        "host_seconds": statistics.median(timing.host_seconds for timing in timings),
        "tokens_per_second": seqlen / median,
        "peak_gib": max(timing.peak_gib for timing in timings),
    }


def take_turns(
    trainer: Trainer, seqlen: int, modes: list[Mode], args: argparse.Namespace
) -> tuple[dict[str, Row], dict[str, Profile]]:
    """Time the kinds of step in turn, after one step of each that is not measured."""
    batch = random_bytes(seqlen, trainer.config.vocab_size, trainer.device)
    for mode in modes:
        trainer.timed(*batch, mode)
    timings: dict[Mode, list[StepTime]] = {mode: [] for mode in modes}
    spent, turns = 0.0, 0
    while not turns or (turns < args.max_repeats and spent * (turns + 1) / turns <= args.seconds):
        for mode in modes:
            timings[mode].append(trainer.timed(*batch, mode))
            spent += timings[mode][-1].seconds
        turns += 1
    profiles: dict[str, Profile] = {}
    if seqlen == args.profile_at and not trainer.model.recompute:
        profiles = {mode: profile(trainer, batch, mode) for mode in modes}
    return {mode: summary(found, seqlen) for mode, found in timings.items()}, profiles


def measure_length(
    trainer: Trainer, seqlen: int, recompute: bool, args: argparse.Namespace
) -> tuple[Row, dict[str, Profile]]:
    """Return one row of the table, and the profiles that were asked for."""
    config, lighthouse = trainer.config, config_for(seqlen, args.num_strata)
    trainer.use(lighthouse, recompute=recompute)
    num_lighthouse = config.num_layers - len(set(config.dense_layers))
    modes: list[Mode] = ["dense", "lighthouse"]
    begin = time.perf_counter()
    graphs = compiled_graphs()
    timed, profiles = take_turns(trainer, seqlen, modes[seqlen > args.skip_dense_above :], args)
    subsequence = lighthouse.subsequence_length(seqlen)
    short = attention_seconds(subsequence, config, args.backend, trainer.device)
    row: Row = {
        "seqlen": seqlen,
        "checkpointed": recompute,
        "lighthouse_config": asdict(lighthouse),
        "subsequence": subsequence,
        "lighthouse_layers": num_lighthouse,
        "attention_short": asdict(short),
        **timed,
    }
    if "dense" in timed:
        whole = attention_seconds(seqlen, config, args.backend, trainer.device)
        row["attention_whole"] = asdict(whole)
    row["graphs_compiled"] = compiled_graphs() - graphs
    row["wall_seconds"] = time.perf_counter() - begin
    return row, profiles


def compiled_graphs() -> int:
    """Count the graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
