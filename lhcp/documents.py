"""Documents that are packed into one sequence: read on the host, numbered on the device.

Users give `cu_seqlens`, flash-attn's form: first tokens of documents, in rows laid end to end. In
the library each token has two integers instead: the *number* of its document, counted over the
whole batch, and its *position* inside that document. A document is one run of tokens, so that
positions settle what belongs together, wherever the sequence is cut: token s, not after t, is of
t's document where t - s <= position of t.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lhcp.checks import check_plain, shape_of
from lhcp.config import LighthouseConfig

T = TypeVar("T")


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


class Packing:
    """Where the documents of a batch begin, on the host; made by `read_packing`."""

    def __init__(self, starts: Tensor, batch: int, seqlen: int) -> None:
        self.starts = starts
        """[num_docs] int64 on the CPU, first tokens in rows laid end to end."""
        self.batch = batch
        self.seqlen = seqlen
        self._fits: set[tuple[LighthouseConfig, int]] = set()
        self._local: dict[tuple[Cut, torch.device], Documents] = {}
        self._limits: dict[Cut, tuple[int, ...]] = {}

    def __str__(self) -> str:
        """Return the documents in words, the same for equal ones."""
        return f"{len(self.starts)} documents of digest {self.digest:x}"

    @cached_property
    def digest(self) -> int:
        """A number below 2**64, the same on all ranks that were given equal ones."""
        said = str(self.starts.tolist()).encode()
        return int.from_bytes(blake2b(said, digest_size=8).digest(), "big")

    @property
    def divides_rows(self) -> bool:
        """Whether some row has more than one document: else there is nothing to keep apart."""
        return len(self.starts) > self.batch

    def local(self, cut: Cut, device: torch.device) -> Documents:
        """Return the documents of a rank's tokens; made once, so nobody may change them."""
        key = (cut, device)
        if key not in self._local:
            # Kept longer than whatever mode this call is made in.
            with torch.inference_mode(False), torch.no_grad():
                self._local[key] = Documents(*map(keep, number_tokens(self.starts, cut, device)))
        return self._local[key]

    def limits(self, cut: Cut) -> tuple[int, ...]:
        """Return `limits_of` these documents; found once."""
        if cut not in self._limits:
            self._limits[cut] = tuple(limits_of(self.starts, cut).tolist())
        return self._limits[cut]

    def check_fits(self, config: LighthouseConfig, num_chunks: int) -> None:
        """Check that each stratum can expand all windows in which a document begins.

        Args:
            num_chunks: of the whole sequence; what is offered divides over them.

        Raises:
            ValueError: it cannot, or the config does not fit the sequence.
        """
        if (config, num_chunks) in self._fits:
            return
        config.check_seqlen(self.seqlen)
        windows = torch.unique_consecutive(self.starts // config.pool_factor)
        counts = self._counts(windows, config, config.num_strata)
        over = (counts > config.picks).nonzero()
        if len(over):
            row, stratum = divmod(int(over[0]), config.num_strata)
            offers = self._offers(windows, config, int(counts.max()), num_chunks)
            raise ValueError(
                f"cu_seqlens: documents begin in {int(counts[over[0]])} windows of level 1 (of "
                f"{config.pool_factor} tokens) of stratum {stratum} of row {row}, and at most m = "
                f"topk / num_strata = {config.picks} can be expanded, so that each document's "
                f"first token has an entry: {offers}"
            )
        self._fits.add((config, num_chunks))

    def _counts(self, windows: Tensor, config: LighthouseConfig, num_strata: int) -> Tensor:
        """Count the windows of level 1 that begin a document, by stratum of all rows."""
        of_stratum = self.seqlen // num_strata // config.pool_factor
        return torch.bincount(windows // of_stratum, minlength=self.batch * num_strata)

    def _offers(self, windows: Tensor, config: LighthouseConfig, most: int, num_chunks: int) -> str:
        """Say what would fit."""
        picks = most + most % 2
        offers = []
        if picks * config.seqlen_multiple <= self.seqlen:
            offers.append(f"topk={picks * config.num_strata}")
        # A divisor's strata are unions of these, so the sequence still cuts into whole windows.
        for strata in range(config.num_strata - 1, 0, -1):
            if config.num_strata % strata or strata % num_chunks or config.topk % (2 * strata):
                continue
            if int(self._counts(windows, config, strata).max()) * strata <= config.topk:
                offers.append(f"num_strata={strata}")
                break
        return " or ".join([*offers, "merge short documents, or pack fewer into a sequence"])


_READ: Any = WeakIdKeyDictionary()
"""What was read from a tensor that is alive, with its version: once a step, not once a layer."""


_MADE: Any = WeakIdKeyDictionary()
"""What was made of a tensor that `keep` was given, by key, for as long as it is alive."""


def keep(x: Tensor) -> Tensor:
    """Return a tensor of documents, which nobody changes, so that `made_once` keeps what it makes.

    By the tensor itself: a copy of it, such as what a CUDA graph reads, is another.
    """
    if not torch.compiler.is_compiling():
        _MADE.setdefault(x, {})
    return x


def made_once(of: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """Return what `make` makes of a tensor of documents, once for all layers that are given it.

    Args:
        key: what is made; equal ones are the same.
        make: does not hold the tensor in what it returns, which would keep it alive.
    """
    made = None if torch.compiler.is_compiling() else _MADE.get(of)
    if made is None:
        return make()
    if key not in made:
        # Kept longer than whatever mode this call is made in.
        with torch.inference_mode(False), torch.no_grad():
            made[key] = make()
    found: T = made[key]
    return found


def read_packing(cu_seqlens: Tensor, batch: int, seqlen: int) -> Packing:
    """Read and check the bounds of documents; from a device they are copied once, and waited for.

    Args:
        cu_seqlens: int32 (or int64) [num_docs + 1], ascending from 0 to batch * seqlen: rows one
            after another, and each row begins a document.
        batch, seqlen: B rows of N tokens of the whole sequence.

    Raises:
        TypeError, ValueError: it is none of that.
    """
    check_plain("cu_seqlens", cu_seqlens)
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "cu_seqlens is given while a CUDA graph is recorded, which would keep these documents: "
            "use lhcp.graphed, which reads them anew at each call, or leave the attention out of "
            "the graph"
        )
    version = None if cu_seqlens.is_inference() else cu_seqlens._version
    known = _READ.get(cu_seqlens)
    if known is not None and known[0] == version:
        packing: Packing = known[1]
        if (packing.batch, packing.seqlen) == (batch, seqlen):
            return packing
    packing = Packing(_starts(cu_seqlens, batch, seqlen), batch, seqlen)
    if version is not None:
        _READ[cu_seqlens] = (version, packing)
    return packing


def _starts(cu_seqlens: Tensor, batch: int, seqlen: int) -> Tensor:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens is {shape_of(cu_seqlens)}: must be torch.int32")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens is {shape_of(cu_seqlens)}: must be [num_docs + 1], first tokens of "
            "documents in rows laid end to end, and the end"
        )
    bounds = cu_seqlens.detach().cpu().long()
    first, last, end = int(bounds[0]), int(bounds[-1]), batch * seqlen
    if first != 0 or last != end:
        raise ValueError(
            f"cu_seqlens goes from {first} to {last}: must go from 0 to {end}, the {batch} x "
            f"{seqlen} tokens of the whole sequences over all ranks; padding is a document too"
        )
    steps = bounds.diff()
    if int(steps.min()) < 1:
        at = int((steps < 1).nonzero()[0])
        raise ValueError(
            f"cu_seqlens[{at}:{at + 2}] is {bounds[at : at + 2].tolist()}: must ascend; "
            "lhcp.cu_seqlens_from_hugging_face leaves empty documents out"
        )
    rows = torch.arange(batch) * seqlen
    missing = rows[~torch.isin(rows, bounds)]
    if len(missing):
        raise ValueError(
            f"cu_seqlens lacks {int(missing[0])}, where row {int(missing[0]) // seqlen} begins: "
            f"each of the {batch} rows of {seqlen} tokens must begin a document"
        )
    return bounds[:-1].contiguous()


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
    stops = torch.cat([starts[1:], torch.tensor([cut.batch * cut.seqlen])])
    first, last = starts // size, (stops - 1) // size
    num_chunks = cut.batch * cut.num_chunks
    begun = torch.bincount(first, minlength=num_chunks)
    # And the one that goes on, where none begins with the chunk.
    begins = torch.isin(torch.arange(num_chunks) * size, starts)
    most = (begun + ~begins).max(), (stops - starts).max(), (last - first).max()
    documents, longest, reach = (_power_of_two(int(x)) for x in most)
    fits = min(documents, size), min(longest, cut.seqlen), min(reach, cut.num_chunks - 1)
    return torch.tensor(fits)


def _power_of_two(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length() if at_least else 0


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
    rows = torch.arange(batch + 1) * seqlen
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
    return torch.cat([starts, torch.tensor([ids.numel()])]).int()
