"""Whole runs as functions: copy one, change three lines, add it to RECIPES."""

from collections.abc import Callable
from dataclasses import replace

from lhcp.config import LighthouseConfig
from lhcp.training.data import DataConfig
from lhcp.training.model_config import ModelConfig
from lhcp.training.run import Run
from lhcp.training.stages import OptimConfig


def tiny() -> Run:
    """Seconds on one rank: shows that everything runs, teaches nothing."""
    return Run(
        name="tiny",
        model=ModelConfig(
            dim=64,
            num_layers=3,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            hidden_dim=128,
            dense_layers=(0,),
        ),
        # 64 coarsest entries, 16 a stratum, of which 4 are taken; S = 192 of 1024.
        lighthouse=LighthouseConfig(num_levels=3, pool_factor=4, topk=16, num_strata=4),
        optim=OptimConfig(lr=2e-3, warmup_steps=10),
        seqlen=1024,
        global_batch=4,
        lighthouse_steps=30,
        dense_steps=30,
        eval_every=10,
        eval_sequences=4,
        checkpoint_every=20,
    )


def tiny_cp4() -> Run:
    """`tiny` with each sequence on four ranks."""
    # Zigzag on 4 ranks cuts 8 chunks: 8 strata of 8 coarsest entries, of which 2 are taken.
    lighthouse = LighthouseConfig(num_levels=3, pool_factor=4, topk=16, num_strata=8)
    return replace(tiny(), name="tiny_cp4", cp=4, lighthouse=lighthouse)


def demo() -> Run:
    """Minutes on two CPU cores, two ranks: the jump at the switch, the recovery, the baseline."""
    return Run(
        name="demo",
        model=ModelConfig(
            dim=128,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            hidden_dim=256,
            dense_layers=(),
        ),
        # 128 coarsest entries, 32 a stratum, of which 8 are taken; S = 320 of 1024.
        lighthouse=LighthouseConfig(num_levels=4, pool_factor=2, topk=32, num_strata=4),
        # As many dense steps as lighthouse ones, at a constant rate: fewer, or a rate that decays,
        # leave the dense stage too little to recover with.
        optim=OptimConfig(lr=4e-3, warmup_steps=40),
        # Sequences of many files: what ends inside one is a document of its own.
        data=DataConfig(documents=True),
        seqlen=1024,
        global_batch=2,
        lighthouse_steps=300,
        dense_steps=300,
        baseline=True,
        cp=2,
        eval_every=50,
        eval_sequences=8,
        checkpoint_every=200,
    )


def retrieve_tiny() -> Run:
    """Minutes on one CPU core: a small dense model learns the test of launch/retrieve.py."""
    return Run(
        name="retrieve_tiny",
        model=ModelConfig(
            dim=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            hidden_dim=128,
            dense_layers=(),
        ),
        lighthouse=LighthouseConfig(num_levels=2, pool_factor=4, topk=16, num_strata=4),
        optim=OptimConfig(lr=4e-3, warmup_steps=50),
        data=DataConfig(passkey=0.9),
        seqlen=256,
        global_batch=16,
        lighthouse_steps=0,
        dense_steps=2500,
        eval_every=500,
        eval_sequences=16,
        checkpoint_every=500,
        sample_bytes=0,
    )


def paper_98k() -> Run:
    """The paper's decoder at 98,304 tokens, 10k + 6k steps (2605.06554); wants --data.text."""
    return Run(
        name="paper_98k",
        model=ModelConfig(),
        # The paper's 128 picks a stratum are C=12; C=16 fits zigzag on 1, 2, 4 and 8 ranks.
        lighthouse=LighthouseConfig(num_levels=3, pool_factor=4, topk=1536, num_strata=16),
        optim=OptimConfig(),
        seqlen=98_304,
        global_batch=32,
        lighthouse_steps=10_000,
        dense_steps=6_000,
        accumulate=4,
        compile=True,
        eval_every=500,
        eval_sequences=32,
    )


def paper_256k_cp8() -> Run:
    """The paper's 256K-token run: each sequence on 8 ranks, k=4096."""
    return replace(
        paper_98k(),
        name="paper_256k_cp8",
        lighthouse=LighthouseConfig(num_levels=3, pool_factor=4, topk=4096, num_strata=64),
        seqlen=262_144,
        global_batch=8,
        accumulate=1,
        cp=8,
        recompute=True,
        eval_sequences=8,
    )


def paper_1m_cp8() -> Run:
    """The paper's 1M-token run (there on 32 GPUs): 4 levels, no layer kept dense."""
    return replace(
        paper_256k_cp8(),
        name="paper_1m_cp8",
        model=ModelConfig(dense_layers=()),
        lighthouse=LighthouseConfig(num_levels=4, pool_factor=4, topk=4096, num_strata=64),
        seqlen=1_048_576,
    )


RECIPES: dict[str, Callable[[], Run]] = {
    recipe.__name__: recipe
    for recipe in (tiny, tiny_cp4, demo, retrieve_tiny, paper_98k, paper_256k_cp8, paper_1m_cp8)
}
