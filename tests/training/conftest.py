"""One small run and one process group of a single rank, shared by the tests here."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from lhcp import LighthouseConfig
from lhcp.testing.ranks import RankPool
from lhcp.training.model_config import ModelConfig
from lhcp.training.run import Run
from lhcp.training.stages import OptimConfig

RunRanks = Callable[..., list[Any]]


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def run_ranks(ranks: RankPool) -> Iterator[RunRanks]:
    """Call `run_ranks(world_size, fn, *args)`: fn(group, *args) on each rank, results by rank.

    Training is a job of the whole world, so each world size needs a pool of just that size.
    """
    pools = {ranks.size: ranks}

    def run(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        pool = pools.setdefault(world_size, RankPool(world_size))
        return pool.run(fn, world_size, *args)

    yield run
    for pool in pools.values():
        if pool is not ranks:
            pool.close()


@pytest.fixture
def small_run() -> Run:
    """A run of five steps that fits every mesh of up to four ranks."""
    return Run(
        name="small",
        model=ModelConfig(
            dim=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            hidden_dim=48,
            dense_layers=(1,),
        ),
        lighthouse=LighthouseConfig(num_levels=3, pool_factor=2, topk=32, num_strata=8),
        optim=OptimConfig(lr=3e-3, warmup_steps=2),
        seqlen=512,
        global_batch=4,
        lighthouse_steps=3,
        dense_steps=2,
        eval_every=2,
        eval_sequences=4,
        checkpoint_every=2,
        keep_checkpoints=3,
    )
