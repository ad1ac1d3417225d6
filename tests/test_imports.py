"""The plan of the house: what may import what, and what is said in which room."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lhcp

ROOT = Path(lhcp.__file__).parent
OPTIONAL = ("triton", "numpy", "matplotlib", "rich", "tyro", "transformers", "flash_attn")

ROOMS = (
    *("base", "comm", "lighthouse", "ring", "cost", "layer", "context"),
    *("measure", "integrations"),
    *("training", "testing", "programs"),
)
"""From the ground up; a room imports itself and those before it. "base" is the files of lhcp/."""

APART = {
    "lighthouse": ("comm", "ring"),
    "ring": ("lighthouse",),
    "context": ("lighthouse", "ring"),
}
"""The two wings know nothing of one another, what is local nothing of messages, and what is around
the layers nothing of what is in them."""

FILES = {path.relative_to(ROOT.parent).with_suffix(""): path for path in ROOT.rglob("*.py")}
MODULES = {
    ".".join(p.parts[:-1] if p.name == "__init__" else p.parts): path for p, path in FILES.items()
}


def imported(path: Path) -> set[str]:
    """Modules of lhcp and others that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found = full & set(MODULES)
            # Importing a name of a package is importing the package, a module of it that module.
            names |= found if found == full else found | {node.module}
    return names


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "base"


INSIDE = {
    module: {name for name in imported(path) if name in MODULES and name != "lhcp"}
    for module, path in MODULES.items()
    if module not in ("lhcp", "lhcp.__main__")
}
"""Module -> modules of lhcp that it imports. In lhcp/__init__.py and __main__.py all rooms meet."""


def reaches(path: Path, *modules: str) -> set[str]:
    return {
        name
        for name in imported(path)
        if any(name == module or name.startswith(f"{module}.") for module in modules)
    }


def strings(path: Path) -> Iterator[str]:
    """Strings of a file that are not docstrings."""
    tree = ast.parse(path.read_text())
    notes = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in notes:
            yield node.value


@pytest.mark.parametrize("module", INSIDE)
def test_imports_only_go_down(module: str) -> None:
    """Fails if a room knows of one above it, or a wing of the other."""
    own = room(module)
    allowed = set(ROOMS[: ROOMS.index(own) + 1]) - set(APART.get(own, ()))
    assert {name for name in INSIDE[module] if room(name) not in allowed} == set()


def test_no_files_go_round_in_a_circle() -> None:
    """Fails if two files need one another, at import or later."""
    # A package's own file names what is in it; its modules do not import it.
    graphlib.TopologicalSorter(INSIDE).prepare()


@pytest.mark.parametrize("module", [m for m in INSIDE if room(m) == "cost"])
def test_the_cost_model_reads_pure_files_of_the_ring(module: str) -> None:
    """Fails if predicting a ring would load or run one."""
    pure = {f"lhcp.ring.{name}" for name in ("shape", "schedule", "parts", "heads")}
    assert {name for name in INSIDE[module] if room(name) == "ring"} <= pure
    for name in pure:
        assert not reaches(MODULES[name], "torch"), name


@pytest.mark.parametrize("path", [MODULES[m] for m in INSIDE if room(m) == "lighthouse"], ids=str)
def test_local_stages_never_communicate(path: Path) -> None:
    assert not reaches(path, "torch.distributed")


@pytest.mark.parametrize("name", ["comm", "lighthouse", "ring", "cost"])
def test_only_the_layer_says_auto(name: str) -> None:
    """Fails if a room below the layer decides what a user left open."""
    for module in INSIDE:
        if room(module) == name:
            assert not [s for s in strings(MODULES[module]) if "auto" in s.split()], module


PRIVATE = ("_coalescing_manager", "_get_backend", "_resolve_process_group", "_flatten", "fake_pg")


def test_private_torch_is_behind_one_file() -> None:
    """Fails if a private name of torch.distributed is used where its loss is not met."""
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | imported(path)
        found = [name for name in PRIVATE if any(name in x.split(".") for x in used)]
        assert not found or module == "lhcp.comm.torch_private", module


def parameters(node: ast.FunctionDef) -> int:
    args = node.args
    names = [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls", "ctx")])


def test_no_function_takes_more_than_seven() -> None:
    """Fails if what travels together is declared one by one.

    But: what spec calls public names; Triton's functions, whose arguments are a kernel's;
    autograd's forward of the gather, since torch sees no tensors inside of records; and sdpa, whose
    arguments are those of torch's function; and the layer's forward, the public name of both modes.
    """
    public = {*lhcp.__all__, "__init__"}
    wide = set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or parameters(node) <= 7:
                continue
            if any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            if node.name not in public:
                wide.add(f"{module}.{node.name}")
    assert wide == {
        "lhcp.lighthouse.autograd.forward",
        "lhcp.testing.inputs.qkv",
        "lhcp.context.context_parallel.sdpa",
        "lhcp.layer.module.forward",
    }


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


def test_the_library_needs_neither_its_oracle_nor_its_programs() -> None:
    for module, names in INSIDE.items():
        if room(module) != "testing":
            assert "lhcp.reference" not in names, module


def test_the_oracle_shares_only_the_config() -> None:
    assert INSIDE["lhcp.reference"] == {"lhcp.config", "lhcp.reference_documents"}
    assert INSIDE["lhcp.reference_documents"] == {"lhcp.config"}


def test_kernels_are_imported_only_where_they_are_used() -> None:
    """Fails if a file outside of the Triton ones needs Triton at import."""
    triton = {
        module
        for module, path in MODULES.items()
        if path.parent.name == "kernels" or path.name.endswith("_kernel.py")
    }
    for module, path in MODULES.items():
        if module in triton:
            continue
        top = {
            name
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else [])
            if name
        }
        assert not {n for n in top if n == "triton" or n in triton}, path


@pytest.mark.parametrize("name", lhcp.__all__)
def test_public_names_exist_and_explain_themselves(name: str) -> None:
    thing = getattr(lhcp, name)
    assert thing.__doc__ and len(thing.__doc__) > 40


def test_torch_without_distributed_is_said() -> None:
    """Fails if whoever has such a torch is told of a name that it lacks, and not why."""
    # As such a build is: the package is there, and little in it.
    lacking = """
import torch.distributed as dist
dist.is_available = lambda: False
for name in ("ProcessGroup", "Store", "PrefixStore", "Work"):
    delattr(dist, name)
import lhcp
"""
    done = subprocess.run([sys.executable, "-c", lacking], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: lhcp needs torch.distributed, which this" in done.stderr
