"""The twins' own truth: C sends nothing, M attends to nothing, M and T send the same."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lhcp.comm.layout import LAYOUTS, LayoutName
from lhcp.comm.mesh import Ranks, as_ranks
from lhcp.cost.schedules import SCHEDULES
from lhcp.cost.traffic import boundary_bytes, traffic
from lhcp.layer.choices import Choices
from lhcp.layer.plan import carry_out, make_plan
from lhcp.measure.runs import Job, Recorder
from lhcp.measure.twins import RandomReceiveBuffers, silent
from lhcp.ring.block import BLOCKS
from lhcp.ring.heads import TWO_AXES
from lhcp.ring.rotation import NAMES
from lhcp.testing.inputs import small_config
from lhcp.testing.ranks import RankPool
from tests.measure.counting import Messages

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 8
CPU = torch.device("cpu")


def groups_of(group: dist.ProcessGroup | Ranks, rotation: str) -> Ranks:
    """All ranks; for rotations of two axes as two nodes, or as those that they are on."""
    if isinstance(group, Ranks):
        return group
    if rotation not in TWO_AXES:
        return as_ranks(group)
    world = dist.get_process_group_ranks(group)
    mesh = torch.tensor(world).view(2, -1)
    return as_ranks(DeviceMesh("cpu", mesh, mesh_dim_names=("node", "local")))


def make_job(
    ranks: Ranks,
    rotation: str,
    layout: LayoutName,
    dtype: torch.dtype,
    lighthouse: bool,
    heads: int = HEADS,
) -> Job:
    config, tokens = small_config(num_strata=8) if lighthouse else (None, 192)
    entries = tokens if config is None else config.subsequence_length(tokens)
    q = torch.empty(2, 1, heads, HEAD_DIM, dtype=dtype)
    local = entries // ranks.world_size
    plan = make_plan(q, q[:, :, :KV_HEADS], ranks, Choices(layout, rotation), tokens=local)
    return Job(
        config=config,
        tokens=tokens,
        entries=entries,
        heads=(heads, KV_HEADS),
        head_dim=HEAD_DIM,
        batch=2,
        dtype=dtype,
        device=CPU,
        plan=plan,
        kernels="auto",
    )


def count(
    group: dist.ProcessGroup | Ranks,
    rotation: str,
    layout: LayoutName,
    dtype: torch.dtype,
    heads: int = HEADS,
) -> dict[Any, Any]:
    """Post every run's messages on this rank and count them and the block calls."""
    ranks = groups_of(group, rotation)
    job = make_job(ranks, rotation, layout, dtype, lighthouse=False, heads=heads)
    local = job.entries // ranks.world_size
    spans = Recorder(CPU)
    found: dict[Any, Any] = {"shape": job.plan.shape}
    blocks = 0
    original = BLOCKS[job.plan.backend]

    def counted(function: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal blocks
            blocks += 1
            return function(*args)

        return call

    BLOCKS[job.plan.backend] = replace(
        original, forward=counted(original.forward), backward=counted(original.backward)
    )
    try:
        with silent(ranks, RandomReceiveBuffers()) as quiet:
            real_names = {g.group_name for g in (ranks.flat, ranks.outer, ranks.inner) if g}
            runs = {
                "real": job.attention(job.plan, spans, local),
                "compute": job.attention(replace(job.plan, ranks=quiet), spans, local),
                "communication": job.messages(spans),
            }
            spans.begin()
            for name, runner in runs.items():
                for phase in ("forward", "backward"):
                    blocks = 0
                    with Messages() as messages:
                        runner.run(phase)
                    real = [m[1] in real_names for m in messages.posted]
                    sent = [m for m, is_real in zip(messages.posted, real, strict=True) if is_real]
                    found[name, phase] = (sent, blocks)
                    if name == "real":
                        found["receivers", phase] = messages.receivers
    finally:
        BLOCKS[job.plan.backend] = original
    return found


CASES = [
    (rotation, layout, dtype, world)
    for rotation in NAMES
    for layout in LAYOUTS
    for dtype, world in ((torch.float32, 4), (torch.float64, 2), (torch.bfloat16, 4))
    if rotation not in TWO_AXES or world == 4
]


@pytest.mark.parametrize(("rotation", "layout", "dtype", "world"), CASES, ids=str)
def test_messages_and_blocks(
    ranks: RankPool, rotation: str, layout: LayoutName, dtype: torch.dtype, world: int
) -> None:
    """Fails if C sends, if M attends, if M and T differ in a message, or if the model miscounts."""
    check_counts(ranks.run(count, world, rotation, layout, dtype), rotation)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotation", TWO_AXES)
@pytest.mark.parametrize(("nodes", "inner"), [(2, 3), (3, 2), (2, 4), (4, 2)], ids=str)
def test_messages_on_more_nodes(
    eight_ranks: RankPool, nodes: int, inner: int, rotation: str, layout: LayoutName
) -> None:
    """Fails if the model miscounts an axis where kv heads are on several ranks, or rings longer."""
    # 24 query heads divide over 2, 3 and 4 ranks, their 4 kv heads not over 3.
    asked = (rotation, layout, torch.float32, 24)
    check_counts(eight_ranks.run(count, nodes * inner, *asked, num_nodes=nodes), rotation)


def check_counts(by_rank: list[dict[Any, Any]], rotation: str) -> None:
    """Hold what ranks counted against one another's runs and against the model."""
    world = len(by_rank)
    for rank, found in enumerate(by_rank):
        for phase in ("forward", "backward"):
            real, real_blocks = found["real", phase]
            assert found["compute", phase] == ([], real_blocks)
            assert found["communication", phase] == (real, 0)
            assert real_blocks > 0
            expected = traffic(rotation, found["shape"], phase, rank)  # type: ignore[arg-type]
            assert sum(size for _, _, size in real) == expected.num_bytes
            assert len(real) == expected.num_messages
            # Several nodes, or one of all.
            size = found["shape"].node_size or world
            across = [
                sum(n for to, n in one.items() if to // size != rank // size)
                for one in found["receivers", phase]
            ]
            assert sum(across) == expected.across_bytes
            assert sum(n > 0 for n in across) == expected.across_messages


def count_layer(group: dist.ProcessGroup, layout: LayoutName) -> dict[str, int]:
    ranks = as_ranks(group)
    job = make_job(ranks, "allgather", layout, torch.float32, lighthouse=True)
    spans, sent = Recorder(CPU), {}
    with silent(ranks, RandomReceiveBuffers()) as quiet:
        runs = {
            "layer": job.layer(ranks, spans, job.tokens // ranks.world_size),
            "compute": job.layer(quiet, spans, job.tokens // ranks.world_size),
            "communication": job.messages(spans, layer=True),
            "attention": job.messages(spans),
        }
        spans.begin()
        for name, runner in runs.items():
            with Messages() as messages:
                runner.run("both")
            assert ranks.flat is not None
            sent[name] = messages.bytes_on(ranks.flat.group_name)
    assert job.config is not None
    return sent | {"boundary": 2 * boundary_bytes(job.plan.shape, job.config.num_levels)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_messages_of_the_layer(ranks: RankPool, layout: LayoutName) -> None:
    """Fails if the layer sends what its communication-only twin or the model does not count."""
    for sent in ranks.run(count_layer, 2, layout):
        assert sent["layer"] == sent["communication"] == sent["attention"] + sent["boundary"]
        assert sent["compute"] == 0


def test_receive_buffers_are_random_and_drawn_once() -> None:
    """Fails if a twin reads what memory happened to hold, or draws anew in every run."""
    like, buffers = torch.full((4,), torch.nan), RandomReceiveBuffers()
    quiet, real = Ranks(allocate=buffers), Ranks()
    first, second = (quiet.receive_buffer(like, 64) for _ in range(2))
    assert first.isfinite().all() and first.std() > 0.5
    assert first.data_ptr() != second.data_ptr()
    buffers.restart()
    assert quiet.receive_buffer(like, 64).data_ptr() == first.data_ptr()
    assert real.receive_buffer(like, 64).data_ptr() not in (first.data_ptr(), second.data_ptr())


def run_poisoned(group: dist.ProcessGroup, rotation: str, layout: LayoutName) -> bool:
    """Run a compute-only twin where new memory is NaN: whether all that it returns is finite."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        return new_empty(self, *shape, **options).fill_(torch.nan)

    with silent(groups_of(group, rotation), RandomReceiveBuffers()) as quiet:
        job = make_job(quiet, rotation, layout, torch.float32, lighthouse=False)
        inputs = [x.requires_grad_() for x in job.draw(job.entries // quiet.world_size)]
        spans = Recorder(CPU)
        spans.begin()
        torch.Tensor.new_empty = poisoned
        try:
            out = carry_out(*inputs, job.plan, spans)[0]
            grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
        finally:
            torch.Tensor.new_empty = new_empty
        return all(bool(x.isfinite().all()) for x in (out, *grads))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotation", sorted(SCHEDULES))
def test_twins_fill_whatever_a_message_would(
    ranks: RankPool, rotation: str, layout: LayoutName
) -> None:
    """Fails if a rotation gets memory for a message in a way that its twin cannot fill."""
    assert all(ranks.run(run_poisoned, 4, rotation, layout))
