"""`ContextParallel`: group, layout and choices in one object, for the whole training step."""

from collections.abc import Mapping
from typing import Any, overload

import torch
import torch.utils.data
from torch import Tensor

from lhcp.comm import sharding
from lhcp.comm.agreement import compared
from lhcp.comm.layout import LayoutName, make_layout
from lhcp.comm.mesh import Group, Ranks, as_ranks
from lhcp.config import LighthouseConfig
from lhcp.context import loss as losses
from lhcp.context.batch import WholeBatch, describe, prepare
from lhcp.context.sdpa import check_sdpa, in_torchs_dtype
from lhcp.cost.calibration import Calibration
from lhcp.layer.choices import Choices, by_name, check_names
from lhcp.layer.dense import ring_attention
from lhcp.layer.module import LighthouseAttention
from lhcp.timing import Spans


class ContextParallel:
    """One sequence over several ranks: everything that must know the group and the layout.

        cp = lhcp.ContextParallel(mesh["cp"])
        attend = cp.attention(config)                      # in the model: o = attend(q, k, v)
        batch = cp.shard(batch)                            # whole sequences in, this rank's out
        logits = model(batch["input_ids"], batch["position_ids"])
        loss = cp.loss(logits, batch["shift_labels"], over=mesh["dp", "cp"])

    Args:
        group: the context-parallel ranks: a ProcessGroup, a DeviceMesh of one axis, a mesh of two
            (outer across nodes) with a rotation that is for them by name, or a table, or None for
            one rank.
        layout: "zigzag" (balanced causal work) or "contiguous".
        rotation, backend, kernels, timers: of every layer made here, as in
            `lhcp.LighthouseAttention`.
        ignore_index: the label of tokens that have none, in `shard` and in the losses.
        debug: of every layer and of `sdpa`, as in `lhcp.ring_attention`; `shard` then compares
            every batch.

    Raises:
        TypeError, ValueError: the group is none, this rank is not in it, or a name is none that
            there is.
    """

    def __init__(
        self,
        group: Group | Ranks = None,
        *,
        layout: LayoutName = "zigzag",
        rotation: str | Calibration = "auto",
        backend: str = "auto",
        kernels: str = "auto",
        timers: Spans | None = None,
        ignore_index: int = -100,
        debug: bool = False,
    ) -> None:
        self.ranks = as_ranks(group, two_axes=by_name(rotation))
        self.cut = make_layout(layout, self.ranks.world_size)
        self.ignore_index = ignore_index
        self.choices = Choices(layout, rotation, backend, kernels, timers=timers, debug=debug)
        check_names(self.choices)
        self._agreed = False

    @property
    def rank(self) -> int:
        """This rank, counted inside the group."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """W, the ranks that share a sequence."""
        return self.ranks.world_size

    @property
    def layout(self) -> LayoutName:
        """ "zigzag" or "contiguous"."""
        return self.cut.name

    def __repr__(self) -> str:
        """Return group and choices in words."""
        c = self.choices
        rotation = c.rotation if isinstance(c.rotation, str) else c.rotation.name
        return (
            f"ContextParallel(rank {self.rank} of {self.world_size}, layout={c.layout!r}, "
            f"{rotation=}, backend={c.backend!r}, kernels={c.kernels!r})"
        )

    def __deepcopy__(self, memo: object) -> "ContextParallel":
        """Return this object: groups are of the process, and a copy of a model shares them."""
        return self

    def attention(
        self, config: LighthouseConfig | None, *, scale: float | None = None
    ) -> LighthouseAttention:
        """Make a layer's attention: q [B, N / W, H, D], k and v [B, N / W, Hk, D] -> like q.

        Args:
            config: its sizes; None for a layer that is always dense.
            scale: of the logits; D ** -0.5 by default.

        Raises:
            ValueError: the config's strata do not divide over these ranks.
        """
        if config is not None:
            config.check_chunks(self.cut.num_chunks)
        c = self.choices
        return LighthouseAttention(
            config,
            self.ranks,
            layout=c.layout,
            rotation=c.rotation,
            backend=c.backend,
            kernels=c.kernels,
            scale=scale,
            timers=c.timers,
            debug=c.debug,
        )

    def sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Attend densely in the place of `torch.nn.functional.scaled_dot_product_attention`.

        The same arguments, defaults, order of axes and dtypes under autocast, on this rank's part
        of the sequence.

        Args:
            query: [B, H, N / W, D]; key, value: [B, Hk, N / W, D], Hk < H only with enable_gqa.
            attn_mask, dropout_p, is_causal: must be None, 0 and True: all else is refused.
            scale: a number; D ** -0.5 by default.
            cu_seqlens: documents of the whole batch, as `shard` returns them; torch's has none.

        Returns:
            [B, H, N / W, D].

        Raises:
            TypeError, ValueError: what is asked for cannot be done across ranks, or another rank
                was asked for something else.
        """
        check_sdpa((query, key, value), attn_mask, dropout_p, is_causal, enable_gqa)
        q, k, v = (in_torchs_dtype(x).transpose(1, 2) for x in (query, key, value))
        c = self.choices
        out = ring_attention(
            q,
            k,
            v,
            group=self.ranks,
            layout=c.layout,
            rotation=c.rotation,
            backend=c.backend,
            scale=scale,
            cu_seqlens=cu_seqlens,
            timers=c.spans,
            debug=c.debug,
        )
        return out.transpose(1, 2)

    def positions(
        self,
        seqlen: int,
        device: torch.device | str | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return the global positions of this rank's tokens, int64 [N / W]: see `lhcp.positions`.

        Args:
            seqlen: N, tokens of the whole sequence.
            cu_seqlens: documents in each of which positions begin at 0: then int64 [B, N / W].
        """
        return sharding.positions(seqlen, self.ranks, self.layout, device, cu_seqlens)

    def padded_length(self, seqlen: int, config: LighthouseConfig | None = None) -> int:
        """Return the shortest whole length, of at least `seqlen` tokens, that fits these ranks.

        Args:
            config: of the lighthouse layers; None where all are dense.

        Raises:
            ValueError: the config's strata do not divide over these ranks.
        """
        if config is None:
            return -(-seqlen // self.cut.num_chunks) * self.cut.num_chunks
        config.check_chunks(self.cut.num_chunks)
        return config.padded_length(seqlen)

    @overload
    def shard(self, batch: Tensor, *, dim: int = 1, pad_to: int | None = None) -> Tensor: ...

    @overload
    def shard(
        self, batch: Mapping[str, Any], *, dim: int = 1, pad_to: int | None = None
    ) -> dict[str, Any]: ...

    def shard(
        self, batch: Tensor | Mapping[str, Any], *, dim: int = 1, pad_to: int | None = None
    ) -> Tensor | dict[str, Any]:
        """Take this rank's part of whole sequences, which all ranks of the group hold alike.

        A tensor is cut along `dim`, as by `lhcp.shard`. A batch is made ready first:

        - `input_ids` [B, N], `inputs_embeds` [B, N, dim] are cut.
        - `labels` [B, N], those of the tokens themselves, are shifted to the next token on the
          whole sequence; the last one gets `ignore_index`. They come back as `shift_labels`, so
          that nobody shifts them again. A batch with `shift_labels` is only cut.
        - `position_ids` [1, N / W] are added: global, for RoPE.
        - `attention_mask` [B, N], ones and then zeros, comes back as `valid`, bool [B, N / W], for
          `attend(q, k, v, valid=)`; padding has no label.
        - packed documents, `cu_seqlens` or one of the forms in lhcp/context/documents.py, come back
          as `cu_seqlens` of the whole batch, for `attend(q, k, v, cu_seqlens=)`. No label asks for
          the first token of the next document (`shift_labels` are taken as they are), and padding
          is a document. Where `position_ids` begin at 0 in each document, they are cut, [B, N / W].
        - other tensors are cut where their second axis has N tokens, and not shifted: weights of a
          loss must be those of the next tokens, as `shift_labels`. All else is kept.

        At its first batch the ranks compare what they hold, since a sampler that gives each rank
        other sequences is an error that nothing else shows; never again, but with `debug` at each.

        Args:
            batch: a whole tensor, or a mapping of whole tensors.
            dim: the axis of the tokens; 1 for a batch.
            pad_to: whole length to pad to at the end first, as `padded_length` finds it; a batch
                then has `valid`.

        Returns:
            tensor of N / W tokens along `dim`, or a dict.

        Raises:
            TypeError, ValueError: the batch holds what cannot be cut, such as another mask,
                the layout does not divide N, ranks hold different batches, or this is a worker of
                a data loader.
        """
        if isinstance(batch, Tensor):
            whole = batch if pad_to is None else sharding.pad_to_length(batch, pad_to, dim)
            return sharding.shard(whole, self.ranks, dim, self.layout)

        if self.world_size > 1 and torch.utils.data.get_worker_info() is not None:
            # A worker is a fork with the rank's own connections, which two may not use at once.
            raise ValueError(
                "shard is called in a worker of a data loader, where ranks cannot compare what "
                "they hold: call it in the training loop, on the batches that the loader gives"
            )

        def make() -> WholeBatch:
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"batch is a {type(batch).__name__}: must be a tensor or a mapping of tensors"
                )
            if dim != 1:
                raise ValueError(f"dim={dim}: the tokens of a batch are along axis 1")
            ready = prepare(batch, ignore_index=self.ignore_index, pad_to=pad_to)
            self.cut.check_seqlen(ready.seqlen)
            return ready

        if self._agreed and not self.choices.debug:
            ready = make()
        else:
            ready = compared(self.ranks, make, lambda r: {} if r is None else describe(r))
        self._agreed = True
        index = self.positions(ready.seqlen, "cpu")
        parts = {key: x.index_select(1, index.to(x.device)) for key, x in ready.tokens.items()}
        return {**ready.kept, **parts}

    def unshard(self, x: Tensor, *, dim: int = 1, length: int | None = None) -> Tensor:
        """Gather the whole tensor on every rank: the mirror of `shard`, as `lhcp.unshard`.

        Args:
            x: this rank's part, N / W tokens along `dim`.
            dim: the axis of the tokens.
            length: tokens without the padding, which is cut off; None: nothing is.
        """
        whole = sharding.unshard(x, self.ranks, dim, self.layout)
        if length is None:
            return whole
        if not 0 <= length <= whole.shape[dim]:
            raise ValueError(f"length={length}: must be 0 to the {whole.shape[dim]} tokens of x")
        return whole.narrow(dim, 0, length)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        over: Group,
        num_valid: float | Tensor | None = None,
        chunk_tokens: int | None = None,
    ) -> Tensor:
        """Return the mean cross-entropy over all valid tokens of the global batch.

        Its value is the same on every rank. Its gradients are right where those of all ranks of
        `over` are averaged, as FSDP2 and DDP do it unless told otherwise: set no divide factor.
        Two numbers are summed over the ranks. Beside the logits and their gradient, it holds one
        chunk of them in float32.

        Args:
            logits: [B, N / W, V] of the token after each of this rank's.
            labels: int64 [B, N / W], `shard(batch)["shift_labels"]`.
            over: mesh or group of the ranks whose gradients are averaged, those of data and
                context parallelism together, such as mesh["dp", "cp"], without tensor
                parallelism's; None for one rank.
            num_valid: valid tokens of the global batch, where they are known, a number or a scalar
                tensor: of all ranks, and of all micro-batches whose gradients accumulate. The
                losses then add up to the mean.
            chunk_tokens: tokens of one chunk; None: as many as have 2**26 logits.

        Raises:
            TypeError, ValueError: shapes or dtypes do not fit, or `over` lacks a rank of this
                group.
        """
        total = losses.cross_entropy_sum(
            logits, labels, ignore_index=self.ignore_index, chunk_tokens=chunk_tokens
        )
        return self.average(total, self._share(labels, over, num_valid), over=over)

    def linear_loss(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        over: Group,
        bias: Tensor | None = None,
        num_valid: float | Tensor | None = None,
        chunk_tokens: int | None = None,
    ) -> Tensor:
        """Return `loss` of the logits hidden @ weight.T + bias, which are never all held.

        For long sequences and large vocabularies: it holds the gradient of hidden (twice in the
        backward), a float32 gradient of weight and one chunk of logits. By arithmetic, a rank with
        128K of 1M tokens, a vocabulary of 128K and dim 4096 in bfloat16 holds 2 + 3 + 0.5 GiB (5.0
        measured on an H100); its logits would take 32, and their float32 as much twice. Under FSDP2
        call it inside the forward of the module that owns the head, where its weight is whole.

        Args:
            hidden: [B, N / W, dim], what goes into the output head.
            weight: [V, dim], the head's.
            labels, over, num_valid, chunk_tokens: as in `loss`.
            bias: [V], the head's, or None.

        Raises:
            TypeError, ValueError: as `loss`.
        """
        total = losses.linear_cross_entropy_sum(
            hidden,
            weight,
            labels,
            bias=bias,
            ignore_index=self.ignore_index,
            chunk_tokens=chunk_tokens,
        )
        return self.average(total, self._share(labels, over, num_valid), over=over)

    def average(self, total: Tensor, count: Tensor | float, *, over: Group) -> Tensor:
        """Return sum(total) / sum(count) over ranks: `loss` for a loss of one's own.

        Args:
            total: scalar of this rank that carries the gradient, such as a sum over its tokens.
            count: what this rank adds to the denominator, such as its valid tokens.
            over: as in `loss`.

        Raises:
            TypeError, ValueError: `over` is none, or lacks a rank of this group.
        """
        losses.check_over(over, self.ranks.flat)
        return losses.average(total, count, over=over)

    def _share(
        self, labels: Tensor, over: Group, num_valid: float | Tensor | None
    ) -> Tensor | float:
        """Return what this rank adds to the number of valid tokens."""
        if num_valid is None:
            return (labels != self.ignore_index).sum()
        return num_valid / losses.num_ranks(over)
