"""Models of transformers, randomly initialised, attend across ranks as on one."""

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import lhcp
from lhcp.comm.layout import LayoutName
from lhcp.integrations import hf
from lhcp.layer.module import Mode
from lhcp.testing.inputs import small_config
from lhcp.testing.ranks import RankPool

transformers = pytest.importorskip("transformers")

CONFIG, SEQLEN = small_config(num_strata=8)
VOCABULARY, BATCH = 64, 2
FAMILIES = ("Llama", "Qwen3", "Mistral")


def make(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model of four query heads and two kv heads, the same on every rank."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
    }
    config = getattr(transformers, f"{family}Config")(**sizes | options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    # Larger than transformers' 0.02, with which attention is nearly uniform and forgives anything.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model.to(dtype)


def batch(seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def packed(restart: bool) -> dict[str, Tensor]:
    """Documents of two rows, as transformers' collator of flattened samples gives them."""
    middle = SEQLEN // 2
    bounds = [0, 5, middle + 3, SEQLEN, SEQLEN + middle - 1, 2 * SEQLEN]
    places = torch.cat([torch.arange(size) for size in torch.tensor(bounds).diff().tolist()])
    positions = {"position_ids": places.view(BATCH, SEQLEN)} if restart else {}
    lengths = torch.tensor(bounds, dtype=torch.int32)
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 9, **positions}


def step(group: Any, family: str, mode: Mode, layout: LayoutName = "zigzag", **more: Any) -> Any:
    """Logits of the whole sequence and whole gradients, on the ranks of `group`."""
    cp = lhcp.ContextParallel(group, layout=layout)
    model = make(family)
    # The first layer is dense: equal tokens have equal scores there, and rounding ranks them.
    hf.attach(model, cp, CONFIG, dense_layers=(0,))
    lhcp.set_mode(model, mode, dense_layers=(0,))
    if more.get("recompute"):
        model.gradient_checkpointing_enable()
    model.train()
    whole = batch() | (packed(more["restart"]) if "restart" in more else {})
    part = cp.shard(whole)
    logits = model(**part).logits
    cp.loss(logits, part["shift_labels"], over=group).backward()
    grads = {name: x.grad for name, x in model.named_parameters()}
    if group is not None:
        for grad in grads.values():
            dist.all_reduce(grad, group=group)
            grad /= cp.world_size
    return cp.unshard(logits.detach()), grads


@lru_cache
def on_one_rank(family: str, mode: Mode) -> Any:
    return step(None, family, mode)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_are_the_models_own(family: str) -> None:
    """Fails if scale, mask, heads or order of axes differ from the model's own attention."""
    for own, dtype, budget in (("sdpa", torch.float64, 1e-13), ("eager", torch.float32, 1e-5)):
        model = make(family, dtype)
        model.set_attn_implementation(own)
        with torch.no_grad():
            expected = model(batch()["input_ids"]).logits
            hf.attach(model, lhcp.ContextParallel(), None)
            found = model(**lhcp.ContextParallel().shard(batch())).logits
        assert (found - expected).norm() <= budget * expected.norm()


EXPERTS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def logits_of_experts(group: Any, family: str) -> tuple[Tensor, Tensor]:
    """Logits of a model's own attention and of ours, in float32, which experts need on a CPU."""
    model = make(family, torch.float32, **EXPERTS[family]).eval()
    cp, whole = lhcp.ContextParallel(group), batch()
    with torch.no_grad():
        expected = model(whole["input_ids"]).logits
        hf.attach(model, cp, None)
        out = model(**cp.shard(whole), output_router_logits=True)
    assert len(out.router_logits) == 3 and out.aux_loss > 0
    return cp.unshard(out.logits), expected


@pytest.mark.parametrize("family", EXPERTS)
def test_models_with_experts_attend_across_ranks(ranks: RankPool, family: str) -> None:
    """Fails if what such a model hands to its attention about routers is taken for its business."""
    for found, expected in ranks.run(logits_of_experts, 2, family):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
@pytest.mark.parametrize(
    ("family", "world_size", "layout", "recompute"),
    [
        ("Llama", 2, "contiguous", False),
        ("Llama", 4, "zigzag", True),
        ("Qwen3", 2, "zigzag", True),
        ("Qwen3", 4, "zigzag", False),
        ("Mistral", 2, "zigzag", False),
    ],
)
def test_logits_and_gradients_are_one_ranks(
    ranks: RankPool, family: str, world_size: int, layout: LayoutName, recompute: bool, mode: Mode
) -> None:
    """Fails if positions, selection, messages or the loss depend on the ranks.

    transformers' norms compute in float32 whatever the model's dtype, so that is the budget.
    """
    expected, grads = on_one_rank(family, mode)
    whole = torch.stack([g.norm() for g in grads.values()]).norm()
    for logits, found in ranks.run(_step_on, world_size, family, mode, layout, recompute):
        assert (logits - expected).norm() <= 1e-6 * expected.norm()
        norm = torch.stack([g.norm() for g in found.values()]).norm()
        assert norm.item() == pytest.approx(whole.item(), rel=1e-6)
        for name, grad in grads.items():
            assert (found[name] - grad).norm() <= 1e-6 * whole, name


def _step_on(group: Any, family: str, mode: Mode, layout: LayoutName, recompute: bool) -> Any:
    return step(group, family, mode, layout, recompute=recompute)


def test_dense_logits_of_documents_are_the_models_own() -> None:
    """Fails if a document's tokens see another's, as transformers itself keeps them apart where
    positions restart."""
    model, documents = make("Llama"), packed(True)
    with torch.no_grad():
        whole = batch()
        positions = documents["position_ids"]
        # With a cache it takes them for one text.
        expected = model(whole["input_ids"], position_ids=positions, use_cache=False).logits
        hf.attach(model, lhcp.ContextParallel(), None)
        found = model(**lhcp.ContextParallel().shard(whole | documents)).logits
    assert (found - expected).norm() <= 1e-13 * expected.norm()


@pytest.mark.parametrize("mode", ["lighthouse", "dense"])
@pytest.mark.parametrize(("family", "restart"), [("Llama", True), ("Qwen3", False)])
def test_documents_are_one_ranks(ranks: RankPool, family: str, restart: bool, mode: Mode) -> None:
    """Fails if bounds are lost on the way to a layer, are read as this rank's own, or positions
    that restart are refused or not kept."""
    expected, grads = step(None, family, mode, restart=restart)
    without = step(None, family, mode)[0]
    assert (without - expected).norm() > 0.01 * expected.norm()
    whole = torch.stack([g.norm() for g in grads.values()]).norm()
    for logits, found in ranks.run(_documents_on, 2, family, mode, restart):
        assert (logits - expected).norm() <= 1e-6 * expected.norm()
        for name, grad in grads.items():
            assert (found[name] - grad).norm() <= 1e-6 * whole, name


def _documents_on(group: Any, family: str, mode: Mode, restart: bool) -> Any:
    return step(group, family, mode, restart=restart, recompute=True)


def attached(family: str = "Llama", **options: Any) -> tuple[Any, lhcp.ContextParallel]:
    model, cp = make(family, torch.float32, **options), lhcp.ContextParallel()
    hf.attach(model, cp, CONFIG)
    return model, cp


def test_kv_heads_are_not_repeated_and_every_layer_is_ours() -> None:
    """Fails if a layer attends by another function, or keys travel once for each query head."""
    model, cp = attached()
    heads = []
    for layer in model.modules():
        if isinstance(layer, lhcp.LighthouseAttention):
            layer.register_forward_pre_hook(lambda _, qkv: heads.append([x.shape[2] for x in qkv]))
    model(**cp.shard(batch()))
    assert heads == [[4, 2, 2]] * 3


def test_modes_and_dense_layers_are_set_mode_s() -> None:
    """Fails if an attached model does not switch as any other."""
    model = make("Llama")
    hf.attach(model, lhcp.ContextParallel(), CONFIG, dense_layers=(0, -1))
    assert lhcp.set_mode(model, "lighthouse", dense_layers=(1,)) == 2
    assert lhcp.set_mode(model, "dense") == 0
    hf.detach(model)
    hf.attach(model, lhcp.ContextParallel(), CONFIG, dense_layers=(0, -1))
    layers = [x for x in model.modules() if isinstance(x, lhcp.LighthouseAttention)]
    assert [x.mode for x in layers] == ["dense", "lighthouse", "dense"]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_taken_before_a_norm_of_q_and_k(family: str) -> None:
    """Fails if Qwen3 is scored on norms that say nothing, or a model without such a norm on others.

    Rotary embeddings keep norms: Llama's projections have those of q and k.
    """
    model, cp = attached(family)
    layer = model.model.layers[1].self_attn
    seen: dict[str, Tensor] = {}
    layer.q_proj.register_forward_hook(lambda *x: seen.update(projected=x[2]))
    layer.lhcp.layer.register_forward_pre_hook(
        lambda _, qkv, options: seen.update(q=qkv[0], **options), with_kwargs=True
    )
    model(**cp.shard(batch()))
    norms = seen["projected"].unflatten(-1, (4, 8)).norm(dim=-1)
    normalises = family == "Qwen3"
    assert ("score_q" in seen) == ("score_k" in seen) == normalises
    scored = seen["score_q"] if normalises else seen["q"]
    assert torch.allclose(scored.norm(dim=-1), norms, rtol=1e-5)
    spread = seen["q"].norm(dim=-1).std() / seen["q"].norm(dim=-1).mean()
    assert (spread < 1e-3) == normalises and norms.std() / norms.mean() > 0.1


def test_a_compiled_model_computes_the_same() -> None:
    """Fails if hooks that keep, or checks, break the graph, or are traced away."""
    model, cp = attached("Qwen3")
    part = cp.shard(batch())
    expected = model(**part).logits
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**part).logits, expected)


def test_padding_changes_no_real_token() -> None:
    """Fails if `valid` is lost between the batch and the selection."""
    model, cp = attached()
    whole, real = batch(), SEQLEN - 70
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    whole["attention_mask"][:, real:] = 0
    found = []
    for pad in (0, 17):
        whole["input_ids"] = whole["input_ids"].clone()
        whole["input_ids"][:, real:] = pad
        found.append(model(**cp.shard(whole)).logits[:, :real])
    assert torch.equal(*found)


def test_a_copy_attends_and_scores_on_its_own() -> None:
    """Fails if the hooks of a copy, such as an average of weights, keep into the original."""
    model, cp = attached("Qwen3")
    with torch.no_grad():
        expected = model(**cp.shard(batch())).logits
        other = copy.deepcopy(model)
        assert torch.equal(other(**cp.shard(batch())).logits, expected)
        hf.detach(model)
        assert torch.equal(other(**cp.shard(batch())).logits, expected)


def test_detached_is_what_it_was(tmp_path: Path) -> None:
    """Fails if generate, the state dict, a saved model, hooks or the config show that it was."""
    model = make("Qwen3", torch.float32)
    before, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    prompt = {"input_ids": batch()["input_ids"][:, :9]}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    expected = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    implementation = model.config._attn_implementation
    hf.attach(model, lhcp.ContextParallel(), CONFIG)
    assert list(model.state_dict()) == before
    with pytest.raises(ValueError, match=r"detach\(model\) before generate"):
        model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    hf.detach(model)
    assert [name for name, _ in model.named_modules()] == names
    assert model.config._attn_implementation == implementation and model.config.use_cache
    for loaded in (model, again):
        found = loaded.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(found, expected)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    with pytest.raises(ValueError, match="not attached"):
        hf.detach(model)


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
