"""What an attached model of transformers refuses, and in which words; on every rank."""

from typing import Any

import pytest
import torch

import lhcp
from lhcp.integrations import hf
from lhcp.testing.ranks import RankPool
from tests.integrations.hf_models import (
    BATCH,
    CONFIG,
    SEQLEN,
    VOCABULARY,
    attached,
    batch,
    make,
    transformers,
)

ONES = torch.ones(BATCH, SEQLEN, dtype=torch.int64)
CALLS = {
    "a padding mask": ({"attention_mask": ONES}, r"cp\.shard"),
    "a mask of its own": ({"attention_mask": ONES[:, None, None].bool()}, "takes none"),
    "no positions": ({"position_ids": None}, "count from 0"),
    "other positions": ({"position_ids": ONES.cumsum(1)}, "holds 0 there"),
    "packed documents": (
        {"position_ids": torch.arange(SEQLEN)[None] % 96},
        r"holds 96 there.*cu_seqlens_from_position_ids",
    ),
    "positions of another shape": ({"position_ids": torch.arange(SEQLEN)}, r"must be \[1, "),
    "documents that are not of the batch": (
        {"cu_seq_lens_q": torch.tensor([0, 9])},
        r"go to the attention as cu_seqlens.*cp\.shard",
    ),
    "positions of other documents": (
        {
            "position_ids": torch.arange(SEQLEN)[None] % 96,
            "cu_seqlens": torch.tensor([0, 95, SEQLEN, 2 * SEQLEN]),
        },
        "holds 96 there",
    ),
    "a loss of its own": ({"labels": ONES}, "shift them once more"),
    "a cache": ({"use_cache": True}, "decoding runs on one rank"),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_cannot_be_done_is_refused(call: str) -> None:
    model, cp = attached()
    wrong, message = CALLS[call]
    with pytest.raises(ValueError, match=message):
        model(**cp.shard(batch()) | wrong)
    model(**cp.shard(batch()))


def test_windows_and_dropout_are_refused() -> None:
    """On each side: a window as long as the sequence hides nothing; dropout is for training."""
    model, cp = attached("Mistral", sliding_window=SEQLEN, attention_dropout=0.1)
    model.eval()(**cp.shard(batch()))
    with pytest.raises(ValueError, match=r"dropout=0.1: must be 0"):
        model.train()(**cp.shard(batch()))
    model, cp = attached("Mistral", sliding_window=SEQLEN - 1)
    with pytest.raises(ValueError, match=f"sliding_window={SEQLEN - 1}: shorter than"):
        model(**cp.shard(batch()))


def test_models_that_cannot_attend_across_ranks_are_refused() -> None:
    """Fails if a model is changed that computes something else across ranks, or is left changed."""
    cp = lhcp.ContextParallel()
    with pytest.raises(TypeError, match="must be a model of transformers"):
        hf.attach(torch.nn.Linear(2, 2), cp, CONFIG)
    model, _ = attached()
    with pytest.raises(ValueError, match="attached already"):
        hf.attach(model, cp, CONFIG)
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = transformers.BertModel(transformers.BertConfig(**small, intermediate_size=48))
    with pytest.raises(ValueError, match="0 of them causally"):
        hf.attach(bert, cp, CONFIG)
    model = make("Llama")
    with pytest.raises(ValueError, match="are not layers"):
        hf.attach(model, cp, CONFIG, dense_layers=(7,))
    # Left as it was: it can be attached, and what it calls is its own.
    assert not any("lhcp" in name for name, _ in model.named_modules())
    model(batch()["input_ids"])
    by_name = make("Llama")
    by_name.set_attn_implementation("lhcp")
    with pytest.raises(ValueError, match=r"call lhcp\.integrations\.hf\.attach"):
        by_name(batch()["input_ids"])


def test_soft_capped_logits_are_refused() -> None:
    """Fails if what an architecture asks of its attention beside a mask is dropped."""
    model, cp = attached("Gemma2", sliding_window=SEQLEN)
    with pytest.raises(ValueError, match="softcap=50"):
        model(**cp.shard(batch()))


def test_a_model_that_scales_q_itself_is_refused() -> None:
    """Fails if q is scaled twice, or once too little."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    config = transformers.OPTConfig(**sizes, num_attention_heads=4, word_embed_proj_dim=32)
    model, cp = transformers.OPTForCausalLM(config).eval(), lhcp.ContextParallel()
    hf.attach(model, cp, None)
    with pytest.raises(ValueError, match=r"scaling=1\.0, and 0\.35.*as OPT, cannot be attached"):
        model(**cp.shard(batch()))


def rope_of(kind: str, known: int) -> dict[str, Any]:
    """Config of rotary embeddings that turn otherwise beyond `known` positions."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "dynamic":
        return {"rope_parameters": rope, "max_position_embeddings": known}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    return {"rope_parameters": rope | {"original_max_position_embeddings": known}}


def distance_or_refusal(group: Any, kind: str, known: int) -> float | str:
    """How far the logits of ranks are off the model's own, of the same frequencies."""
    model = make("Llama", torch.float64, head_dim=8, **rope_of(kind, known))
    cp = lhcp.ContextParallel(group)
    hf.attach(model, cp, None)
    whole = batch()
    try:
        with torch.no_grad():
            found = cp.unshard(model(**cp.shard(whole)).logits)
            hf.detach(model)
            expected = model(whole["input_ids"]).logits
    except ValueError as error:
        return str(error)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("kind", "known", "taken"),
    [
        ("dynamic", SEQLEN, True),
        ("dynamic", SEQLEN - 1, False),
        ("longrope", SEQLEN, True),
        # On two ranks, zigzag, one holds the first three quarters alone.
        ("longrope", 3 * SEQLEN // 4, False),
        ("longrope", 3 * SEQLEN // 4 - 1, True),
    ],
)
def test_ranks_turn_by_the_same_frequencies(
    ranks: RankPool, kind: str, known: int, taken: bool
) -> None:
    """Fails if each rank's rotary embeddings go by the largest position that it holds."""
    for found in ranks.run(distance_or_refusal, 2, kind, known):
        if taken:
            assert isinstance(found, float) and found < 1e-12
        else:
            assert f"rope_type='{kind}' and a sequence of {SEQLEN} tokens" in str(found)


def refusals(group: Any) -> list[str]:
    """What each rank hears of one rank's mistakes."""
    model, cp = make("Llama", torch.float32), lhcp.ContextParallel(group)
    hf.attach(model, cp, CONFIG)
    part = cp.shard(batch())
    local = {"position_ids": torch.arange(SEQLEN // cp.world_size)[None]}
    mask = {"attention_mask": torch.ones_like(part["input_ids"])}
    heard = []
    for wrong in (local, mask):
        try:
            model(**part | (wrong if cp.rank == 1 else {}))
        except ValueError as error:
            heard.append(str(error))
        # Shapes that are new, so that all ranks compare.
        part = {key: x[:1] for key, x in part.items()}
    return heard


def test_every_rank_hears_of_one_ranks_mistake(ranks: RankPool) -> None:
    """Fails if the other ranks wait for messages of one that has raised."""
    first, second = ranks.run(refusals, 2)
    assert "rank 1 of 2 cannot go on: ValueError: position_ids" in first[0]
    assert "rank 1 of 2 cannot go on: ValueError: attention_mask" in first[1]
    assert "token 0 has position [0], and rank 1 of 2 holds" in second[0]
    assert "of padding at the end `valid` is made" in second[1]
