"""The packed documents of a batch: read in the forms of data loaders, padded, kept apart in labels.

cu_seqlens      flash-attn's bounds over the rows laid end to end, as attention takes them
cu_seq_lens_q   Hugging Face's, which may stop early; cu_seq_lens_k must be the same
document_ids    [B, N], a run of equal ones is a document; seq_idx is the same
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lhcp.bounds import cu_seqlens_from_document_ids, cu_seqlens_from_hugging_face
from lhcp.packing import read_packing

BOUNDS = ("cu_seqlens", "cu_seq_lens_q")
IDS = ("document_ids", "seq_idx")
DOCUMENTS = (*BOUNDS, *IDS, "cu_seq_lens_k")
"""Keys of which documents are read; the batch then has `cu_seqlens` alone."""


def read_documents(batch: Mapping[str, Any], rows: int, seqlen: int) -> Tensor | None:
    """Return the documents of whole sequences [rows, seqlen], int32 [num_docs + 1]; None: none.

    Raises:
        TypeError, ValueError: they are in several forms, or in none that is known.
    """
    given = [key for key in DOCUMENTS if batch.get(key) is not None]
    if not given:
        return None
    if len([key for key in given if key != "cu_seq_lens_k"]) != 1:
        raise ValueError(
            f"batch has {', '.join(given)}: pass documents in one form, for example cu_seqlens; "
            "lhcp.cu_seqlens_from_position_ids makes it of positions that restart"
        )
    (key,) = (key for key in given if key != "cu_seq_lens_k")
    if key in IDS:
        cu_seqlens = cu_seqlens_from_document_ids(batch[key])
    elif key == "cu_seq_lens_q":
        of_keys = batch.get("cu_seq_lens_k")
        if of_keys is not None and not torch.equal(*map(torch.as_tensor, (batch[key], of_keys))):
            raise ValueError("batch has other cu_seq_lens_k than cu_seq_lens_q: must be the same")
        cu_seqlens = cu_seqlens_from_hugging_face(batch[key], rows, seqlen)
    else:
        cu_seqlens = batch[key]
    read_packing(cu_seqlens, rows, seqlen)
    return cu_seqlens


def pad_documents(cu_seqlens: Tensor, rows: int, seqlen: int, length: int) -> Tensor:
    """Return the documents of rows that are padded to `length`: the padding is one of its own."""
    if length == seqlen:
        return cu_seqlens
    row, token = starts_of(cu_seqlens, seqlen)
    begins = torch.cat([row * length + token, torch.arange(rows, device="cpu") * length + seqlen])
    return torch.cat([begins.sort().values, torch.tensor([rows * length], device="cpu")]).int()


def starts_of(cu_seqlens: Tensor, seqlen: int) -> tuple[Tensor, Tensor]:
    """Return the row and the place in it of each document's first token, on the CPU."""
    begins = cu_seqlens[:-1].cpu().long()
    return begins // seqlen, begins % seqlen


def positions_of(cu_seqlens: Tensor, rows: int, seqlen: int) -> Tensor:
    """Return positions that begin at 0 in each document, int64 [rows, seqlen] on the CPU."""
    begins = cu_seqlens[:-1].cpu().long()
    tokens = torch.arange(rows * seqlen, device="cpu")
    return (tokens - begins[torch.bucketize(tokens, begins, right=True) - 1]).view(rows, seqlen)
