"""What a training batch of whole sequences becomes before it is cut over ranks. No communication.

Names are those of Hugging Face's batches, which most data loaders follow:

    input_ids, inputs_embeds   cut
    labels                     shifted to the next token, then cut; returned as shift_labels
    shift_labels               cut (they are shifted already)
    attention_mask             must be ones, then zeros (padding at the end); returned as valid
    position_ids               made, [1, N]; where given, they must be 0 to N - 1, or begin at 0 in
                               each document, and are then cut
    cu_seqlens and its like    packed documents (`lhcp.context.documents`); returned as cu_seqlens
    other tensors              cut where their second axis is the sequence, else kept
    anything else              kept
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lhcp.checks import shape_of
from lhcp.comm.sharding import pad_to_length
from lhcp.context.documents import (
    DOCUMENTS,
    pad_documents,
    positions_of,
    read_documents,
    starts_of,
)
from lhcp.context.loss import shift_labels

TOKENS = ("input_ids", "inputs_embeds", "labels", "shift_labels")
"""Keys by whose second axis the length of the sequence is known."""


@dataclass(frozen=True)
class WholeBatch:
    """A batch of whole sequences, ready to be cut along axis 1."""

    tokens: dict[str, Tensor]
    """Tensors whose axis 1 is the sequence, all of `seqlen` tokens."""
    kept: dict[str, Any]
    """Whatever has no sequence."""
    seqlen: int
    """N, the padding included."""


def prepare(batch: Mapping[str, Any], *, ignore_index: int, pad_to: int | None) -> WholeBatch:
    """Shift labels, make positions, read the padding mask and pad at the end.

    Args:
        batch: tensors [B, N, ...] and whatever else goes with them.
        ignore_index: the label of a token that has none.
        pad_to: whole length to pad to, or None.

    Raises:
        TypeError, ValueError: the batch holds what cannot be cut over ranks; the message says what,
            and what to do.
    """
    seqlen = _length(batch)
    like: Tensor = next(batch[key] for key in TOKENS if key in batch)
    rows = like.shape[0]
    _check_known(batch, seqlen)
    documents = read_documents(batch, rows, seqlen)
    positions = _positions(batch, documents, like)
    if pad_to is not None and pad_to < seqlen:
        raise ValueError(f"pad_to={pad_to}: must be at least the {seqlen} tokens of the batch")
    tokens: dict[str, Tensor] = {}
    kept: dict[str, Any] = {}
    for key, value in batch.items():
        if key in ("labels", "attention_mask", "position_ids", *DOCUMENTS):
            continue
        cut = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[1] == seqlen
        (tokens if cut else kept)[key] = value
    valid = _valid(batch, like, pad_to)
    labels: Tensor | None = batch.get("labels")
    if labels is not None:
        # Before the shift: the last real token has no next one.
        labels = labels if valid is None else labels.masked_fill(~valid, ignore_index)
        if documents is not None:
            # The last token of a document has no next one either.
            first = tuple(x.to(labels.device) for x in starts_of(documents, seqlen))
            labels = labels.index_put(first, labels.new_tensor(ignore_index))
        tokens["shift_labels"] = shift_labels(labels, ignore_index)
    elif valid is not None and "shift_labels" in tokens:
        tokens["shift_labels"] = tokens["shift_labels"].masked_fill(~valid, ignore_index)
    if valid is not None:
        tokens["valid"] = valid
    if positions is not None:
        tokens["position_ids"] = positions
    if pad_to is not None:
        if documents is not None:
            documents = pad_documents(documents, rows, seqlen, pad_to)
        fill = {"shift_labels": ignore_index}
        tokens = {
            key: pad_to_length(x, pad_to, value=fill.get(key, 0)) for key, x in tokens.items()
        }
        seqlen = pad_to
    if positions is None:
        tokens["position_ids"] = torch.arange(seqlen, device=like.device)[None]
    if documents is not None:
        kept["cu_seqlens"] = documents
    return WholeBatch(tokens, kept, seqlen)


def describe(batch: WholeBatch) -> dict[str, str]:
    """Return shapes, dtypes and integers of a batch in words, the same for equal ones."""
    read = {key: x for key, x in batch.kept.items() if key in DOCUMENTS}
    return {f"batch[{key!r}]": _digest(x) for key, x in {**batch.tokens, **read}.items()}


def _digest(value: Tensor) -> str:
    text = f"{list(value.shape)} {value.dtype}"
    if value.is_floating_point() or value.is_complex():
        return text
    # A sum that depends on the order, modulo 2**64: the same integer on every device.
    flat = value.flatten().long()
    weights = torch.arange(1, flat.numel() + 1, device=flat.device) * 0x9E3779B97F4A7C1
    return f"{text} of digest {int((flat * weights).sum()):x}"


def _length(batch: Mapping[str, Any]) -> int:
    """Return N; every key that is known to hold tokens has it."""
    lengths = {}
    for key in (*TOKENS, "attention_mask", "position_ids"):
        if key not in batch:
            continue
        value = batch[key]
        if not isinstance(value, Tensor):
            raise TypeError(f"batch[{key!r}] is a {type(value).__name__}: must be a tensor [B, N]")
        wanted = 3 if key == "inputs_embeds" else 2
        if value.ndim != wanted:
            shape = "[B, N, dim]" if wanted == 3 else "[B, N]"
            raise ValueError(f"batch[{key!r}] is {shape_of(value)}: must be {shape}")
        lengths[key] = value.shape[1]
    if not lengths.keys() & set(TOKENS):
        raise ValueError(
            f"batch has the keys {sorted(batch)}: one of {', '.join(TOKENS)} must be there, by "
            "which the length of the sequence is known; a single tensor is cut by shard(x, dim=1)"
        )
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"batch has tokens along axis 1 of {lengths}: must be one length; labels [B, N] are "
            "those of the tokens themselves, shift_labels [B, N] those of the next ones"
        )
    return next(iter(lengths.values()))


def _check_known(batch: Mapping[str, Any], seqlen: int) -> None:
    if "labels" in batch and "shift_labels" in batch:
        raise ValueError(
            "batch has labels and shift_labels: pass one; labels are shifted here, shift_labels "
            "are shifted already"
        )
    if "valid" in batch:
        raise ValueError(
            "batch has the key 'valid', which is made here: pass attention_mask [B, N] instead, "
            "ones and then zeros"
        )
    for key, value in batch.items():
        known = ("inputs_embeds", *DOCUMENTS)
        if not isinstance(value, Tensor) or key in known or seqlen == 1:
            continue
        if seqlen in value.shape[2:] or list(value.shape) == [seqlen]:
            raise ValueError(
                f"batch[{key!r}] is {shape_of(value)}: an axis other than the second has the "
                f"length of the sequence, {seqlen}; attention is causal and takes no mask or bias: "
                "leave it out, or cut it on its own with shard(x, dim=)"
            )


def _positions(batch: Mapping[str, Any], documents: Tensor | None, like: Tensor) -> Tensor | None:
    """Return positions [B, N] that begin at 0 in each document; None where they are global."""
    positions: Tensor | None = batch.get("position_ids")
    rows, seqlen = like.shape[:2]
    if positions is None or torch.equal(
        positions.long(), torch.arange(seqlen, device=positions.device).expand(positions.shape)
    ):
        return None
    if documents is None:
        raise ValueError(
            "batch['position_ids'] are not 0 to N - 1 in every sequence, and the batch has no "
            "documents: pass cu_seqlens=lhcp.cu_seqlens_from_position_ids(position_ids) if they "
            "restart in packed documents; sequences that were cut before are not taken"
        )
    restarted = positions_of(documents, rows, seqlen).to(positions.device)
    if not torch.equal(positions.expand(rows, -1).long(), restarted):
        raise ValueError(
            "batch['position_ids'] are neither 0 to N - 1 in every sequence nor begin at 0 in each "
            "document of cu_seqlens: leave position_ids out to have the first made"
        )
    return restarted


def _valid(batch: Mapping[str, Any], like: Tensor, pad_to: int | None) -> Tensor | None:
    """Return which tokens are real, bool [B, N]; None where nobody spoke of padding."""
    mask: Tensor | None = batch.get("attention_mask")
    if mask is None:
        shape = like.shape[:2]
        return None if pad_to is None else torch.ones(shape, dtype=torch.bool, device=like.device)
    valid = mask != 0
    if bool((valid[:, 1:] > valid[:, :-1]).any()):
        raise ValueError(
            "batch['attention_mask'] has a one after a zero: must be ones and then zeros, padding "
            'at the end; with a tokenizer: padding_side="right"'
        )
    return valid
