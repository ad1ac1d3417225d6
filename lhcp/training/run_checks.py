"""What a training run must fit: its fields, its ranks, its lengths. Before anything starts.

Not in `Run` itself, since most of it depends on the number of ranks, which a record does not have.
"""

import math

from lhcp.comm.layout import make_layout
from lhcp.config import LighthouseConfig
from lhcp.training.run import Run


def check_run(run: Run, world_size: int) -> None:
    """Check that a run fits on `world_size` ranks.

    Raises:
        ValueError: a field is out of its range, a size does not divide, or the sequence does
            not fit the lighthouse config.
    """
    check_fields(run)
    check_heads(run)
    left = world_size // run.tp
    if world_size % run.tp:
        raise ValueError(
            f"tp={run.tp}: must divide the {world_size} ranks of the run; start a multiple of "
            f"{run.tp} ranks (torchrun --nproc-per-node)"
        )
    if run.cp < 1 or left % run.cp:
        fits = [d for d in range(1, left + 1) if left % d == 0]
        ranks = f"{world_size} ranks of the run" + (f" / tp = {left}" if run.tp > 1 else "")
        raise ValueError(
            f"cp={run.cp}: must divide the {ranks}, for example one of {fits}, or start a "
            f"multiple of {run.cp * run.tp} ranks (torchrun --nproc-per-node)"
        )
    if run.nodes < 0 or (run.nodes and run.cp % run.nodes):
        raise ValueError(
            f"nodes={run.nodes}: must divide the cp={run.cp} ranks of a sequence; 0 takes "
            "them as they were started"
        )
    dp = left // run.cp
    if run.accumulate < 1 or run.global_batch % (dp * run.accumulate):
        unit = dp * max(run.accumulate, 1)
        raise ValueError(
            f"global_batch={run.global_batch}: must be a multiple of dp * accumulate = {dp} * "
            f"{run.accumulate}, for example {max(run.global_batch // unit, 1) * unit}; dp is "
            "ranks / (cp * tp)"
        )
    if run.eval_sequences < 1 or run.eval_sequences % dp:
        raise ValueError(
            f"eval_sequences={run.eval_sequences}: must be a positive multiple of dp = {dp}, "
            f"for example {max(run.eval_sequences // dp, 1) * dp}; dp is ranks / (cp * tp)"
        )
    for name in ("eval_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name}={getattr(run, name)}: must be at least 1")
    run.lighthouse.check_seqlen(run.seqlen)
    run.lighthouse.check_chunks(make_layout(run.layout, run.cp).num_chunks)
    if run.short.steps:
        check_short_stage(run, world_size)


def check_short_stage(run: Run, world_size: int) -> None:
    """Check that the short stage fits on `world_size` ranks.

    Raises:
        ValueError: it is longer than the run, or does not fit; the message says of what.
    """
    asked = run.short.seqlen
    fits = LighthouseConfig.fit(asked, run.cp).padded_length(asked)
    if asked != fits or asked > run.seqlen:
        raise ValueError(
            f"short.seqlen={asked}: must be at most seqlen={run.seqlen} and divide over "
            f"cp={run.cp} ranks, for example {min(fits, run.seqlen)}"
        )
    try:
        check_run(run.short_run, world_size)
    except ValueError as error:
        raise ValueError(f"the short stage (--short.*): {error}") from error


def check_heads(run: Run) -> None:
    """Check that `tp` cuts the model's layers into equal parts.

    Raises:
        ValueError: it does not.
    """
    cut = {n: getattr(run.model, n) for n in ("num_heads", "num_kv_heads", "hidden_dim")}
    if run.tp < 1 or any(size % run.tp for size in cut.values()):
        most = math.gcd(*cut.values())
        fits = [d for d in range(1, most + 1) if most % d == 0]
        said = ", ".join(f"{name}={size}" for name, size in cut.items())
        raise ValueError(
            f"tp={run.tp}: must divide the model's {said}, so that each rank has whole heads: "
            f"for example one of {fits}"
        )


def check_fields(run: Run) -> None:
    """Check what can be said of a field alone.

    Raises:
        ValueError: a field is out of its range.
    """
    if not run.folder.name or not (run.out or run.name).strip():
        raise ValueError(
            f"out={run.out!r}, name={run.name!r}: the folder of checkpoints and report must "
            "have a name; give --out runs/first"
        )
    if not 0 <= run.seed < 1 << 63:
        raise ValueError(f"seed={run.seed}: must lie in 0 to 2**63 - 1, for example 0")
    for name in ("seqlen", "global_batch"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name}={getattr(run, name)}: must be at least 1")
    if run.calibration and run.rotation != "auto":
        raise ValueError(
            f"calibration={run.calibration!r}: chooses the rotation, and "
            f"rotation={run.rotation!r} is asked for by name; leave out one"
        )
    if run.profile < 0:
        raise ValueError(f"profile={run.profile}: must not be negative; 0 is none")
    if run.sample_bytes < 0:
        raise ValueError(f"sample_bytes={run.sample_bytes}: must not be negative; 0 is none")
    if run.model.vocab_size < 256:
        raise ValueError(
            f"model.vocab_size={run.model.vocab_size}: the text is read as bytes, which need "
            "at least 256"
        )
    if run.offload and not run.recompute:
        raise ValueError(
            "offload=True: the inputs of recomputed blocks are kept on the host, so that it "
            "needs recompute=True (--recompute)"
        )
    if not 0 <= run.rotation_budget < math.inf:
        raise ValueError(
            f"rotation_budget={run.rotation_budget}: must be finite and not negative; 0 is none"
        )
    if run.spike_factor and not 1 < run.spike_factor < math.inf:
        raise ValueError(
            f"spike_factor={run.spike_factor}: must be finite and more than 1, as 10, or 0 for none"
        )
    if not 0 < run.timeout < float("inf"):
        raise ValueError(f"timeout={run.timeout}: must be a positive number of seconds")
