"""Bounds of documents that a user gives: read on the host, checked, and what is known of them."""

from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lhcp.checks import check_plain, shape_of
from lhcp.config import LighthouseConfig
from lhcp.documents import Cut, Documents, limits_of, number_tokens
from lhcp.made_once import keep


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
    rows = torch.arange(batch, device="cpu") * seqlen
    missing = rows[~torch.isin(rows, bounds)]
    if len(missing):
        raise ValueError(
            f"cu_seqlens lacks {int(missing[0])}, where row {int(missing[0]) // seqlen} begins: "
            f"each of the {batch} rows of {seqlen} tokens must begin a document"
        )
    return bounds[:-1].contiguous()
