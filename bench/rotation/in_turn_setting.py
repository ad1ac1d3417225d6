"""What one call of ranks in turn asks for on this device, and the gate before it is timed."""

import argparse
from contextlib import closing
from dataclasses import dataclass

import torch

from bench.common.arguments import config_of
from bench.common.gate import gate, refuse
from bench.common.problem import TENSORS, AttentionProblem, Choice
from lhcp.comm.layout import LayoutName
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.config import LighthouseConfig
from lhcp.layer.choices import Choices
from lhcp.layer.plan import able_backends, choose_backend, make_plan
from lhcp.measure.runs import Job
from lhcp.ring.block import BLOCKS
from lhcp.ring.block.base import BackwardInputs
from lhcp.ring.kv import KV
from lhcp.ring.shape import CAUSAL, FULL
from lhcp.testing.ranks import RankPool
from lhcp.testing.tolerance import assert_within_budget


@dataclass(frozen=True)
class InTurnSetting:
    """What one call of the command asks for on this device."""

    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    copy_rate: float
    """Bytes a second of a copy."""

    @property
    def config(self) -> LighthouseConfig | None:
        return config_of(self.args)

    @property
    def kernels(self) -> list[str]:
        """Return blocks that can do such inputs here; plain torch only where it is alone."""
        able = [b.name for b in able_backends(self.dtype, self.args.head_dim, self.device)]
        return [name for name in able if name != "math"] or able

    def job(self, rotation: str, seqlen: int, ranks: Ranks) -> Job:
        """Resolve one rank's work."""
        args, config = self.args, self.config
        entries = seqlen if config is None else config.subsequence_length(seqlen)
        shape = (args.batch, 1, args.heads, args.head_dim)
        like = torch.empty(shape, dtype=self.dtype, device=self.device)
        choices = Choices(args.layout, rotation, args.backend)
        local = entries // ranks.world_size
        return Job(
            config=config,
            tokens=seqlen,
            entries=entries,
            heads=(args.heads, args.kv_heads),
            head_dim=args.head_dim,
            batch=args.batch,
            dtype=self.dtype,
            device=self.device,
            plan=make_plan(like, like[:, :, : args.kv_heads], ranks, choices, tokens=local),
            kernels=args.kernels,
        )


def _gate_on_gloo(
    group: Group | Ranks, rotation: str, layout: LayoutName, like: AttentionProblem
) -> str | None:
    return gate(Choice(rotation, "auto", as_ranks(group), layout), like, torch.device("cpu"))


def check(setting: InTurnSetting, rotation: str) -> None:
    """Check the rotation on gloo ranks, and the kernel here; raise if either is wrong."""
    args = setting.args
    like = AttentionProblem.of(args, torch.float64, head_dim=16)
    nodes = args.nodes if args.nodes > 1 else None
    work = (args.simulate_ranks, rotation, args.layout, like)
    with closing(RankPool(args.simulate_ranks, timeout=600)) as pool:
        said = pool.run(_gate_on_gloo, *work, num_nodes=nodes)
    refuse(rotation, said[0])
    if setting.device.type == "cuda":
        _check_kernel(setting)


def _check_kernel(setting: InTurnSetting) -> None:
    args, device, dtype = setting.args, setting.device, setting.dtype
    name = choose_backend(args.backend, dtype, args.head_dim, device).name
    for queries, keys, mask in ((512, 512, CAUSAL), (512, 1536, FULL)):
        shapes = ((queries, args.heads), (keys, args.kv_heads), (keys, args.kv_heads))
        q, k, v = (torch.randn(2, n, h, args.head_dim, device=device).to(dtype) for n, h in shapes)
        dout, scale = torch.randn_like(q), args.head_dim**-0.5
        answers = []
        for block, kind in (
            (BLOCKS[name], dtype),
            (BLOCKS["math"], dtype),
            (BLOCKS["math"], torch.float64),
        ):
            x, grad = q.to(kind), dout.to(kind)
            kv = KV(k.to(kind), v.to(kind))
            out, lse = block.forward(x, kv, mask, scale)
            inputs = BackwardInputs(grad, x, kv, out, lse)
            answers.append((out, *block.backward(inputs, mask, scale)))
        for title, *three in zip(TENSORS, *answers, strict=True):
            assert_within_budget(f"{name} {title}", *three)
