"""One step: what ranks did in it is the same, or the step is not taken."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lhcp.layer.module import LighthouseAttention
from lhcp.training.data import open_data
from lhcp.training.parallel import build
from lhcp.training.run import Run
from lhcp.training.sequences import Batch
from lhcp.training.step import train_step

RunRanks = Callable[..., list[Any]]


def another_known_call(group: object, run: Run) -> tuple[str, bool]:
    """Take steps at two scales, then one in which rank 1 has the other; return what is said."""
    data = open_data(run.data, run.seqlen, run.seed)
    trainee = build(run, torch.device("cpu"))
    layers = [m for m in trainee.model.modules() if isinstance(m, LighthouseAttention)]

    def step(number: int, scale: float) -> None:
        for layer in layers:
            layer.scale = scale
        train_step(run, trainee, data.train, run.stages, number)

    for number, scale in enumerate((0.2, 0.5, 0.2)):
        step(number, scale)
    before = [p.detach().clone() for p in trainee.model.parameters()]
    with pytest.raises(ValueError) as error:
        step(3, 0.5 if dist.get_rank() == 1 else 0.2)
    same = all(torch.equal(a, b) for a, b in zip(before, trainee.model.parameters(), strict=True))
    return str(error.value), same


def test_a_step_in_which_a_rank_attends_otherwise_is_not_taken(
    run_ranks: RunRanks, small_run: Run, tmp_path: Path
) -> None:
    """Fails if calls that all ranks know, at equal sizes, are mixed up without a word."""
    run = replace(small_run, cp=2, lighthouse_steps=9, out=str(tmp_path))
    for said, same in run_ranks(2, another_known_call, run):
        assert said.startswith("step 4: the ranks' attention calls differ: ") and same
        assert "(scale: 0.2)" in said and "(scale: 0.5)" in said and "rank 1 is at" in said


class Packed:
    """Sequences of two documents each, the second of which begins where it is told."""

    def __init__(self, sequences: Any, start: int) -> None:
        self._sequences, self._start = sequences, start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sequences, name)

    def batch(self, *which: int) -> Batch:
        batch: Batch = self._sequences.batch(*which)
        return batch._replace(documents=((0, self._start),) * len(batch.tokens))


def other_documents(group: object, run: Run) -> tuple[str, bool]:
    """Take two steps, then one in which rank 1 has other documents; return what is said."""
    data = open_data(run.data, run.seqlen, run.seed).train
    trainee = build(run, torch.device("cpu"))

    def step(number: int, start: int) -> None:
        packed: Any = Packed(data, start)
        train_step(run, trainee, packed, run.stages, number)

    for number, start in enumerate((100, 200)):
        step(number, start)
    before = [p.detach().clone() for p in trainee.model.parameters()]
    with pytest.raises(ValueError) as error:
        # Of equal limits, so that all messages are as the others expect them.
        step(2, 150 + dist.get_rank())
    same = all(torch.equal(a, b) for a, b in zip(before, trainee.model.parameters(), strict=True))
    return str(error.value), same


def test_a_step_in_which_a_rank_has_other_documents_is_not_taken(
    run_ranks: RunRanks, small_run: Run, tmp_path: Path
) -> None:
    """Fails if ranks of a sequence are given other documents, after the first, without a word."""
    run = replace(small_run, cp=2, lighthouse_steps=9, out=str(tmp_path))
    for said, same in run_ranks(2, other_documents, run):
        assert said.startswith("step 3: the ranks' attention calls differ: ") and same
        assert said.count("(cu_seqlens: ") == 2 and "rank 1 is at" in said
