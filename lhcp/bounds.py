"""Bounds of documents, made from the forms in which they come."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lhcp.checks import check_plain, shape_of


def cu_seqlens_from_document_ids(document_ids: Tensor) -> Tensor:
    """Return the bounds of documents of which each token has an id.

    Args:
        document_ids: integers [B, N], or [N] for one row, of whole sequences; a document is a run
            of equal ids. Padding may have any id of its own.

    Returns:
        cu_seqlens, int32 [num_docs + 1] on the CPU.

    Raises:
        TypeError, ValueError: it is no tensor of integers, or has another shape.
    """
    ids = _rows("document_ids", document_ids)
    return _bounds(ids[:, 1:] != ids[:, :-1], ids)


def cu_seqlens_from_position_ids(position_ids: Tensor) -> Tensor:
    """Return the bounds of documents whose positions count on from token to token.

    Args:
        position_ids: integers [B, N], or [N] for one row, of whole sequences; where one does not
            follow the one before it, a document begins. A run of zeros, which is how padding is
            often given, is as many documents of one token.

    Returns:
        cu_seqlens, int32 [num_docs + 1] on the CPU.

    Raises:
        TypeError, ValueError: it is no tensor of integers, or has another shape.
    """
    ids = _rows("position_ids", position_ids)
    return _bounds(ids[:, 1:] != ids[:, :-1] + 1, ids)


def cu_seqlens_from_hugging_face(
    cu_seq_lens_q: Sequence[int] | Tensor, batch: int, seqlen: int
) -> Tensor:
    """Return the bounds of documents from Hugging Face's, which may be padded or stop early.

    Args:
        cu_seq_lens_q: of `DataCollatorWithFlattening` and its like: integers that do not descend,
            from 0. Empty documents are left out, rows begin documents, and what is left behind the
            last bound is a document, such as padding.
        batch, seqlen: B rows of N tokens of whole sequences; a flattened batch is one row.

    Returns:
        cu_seqlens, int32 [num_docs + 1] on the CPU.

    Raises:
        ValueError: the bounds descend, or leave the 0 to B N tokens.
    """
    bounds = torch.as_tensor(cu_seq_lens_q).cpu().long()
    end = batch * seqlen
    if (
        bounds.ndim != 1
        or not len(bounds)
        or int(bounds.diff().min() if len(bounds) > 1 else 0) < 0
    ):
        raise ValueError(f"cu_seq_lens_q is {shape_of(bounds)}: must be 1-d and not descend")
    if int(bounds[0]) != 0 or int(bounds[-1]) > end:
        raise ValueError(
            f"cu_seq_lens_q goes from {int(bounds[0])} to {int(bounds[-1])}: must begin at 0 and "
            f"end within the {batch} x {seqlen} = {end} tokens"
        )
    rows = torch.arange(batch + 1, device="cpu") * seqlen
    return torch.cat([bounds, rows]).unique().int()


def _rows(name: str, ids: Tensor) -> Tensor:
    check_plain(name, ids)
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{name} is {shape_of(ids)}: must be integers")
    if ids.ndim not in (1, 2) or 0 in ids.shape:
        raise ValueError(f"{name} is {shape_of(ids)}: must be [B, N], or [N] for one row")
    return ids[None] if ids.ndim == 1 else ids


def _bounds(begins: Tensor, ids: Tensor) -> Tensor:
    """Return cu_seqlens from whether each token but a row's first begins a document."""
    first = torch.nn.functional.pad(begins, (1, 0), value=True)
    starts = first.flatten().nonzero()[:, 0].cpu()
    return torch.cat([starts, torch.tensor([ids.numel()], device="cpu")]).int()
