"""What the oracle knows of documents that are packed into one sequence.

Strata and windows stay where they are. An entry belongs to the document of the last token that it
covers: its mean and its scores are of those of its tokens that are in that document, and it serves
the tokens of that document alone. A window in which a document begins is always expanded, so that
every document's first token is an entry of its own.
"""

import torch
from torch import Tensor

from lhcp.config import LighthouseConfig


def documents(cu_seqlens: Tensor, batch: int, seqlen: int) -> Tensor:
    """Return the document of each token, int64 [B, N], numbered over all rows in order.

    Args:
        cu_seqlens: int [num_docs + 1], first tokens of documents in rows laid end to end, from 0 to
            B N; each row begins a document.

    Raises:
        ValueError: it does not ascend, or does not begin, end or part rows as it must.
    """
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != batch * seqlen or sorted(set(starts)) != starts:
        raise ValueError(f"cu_seqlens={starts}: must ascend from 0 to {batch * seqlen}")
    if not set(range(0, batch * seqlen, seqlen)) <= set(starts):
        raise ValueError(f"cu_seqlens={starts}: each of the {batch} rows must begin a document")
    lengths = cu_seqlens.diff().to(torch.int64)
    return torch.arange(len(lengths)).repeat_interleave(lengths.cpu()).view(batch, seqlen)


def in_last_document(docs: Tensor, window: int) -> Tensor:
    """Whether each token of each window [B, N / window, window] is in its last one's document."""
    windows = docs.unflatten(1, (-1, window))
    return windows == windows[..., -1:]


def first_tokens(docs: Tensor, row: int) -> list[int]:
    """First tokens of the documents of a row."""
    ids = docs[row].tolist()
    return [t for t, doc in enumerate(ids) if t == 0 or doc != ids[t - 1]]


def check_documents(docs: Tensor, config: LighthouseConfig) -> None:
    """Check that each stratum can expand all windows in which a document begins.

    Raises:
        ValueError: it cannot; the message names row, stratum, count and what would fit.
    """
    size = docs.shape[1] // config.num_strata
    for row in range(docs.shape[0]):
        windows = {t // config.pool_factor for t in first_tokens(docs, row)}
        for stratum in range(config.num_strata):
            inside = range(
                stratum * size // config.pool_factor, (stratum + 1) * size // config.pool_factor
            )
            count = len(windows & set(inside))
            if count > config.picks:
                raise ValueError(
                    f"documents begin in {count} windows of level 1 of stratum {stratum} of row "
                    f"{row}, of which m = topk / num_strata = {config.picks} are expanded: use "
                    f"topk >= {count * config.num_strata}, fewer strata, or merge short documents"
                )
