"""README's lines for Hugging Face's stacks run as they stand there, and train."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lhcp
from lhcp.integrations import hf
from lhcp.testing.ranks import RankPool
from tests.launch.test_readme import CP, FSDP2, HF, ONCE, SEQLEN, STEP, answer, tokens

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]

BECOMES = {
    "model = Model(attention=lambda: cp.attention(config))": "",
    'lhcp.set_mode(model, "lighthouse", dense_layers=(0, 1, -2, -1))': "",
    "model.blocks": "model.model.layers",
    'model(batch["input_ids"], batch["position_ids"])': "model(**batch).logits",
}
"""What a user of transformers has in the place of README's lines, as it says there."""


def make() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double()


def for_transformers(program: str) -> str:
    for stands, becomes in BECOMES.items():
        program = program.replace(stands, becomes)
    return program


def run(group: Any, program: str) -> tuple[float, float]:
    """Run README's lines on this rank of 2 x CP."""
    mine = tokens().chunk(2)[torch.distributed.get_rank() // CP]
    scope: dict[str, Any] = {
        "model": make(),
        "dp_size": 2,
        "cp_size": CP,
        "seqlen": SEQLEN,
        "batch": {"input_ids": mine, "labels": mine, "attention_mask": torch.ones_like(mine)},
    }
    exec(program.replace('"cuda"', '"cpu"'), scope)
    return answer(scope)


def test_the_lines_for_transformers_train_as_one_rank(ranks: RankPool) -> None:
    """Fails if a line does not run, or loss and gradient are not those of one rank."""
    assert all(any(stands in x for x in (ONCE, FSDP2, STEP)) for stands in BECOMES)
    program = for_transformers(ONCE + HF + FSDP2 + STEP)
    cp, model = lhcp.ContextParallel(), make()
    config = lhcp.LighthouseConfig.fit(SEQLEN, CP)
    hf.attach(model, cp, config, dense_layers=(0, 1, -2, -1))
    batch = {"input_ids": tokens(), "labels": tokens()}
    scope = {"cp": cp, "mesh": None, "model": model, "batch": batch}
    exec(for_transformers(STEP), scope)
    # transformers' norms compute in float32, whatever the model's dtype.
    for found in ranks.run(run, 4, program):
        assert found == pytest.approx(answer(scope), rel=1e-6)


def on_two_ranks(*command: str) -> "subprocess.CompletedProcess[str]":
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    return subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("stack", ["accelerate", pytest.param("Trainer", marks=pytest.mark.slow)])
def test_the_lines_of_a_stack_learn_more_than_how_often_a_byte_comes(stack: str) -> None:
    """Fails if a line does not run, ranks hold other sequences, or the gradient is wrong.

    On two gloo ranks with FSDP2, as the stack itself calls it.
    """
    pytest.importorskip("accelerate")
    done = on_two_ranks("tests/launch/train_hf.py", stack)
    # Lines of two ranks may come without a break between them.
    pattern = r"rank \d: (\w+) norm (\S+) expected (\S+) loss (\S+) entropy ([\d.]+)"
    found = re.findall(pattern, done.stdout)
    assert len(found) == 2 and found[0] == found[1], done.stdout + done.stderr
    name, norm, expected, loss, entropy = found[0]
    assert name.startswith("FSDP") and float(loss) < float(entropy), found
    # In float32 a near-tie of the first layer may fall otherwise; a wrong scale would be a half.
    assert float(norm) == pytest.approx(float(expected), rel=0.02)


@pytest.mark.slow
def test_trainer_goes_on_from_its_checkpoints_and_evaluates(tmp_path: Path) -> None:
    """Fails if the attached layers keep Trainer from loading what it saved, or its evaluation is of
    one rank's part."""
    pytest.importorskip("accelerate")
    done = on_two_ranks("tests/launch/resume_hf.py", str(tmp_path))
    written = [tmp_path / f"rank{rank}.json" for rank in (0, 1)]
    assert all(path.exists() for path in written), done.stdout + done.stderr
    first, second = (json.loads(path.read_text()) for path in written)
    assert first == second
    whole, resumed = first["losses"]
    assert resumed == whole and whole[-1] < whole[0]
    assert first["evaluated"] == pytest.approx(first["own"], rel=1e-6)
