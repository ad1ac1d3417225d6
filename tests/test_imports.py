"""What may import what: torch alone to start, and only downwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lhcp

ROOT = Path(lhcp.__file__).parent
OPTIONAL = ("triton", "numpy", "matplotlib", "rich", "tyro", "transformers", "flash_attn")


def imported(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def reaches(path: Path, *modules: str) -> set[str]:
    return {
        name
        for name in imported(path)
        if any(name == module or name.startswith(f"{module}.") for module in modules)
    }


def files(folder: str = "") -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_torch_is_enough() -> None:
    """Fails if importing lhcp, or attention on a CPU, needs an optional package."""
    program = f"""
import importlib.machinery, sys

finder = importlib.machinery.PathFinder
real = finder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {OPTIONAL!r} else real(name, path, target)

finder.find_spec = staticmethod(find_spec)
import torch, lhcp

config = lhcp.LighthouseConfig(num_levels=2, pool_factor=2, topk=8, num_strata=2)
q, k, v = (torch.randn(1, 32, 2, 8, requires_grad=True) for _ in range(3))
layer = lhcp.LighthouseAttention(config)
layer(q, k, v).sum().backward()
layer.mode = "dense"
layer(q, k, v).sum().backward()
print(sorted(set({OPTIONAL!r}) & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_is_light() -> None:
    """Fails if `import lhcp` pulls in the compiler or Triton, which take seconds."""
    heavy = ("torch._dynamo", "triton")
    program = f"import sys, lhcp; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("path", files("lighthouse"), ids=lambda p: p.stem)
def test_local_stages_never_communicate(path: Path) -> None:
    above = (
        "lhcp.ring",
        "lhcp.comm.mesh",
        "lhcp.layer.boundary",
        "lhcp.layer.lighthouse",
        "lhcp.layer.module",
    )
    assert not reaches(path, "torch.distributed", "lhcp.comm.collectives", *above)


@pytest.mark.parametrize("path", files("ring"), ids=lambda p: p.stem)
def test_ring_knows_nothing_of_lighthouse(path: Path) -> None:
    assert not reaches(
        path,
        "lhcp.lighthouse",
        "lhcp.lighthouse.geometry",
        "lhcp.layer.lighthouse",
        "lhcp.layer.module",
    )


def test_the_library_needs_neither_its_oracle_nor_its_programs() -> None:
    for path in files():
        inside = path.relative_to(ROOT).parts[0]
        if inside != "testing":
            assert not reaches(path, "lhcp.testing"), path
            assert not reaches(path, "lhcp.reference"), path
        if inside != "training":
            assert not reaches(path, "lhcp.training"), path


def test_the_oracle_shares_only_the_config() -> None:
    assert {n for n in reaches(ROOT / "reference.py", "lhcp") if n.count(".") == 1} == {
        "lhcp.config"
    }


def test_kernels_are_imported_only_where_they_are_used() -> None:
    """Fails if a file outside of the Triton ones needs Triton at import."""
    for path in files():
        if path.parent.name == "kernels" or path.name.endswith("_kernel.py"):
            continue
        top = {
            name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [])
            if name
        }
        assert not {n for n in top if n == "triton" or "kernel" in n.split(".")[-1]}, path


@pytest.mark.parametrize("name", lhcp.__all__)
def test_public_names_exist_and_explain_themselves(name: str) -> None:
    thing = getattr(lhcp, name)
    assert thing.__doc__ and len(thing.__doc__) > 40
