"""Whole experiments as functions, beside the runs of `recipes`: recoveries, and what knobs do."""

from collections.abc import Callable
from dataclasses import replace

from lhcp.config import LighthouseConfig
from lhcp.training.data import DataConfig
from lhcp.training.knobs import Knobs
from lhcp.training.model_config import ModelConfig
from lhcp.training.recipes import demo
from lhcp.training.recovery import Recovery
from lhcp.training.run import Run
from lhcp.training.short import Short
from lhcp.training.stages import OptimConfig


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


def recover_32k_long() -> Recovery:
    """`recover_32k` with one sequence a step and twice the steps; 3:2, as the paper, and 4:1.

    8 minutes on one H200, dense and both splits, each on a GPU of its own: --part dense, --part
    splits.
    """
    base = recover_32k()
    run = replace(
        base.run,
        name="recover_32k_long",
        global_batch=1,
        eval_every=135,
        checkpoint_every=1080,
    )
    return replace(base, run=run, splits=("3240+2160", "4320+1080"), seeds=(0,))


def recover_64k() -> Recovery:
    """`recover_32k` at 65,536 tokens, one sequence a step, as many tokens in all."""
    # k = N / 32.
    lighthouse = LighthouseConfig(num_levels=3, pool_factor=4, topk=2048, num_strata=16)
    base = recover_32k()
    run = replace(
        base.run, name="recover_64k", lighthouse=lighthouse, seqlen=65_536, global_batch=1
    )
    return replace(base, run=run)


def from_2k(run: Run) -> Run:
    """Return a run that begins from a short stage of 2,048 tokens, half of its text passkey text:
    the same stage for all of a seed, whatever their length.
    """
    return replace(
        run,
        # Slower turns than 10,000 gives: positions beyond the short ones are less of a surprise.
        model=replace(run.model, rope_theta=100_000.0),
        # A third of the short stage's: with 1e-3 two stages end 0.07 nats worse.
        optim=OptimConfig(lr=3e-4, warmup_steps=40),
        short=Short(steps=1800, seqlen=2048, global_batch=32),
        data=DataConfig(passkey=0.5),
    )


def recover_2k_to_64k() -> Recovery:
    """Context extension: a short stage of 2,048 tokens, then dense or 3:2 at 65,536, half of it
    passkey text; 5 minutes each arm on a GPU of its own: --part dense, --part splits, with one
    --short.out. Wants --data.text.
    """
    run = replace(
        from_2k(recover_64k().run),
        name="recover_2k_to_64k",
        # With one sequence a step, each step is all text or all passkeys.
        global_batch=4,
        eval_every=25,
        checkpoint_every=5000,
    )
    return Recovery(run=run, splits=("150+100",), seeds=(1,))


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
    for recipe in (
        *(recover_tiny, recover_32k, recover_32k_long, recover_64k),
        *(recover_2k_to_64k, retrieve_32k, retrieve_16k),
    )
}


def knobs_2k_to_16k() -> Knobs:
    """One change at a time from L=3, p=4, k=N/32, norm, two dense layers, half of the text passkey
    text; half a minute each on one H200; wants --data.text. All layers dense is dense throughout.

    Most of the loss falls in one steep phase, and the passkey test is learnt, which takes over a
    thousand steps at 16,384 tokens. So a short stage of each seed, 2,048 tokens, does both once.
    """
    run = replace(
        from_2k(retrieve_16k().run),
        name="knobs_2k_to_16k",
        eval_every=50,
        eval_sequences=16,
        # Its marks have checkpoints all the same.
        checkpoint_every=5000,
    )
    return Knobs(
        run=run,
        split="200+120",
        seeds=(0, 1),
        # What matters most first, as time may end. Where k=N/32 does not fit, k=N/64.
        knobs=(
            "",
            "model.dense-layers 0 1 2 3 4 5 6 7",
            "lighthouse.topk 256",
            "lighthouse.topk 1024",
            "lighthouse.scorer dilated",
            "lighthouse.pool-factor 2",
            "lighthouse.pool-factor 8, lighthouse.topk 256",
            "model.dense-layers",
            "lighthouse.num-levels 2",
            "lighthouse.num-levels 4, lighthouse.topk 256",
            "model.dense-layers 0 1 6 7",
            "lighthouse.num-strata 4",
            "lighthouse.num-strata 64",
            "optim.lr 1e-3",
        ),
        contexts=(2048, 4096, 8192, 16_384),
    )


def knobs_tiny() -> Knobs:
    """About a minute on one CPU: the page of `knobs_2k_to_16k` in small."""
    run = replace(
        recover_tiny().run,
        name="knobs_tiny",
        data=DataConfig(passkey=0.25),
        short=Short(steps=60, seqlen=256, global_batch=4, lr=4e-3),
    )
    return Knobs(
        run=run,
        split="40+40",
        seeds=(0,),
        knobs=(
            "",
            "model.dense-layers 0 1",
            "lighthouse.topk 16",
            "lighthouse.scorer dilated",
        ),
        contexts=(256, 1024),
    )


KNOBS: dict[str, Callable[[], Knobs]] = {
    recipe.__name__: recipe for recipe in (knobs_2k_to_16k, knobs_tiny)
}
