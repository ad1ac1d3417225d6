"""`LighthouseAttention`: the layer as an nn.Module with two modes."""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lhcp.checks import check_scale
from lhcp.comm.layout import LayoutName
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.comm.trail import leave_uncounted
from lhcp.config import LighthouseConfig
from lhcp.cost.calibration import Calibration
from lhcp.layer.choices import Choices, by_name, check_names
from lhcp.layer.dense import dense_attention
from lhcp.layer.documents import Bounds
from lhcp.layer.given import Given
from lhcp.layer.graphs import Graphs, Kind
from lhcp.layer.lighthouse import sparse_attention
from lhcp.layer.spread import warn_if_constant
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.select import Selection
from lhcp.ring.shape import CAUSAL
from lhcp.timing import UNTIMED, Spans

Mode = Literal["lighthouse", "dense"]


class LighthouseAttention(nn.Module):
    """Lighthouse attention for the first training stage, dense attention for the second.

    Both modes take the same sharded tensors; `layer.mode = "dense"` switches. No parameters. As in
    the functions, ranks compare what they were asked for at each call that is new, so that a wrong
    shape on one rank is an error on all instead of a hang. After its first call in lighthouse mode,
    outside of torch.compile and graphs, a layer looks at the scores of this rank's tokens, and
    warns where they are nearly constant; that call waits for the device, no other does.

    Args:
        config: the layer's sizes; None for a layer that is always dense.
        group: ProcessGroup, DeviceMesh of one axis (or two, outer across nodes), or None.
        layout: "zigzag" or "contiguous".
        rotation, backend, kernels, scale: as in `lhcp.lighthouse_attention`.
        timers: an `lhcp.Timers` shared by all layers, or None.
        debug: as in `lhcp.ring_attention`; ranks whose layers take turns differently are told so
            too, by the order of the layers' first calls. Graphs of `lhcp.graphed` are not used.
    """

    def __init__(
        self,
        config: LighthouseConfig | None,
        group: Group | Ranks = None,
        *,
        layout: LayoutName = "zigzag",
        rotation: str | Calibration = "auto",
        backend: str = "auto",
        kernels: str = "auto",
        scale: float | None = None,
        timers: Spans | None = None,
        debug: bool = False,
    ) -> None:
        super().__init__()
        # Here, because a module makes a parameter its own.
        check_scale(scale)
        check_names(Choices(layout, rotation, backend, kernels))
        self.config = config
        self.ranks = as_ranks(group, two_axes=by_name(rotation))
        self.layout: LayoutName = layout
        self.rotation = rotation
        self.backend = backend
        self.kernels = kernels
        self.scale = scale
        self.timers = UNTIMED if timers is None else timers
        self.debug = debug
        self._token = object()
        self.graphs: Graphs | None = None
        """Of `lhcp.graphed`."""
        self._looked = False
        self._made_alone = group is None and not dist.is_initialized()
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

    @property
    def choices(self) -> Choices:
        """What the layer was asked for, as its attributes say now."""
        return self._choices(self.scale)

    def _choices(self, scale: float | None) -> Choices:
        return Choices(
            self.layout,
            self.rotation,
            self.backend,
            self.kernels,
            scale,
            self.timers,
            self.debug,
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        selection: Selection | None = None,
        score_q: Tensor | None = None,
        score_k: Tensor | None = None,
        valid: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attend: q [B, N / W, H, D], k and v [B, N / W, Hk, D] -> [B, N / W, H, D].

        The keyword arguments are as in `lhcp.lighthouse_attention`. Documents, `cu_seqlens`, and
        `scale`, in place of the layer's own, are for both modes; the others are for the lighthouse
        mode: the dense one does not use them, nor need it: padding is at the end, which nobody
        before sees.

        Raises:
            TypeError, ValueError: as `lhcp.lighthouse_attention` and `lhcp.ring_attention`.
            RuntimeError: the layer was made for one rank before this process joined others.
        """
        if self._made_alone:
            self._check_alone()
        documents = None
        if cu_seqlens is not None:
            # Before a graph, whose input they are: it would keep those that it was recorded with.
            config = self.config if self._mode == "lighthouse" else None
            bounds = Bounds(cu_seqlens, q, self.ranks, self.layout, config)
            documents = bounds.agreed(self._token, self.debug)
        given = Given(selection, score_q, score_k, valid, documents)
        choices = self._choices(self.scale if scale is None else scale)
        if self.graphs is None:
            out = self.attend(QKV(q, k, v), given, choices)
        else:
            out = self.graphs.outside(self._by_graph, self.graphs, QKV(q, k, v), given, choices)
        # Afterwards: the call has checked what it was given.
        if not (torch.compiler.is_compiling() or self._looked or self._mode == "dense"):
            self._look(q, k, given)
        return out

    def attend(self, qkv: QKV, given: Given, choices: Choices) -> Tensor:
        """Attend in the mode that is set, without a graph."""
        if self._mode == "dense":
            out, _ = dense_attention(qkv, self.ranks, choices, CAUSAL, given.documents, self._token)
            return out
        assert self.config is not None
        return sparse_attention(qkv, self.config, self.ranks, choices, given, self._token)

    def _look(self, q: Tensor, k: Tensor, given: Given) -> None:
        """Warn, once, where this call's scores are nearly constant."""
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._looked = True
        assert self.config is not None
        if given.selection is None and self.config.scorer == "norm":
            score_q = q if given.score_q is None else given.score_q
            score_k = k if given.score_k is None else given.score_k
            warn_if_constant(score_q, score_k, given.valid)

    def _by_graph(self, graphs: Graphs, qkv: QKV, given: Given, choices: Choices) -> Tensor:
        """Attend by a graph where that can be."""
        names, others = given.flat()

        def attend(*tensors: Tensor) -> Tensor:
            q, k, v, *more = tensors
            return self.attend(QKV(q, k, v), Given.from_flat(names, more), choices)

        tensors = [*qkv, *others]
        kind = qkv.q.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        if self.timers is not UNTIMED:
            return graphs.as_it_is("timers measure each call", attend, tensors)
        if self.debug:
            return graphs.as_it_is("debugging looks at each call", attend, tensors)
        leave_uncounted(self.ranks)
        asked = (self.config, choices, names, autocast)
        return graphs.call(attend, tensors, self._token, Kind(self._mode, self.ranks, asked))

    def extra_repr(self) -> str:
        """Return what the layer was made with, for printing a model."""
        c = self.choices
        rotation = c.rotation if isinstance(c.rotation, str) else c.rotation.name
        return (
            f"{self.config}, mode={self._mode!r}, world_size={self.ranks.world_size}, "
            f"layout={c.layout!r}, rotation={rotation!r}, backend={c.backend!r}"
        )

    def _check_alone(self) -> None:
        """Check that a layer that was made without a group, and before there were any, is alone.

        Raises:
            RuntimeError: the process has joined others since.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "this layer was made with group=None before init_process_group, when "
                "dist.group.WORLD is None too: it would attend to this rank's tokens alone. Make "
                "it after init_process_group, with the group that shares a sequence, or with None "
                "where each rank holds whole sequences"
            )
