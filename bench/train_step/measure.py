"""The measurements of bench/train_step.py: steps in turn, the kernel alone, one step's kernels."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from train_step_model import Attention, Profile, Row, config_for
from train_step_trainer import Timing, Trainer, random_bytes

from lhcp.ring.block import BLOCKS
from lhcp.training.model import Mode, ModelConfig


def sustained_seconds(device: torch.device, run: Callable[[], object], least: float) -> float:
    """Seconds of a call among calls in a row, after as many unmeasured: at a step's clocks.

    An idle GPU runs a first call faster than a long step, which has its heat and power, does.

    Args:
        least: how long the measured calls should take in all.
    """
    if device.type != "cuda":
        run()
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    calls = 1
    for _ in range(3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        stop.synchronize()
        seconds = start.elapsed_time(stop) / 1e3 / calls
        calls = max(1, min(200, round(least / seconds)))
    return seconds


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of an 8192^3 bf16 product of random numbers (512^3 without a GPU)."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / sustained_seconds(device, lambda: torch.mm(a, b), 0.1)


def attention_seconds(
    seqlen: int, config: ModelConfig, backend: str, device: torch.device
) -> Attention:
    """Time the attention kernel alone over `seqlen` tokens."""
    shape = (1, seqlen, config.num_heads, config.head_dim)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    block, scale = BLOCKS[backend], config.head_dim**-0.5
    forward = sustained_seconds(device, lambda: block.forward(q, k, v, True, scale), 0.3)
    out, lse = block.forward(q, k, v, True, scale)
    out, lse = out.contiguous(), lse.contiguous()
    backward = sustained_seconds(
        device, lambda: block.backward(dout, q, k, v, out, lse, True, scale), 0.3
    )
    return Attention(forward, backward)


def summary(timings: list[Timing], seqlen: int) -> Row:
    """Median and extremes of one kind of step."""
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
) -> tuple[dict[Mode, Row], dict[Mode, Profile]]:
    """Time the kinds of step in turn, after one step of each that is not measured."""
    batch = random_bytes(seqlen, trainer.config.vocab_size, trainer.device)
    for mode in modes:
        trainer.timed(*batch, mode)
    timings: dict[Mode, list[Timing]] = {mode: [] for mode in modes}
    spent, turns = 0.0, 0
    while not turns or (turns < args.max_repeats and spent * (turns + 1) / turns <= args.seconds):
        for mode in modes:
            timings[mode].append(trainer.timed(*batch, mode))
            spent += timings[mode][-1].seconds
        turns += 1
    profiles: dict[Mode, Profile] = {}
    if seqlen == args.profile_at and not trainer.model.recompute:
        profiles = {mode: profile(trainer, batch, mode) for mode in modes}
    return {mode: summary(found, seqlen) for mode, found in timings.items()}, profiles


def profile(trainer: Trainer, batch: tuple[Tensor, Tensor], mode: Mode) -> Profile:
    """Sum up the device time of one step by kernel."""
    cuda = trainer.device.type == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as prof:
        trainer.step(*batch, mode)
        if cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    return Profile.of(
        [
            (event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
            for event in prof.events()
            # Named ranges show up beside the kernels that they enclose.
            if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
        ]
    )


def measure_length(
    trainer: Trainer, seqlen: int, recompute: bool, args: argparse.Namespace
) -> tuple[Row, dict[Mode, Profile]]:
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
    """Graphs that torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
