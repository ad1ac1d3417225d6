"""What `ContextParallel.shard` makes of a batch: keys, labels, positions, masks, refusals."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import lhcp
from lhcp.comm.layout import LayoutName
from lhcp.testing.ranks import RankPool
from tests.cases import LAYOUTS, together

N = 16


def ids() -> Tensor:
    return torch.arange(2 * N).view(2, N) + 100


def batch(**more: Any) -> dict[str, Any]:
    return {"input_ids": ids(), "labels": ids() + 1000, **more}


def cut(group: Any, layout: LayoutName, whole: Any, pad_to: int | None = None) -> Any:
    return lhcp.ContextParallel(group, layout=layout).shard(whole, pad_to=pad_to)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_labels_are_those_of_the_next_token_of_the_whole_sequence(
    ranks: RankPool, layout: LayoutName, world_size: int
) -> None:
    """Fails if labels are shifted inside a rank's part, or positions are those of the part."""
    parts = ranks.run(cut, world_size, layout, batch())
    found = {key: together([part[key] for part in parts], layout) for key in parts[0]}
    assert found.keys() == {"input_ids", "shift_labels", "position_ids"}
    assert torch.equal(found["input_ids"], ids())
    assert torch.equal(found["position_ids"], torch.arange(N)[None])
    assert torch.equal(found["shift_labels"][:, :-1], ids()[:, 1:] + 1000)
    assert (found["shift_labels"][:, -1] == -100).all()


def test_labels_that_are_shifted_already_are_only_cut() -> None:
    found = lhcp.ContextParallel().shard({"input_ids": ids(), "shift_labels": ids() + 1})
    assert torch.equal(found["shift_labels"], ids() + 1)


def test_what_has_no_sequence_is_kept_and_what_has_one_is_cut(ranks: RankPool) -> None:
    """Fails if a tensor of the sequence stays whole, or one without it is cut."""
    more = {"weights": torch.rand(2, N), "row": torch.arange(2), "name": "x", "image": ids()[:, :3]}
    parts = ranks.run(cut, 2, "zigzag", batch(**more))
    for part in parts:
        assert part["name"] == "x" and torch.equal(part["row"], more["row"])
        assert torch.equal(part["image"], more["image"])
    assert torch.equal(together([p["weights"] for p in parts], "zigzag"), more["weights"])


def test_embeddings_in_the_place_of_tokens() -> None:
    """Fails if an embedding as wide as the sequence is long is taken for a mask."""
    x = torch.rand(2, N, N)
    found = lhcp.ContextParallel().shard({"inputs_embeds": x})
    assert torch.equal(found["inputs_embeds"], x)


def test_the_caller_s_batch_is_not_changed() -> None:
    whole = batch(attention_mask=torch.ones(2, N, dtype=torch.long))
    before = {key: x.clone() for key, x in whole.items()}
    lhcp.ContextParallel().shard(whole, pad_to=N + 2)
    assert whole.keys() == before.keys()
    assert all(torch.equal(whole[key], before[key]) for key in whole)


def test_padding_has_no_label_and_is_not_valid() -> None:
    """Fails if the last real token is asked for the padding, or padding for anything."""
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, 10:] = 0
    found = lhcp.ContextParallel().shard(batch(attention_mask=mask))
    assert "attention_mask" not in found
    assert torch.equal(found["valid"], mask.bool())
    labels = found["shift_labels"]
    assert (labels[1, 9:] == -100).all() and (labels[1, :9] == ids()[1, 1:10] + 1000).all()
    assert (labels[0, :-1] == ids()[0, 1:] + 1000).all()


@pytest.mark.parametrize("shifted", [False, True])
def test_padding_to_a_length(ranks: RankPool, shifted: bool) -> None:
    """Fails if padding is not at the end of the whole sequence, has labels, or has no position."""
    whole = {"input_ids": ids(), "shift_labels" if shifted else "labels": ids() + 1000}
    parts = ranks.run(cut, 2, "zigzag", whole, N + 8)
    found = {key: together([part[key] for part in parts], "zigzag") for key in parts[0]}
    assert all(x.shape[1] == N + 8 for x in found.values())
    assert torch.equal(found["valid"], (torch.arange(N + 8) < N).expand(2, -1))
    assert (found["shift_labels"][:, N:] == -100).all()
    assert bool((found["shift_labels"][:, N - 1] == -100).all()) != shifted
    assert torch.equal(found["position_ids"], torch.arange(N + 8)[None])
    assert torch.equal(found["input_ids"][:, :N], ids()) and not found["input_ids"][:, N:].any()


LEFT = torch.ones(2, N, dtype=torch.long)
LEFT[0, 0] = 0
PACKED = torch.arange(N).remainder(8)[None].expand(2, N)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"input_ids": [1, 2]}, "is a list: must be a tensor"),
        ({"input_ids": torch.arange(N)}, r"must be \[B, N\]"),
        ({"input_ids": ids(), "labels": ids()[:, 1:]}, "must be one length"),
        ({"input_ids": ids(), "labels": ids(), "shift_labels": ids()}, "pass one"),
        ({"tokens": ids()}, "one of input_ids, inputs_embeds, labels, shift_labels"),
        (batch(attention_mask=LEFT), "padding_side"),
        (batch(attention_mask=torch.ones(2, 1, N, N)), r"must be \[B, N\]"),
        (batch(bias=torch.zeros(2, 1, N, N)), "no mask or bias"),
        (batch(cache_position=torch.arange(N)), "an axis other than the second"),
        (batch(position_ids=PACKED), "cu_seqlens_from_position_ids"),
        (batch(cu_seqlens=torch.tensor([0, 8, 16])), "goes from 0 to 16: must go from 0 to 32"),
        (batch(valid=torch.ones(2, N)), "pass attention_mask"),
        ([1, 2], "must be a tensor or a mapping"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_be_cut_is_refused_in_words(wrong: Any, message: str) -> None:
    """Fails if a batch is cut that attention or the loss would then take for another."""
    with pytest.raises((TypeError, ValueError), match=message):
        lhcp.ContextParallel().shard(wrong)


def test_pad_to_less_than_there_is() -> None:
    with pytest.raises(ValueError, match="pad_to=8: must be at least the 16"):
        lhcp.ContextParallel().shard(batch(), pad_to=8)


def each_its_own(group: Any, what: str) -> list[str]:
    """What a rank is told whose sequences, or mistakes, are its own; then whether it goes on."""
    cp, rank = lhcp.ContextParallel(group), group.rank()
    told = []
    mine = batch() if what == "none" or rank == 0 else batch(**{what: ids() + rank})
    for whole in (mine, batch()):
        try:
            cp.shard(whole)
            told.append("")
        except ValueError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("what", ["input_ids", "labels", "cu_seqlens"])
def test_ranks_with_other_sequences_are_told(ranks: RankPool, what: str) -> None:
    """Fails if a sampler that gives each rank its own sequences goes unseen, or a rank hangs."""
    told = ranks.run(each_its_own, 2, what)
    assert "rank 1" in told[0][0].lower() and told[1][0]
    assert [second for _, second in told] == ["", ""]


def test_equal_sequences_agree(ranks: RankPool) -> None:
    assert ranks.run(each_its_own, 2, "none") == [["", ""]] * 2


def in_a_worker(group: Any) -> tuple[str, bool]:
    """What is said in a worker of a data loader, and whether a tensor alone is cut there."""
    cp = lhcp.ContextParallel(group)
    with mock.patch.object(torch.utils.data, "get_worker_info", lambda: "a worker"):
        part = cp.shard(ids())
        try:
            cp.shard(batch())
        except ValueError as error:
            return str(error), torch.equal(cp.unshard(part), ids())
    return "", False


def test_a_worker_of_a_loader_does_not_talk_to_ranks(ranks: RankPool) -> None:
    """Fails if a fork uses the connections of its rank: answers then go to the wrong one."""
    for said, cut_alone in ranks.run(in_a_worker, 2):
        assert "call it in the training loop" in said and cut_alone
    # One rank has nobody to talk to: a loader may do it all.
    loader = DataLoader([ids()], num_workers=1, collate_fn=lambda x: cut(None, "zigzag", batch()))
    assert [part["input_ids"].shape for part in loader] == [(2, N)]
