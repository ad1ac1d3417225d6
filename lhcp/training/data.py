"""The data of a run: its text, the part of it that is held out, and the sequences of both."""

from dataclasses import dataclass

from lhcp.training.corpus import Corpus, Piece, cut_end, draw_files
from lhcp.training.files import Manifest, find_files, read_manifest, standard_library
from lhcp.training.sequences import Sequences


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on, and how much of it to hold out."""

    text: tuple[str, ...] = ()
    """Paths or globs (`**` goes into folders); none: the Python standard library's own sources."""
    heldout: float = 0.05
    """Share of the text's bytes that is never trained on, strictly between 0 and 1."""
    passkey: float = 0.0
    """Share of the training sequences that are passkey text (`lhcp.training.passkey`), 0 to 1. The
    held-out text has none."""
    documents: bool = False
    """Whether each file is a document of its own: attention stays inside it, and its last byte asks
    for none. Else the text runs on from file to file."""
    restart_positions: bool = False
    """Whether positions begin at 0 in each document; else in each sequence."""

    def __post_init__(self) -> None:
        if self.restart_positions and not self.documents:
            raise ValueError(
                "restart_positions=True without documents: text that runs on has one run of "
                "positions; set documents too, or neither"
            )
        if not 0 < self.heldout < 1:
            raise ValueError(f"heldout={self.heldout}: must lie between 0 and 1, for example 0.05")
        if not 0 <= self.passkey <= 1:
            raise ValueError(f"passkey={self.passkey}: must lie in 0 to 1, for example 0.25")


def open_corpus(config: DataConfig) -> tuple[Corpus, Corpus, Manifest]:
    """Return the training part, the held-out part and the manifest; no byte is in both parts.

    Files are held out whole, drawn by their names, as long as they fit into the held-out share of
    all bytes. Where files are too few or too large for that, the end of the text is held out.

    Raises:
        FileNotFoundError: a pattern names no file.
        ValueError: there is no text.
    """
    manifest = read_manifest(find_files(config.text) if config.text else standard_library())
    total = sum(file.size for file in manifest.files)
    if not total:
        named = ", ".join(config.text) or "the Python standard library (no .py files are installed)"
        raise ValueError(f"data.text: no text in {named}; name files with --data.text")
    chosen = draw_files(manifest, config.heldout)
    if chosen is not None:
        pieces = [(f in chosen, Piece(f.path, 0, f.size)) for f in manifest.files if f.size]
    else:
        pieces = cut_end(manifest, round(total * (1 - config.heldout)))
    train, heldout = (Corpus([p for out, p in pieces if out is part]) for part in (False, True))
    return train, heldout, manifest


@dataclass(frozen=True)
class TrainingData:
    """The text of a run: what it trains on, what it never sees, and the files that both are of."""

    train: Sequences
    heldout: Sequences
    manifest: Manifest


def open_data(config: DataConfig, seqlen: int, seed: int, shortest: int = 1) -> TrainingData:
    """Return the data of a run; every rank that calls it with the same files gets the same.

    Args:
        shortest: Bytes of the shortest document, if files are documents: see `Sequences`.

    Raises:
        FileNotFoundError: a pattern names no file.
        ValueError: there is no text, or a part of it is shorter than a sequence.
    """
    train, heldout, manifest = open_corpus(config)
    shortest = shortest if config.documents else 0
    return TrainingData(
        Sequences(train, seqlen, seed, passkey=config.passkey, shortest=shortest),
        Sequences(heldout, seqlen, seed, "held-out", shortest=shortest),
        manifest,
    )
