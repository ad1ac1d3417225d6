"""What the change from lighthouse to dense did, found in a run's history."""

from dataclasses import dataclass

from lhcp.training.history import EvalRecord, History


@dataclass(frozen=True, kw_only=True)
class Switch:
    """What the change from lighthouse to dense did to the held-out loss, nats per byte."""

    step: int
    lighthouse: float
    """At the switch, attending as trained."""
    dense: float
    """At the switch, the same weights and text attending densely."""
    final: float
    """At the end of the dense stage, dense."""
    recovered_at: int | None
    """Dense steps until the dense loss was back at `lighthouse`, as far as evaluations tell."""

    @property
    def jump(self) -> float:
        """Return how much the loss rises at the switch."""
        return self.dense - self.lighthouse

    @property
    def recovered(self) -> float | None:
        """Return the share of the jump won back (above 1: more), or None without a jump."""
        return (self.dense - self.final) / self.jump if self.jump > 0.01 else None


def find_switch(history: History) -> Switch | None:
    """Return the switch of a two-stage history, or None where a stage has not been evaluated."""
    last: dict[tuple[str, str], EvalRecord] = {(r.stage, r.mode): r for r in history.evals}
    keys = ("lighthouse", "lighthouse"), ("lighthouse", "dense"), ("dense", "dense")
    if any(key not in last for key in keys):
        return None
    sparse, jumped, final = (last[key] for key in keys)
    back = (
        r.step - sparse.step for r in history.evals if r.stage == "dense" and r.loss <= sparse.loss
    )
    return Switch(
        step=sparse.step,
        lighthouse=sparse.loss,
        dense=jumped.loss,
        final=final.loss,
        recovered_at=next(back, None),
    )
