"""Compile recorded launches for a card that is not there, and read the figures of the machine code.

Needs no GPU: ptxas and cuobjdump come with triton. Not for an interpreting process, whose kernels are Python.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bert_kernels._launch import Launch

# Shared memory that one block may have, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
_BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Figures:
    """What the machine code of one kernel says."""

    registers: int
    stack_bytes: int
    spills: int
    """Loads and stores of local memory."""
    shared_bytes: int
    tensor_core_ops: int
    loads_128: int
    """16-byte loads from global memory."""
    instructions: int
    loop_instructions: int
    """Those of the longest loop, inner loops included; 0 without one. On sm_100 a wait for the tensor cores is a loop
    that jumps back from the end of the code, so there the figure is near that of all instructions."""
    int64_products: int
    """Offsets computed in 64 bits."""


def compile_launch(launch: Launch, architecture: str) -> tuple[Figures, Any]:
    """Compile as the launch would on that card; return the figures and triton's compiled kernel."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list] = {}
    for index, param in enumerate(kernel.params):
        value = launch.arguments[param.name]
        signature[param.name] = _type_name(value, param)
        if signature[param.name] == "constexpr":
            constants[(index,)] = value
        elif _divisible_by_16(value, param):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=launch.tile.options)
    return _figures(compiled), compiled


def _type_name(value: Any, param: Any) -> str:
    if param.is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if value == 1 and not param.do_not_specialize:
        return "constexpr"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _divisible_by_16(value: Any, param: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    return isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize


def _figures(compiled: Any) -> Figures:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    code = _instructions(sass)
    found = [name for _, name, _ in code]
    count = Counter(name.split(".")[0] for name in found)
    registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
    assert registers and stack, f"cuobjdump gave no figures: {usage!r}"
    return Figures(
        registers=int(registers[1]),
        stack_bytes=int(stack[1]),
        spills=count["STL"] + count["LDL"],
        shared_bytes=compiled.metadata.shared,
        tensor_core_ops=sum(count[name] for name in ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA")),
        loads_128=sum(name.startswith(("LDG", "LDGSTS")) and ".128" in name for name in found),
        instructions=len(found) - count["NOP"],
        loop_instructions=_longest_loop(code),
        int64_products=len(re.findall(r"arith\.muli .* : (?:tensor<\w*)?i64", compiled.asm["ttir"])),
    )


def _instructions(sass: str) -> list[tuple[int, str, str]]:
    """Return (address, name, operands) of every instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;\n]*)", sass)
    return [(int(address, 16), name, operands) for address, name, operands in found]


def _longest_loop(code: list[tuple[int, str, str]]) -> int:
    longest = 0
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if name.split(".")[0] == "BRA" else None
        if target and int(target[1], 16) < address:
            first = int(target[1], 16)
            longest = max(longest, sum(first <= other <= address and op != "NOP" for other, op, _ in code))
    return longest


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([_BINARIES / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout
