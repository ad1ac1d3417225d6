"""torchtitan 0.3: its Llama 3 and Qwen3 attend across ranks, by overrides of the command line.

    --override.imports \
        'lhcp.integrations.torchtitan.attention={"topk": 1536, "dense_layers": [0, 1, -2, -1]}' \
        lhcp.integrations.torchtitan.whole_sequences

torchtitan cuts the sequence, shifts labels, and scales loss and gradients itself, and its order
"headtail" is our zigzag. Nothing of its classes is changed. It packs documents into sequences: the
second override makes each sequence one text; `"documents": true` in the first keeps them apart.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakIdKeyDictionary
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import derive, override
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.common.attention import (
    FlexAttention,
    GQAttention,
    ScaledDotProductAttention,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig

from lhcp.bounds import cu_seqlens_from_position_ids
from lhcp.comm.agreement import agreed
from lhcp.comm.layout import LayoutName
from lhcp.config import LighthouseConfig
from lhcp.context.context_parallel import ContextParallel
from lhcp.integrations.positions import first_wrong
from lhcp.layer.module import LighthouseAttention

WHOLE = (
    "name lhcp.integrations.torchtitan.whole_sequences in override.imports, which makes each "
    'sequence one text, to which attention reaches from end to end, or pass "documents": true to '
    "lhcp.integrations.torchtitan.attention, which keeps documents apart"
)

ORDER = (
    'Where the order of tokens differs, pass layout: "zigzag" for torchtitan\'s "headtail", '
    '"contiguous" for its None'
)

_READ: Any = WeakIdKeyDictionary()
"""The documents of positions that are alive: read once a step, not once a layer."""


class InnerAttention(Module):
    """Attention to the whole sequence, in the place of torchtitan's FlexAttention."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """What a layer attends with."""

        sizes: LighthouseConfig | None
        """None: always dense."""
        dense: bool
        """Dense until `lhcp.set_mode` says otherwise."""
        layout: LayoutName
        documents: bool
        """Whether attention ends where positions restart."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.scores: dict[str, Tensor] = {}
        self.cu_seqlens: Tensor | None = None
        self.known: set[tuple[int, ...]] = set()
        self.token = object()

    def attend_over(self, mesh: DeviceMesh | None) -> None:
        """Take the ranks that share a sequence; None: this one has it whole."""
        self.cp = ContextParallel(mesh, layout=self.config.layout)
        self.layer: LighthouseAttention = self.cp.attention(self.config.sizes)
        if self.config.dense:
            self.layer.mode = "dense"

    def parallelize(self, parallel_dims: ParallelDims) -> None:
        """Learn which ranks share a sequence; torchtitan calls it once its meshes are there.

        Not with its spmd_backend "partial_dtensor", which refuses context parallelism of modules
        that it does not know.
        """
        self.attend_over(parallel_dims.get_mesh("cp") if parallel_dims.cp_enabled else None)
        super().parallelize(parallel_dims)

    def read(self, positions: Tensor | None) -> None:
        """Read documents of positions, or check that those are the global ones of this rank.

        They are checked on a CPU at every call, else at the first of each shape, and not inside
        torch.compile.

        Raises:
            ValueError: they are not, or restart otherwise than documents do; on every rank where
                the shape is new.
        """
        if not hasattr(self, "cp"):
            # Made as late as torchtitan's own check that all modules are of its classes allows.
            self.attend_over(None)
        self.cu_seqlens = None
        if torch.compiler.is_compiling():
            if self.config.documents:
                raise ValueError(
                    "documents are read by the host, which torch.compile cannot: leave compilation "
                    "off, or make sequences whole (lhcp.integrations.torchtitan.whole_sequences)"
                )
            return
        mine = local(positions) if positions is not None else None
        shape = () if mine is None else tuple(mine.shape)
        if shape in self.known and mine is not None and mine.device.type != "cpu":
            return

        def prepare() -> None:
            if mine is None:
                raise ValueError(f"the data has no positions: {WHOLE}")
            wrong = first_wrong(mine, self.cp)
            if wrong is not None and not self.config.documents:
                raise ValueError(
                    f"positions: {wrong}. Where documents are packed, nobody said whether they are "
                    f"one text: {WHOLE}. {ORDER}"
                )

        fields = {"call": "torchtitan", "positions": str(list(shape))}
        agreed(self.cp.ranks, (self.token, shape), prepare, lambda _: fields)
        self.known.add(shape)
        if self.config.documents and positions is not None and mine is not None:
            if positions not in _READ:
                _READ[positions] = documents_of(self.cp.unshard(mine), self.cp)
            self.cu_seqlens = _READ[positions]

    def keep(self, _module: nn.Module, _inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        """Keep projections from before a norm, to be scored in place of q and k."""
        q, k, _ = outputs
        self.scores = {"score_q": local(q.detach()), "score_k": local(k.detach())}

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Any = None,
        scale: float | None = None,
        **_options: Any,
    ) -> Tensor:
        """Attend: q [B, N / W, H, D], k and v [B, N / W, Hk, D] -> [B, N / W, H, D]."""
        if attention_masks is not None:
            raise ValueError(f"attention_masks must be None: lhcp has no such masks; {WHOLE}")
        if scale is not None and scale != q_BLNH.shape[-1] ** -0.5:
            raise ValueError(f"scale={scale}: must be head_dim ** -0.5, or None")
        scores, self.scores = self.scores, {}
        cu_seqlens, self.cu_seqlens = self.cu_seqlens, None
        out: Tensor = self.layer(q_BLNH, k_BLNH, v_BLNH, cu_seqlens=cu_seqlens, **scores)
        return out


class GroupedAttention(GQAttention):
    """torchtitan's attention module, with positions checked, and scored from before its norms."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        """As its own."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        sizes = config.inner_attention.sizes
        # Rotary embeddings keep norms; a scorer that attends needs them in what it is given.
        if self.q_norm is not None and sizes is not None and sizes.scorer == "norm":
            self.qkv_linear.register_forward_hook(self.inner_attention.keep)

    def forward(self, x_BLD: Tensor, attention_masks: Any, positions: Any = None) -> Tensor:
        """Attend as torchtitan's, from projections to the projection of the output."""
        self.inner_attention.read(positions)
        out: Tensor = super().forward(x_BLD, attention_masks, positions)
        return out


def documents_of(positions: Tensor, cp: ContextParallel) -> Tensor:
    """Return the documents of whole sequences whose positions begin at 0 in each of them.

    Args:
        positions: integers [B, N].
        cp: the ranks that were asked for their parts.

    Returns:
        cu_seqlens, int32 [num_docs + 1] on the CPU.

    Raises:
        ValueError: positions neither count on nor begin anew at 0.
    """
    restart = positions == 0
    restart[:, 1:] |= positions[:, 1:] == positions[:, :-1] + 1
    if not bool(restart.all()):
        row, token = (~restart).nonzero()[0].tolist()
        raise ValueError(
            f"positions: token {token} of sequence {row} has {int(positions[row, token])}, as the "
            f"{cp.layout} parts of {cp.world_size} ranks are put together: must be one more than "
            f"the token before it, or 0 where a document begins. {ORDER}"
        )
    return cu_seqlens_from_position_ids(positions)


def local(x: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, and any other tensor as it is."""
    mine: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return mine


@override(target=Decoder.Config, description="attention across ranks by lhcp")
def attention(
    cfg: Any,
    *,
    layout: LayoutName = "zigzag",
    dense_layers: Collection[int] = (),
    dense: bool = False,
    documents: bool = False,
    **sizes: Any,
) -> Any:
    """Let all layers of a decoder attend with lhcp.

    Args:
        cfg: torchtitan's config of the decoder, changed in place.
        layout: how torchtitan cuts the sequence: "zigzag" for its "headtail", "contiguous" for its
            None, of parallelism.context_parallel_load_balancer.
        dense_layers: layers that stay dense; negative ones count from the end.
        dense: all layers, for the second stage.
        documents: whether the documents that torchtitan packs into a sequence are kept apart, as
            its own attention does; the ranks of a sequence then gather its positions once a step.
            False where sequences are whole.
        sizes: fields of `lhcp.LighthouseConfig`.

    Raises:
        TypeError, ValueError: sizes that are none, or layers that lhcp cannot take the place of.
    """
    config, number = LighthouseConfig(**sizes), len(cfg.layers)
    outside = [i for i in dense_layers if not -number <= i < number]
    if outside:
        raise ValueError(f"dense_layers: {outside} are not layers; this model has {number}")
    stay = set(range(number)) if dense else {i % number for i in dense_layers}
    for i, layer in enumerate(cfg.layers):
        own = layer.attention
        inner = getattr(own, "inner_attention", None)
        if type(own) is not GQAttention.Config or not isinstance(
            inner, FlexAttention.Config | ScaledDotProductAttention.Config
        ):
            raise ValueError(
                f"layer {i} attends by {type(own).__qualname__} over {type(inner).__qualname__}: "
                "must be GQAttention over FlexAttention, as in Llama 3 and Qwen3"
            )
        replaced = InnerAttention.Config(
            sizes=config,
            dense=i in stay,
            layout=layout,
            documents=documents,
            sharding_config=_sharding(inner),
        )
        layer.attention = derive(own, GroupedAttention.Config, inner_attention=replaced)
    return cfg


def _sharding(inner: Any) -> ShardingConfig | None:
    """Return how q, k and v are cut: as they come, where torchtitan's gathers k and v."""
    own = inner.sharding_config
    if own is None:
        return None
    as_they_come = own.in_src_shardings
    return ShardingConfig(
        in_src_shardings=as_they_come,
        in_dst_shardings=as_they_come,
        out_src_shardings=own.out_src_shardings,
        local_map=LocalMapConfig(in_grad_placements=tuple(as_they_come.values())),
    )


class WholeSequences(BaseDataLoader):
    """A data loader whose sequences are one text each, wherever documents begin in them."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """The loader that it takes the place of."""

        inner: Any

    def __init__(self, config: Config, **options: Any) -> None:
        self.inner = config.inner.build(**options)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yield its batches, with positions that run from 0 to N - 1."""
        for inputs, labels in self.inner:
            batch, seqlen = inputs["input"].shape
            positions = torch.arange(seqlen, device=inputs["input"].device).repeat(batch, 1)
            yield {**inputs, "positions": positions}, labels

    def state_dict(self) -> dict[str, Any]:
        """Return its state."""
        state: dict[str, Any] = self.inner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.inner.load_state_dict(state_dict)


@override(target=BaseDataLoader.Config, description="one text a sequence, for lhcp")
def whole_sequences(cfg: Any) -> Any:
    """Let attention and positions run over each whole sequence, across documents."""
    return derive(cfg, WholeSequences.Config, inner=cfg)
