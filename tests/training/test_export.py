"""The exported decoder is the same Llama: by plain torch, and by transformers where it is there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lhcp import LighthouseAttention
from lhcp.training import checkpoint
from lhcp.training.byte_tokenizer import byte_names, tokenizer
from lhcp.training.data import DataConfig, open_data
from lhcp.training.export import export, model_tensors
from lhcp.training.identity import identity
from lhcp.training.llama import llama_config, llama_tensors
from lhcp.training.model import Decoder
from lhcp.training.model_config import ModelConfig
from lhcp.training.parallel import build
from lhcp.training.run import Run
from tests.training import plain_llama

# No two widths are equal, so that none can stand for another.
GROUPED = ModelConfig(
    dim=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    dense_layers=(1,),
    vocab_size=300,
    rope_theta=500.0,
    norm_eps=1e-2,
)


def dense(always_dense: bool) -> nn.Module:
    return LighthouseAttention(None)


def drawn(config: ModelConfig) -> Decoder:
    """A float64 model whose every weight counts: norms and products of about one."""
    model = Decoder(config, dense).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
        parameter.data.normal_(0.0, scale, generator=generator)
    return model


def some_ids(config: ModelConfig, length: int = 33) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(config.vocab_size, (2, length), generator=generator)


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_plain_torch_computes_the_same_logits(tied: bool) -> None:
    """Fails if a tensor, a pair of RoPE, eps, theta or a head is not what Llama takes it for."""
    config = replace(GROUPED, tied=tied)
    model, ids = drawn(config), some_ids(config)
    tensors = llama_tensors(config, model.state_dict())
    assert ("lm_head.weight" in tensors) is not tied
    settings = json.loads(json.dumps(llama_config(config, 64, torch.float64)))
    expected = model(ids, torch.arange(ids.shape[1]))
    # The decoder's RoPE table is float32.
    torch.testing.assert_close(
        plain_llama.logits(settings, tensors, ids), expected, rtol=0, atol=1e-5
    )
    assert float(expected.detach().std()) > 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"blocks.0.attention.q_norm.weight": torch.ones(8)}, "q_norm.*no place"),
        (lambda s: {n: t for n, t in s.items() if n != "norm.weight"}, "norm.weight: .*lacks"),
        (lambda s: s | {"head.weight": s["head.weight"] + 1}, "though the model is tied"),
    ],
    ids=["more", "less", "untied"],
)
def test_what_llama_cannot_express_is_refused(change: object, message: str) -> None:
    config = replace(GROUPED, tied=True)
    state = drawn(config).state_dict()
    with pytest.raises(ValueError, match=message):
        llama_tensors(config, change(state))  # type: ignore[operator]


def test_bytes_have_names_of_their_own() -> None:
    """Fails if two bytes share a name, or one is not GPT-2's."""
    names = byte_names()
    assert len(set(names)) == 256 and names[ord("a")] == "a"
    assert (names[0], names[32], names[10], names[255]) == ("Ā", "Ġ", "Ċ", "ÿ")
    assert tokenizer()["model"]["vocab"]["Ġ"] == 32


@pytest.fixture
def run(small_run: Run, tmp_path: Path) -> Run:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 127)) * 400)
    return replace(small_run, data=DataConfig(text=(str(text),), heldout=0.2))


def saved(run: Run, folder: Path, step: int) -> Path:
    """Write a checkpoint of the untrained model after `step` steps."""
    trainee = build(run, torch.device("cpu"))
    manifest = open_data(run.data, run.seqlen, run.seed).manifest
    beside = {"identity": identity(run, run.stages, manifest, torch.float32, step)}
    return checkpoint.save(folder, step, trainee.model, trainee.optimizer, beside=beside, keep=5)


@pytest.mark.usefixtures("one_rank")
def test_weights_come_from_the_checkpoint(run: Run, tmp_path: Path) -> None:
    """Fails if a tensor is not read, or a model of other sizes is taken for this one."""
    path = saved(run, tmp_path / "arm", 5)
    found = model_tensors(path, run.model)
    expected = Decoder(run.model, dense)
    expected.initialize(run.seed)
    state = expected.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    with pytest.raises(ValueError, match=r"no decoder of its own sizes: .*blocks"):
        model_tensors(path, replace(run.model, num_layers=3))


@pytest.mark.usefixtures("one_rank")
def test_a_model_before_its_recovery_is_refused(run: Run, tmp_path: Path) -> None:
    """Fails if a model that has only attended sparsely is handed out as a dense one."""
    pytest.importorskip("safetensors")
    saved(run, tmp_path / "arm", 3)
    with pytest.raises(ValueError, match=r"last stage is lighthouse.*--any-stage"):
        export(tmp_path / "arm", tmp_path / "out")
    export(tmp_path / "arm", tmp_path / "out", any_stage=True)
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.usefixtures("one_rank")
def test_a_folder_has_what_its_readers_need(run: Run, tmp_path: Path) -> None:
    """Fails if a file is missing, or the folder's files alone do not give the model's logits."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = saved(run, tmp_path / "arm", 5)
    out = tmp_path / "out"
    assert export(tmp_path / "arm", out) == path
    settings = json.loads((out / "config.json").read_text())
    tensors = {n: t.double() for n, t in safetensors.load_file(out / "model.safetensors").items()}
    model = Decoder(run.model, dense)
    model.load_state_dict(model_tensors(path, run.model))
    ids = some_ids(run.model)
    expected = model.double()(ids, torch.arange(ids.shape[1]))
    torch.testing.assert_close(
        plain_llama.logits(settings, tensors, ids), expected, rtol=0, atol=1e-6
    )
    assert "id is the byte" in (out / "README.md").read_text()
    export(tmp_path / "arm", out, dtype=torch.bfloat16)
    (dtype,) = {t.dtype for t in safetensors.load_file(out / "model.safetensors").values()}
    assert dtype == torch.bfloat16


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_stock_transformers_reads_it(run: Run, tmp_path: Path, tied: bool) -> None:
    """Fails if LlamaForCausalLM needs more than the folder, or computes other logits or bytes."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    run = replace(run, model=replace(run.model, tied=tied, rope_theta=500.0))
    path = saved(run, tmp_path / "arm", 5)
    export(path, tmp_path / "out")
    stock, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model = Decoder(run.model, dense)
    model.load_state_dict(model_tensors(path, run.model))
    ids = some_ids(run.model)
    expected = model(ids, torch.arange(ids.shape[1]))
    assert float(expected.detach().std()) > 1e-3
    torch.testing.assert_close(stock(ids).logits, expected, rtol=0, atol=1e-6)
    grown = stock.generate(ids[:1], max_new_tokens=5, do_sample=False)
    for at in range(ids.shape[1], grown.shape[1]):
        before = grown[:, :at]
        assert model(before, torch.arange(at))[0, -1].argmax() == grown[0, at]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "def é(x):\n\treturn 'ü' "
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
