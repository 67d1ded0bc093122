"""Compiles what triton_launch would launch, for GPUs of compute capability 9.0, on any machine:
TRITON_INTERPRET=0 python compile_kernels.py

Prints a line a kernel: its name, the bytes of registers it spills, its shared memory, and its constants.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from phatgoose.ops import Stack
from phatgoose.ops.operands import kernel_operands
from phatgoose.ops.triton import launch as triton_launch

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
}
TARGET = GPUTarget("cuda", 90, 32)
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
done: set[str] = set()


def compiled(kernel, grid, *arguments, **constants):
    """In place of a launch."""
    values = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
    types, fixed, facts = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        whole = isinstance(value, torch.Tensor) or (
            not parameter.do_not_specialize and value and value % 16 == 0
        )
        if isinstance(value, torch.Tensor):
            types[parameter.name] = f"*{TYPES[value.dtype]}"
        elif parameter.is_constexpr or value is None:
            types[parameter.name], fixed[parameter.name] = "constexpr", value
            continue
        else:
            types[parameter.name] = "i32"
        if whole:
            facts[(place,)] = [["tt.divisibility", 16]]
    key = f"{kernel.__name__} {types} {fixed} {facts}"
    if key not in done:
        done.add(key)
        made = triton.compile(ASTSource(kernel, types, fixed, facts), target=TARGET, options=values)
        print(kernel.__name__, spilled(made.asm["cubin"]), made.metadata.shared, fixed)


def spilled(binary):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return re.search(r"STACK:(\d+)", usage.stdout)[1]


def update(tokens, experts, rank, d_in, d_out, dtype, top_k=2):
    rows = experts * rank
    a, b = torch.zeros(rows, d_in, dtype=dtype), torch.zeros(rows, d_out, dtype=dtype)
    stack = Stack(a, b, tuple(range(0, rows, rank)), (rank,) * experts, (1.0,) * experts)
    u, y = torch.zeros(tokens, d_in, dtype=dtype), torch.zeros(tokens, d_out, dtype=dtype)
    of_stack = kernel_operands(stack)
    triton_launch.updated(of_stack, u, y, torch.zeros(experts, d_in), top_k)
    if top_k == 2:
        chosen, weights = torch.zeros(tokens, 2, dtype=torch.int64), torch.zeros(tokens, 2)
        triton_launch.mixed(of_stack, u, y, chosen, weights)


triton_launch.launch = compiled
triton_launch._processors = lambda device: 132
for n in (1, 8, 64, 1024, 4096):
    update(n, 166, 16, 4096, 4096, torch.bfloat16)
update(8, 40, 5, 577, 331, torch.float16)
update(500, 40, 5, 577, 331, torch.float16, 3)
update(500, 40, 16, 576, 192, torch.float32)
