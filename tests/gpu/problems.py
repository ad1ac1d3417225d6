"""Inputs and answers of the layer on a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

import lhcp
from lhcp import LighthouseConfig, Selection, reference
from lhcp.lighthouse.geometry import Geometry
from lhcp.testing import inputs
from lhcp.testing.inputs import small_config
from lhcp.testing.tolerance import assert_within_budget
from tests.documents import cu_seqlens

NAMES = ("o", "dq", "dk", "dv")


@dataclass(frozen=True)
class LayerProblem:
    """One layer on one GPU; q, k, v and the output's gradient of a named seed."""

    num_heads: int = 2
    num_kv_heads: int = 2
    head_dim: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    config: LighthouseConfig = small_config(pool_factor=4, num_strata=4, picks=8)[0]
    seqlen: int = small_config(pool_factor=4, num_strata=4, picks=8)[1]
    packed: str | None = None
    """Of which documents rows are packed: of `tests.documents.KINDS`."""

    @property
    def documents(self) -> dict[str, Tensor]:
        """The argument that says so; none where rows are not packed."""
        if self.packed is None:
            return {}
        return {"cu_seqlens": cu_seqlens(self.packed, self.config, self.seqlen, self.batch)}

    @property
    def geom(self) -> Geometry:
        return Geometry.local(self.config, self.seqlen, 1, 1, 0)

    def draw(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, dout = inputs.qkv(
            self.seqlen,
            batch=self.batch,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device="cuda",
            seed=seed,
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    def answer(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, kernels: str = "triton", **choices
    ) -> tuple[Tensor, ...]:
        """Output and gradients, by the library."""
        choices = {"kernels": kernels, **self.documents, **choices}
        out = lhcp.lighthouse_attention(q, k, v, config=self.config, **choices)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    def select(self, q: Tensor, k: Tensor, kernels: str = "triton", **choices) -> Selection:
        choices = {"kernels": kernels, **self.documents, **choices}
        return lhcp.select(q, k, config=self.config, **choices)

    def reference(
        self, rows: tuple[Tensor, ...], selection: Selection, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """The oracle's output and gradients for a given selection."""
        q, k, v, dout = (x.detach().to(dtype) for x in rows)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        fixed = reference.ReferenceSelection(
            selection.levels(self.geom), selection.indices(self.geom)
        )
        choices = {"config": self.config, "selection": fixed, **self.documents}
        out = reference.lighthouse_attention(q, k, v, **choices)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    def check(self, **choices) -> None:
        """Compare the layer with the oracle in float64, by the error budget."""
        rows = self.draw()
        selection = self.select(*rows[:2])
        plain, exact = (
            self.reference(rows, selection, dtype) for dtype in (self.dtype, torch.float64)
        )
        for results in zip(NAMES, self.answer(*rows, **choices), plain, exact, strict=True):
            assert_within_budget(*results)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative distance ‖a - b‖ / ‖b‖."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
