"""A checkpoint that changes shape: on other ranks, with layers cut over them, and back from dense,
layers take equal entries.

Selections of whole models have equal bits as far as rounding leaves scores in order: in float32, of
a small model whose first layer is dense (equal bytes have equal scores there), it does.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from lhcp.layer.mode import set_mode
from lhcp.lighthouse import operators
from lhcp.lighthouse.select import Selection
from lhcp.training import checkpoint
from lhcp.training.data import open_data
from lhcp.training.parallel import build
from lhcp.training.run import Run
from lhcp.training.step import loss_sum, sum_over_ranks
from tests.cases import decode, together
from tests.training.test_checkpoint import Silent, do

RunRanks = Callable[..., list[Any]]

MODES = ("lighthouse", "dense", "lighthouse")


class Seen(NamedTuple):
    """The next batch after a checkpoint, in each mode in turn."""

    done: int
    losses: list[float]
    picked: list[list[tuple[Tensor, Tensor]]]
    """Levels and indices in the whole sequence, by mode and layer; of one rank its part."""


@torch.no_grad()
def look(group: object, run: Run) -> Seen:
    """Compute the next batch with the newest checkpoint of a run's folder."""
    trainee = build(run, torch.device("cpu"))
    newest = checkpoint.latest(run.folder)
    assert newest is not None
    done = checkpoint.load(newest, trainee.model, trainee.optimizer)
    data, ranks = open_data(run.data, run.seqlen, run.seed).train, trainee.placement.ranks
    batch = data.batch(done, 0, 1, run.global_batch)
    seen, own, sizes = Seen(done, [], []), operators.select_entries, (run.lighthouse, run.seqlen)

    def keep(*asked: Any) -> Any:
        made = own(*asked)
        where = (run.layout, ranks.world_size, ranks.rank)
        seen.picked[-1].append(decode(Selection(*made), *sizes, *where))
        return made

    with mock.patch.object(operators, "select_entries", keep):
        for mode in MODES:
            set_mode(trainee.model, mode)
            seen.picked.append([])
            (loss,) = sum_over_ranks([loss_sum(trainee, batch)], torch.device("cpu"))
            # Ranks that cut layers among them have the same share.
            seen.losses.append(loss / batch.tokens.numel() / run.tp)
    return seen


def joined(parts: list[Seen], run: Run) -> Seen:
    """Put the parts of all ranks of a sequence together, and the heads of those that cut layers."""

    def whole_of(mode: int, layer: int, i: int) -> Tensor:
        own = [part.picked[mode][layer][i] for part in parts]
        # Neighbours have the same tokens.
        return torch.cat([together(own[t :: run.tp], run.layout, 2) for t in range(run.tp)], 1)

    whole = [
        [(whole_of(m, layer, 0), whole_of(m, layer, 1)) for layer in range(len(parts[0].picked[m]))]
        for m in range(len(MODES))
    ]
    return Seen(parts[0].done, parts[0].losses, whole)


def same(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> bool:
    assert len(ours) == len(theirs) == 2
    return all(
        torch.equal(x, y)
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a, b, strict=True)
    )


def stop_after(group: object, run: Run, step: int) -> None:
    with pytest.raises(InterruptedError):
        do(run, Silent(stop_after=step))


@pytest.mark.slow
def test_layers_select_the_same_on_other_ranks_and_after_the_dense_stage(
    one_rank: None, run_ranks: RunRanks, small_run: Run, tmp_path: Path
) -> None:
    """Fails if weights, the order of tokens, a stratum's place or a mode's state is another where a
    run goes on: CP 2, then 4, then 1, the last checkpoint from the dense stage."""
    model = replace(small_run.model, num_layers=3, dense_layers=(0,))
    run = replace(
        small_run, model=model, lighthouse_steps=4, dense_steps=4, out=str(tmp_path / "out")
    )
    before: list[Seen] = []
    for cp, step in ((2, 3), (4, 5), (1, 7)):
        run_ranks(cp, stop_after, replace(run, cp=cp), step)
        meshes = [replace(run, cp=cp, tp=tp) for cp, tp in ((2, 1), (4, 1), (1, 1), (2, 2))]
        found = [joined(run_ranks(mesh.cp * mesh.tp, look, mesh), mesh) for mesh in meshes]
        first = found[0]
        assert first.done == step - 1
        assert first.losses[0] != first.losses[1], "both modes attend alike"
        for one in found:
            assert one.done == first.done and one.losses == pytest.approx(first.losses, rel=1e-6)
            assert same(one.picked[0], first.picked[0]), "another number of ranks takes others"
            assert same(one.picked[2], one.picked[0]), "back from dense it takes others"
            assert one.picked[1] == [], "a dense layer selects"
        # A checkpoint of other weights takes others: the comparison sees something.
        assert not any(same(first.picked[0], other.picked[0]) for other in before)
        before.append(first)
