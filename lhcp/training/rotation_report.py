"""What the rotation costs a run: `lhcp.measure_overhead` at the run's own sizes, for its table."""

import lhcp
from lhcp.training.parallel import Trainee, compute_dtype
from lhcp.training.run import Run


def measure_rotation(run: Run, trainee: Trainee) -> dict[str, str | float]:
    """Measure one attention of each stage, forward and backward; a collective of every rank.

    Returns:
        rows for the report: overhead over one rank, exposed ms, MB sent, for both stages; empty
        where no sequence is shared, or the run gives it no time.
    """
    placement = trainee.placement
    if placement.ranks.world_size == 1 or not run.rotation_budget:
        return {}
    rows: dict[str, str | float] = {}
    for stage, config in (("lighthouse", run.lighthouse), ("dense", None)):
        report = lhcp.measure_overhead(
            config,
            seqlen=run.seqlen,
            num_heads=run.model.num_heads // run.tp,
            num_kv_heads=run.model.num_kv_heads // run.tp,
            head_dim=run.model.head_dim,
            batch=run.global_batch // placement.dp_size // run.accumulate,
            dtype=compute_dtype(run, placement.device),
            group=placement.ranks,
            layout=run.layout,
            rotation=placement.rotation,
            backend=run.backend,
            kernels=run.kernels,
            device=placement.device,
            budget=run.rotation_budget,
            progress=False,
        )
        both = report.phase("both")
        # Of whole sequences, and so by what "auto" takes for those.
        of = f"{stage}, without documents" if run.data.documents else stage
        if both.overhead is not None:
            doubt = "" if both.overhead_error is None else f" +- {both.overhead_error:.1%}"
            rows[f"{of}: attention over one rank / W"] = f"{both.overhead:+.1%}{doubt}"
        rows[f"{of}: exposed"] = f"{both.exposed * 1e3:.2f} of {both.real.median * 1e3:.2f} ms"
        if both.bytes_per_rank is not None:
            rows[f"{of}: sent a rank"] = f"{both.bytes_per_rank / 1e6:.2f} MB"
    return rows
