"""`LighthouseAttention`: the layer as an nn.Module with two modes."""

from typing import Literal

import torch
from torch import Tensor, nn

from lhcp.checks import check_qkv, check_scores
from lhcp.comm.agreement import check_agreement
from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Group, as_ranks
from lhcp.config import LighthouseConfig
from lhcp.cost.calibration import Calibration
from lhcp.layer.lighthouse import lighthouse_attention, local_geometry
from lhcp.lighthouse.select import Selection
from lhcp.lighthouse.stages import choose_kernels
from lhcp.ring.function import make_plan, ring_attention
from lhcp.timing import UNTIMED, Spans

Mode = Literal["lighthouse", "dense"]


class LighthouseAttention(nn.Module):
    """Lighthouse attention for the first training stage, dense attention for the second.

    Both modes take the same sharded tensors; `layer.mode = "dense"` switches. No parameters. At the
    first call in each mode the ranks compare what they were asked to do, so that a wrong shape on
    one rank is an error on all instead of a hang.

    Args:
        config: the layer's sizes; None for a layer that is always dense.
        group: ProcessGroup, DeviceMesh of one axis (or two, outer across nodes), or None.
        layout: "zigzag" or "contiguous".
        rotation, backend, kernels, scale: as in `lhcp.lighthouse_attention`.
        timers: an `lhcp.Timers` shared by all layers, or None.
    """

    def __init__(
        self,
        config: LighthouseConfig | None,
        group: Group = None,
        *,
        layout: LayoutName = "zigzag",
        rotation: str | Calibration = "auto",
        backend: str = "auto",
        kernels: str = "auto",
        scale: float | None = None,
        timers: Spans | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.ranks = as_ranks(group)
        self.layout: LayoutName = layout
        self.rotation = rotation
        self.backend = backend
        self.kernels = kernels
        self.scale = scale
        self.timers = UNTIMED if timers is None else timers
        self._agreed: set[str] = set()
        self._mode: Mode = "dense" if config is None else "lighthouse"

    @property
    def mode(self) -> Mode:
        """ "lighthouse" or "dense"."""
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if mode not in ("lighthouse", "dense"):
            raise ValueError(f"mode={mode!r}: must be 'lighthouse' or 'dense'")
        if mode == "lighthouse" and self.config is None:
            raise ValueError("mode='lighthouse' needs a config; this layer was made with None")
        self._mode = mode

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection | None = None,
        score_q: Tensor | None = None,
        score_k: Tensor | None = None,
    ) -> Tensor:
        """Attend: q [B, N / W, H, D], k and v [B, N / W, Hk, D] -> [B, N / W, H, D].

        The keyword arguments are for the lighthouse mode; the dense mode does not use them.

        Raises:
            TypeError, ValueError: as `lhcp.lighthouse_attention` and `lhcp.ring_attention`; at the
                first call also where another rank has a problem or was asked for something else.
        """
        if not torch.compiler.is_compiling() and self._mode not in self._agreed:
            self._agree(q, k, v, score_q, score_k)
        if self._mode == "dense":
            return ring_attention(
                q,
                k,
                v,
                group=self.ranks,
                layout=self.layout,
                rotation=self.rotation,
                backend=self.backend,
                scale=self.scale,
                timers=self.timers,
            )
        assert self.config is not None
        return lighthouse_attention(
            q,
            k,
            v,
            config=self.config,
            group=self.ranks,
            layout=self.layout,
            rotation=self.rotation,
            backend=self.backend,
            kernels=self.kernels,
            scale=self.scale,
            selection=selection,
            score_q=score_q,
            score_k=score_k,
            timers=self.timers,
        )

    def extra_repr(self) -> str:
        rotation = self.rotation if isinstance(self.rotation, str) else self.rotation.name
        return (
            f"{self.config}, mode={self._mode!r}, world_size={self.ranks.world_size}, "
            f"layout={self.layout!r}, rotation={rotation!r}, backend={self.backend!r}"
        )

    def _agree(
        self, q: Tensor, k: Tensor, v: Tensor, score_q: Tensor | None, score_k: Tensor | None
    ) -> None:
        meaning, problem = "", None
        try:
            check_qkv(q, k, v)
            kernels, tokens = "none", q.shape[1]
            if self._mode == "lighthouse":
                assert self.config is not None
                check_scores(score_q, score_k, q, k)
                geom = local_geometry(self.config, tokens, self.ranks, self.layout)
                kernels, tokens = choose_kernels(self.kernels, q.dtype, q.device), geom.subsequence
            else:
                layout = make_layout(self.layout, self.ranks.world_size)
                layout.check_seqlen(tokens * self.ranks.world_size)
            choices = (self.layout, self.rotation, self.backend, True, self.scale, tokens)
            plan = make_plan(q, k, self.ranks, *choices)
            meaning = (
                f"mode={self._mode} q={list(q.shape)} k={list(k.shape)} {q.dtype} {self.config} "
                f"layout={self.layout} rotation={plan.rotation} backend={plan.backend} "
                f"kernels={kernels} scale={plan.scale}"
            )
        except (TypeError, ValueError, ImportError) as error:
            problem = error
        check_agreement(self.ranks, meaning, problem)
        self._agreed.add(self._mode)
