"""Scatter the sub-sequence's outputs back to the tokens, and its gradient.

Entry (l, i) serves positions i p**l + p**l - 1 to i p**l + 2 p**l - 2 of its chunk: from the last
token that it covers on. Position t therefore reads entry (t + 1) // p**l - 1 of each level; index
-1 is the last entry of the chunk before, whose row arrives as a *halo* (`lhcp/layer/boundary.py`).
With documents, given as positions [B, n] inside them, an entry serves those of its positions that
are in its own: each position judges by itself, also of what comes from the chunk before.
"""

import torch
from torch import Tensor

from lhcp.lighthouse.documents import of_last_tokens, served
from lhcp.lighthouse.gather import heads_of, rows_at
from lhcp.lighthouse.geometry import Geometry
from lhcp.precision import wide


def scatter(
    o: Tensor, row_of_entry: Tensor, geom: Geometry, positions: Tensor | None = None
) -> Tensor:
    """Sum, for each position, the rows of its entries in the same chunk, from level 0 upwards.

    Args:
        o: [B, S, H, D]. row_of_entry: [B, Hk, pyramid_size].

    Returns:
        [B, n, H, D] in the dtype of `o`, rounded once. What chunks owe each other is missing:
        `scatter_edges` completes the first p**(L-1) - 1 positions of each chunk.
    """
    total = rows_at(o, row_of_entry[..., : geom.num_tokens]).to(wide(o.dtype))
    chunked = total.unflatten(1, (geom.num_chunks, -1))
    for level in range(1, geom.num_levels):
        window = geom.window(level)
        into = chunked[:, :, window - 1 :]
        columns = slice(geom.offset(level), geom.offset(level + 1))
        rows = rows_at(o, row_of_entry[..., columns]).unflatten(1, (geom.num_chunks, -1))
        rows = rows.to(total.dtype).repeat_interleave(window, dim=2)[:, :, : into.shape[2]]
        if positions is not None:
            own = served(positions, level, geom).unflatten(1, (geom.num_chunks, -1))
            rows = rows.where(own[:, :, window - 1 :, None, None], 0)
        into += rows
    return total.to(o.dtype)


def scatter_edges(
    out: Tensor,
    o: Tensor,
    row_of_entry: Tensor,
    halo: Tensor,
    geom: Geometry,
    positions: Tensor | None = None,
) -> None:
    """Complete, in place, the positions that the last entries of the chunk before also serve.

    They are summed anew from level 0 upwards, so that the order of the sum and its one rounding do
    not depend on where chunks end.

    Args:
        out: [B, n, H, D] from `scatter`; overwritten at p**(L-1) - 1 positions a chunk.
        halo: [B, num_chunks, L-1, H, D], rows of the last entry of levels 1 to L-1 of the chunk
            before, zero where that entry is not in the sub-sequence.
    """
    edge = min(geom.window(geom.num_levels - 1) - 1, geom.chunk_size)
    chunked = out.unflatten(1, (geom.num_chunks, -1))
    position = torch.arange(edge, device=out.device)
    sum_dtype = wide(o.dtype)
    for chunk in range(geom.num_chunks):
        total: Tensor | None = None
        for level in range(geom.num_levels):
            index = (position + 1) // geom.window(level) - 1
            start = geom.offset(level) + chunk * geom.chunk_size // geom.window(level)
            rows = rows_at(o, row_of_entry[..., start + index.clamp(min=0)]).to(sum_dtype)
            if level > 0:
                owed = halo[:, chunk, level - 1][:, None].to(sum_dtype)
                rows = torch.where((index < 0)[None, :, None, None], owed, rows)
                if positions is not None:
                    own = served(positions, level, geom).unflatten(1, (geom.num_chunks, -1))
                    rows = rows.where(own[:, chunk, :edge, None, None], 0)
            total = rows if total is None else total + rows
        assert total is not None
        chunked[:, chunk, :edge] = total.to(out.dtype)


def scatter_backward(
    dout: Tensor, entries: Tensor, geom: Geometry, positions: Tensor | None = None
) -> Tensor:
    """Sum, for each entry, the rows of `dout` that it serves in its chunk: `scatter`'s gradient.

    Args:
        dout: [B, n, H, D]. entries: [B, Hk, S].

    Returns:
        [B, S, H, D] in the dtype of `dout`, rounded once.
    """
    by_chunk = dout.to(wide(dout.dtype)).unflatten(1, (geom.num_chunks, -1))
    pyramid = [by_chunk.flatten(1, 2)]
    sums = by_chunk
    for level in range(1, geom.num_levels):
        # sums[j] serves from the end of entry j of the level below: p of them, from the last child.
        p = geom.pool_factor
        if positions is not None:
            # A child's own sum is all that it has of the entry's document, or it has none of it.
            after_last = torch.arange(1, sums.shape[2] + 1, device=dout.device) % p
            first = of_last_tokens(positions, level - 1, geom).unflatten(1, (geom.num_chunks, -1))
            own = after_last * geom.window(level - 1) <= first
            sums = sums.where(own[..., None, None], 0)
        missing = sums.new_zeros(*sums.shape[:2], p - 1, *sums.shape[3:])
        rows = torch.cat([sums[:, :, p - 1 :], missing], 2).unflatten(2, (-1, p)).unbind(3)
        sums = rows[0]
        for row in rows[1:]:
            sums = sums + row
        pyramid.append(sums.flatten(1, 2))
    index = heads_of(entries, dout.shape[2]).expand(-1, -1, -1, dout.shape[3])
    return torch.cat(pyramid, 1).gather(1, index).to(dout.dtype)


def edge_grads(dout: Tensor, geom: Geometry, positions: Tensor | None = None) -> Tensor:
    """Sum, per chunk and level, the first p**level - 1 rows of `dout`: the halo's gradient.

    Returns:
        [B, num_chunks, L-1, H, D], float32 (float64 for float64).
    """
    by_chunk = dout.to(wide(dout.dtype)).unflatten(1, (geom.num_chunks, -1))
    if positions is not None:
        after_last = torch.arange(1, geom.chunk_size + 1, device=dout.device)
        own = after_last <= positions.unflatten(1, (geom.num_chunks, -1))
        by_chunk = by_chunk.where(own[..., None, None], 0)
    sums = [by_chunk[:, :, : geom.window(level) - 1].sum(2) for level in range(1, geom.num_levels)]
    return torch.stack(sums, 2)


def rows_of_last(row_of_entry: Tensor, geom: Geometry) -> Tensor:
    """Return the rows of each chunk's last entries, levels 1 to L-1: [B, Hk, num_chunks, L-1]."""
    # Slices, not an index tensor: a CUDA graph can capture them.
    columns = []
    for level in range(1, geom.num_levels):
        per_chunk = geom.chunk_size // geom.window(level)
        entries = row_of_entry[..., geom.offset(level) : geom.offset(level + 1)]
        columns.append(entries[..., per_chunk - 1 :: per_chunk])
    return torch.stack(columns, 3)


def last_rows(o: Tensor, row_of_entry: Tensor, geom: Geometry) -> Tensor:
    """Return what each chunk owes the next: rows of `o`, zero if absent, [B, chunks, L-1, H, D]."""
    last = rows_of_last(row_of_entry, geom)
    rows = rows_at(o, last.flatten(2))
    return rows.unflatten(1, last.shape[2:])


def add_last_grads(
    do: Tensor, dout: Tensor, received: Tensor, row_of_entry: Tensor, geom: Geometry
) -> None:
    """Complete, in place, the gradient of the rows that chunks owed each other.

    In its own chunk such an entry serves one position only, the chunk's last; the rest of its sum
    is `received`, so the whole is by_chunk wide here and rounded once.

    Args:
        do: [B, S, H, D] from `scatter_backward`; overwritten at the row_of_entry of `last_rows`.
        dout: [B, n, H, D]. received: [B, num_chunks, L-1, H, D], wide, zero where nothing was owed.
    """
    last = rows_of_last(row_of_entry, geom).flatten(2)
    own = dout.unflatten(1, (geom.num_chunks, -1))[:, :, -1][:, :, None].to(received.dtype)
    grads = (own + received).flatten(1, 2).to(do.dtype)
    index = heads_of(last, do.shape[2])
    # An absent entry writes row 0 back as it is: same bits, whatever the order of the writes.
    safe = index.clamp(min=0).expand_as(grads)
    do.scatter_(1, safe, torch.where(index >= 0, grads, do.gather(1, safe)))
