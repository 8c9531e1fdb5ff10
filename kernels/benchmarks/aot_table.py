"""Compile the shipped kernels for cards that are not here and write or check the table of their machine code.

    python kernels/benchmarks/aot_table.py                        print the table
    python kernels/benchmarks/aot_table.py --write                and write results/aot.csv
    python kernels/benchmarks/aot_table.py --check [--only TEXT ...]
        exit 1 where a rule is broken or a figure got worse

The rules for every kernel: no stack, no spills, shared memory within the card's limit, 16-byte loads, row offsets in
64 bits, and tensor-core instructions where it multiplies 16-bit matrices. A figure is compared
only with one of the same triton version.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from bert_kernels._launch import INTERPRETING, Launch, record_launches
from bert_kernels.attention_kernels import AttentionCall, attention_backward, attention_forward
from bert_kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from bert_kernels.compile_ahead import SHARED_LIMIT_BYTES, Figures, compile_launch
from bert_kernels.embedding_kernels import EmbeddingCall, Tables, embedding_backward, embedding_forward
from bert_kernels.lamb import FlatShard, LambScalars, Segment, SegmentTable
from bert_kernels.lamb_kernels import hyper_of_step, lamb_apply_triton, lamb_moments_triton
from bert_kernels.layer_norm import LayerNormCall, layer_norm_backward, layer_norm_forward
from bert_kernels.mlm_cross_entropy_kernels import replace_by_gradient

TABLE = Path(__file__).parent / "results" / "aot.csv"
ARCHITECTURES = ("sm_80", "sm_90")
# How far a figure may rise above the recorded one: other patch releases of ptxas move a few instructions.
_TOLERANCE = {"registers": 1.0, "stack_bytes": 1.0, "spills": 1.0, "shared_bytes": 1.0, "instructions": 1.02}


@dataclass(frozen=True)
class Case:
    """One call of an operator at one of BERT's shapes, forward and backward."""

    name: str
    run: Callable[[], None]
    multiplies: bool
    """Whether tensor-core instructions must be there."""


@dataclass(frozen=True)
class Row:
    """One kernel of one case on one architecture."""

    triton: str
    architecture: str
    case: str
    kernel: str
    figures: Figures

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies a row in the table."""
        return self.triton, self.architecture, self.case, self.kernel


def attention_case(head_dim: int, max_seqlen: int, dropout_p: float, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return attention of packed qkv with 12 heads."""

    def run() -> None:
        qkv = torch.empty(4 * max_seqlen, 3, 12, head_dim, dtype=dtype)
        cu_seqlens, seed = torch.empty(5, dtype=torch.int32), torch.empty(1, dtype=torch.int64)
        call = AttentionCall(qkv, cu_seqlens, max_seqlen, dropout_p, seed, 0, 0.125, -1)
        out, lse = attention_forward(call)
        attention_backward(call, out, lse, out)

    name = f"attention d={head_dim} s={max_seqlen} p={dropout_p} {str(dtype).removeprefix('torch.')}"
    return Case(name, run, multiplies=dtype != torch.float32)


def layer_norm_case(width: int, dropout_p: float | None, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return dropout_add_layer_norm of 8192 rows with a bias, or plain layer_norm where dropout_p is None."""

    def run() -> None:
        x, vector = torch.empty(8192, width, dtype=dtype), torch.empty(width, dtype=dtype)
        residual, x_bias = (None, None) if dropout_p is None else (x, vector)
        call = LayerNormCall(x, residual, vector, x_bias, dropout_p or 0.0, torch.empty(1, dtype=torch.int64), 0)
        y, mean, rstd = layer_norm_forward(call, vector, 1e-12)
        layer_norm_backward(call, mean, rstd, y)

    op = "layer_norm" if dropout_p is None else f"dropout_add_layer_norm p={dropout_p}"
    return Case(f"{op} d={width} {str(dtype).removeprefix('torch.')}", run, multiplies=False)


def bias_gelu_case(width: int, approximate: str, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return bias_gelu of 8192 rows."""

    def run() -> None:
        x, bias = torch.empty(8192, width, dtype=dtype), torch.empty(width, dtype=dtype)
        bias_gelu_backward(x, bias, bias_gelu_forward(x, bias, approximate), approximate)

    return Case(f"bias_gelu {approximate} f={width} {str(dtype).removeprefix('torch.')}", run, multiplies=False)


def mlm_cross_entropy_case(num_columns: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return the loss of 128 rows, with and without their gradient."""

    def run() -> None:
        logits, labels = torch.empty(128, num_columns, dtype=dtype), torch.empty(128, dtype=torch.int64)
        replace_by_gradient(logits, labels, num_columns - 6, gradient=True)

    return Case(f"mlm_cross_entropy v={num_columns} {str(dtype).removeprefix('torch.')}", run, multiplies=False)


def embedding_case(width: int, dropout_p: float, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Return the embedding of 8192 tokens and the gradient of the word table."""

    def run() -> None:
        index, seed = torch.zeros(8192, dtype=torch.int64), torch.empty(1, dtype=torch.int64)
        tables = Tables(*(torch.empty(rows, width, dtype=dtype) for rows in (30528, 512, 2)))
        vector = torch.empty(width, dtype=dtype)
        call = EmbeddingCall(Tables(index, index, index), tables, vector, dropout_p, seed, 0)
        y, mean, rstd = embedding_forward(call, vector, 1e-12)
        embedding_backward(call, mean, rstd, y, Tables(True, False, False))

    return Case(f"embedding d={width} p={dropout_p} {str(dtype).removeprefix('torch.')}", run, multiplies=False)


def lamb_case(grad_dtype: torch.dtype) -> Case:
    """Return a step over one tensor of a million elements, with a bf16 copy."""

    def run() -> None:
        table = SegmentTable((Segment(0, 1 << 20, 0, 0.01),), 1 << 20, 1)
        param, grad = torch.empty(1 << 20), torch.empty(1 << 20, dtype=grad_dtype)
        shard = FlatShard(param, grad, param.clone(), param.clone(), table)
        scalars = LambScalars(0.9, 0.999, 0.1, 1e-6, 0.1, 0.001, True)
        hyper = hyper_of_step(scalars, 0.001, device=param.device)
        lamb_moments_triton(shard, hyper, sums_R2=torch.empty(1, 2, dtype=torch.float64))
        lamb_apply_triton(shard, hyper, ratios_R=torch.empty(1), copy_E=param.bfloat16())

    return Case(f"lamb {str(grad_dtype).removeprefix('torch.')} gradients", run, multiplies=False)


def cases() -> list[Case]:
    """Return what the table holds."""
    lengths = (64, 128, 512)
    attention = [attention_case(64, length, p) for length in lengths for p in (0.0, 0.1)]
    attention += [attention_case(d, length, 0.1) for d in (32, 128) for length in lengths]
    attention += [attention_case(64, 512, 0.1, torch.float16), attention_case(64, 512, 0.1, torch.float32)]
    layer_norm = [layer_norm_case(width, p) for width in (768, 1024) for p in (None, 0.0, 0.1)]
    layer_norm += [layer_norm_case(width, 0.1) for width in (256, 512, 2048, 4096)]
    bias_gelu = [bias_gelu_case(width, kind) for width in (3072, 4096) for kind in ("none", "tanh")]
    bias_gelu.append(bias_gelu_case(4096, "none", torch.float32))
    mlm = [mlm_cross_entropy_case(width) for width in (4096, 30528, 119552)]
    mlm.append(mlm_cross_entropy_case(30528, torch.float32))
    embedding = [embedding_case(width, p) for width in (768, 1024) for p in (0.0, 0.1)]
    embedding.append(embedding_case(1024, 0.1, torch.float32))
    lamb = [lamb_case(torch.bfloat16), lamb_case(torch.float32)]
    return attention + layer_norm + bias_gelu + mlm + embedding + lamb


def measure(case: Case, architecture: str) -> Iterator[Row]:
    """Compile the launches of a case."""
    with record_launches(architecture) as launches:
        case.run()
    for launch in launches:
        yield Row(
            triton.__version__, architecture, case.name, _kernel_name(launch), compile_launch(launch, architecture)[0]
        )


def _kernel_name(launch: Launch) -> str:
    return launch.kernel.__name__.strip("_").removesuffix("_kernel")


def broken_rules(row: Row, case: Case) -> list[str]:
    """Return what the machine code of a kernel must not do."""
    figures, limit = row.figures, SHARED_LIMIT_BYTES[row.architecture]
    found = [
        (figures.stack_bytes > 0, f"{figures.stack_bytes} bytes of stack, none allowed"),
        (figures.spills > 0, f"{figures.spills} spills, none allowed"),
        (figures.shared_bytes > limit, f"{figures.shared_bytes} bytes of shared memory, the card has {limit}"),
        (case.multiplies and figures.tensor_core_ops == 0, "no tensor-core instruction"),
        (figures.loads_128 == 0, "no 16-byte load"),
        (figures.int64_products == 0, "no offset computed in 64 bits"),
    ]
    return [message for broken, message in found if broken]


def worse_figures(row: Row, recorded: dict[tuple[str, ...], dict[str, str]]) -> list[str]:
    """Return the figures that rose above the recorded ones of the same triton version."""
    old = recorded.get(row.key)
    if old is None:
        return [] if not any(key[0] == row.triton for key in recorded) else ["not in the table: run with --write"]
    return [
        f"{name} rose from {old[name]} to {value}"
        for name, value in asdict(row.figures).items()
        if name in _TOLERANCE and value > float(old[name]) * _TOLERANCE[name]
    ]


def read_table() -> dict[tuple[str, ...], dict[str, str]]:
    """Return the recorded rows by (triton, architecture, case, kernel)."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {(row["triton"], row["architecture"], row["case"], row["kernel"]): row for row in csv.DictReader(file)}


def write_table(rows: list[Row]) -> None:
    """Write the rows; those of other triton versions, and of cases that were not compiled now, stay."""
    measured, known = {row.case for row in rows}, {case.name for case in cases()}
    records = {
        key: old
        for key, old in read_table().items()
        if key[0] != triton.__version__ or (key[2] in known and key[2] not in measured)
    }
    for row in rows:
        names = dict(zip(("triton", "architecture", "case", "kernel"), row.key, strict=True))
        records[row.key] = names | {name: str(value) for name, value in asdict(row.figures).items()}
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(next(iter(records.values()))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records.values())


def main() -> int:
    """Parse, compile, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--check", action="store_true", help="compare with the table")
    parser.add_argument("--only", nargs="+", default=[""], help="only the cases whose name holds one of these texts")
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=sorted(SHARED_LIMIT_BYTES))
    args = parser.parse_args()
    if INTERPRETING:
        raise SystemExit("TRITON_INTERPRET is set: kernels are Python there, unset it to compile them")
    recorded, rows, failures = read_table(), [], 0
    for case in (case for case in cases() if any(text in case.name for text in args.only)):
        for row in (row for architecture in args.architectures for row in measure(case, architecture)):
            rows.append(row)
            problems = broken_rules(row, case) + (worse_figures(row, recorded) if args.check else [])
            failures += len(problems)
            print(row.architecture, row.case, row.kernel, *asdict(row.figures).values(), *problems, sep=",", flush=True)
    if args.write:
        write_table(rows)
    return 1 if args.check and failures else 0


if __name__ == "__main__":
    sys.exit(main())
