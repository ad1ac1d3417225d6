"""The ring-flash-attn engine without its packages: how it is loaded, what it refuses."""

import sys
from pathlib import Path

import pytest
import torch

from lhcp.comm.layout import Layout
from lhcp.integrations import ring_flash_attn as engine
from lhcp.ring.block.base import Request
from lhcp.ring.shape import CAUSAL, FULL

ZIGZAG = Layout("zigzag", 2)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name whose `__init__` does not import, as with transformers >= 5."""
    root = tmp_path / engine.PACKAGE
    root.mkdir()
    (root / "__init__.py").write_text("raise ImportError('an adapter')\n")
    (root / "utils.py").write_text("FACTOR = 2\n")
    (root / "zigzag_ring_flash_attn.py").write_text(
        "from .utils import FACTOR\ndef zigzag_ring_flash_attn_func(x):\n    return FACTOR * x\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    engine._zigzag_function.cache_clear()
    yield root
    engine._zigzag_function.cache_clear()


def loaded() -> set[str]:
    return {name for name in sys.modules if name.startswith(engine.PACKAGE)}


def test_loads_without_the_adapter_and_leaves_no_module(package):
    before = loaded()
    assert engine._zigzag_function()(21) == 42
    assert loaded() == before


def test_what_does_not_import_is_an_import_error(package):
    before = loaded()
    (package / "utils.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(ImportError, match=r"no_such_module_anywhere.*pip install"):
        engine._zigzag_function()
    assert loaded() == before


@pytest.mark.parametrize(
    "change, words",
    [
        ({"device": "cpu"}, "cuda"),
        ({"dtype": torch.float32}, "bfloat16 and float16"),
        ({"head_dim": 20}, "multiples of 8"),
        ({"layout": Layout("contiguous", 2)}, "'zigzag'"),
        ({"mask": FULL}, "causal"),
    ],
)
def test_refusals_name_what_works(change, words):
    asked = {"dtype": torch.bfloat16, "head_dim": 64, "device": "cuda"}
    cut = {"layout": ZIGZAG, "mask": CAUSAL}
    asked, cut = ({name: change.get(name, x) for name, x in some.items()} for some in (asked, cut))
    with pytest.raises(ValueError, match=words):
        engine.check_ring_flash_attn(Request(**asked), **cut)
