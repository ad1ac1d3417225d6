"""An attached model of transformers on a GPU; tests/integrations/test_hf.py is the rest."""

from typing import Any

import pytest
import torch

import lhcp
from lhcp.integrations import hf, hf_inputs
from lhcp.testing.inputs import small_config

transformers = pytest.importorskip("transformers")

CONFIG, SEQLEN = small_config()


def make(family: str) -> Any:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).cuda().to(torch.bfloat16)


def batch() -> Any:
    ids = torch.randint(64, (2, SEQLEN), generator=torch.Generator().manual_seed(1)).cuda()
    return lhcp.ContextParallel().shard({"input_ids": ids, "labels": ids})


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
def test_dense_logits_are_the_models_own(family):
    """Fails if an attached model errs more than twice as much as with torch's attention."""
    model, part = make(family), batch()
    with torch.no_grad():
        torchs = model(part["input_ids"]).logits.double()
        exact = make(family).double()(part["input_ids"]).logits
        hf.attach(model, lhcp.ContextParallel(), None)
        ours = model(**part).logits.double()
    assert (ours - exact).norm() <= 2 * (torchs - exact).norm()


@pytest.mark.parametrize("graphed", [False, True])
def test_documents_are_kept_apart(graphed):
    """Fails if bounds on the device are not those of a graph's call, or a token sees another
    document: transformers itself keeps them apart where positions restart."""
    model, ids = make("Llama"), batch()["input_ids"]
    hf.attach(model, lhcp.ContextParallel(), None)
    graphs = lhcp.graphed(model, always=True) if graphed else None
    for first in (100, 131, 100):
        bounds = torch.tensor([0, first, SEQLEN, SEQLEN + 5, 2 * SEQLEN])
        places = torch.cat([torch.arange(size) for size in bounds.diff().tolist()]).view(2, -1)
        whole = {"input_ids": ids, "position_ids": places.cuda(), "cu_seq_lens_q": bounds.cuda()}
        with torch.no_grad():
            own = {"position_ids": places.cuda(), "use_cache": False}
            torchs, exact = (m(ids, **own).logits.double() for m in (make("Llama"), exact_model()))
            ours = model(**lhcp.ContextParallel().shard(whole)).logits.double()
        assert (ours - exact).norm() <= 2 * (torchs - exact).norm()
    if graphs is not None:
        graphs.release()


def exact_model() -> Any:
    return make("Llama").double()


@pytest.mark.parametrize("graphed", [False, True])
def test_lighthouse_gradients_are_there(graphed):
    """Fails if a stage of the layer cannot take what transformers hands it, or graphs what it keeps
    between a projection and the attention."""
    model, cp = make("Qwen3"), lhcp.ContextParallel()
    hf.attach(model, cp, CONFIG, dense_layers=(0,))
    graphs = lhcp.graphed(model, always=True) if graphed else None
    norms = []
    for _ in range(4):
        model.zero_grad()
        part = batch()
        cp.loss(model(**part).logits, part["shift_labels"], over=None).backward()
        norms.append(torch.stack([x.grad.norm() for x in model.parameters()]).norm().item())
    assert norms[0] > 0 and norms == pytest.approx([norms[0]] * 4, rel=1e-3)
    if graphs is not None:
        graphs.release()


def test_positions_are_compared_at_the_first_call_of_a_shape(monkeypatch):
    """Fails if the host waits for the GPU at every call, or never looks."""
    model, looked = make("Llama"), []
    hf.attach(model, lhcp.ContextParallel(), CONFIG)
    own = hf_inputs.first_wrong
    monkeypatch.setattr(hf_inputs, "first_wrong", lambda *x: looked.append(x) or own(*x))
    part = batch()
    for _ in range(3):
        model(**part)
    assert len(looked) == 1
    model(**{name: x[:1] for name, x in part.items()})
    assert len(looked) == 2
