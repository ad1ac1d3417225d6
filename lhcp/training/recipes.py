"""Whole runs as functions: copy one, change three lines, add it to RECIPES."""

from collections.abc import Callable
from dataclasses import replace

from lhcp.config import LighthouseConfig
from lhcp.training.data import DataConfig
from lhcp.training.model import ModelConfig
from lhcp.training.recovery import Recovery
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


def recover_tiny() -> Recovery:
    """About a minute on one CPU: the picture of a recovery in small, two seeds."""
    run = replace(
        demo(),
        name="recover_tiny",
        data=DataConfig(),
        global_batch=1,
        lighthouse_steps=0,
        dense_steps=0,
        baseline=False,
        cp=1,
        eval_every=20,
        eval_sequences=8,
        checkpoint_every=80,
    )
    return Recovery(run=run, splits=("80+80", "110+50"), seeds=(0, 1))


def recover_32k() -> Recovery:
    """26M parameters at 32,768 tokens, three seeds; 15 minutes each on one H200; wants --data.text.

    With a constant rate, as the paper: a decaying one leaves the dense stage nothing.
    """
    run = Run(
        name="recover_32k",
        model=ModelConfig(
            dim=512,
            num_layers=8,
            num_heads=4,
            num_kv_heads=4,
            head_dim=128,
            hidden_dim=1408,
            dense_layers=(0, 7),
        ),
        # k = N / 32: 2,048 coarsest entries, 128 a stratum.
        lighthouse=LighthouseConfig(num_levels=3, pool_factor=4, topk=1024, num_strata=16),
        optim=OptimConfig(lr=1e-3, warmup_steps=100),
        seqlen=32_768,
        global_batch=2,
        lighthouse_steps=0,
        dense_steps=0,
        compile=True,
        eval_every=225,
        checkpoint_every=225,
    )
    return Recovery(run=run, splits=("1350+1350", "2000+700"), seeds=(0, 1, 2))


def recover_64k() -> Recovery:
    """`recover_32k` at 65,536 tokens, one sequence a step, as many tokens in all."""
    # k = N / 32.
    lighthouse = LighthouseConfig(num_levels=3, pool_factor=4, topk=2048, num_strata=16)
    base = recover_32k()
    run = replace(
        base.run, name="recover_64k", lighthouse=lighthouse, seqlen=65_536, global_batch=1
    )
    return replace(base, run=run)


def retrieve_32k() -> Recovery:
    """`recover_32k` with a quarter of passkey text, for launch/retrieve.py; wants --data.text."""
    base = recover_32k()
    return replace(base, run=replace(base.run, name="retrieve_32k", data=DataConfig(passkey=0.25)))


def retrieve_16k() -> Recovery:
    """`retrieve_32k` at 16,384 tokens, four sequences a step, as many tokens in all."""
    # k = N / 32: 1,024 coarsest entries, 64 a stratum.
    lighthouse = LighthouseConfig(num_levels=3, pool_factor=4, topk=512, num_strata=16)
    base = retrieve_32k()
    run = replace(
        base.run, name="retrieve_16k", lighthouse=lighthouse, seqlen=16_384, global_batch=4
    )
    return replace(base, run=run)


RECOVERIES: dict[str, Callable[[], Recovery]] = {
    recipe.__name__: recipe
    for recipe in (recover_tiny, recover_32k, recover_64k, retrieve_32k, retrieve_16k)
}
