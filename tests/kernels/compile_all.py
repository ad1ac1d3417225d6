"""Compile every kernel for one architecture and print its registers and spills; needs no GPU.

python -m tests.kernels.compile_all 90 [levels factor dtype head_dim heads kv_heads]
"""

import subprocess
import sys
import tempfile
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lhcp.lighthouse.geometry import Geometry
from lhcp.lighthouse.kernel_set import QKV
from lhcp.lighthouse.kernels import gather, last_rows, pool, scatter, scatter_backward, select
from lhcp.ring.kv import KV
from lhcp.ring.merge.merge_kernel import add_fused, merge_fused
from lhcp.ring.merge.partial import Partial
from lhcp.ring.merge.sum_kernel import sum_fused

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}


def compiled(kernel, arch: int, args: tuple, kwargs: dict):
    """Compile `kernel` as a launch with these arguments on a GPU of `arch` would."""
    options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr:
            signature[param.name], constants[(i,)] = "constexpr", value
            continue

        def describe(value, path: tuple, specialize: bool):
            if isinstance(value, tuple):
                return tuple(describe(x, (*path, j), specialize) for j, x in enumerate(value))
            if value is None:
                constants[path] = None
                return "constexpr"
            if isinstance(value, torch.Tensor):
                attributes[path] = [["tt.divisibility", 16]]
                return TYPES[value.dtype]
            if value == 1 and specialize:
                constants[path] = 1
                return "constexpr"
            if value % 16 == 0 and specialize:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32" if abs(value) < 2**31 else "i64"

        signature[param.name] = describe(value, (i,), not param.do_not_specialize)
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(binary) -> str:
    """Registers and local memory by cuobjdump, where Triton brings it."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    lines = [x for x in text.stdout.splitlines() if "REG:" in x]
    usage = " ".join(lines[-1].split()[:4]) if lines else "?"
    return f"{usage} dynamic shared {binary.metadata.shared}"


def launches(geom: Geometry, dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int) -> None:
    """Call every launcher once, and once more with documents, on meta tensors."""

    def rows(length: int, num: int) -> torch.Tensor:
        return torch.empty((1, length, num, head_dim), dtype=dtype, device="meta")

    def qkv(length: int) -> QKV:
        return QKV(*(rows(length, num) for num in (heads, kv_heads, kv_heads)))

    tokens = q, k, v = qkv(geom.num_tokens)
    packed = torch.empty((1, geom.num_tokens), dtype=torch.int32, device="meta")
    halo = rows(geom.num_chunks * (geom.num_levels - 1), heads)
    halo = halo.unflatten(1, (geom.num_chunks, geom.num_levels - 1))
    for positions in (None, packed):
        means, sq, sk = pool.pool_and_score(tokens, geom, True, positions)
        pool.score_tensors(q, k, geom, positions)
        entries, row_of_entry = select.select(sq, sk, geom, positions)
        sub = gather.gather(tokens, means, entries, geom)
        gather.gather_backward(sub, row_of_entry, geom, positions)
        out = scatter.scatter(sub.q, row_of_entry, geom, positions)
        scatter.scatter_edges(out, sub[0], row_of_entry, halo, geom, positions)
        scatter_backward.scatter_backward(out, row_of_entry, geom, positions)
        scatter_backward.edge_grads(out, geom, positions)
    last_rows.last_rows(sub[0], row_of_entry, geom)
    last_rows.add_last_grads(sub[0], out, halo.float(), row_of_entry, geom)
    lse = torch.empty((1, heads, geom.num_tokens), dtype=torch.float32, device="meta")
    for merged in (q, q.float()):
        half = geom.num_tokens // 2
        later = Partial((half, geom.num_tokens), (0, heads), q[:, half:], lse[:, :, half:])
        wholes = (Partial.whole(merged, lse), Partial.whole(q, lse), later)
        merge_fused(merged, lse, wholes)
        add_fused(merged, wholes)
    parts = torch.stack((k, k))[:, None].expand(2, 3, *k.shape)
    for own in (KV(k, v), None):
        sum_fused(parts, 3, own, KV(k, v), parts.shape[3])


def main() -> None:
    arch = int(sys.argv[1])
    levels, factor, *rest = [*sys.argv[2:], "3", "4"][:2] + sys.argv[4:]
    dtype = getattr(torch, rest[0]) if rest else torch.bfloat16
    head_dim, heads, kv_heads = (int(x) for x in rest[1:4]) if rest[1:] else (128, 8, 8)
    geom = Geometry(
        num_tokens=131072, num_strata=16, num_chunks=2, num_levels=int(levels),
        pool_factor=int(factor), picks=128, has_first=True,
    )  # fmt: skip

    def compile_launch(self, grid):
        def launch(*args, **kwargs):
            binary = compiled(self, arch, args, kwargs)
            print(f"{self.fn.__name__:24s} {resources(binary)}", flush=True)

        return launch

    with (
        patch.object(triton.runtime.jit.JITFunction, "__getitem__", compile_launch),
        patch.object(torch.Tensor, "data_ptr", lambda self: 0),
    ):
        launches(geom, dtype, head_dim, heads, kv_heads)


if __name__ == "__main__":
    main()
