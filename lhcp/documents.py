"""Documents that are packed into one sequence, numbered on the device.

Users give `cu_seqlens`, flash-attn's form: first tokens of documents, in rows laid end to end. In
the library each token has two integers instead: the *number* of its document, counted over the
whole batch, and its *position* inside that document. A document is one run of tokens, so that
positions settle what belongs together, wherever the sequence is cut: token s, not after t, is of
t's document where t - s <= position of t.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """The documents of one rank's tokens, in layout order, on their device."""

    numbers: Tensor
    """[B, n] int32, ascending along the sequence; row b's count on after those of row b-1."""
    positions: Tensor
    """[B, n] int32: how many tokens of its document are before a token."""
    whole: Tensor
    """[B, 1, N] int32, the numbers of all ranks' tokens in the order of the sequence; heads share
    them."""
    limits: Tensor
    """int64 [3] on the CPU, the same on all ranks: see `limits_of`."""


class Cut(NamedTuple):
    """Which tokens of a batch of whole sequences a rank holds."""

    batch: int
    seqlen: int
    """N, tokens of a whole sequence."""
    num_chunks: int
    """Equal chunks of the whole sequence."""
    chunks: tuple[int, ...]
    """Those of this rank, in the order of its tokens."""


def number_tokens(starts: Tensor, cut: Cut, device: torch.device) -> Documents:
    """Return the documents of a rank's tokens from `Packing.starts`; nothing is waited for."""
    size = cut.seqlen // cut.num_chunks
    first = starts.to(device, non_blocking=True)
    rows = torch.arange(cut.batch, device=device)[:, None] * cut.seqlen
    all_tokens = rows + torch.arange(cut.seqlen, device=device)
    whole = torch.bucketize(all_tokens, first, right=True, out_int32=True) - 1
    own = [slice(c * size, (c + 1) * size) for c in cut.chunks]
    tokens, numbers = (torch.cat([x[:, run] for run in own], 1) for x in (all_tokens, whole))
    positions = (tokens - first[numbers]).int()
    return Documents(numbers, positions, whole[:, None], limits_of(starts, cut))


def limits_of(starts: Tensor, cut: Cut) -> Tensor:
    """Return how documents lie at most, int64 [3] on the CPU: what kernels and messages depend on.

    The documents that one chunk of a row holds tokens of; the tokens of one document; how many
    chunks before that of its last token a document begins. Rounded up to powers of two, so that
    there are few different ones over the steps of a run.
    """
    size = cut.seqlen // cut.num_chunks
    stops = torch.cat([starts[1:], torch.tensor([cut.batch * cut.seqlen], device="cpu")])
    first, last = starts // size, (stops - 1) // size
    num_chunks = cut.batch * cut.num_chunks
    begun = torch.bincount(first, minlength=num_chunks)
    # And the one that goes on, where none begins with the chunk.
    begins = torch.isin(torch.arange(num_chunks, device="cpu") * size, starts)
    most = (begun + ~begins).max(), (stops - starts).max(), (last - first).max()
    documents, longest, reach = (_power_of_two(int(x)) for x in most)
    fits = min(documents, size), min(longest, cut.seqlen), min(reach, cut.num_chunks - 1)
    return torch.tensor(fits, device="cpu")


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length() if at_least else 0
