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
from lhcp.testing.ranks import RankPool
from tests.integrations.hf_models import (
    BATCH,
    CONFIG,
    FAMILIES,
    SEQLEN,
    attached,
    batch,
    make,
)


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
