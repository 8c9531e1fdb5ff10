"""Time the operators against others on this GPU and append the rows to results/ops.csv.

    python kernels/benchmarks/bench_ops.py                      every operator; needs a CUDA device
    python kernels/benchmarks/bench_ops.py --ops lamb embedding
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_ops.py --dry_run    tiny sizes, anywhere, writes nothing

An operator whose tests fail is not timed. Times are cold: the L2 cache is flushed before every call. The roofline of a
row is max(bytes / copy bandwidth, FLOPs / GEMM rate), both measured in the same run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_cases import Case, Inputs, attention_cases, bias_gelu_cases, layer_norm_cases
from bench_cases_ends import embedding_cases, lamb_cases, mlm_cross_entropy_cases
from bench_harness import (
    RESULTS,
    Ceilings,
    Row,
    Work,
    append_rows,
    circumstances,
    measure_ceilings,
    reason,
    roofline_s,
    tests_are_green,
    time_cold,
)

OPS = {
    "attention": attention_cases,
    "layer_norm": layer_norm_cases,
    "bias_gelu": bias_gelu_cases,
    "mlm_cross_entropy": mlm_cross_entropy_cases,
    "embedding": embedding_cases,
    "lamb": lamb_cases,
}


def modes_of(
    case: Case, provider: Callable[[Inputs], Any], inputs: Inputs
) -> Iterator[tuple[str, Callable[[], object], Work]]:
    """Yield (mode, what to time, least work) of a provider."""
    if not case.differentiable:
        yield "step", lambda: provider(inputs), case.forward
        return
    both = Work(*(a + b for a, b in zip(case.forward, case.backward, strict=True)))
    out = provider(inputs)
    out = out[0] if isinstance(out, tuple) else out
    dout = torch.randn_like(out)
    yield "forward", lambda: provider(inputs), case.forward
    yield (
        "backward",
        lambda: torch.autograd.grad(out, inputs.tensors, dout, retain_graph=True, allow_unused=True),
        case.backward,
    )

    def forward_and_backward() -> None:
        result = provider(inputs)
        result = result[0] if isinstance(result, tuple) else result
        torch.autograd.grad(result, inputs.tensors, dout, allow_unused=True)

    yield "both", forward_and_backward, both


def time_case(case: Case, ceilings: Ceilings, facts: dict[str, str], *, dry_run: bool) -> Iterator[Row]:
    """Yield a row for each provider and mode; what a provider cannot do is printed and left out."""
    inputs = case.make()
    for name, provider in case.providers.items():
        try:
            for mode, function, work in modes_of(case, provider, inputs):
                times = time_cold(function, dry_run=dry_run)
                percent = 100.0 * roofline_s(work, ceilings) / times.p50
                names = ("p20_us", "p50_us", "p80_us")
                numbers = {column: f"{1e6 * value:.2f}" for column, value in zip(names, times, strict=True)}
                numbers |= {"bytes": f"{work.bytes:.0f}", "flops": f"{work.flops:.0f}"}
                numbers["roofline_percent"] = f"{percent:.1f}"
                numbers["copy_bytes_per_s"] = f"{ceilings.bytes_per_s:.4e}"
                numbers["gemm_flops_per_s"] = f"{ceilings.flops_per_s:.4e}"
                yield Row(**facts, op=case.op, shape=case.shape, provider=name, mode=mode, **numbers)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            if name == "ours":
                raise
            print(f"{case.op} {case.shape}: {name} left out: {reason(error)}", file=sys.stderr)


def main() -> int:
    """Parse, test, time, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="tiny sizes on any device, writes nothing")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.dry_run:
        raise SystemExit("no CUDA device: nothing here is worth timing; --dry_run tries the script itself")
    torch.manual_seed(0)
    facts = circumstances(device)
    ceilings = measure_ceilings(device, dry_run=args.dry_run)
    red = []
    for op in args.ops:
        if not args.dry_run and not tests_are_green(op):
            print(f"{op}: its tests fail, so it is not timed", file=sys.stderr)
            red.append(op)
            continue
        for case in OPS[op](device, dry_run=args.dry_run):
            rows = list(time_case(case, ceilings, facts, dry_run=args.dry_run))
            for row in rows:
                figures = "ran" if args.dry_run else f"{row.p50_us:>12} us {row.roofline_percent:>6} %"
                print(f"{row.op:18} {row.shape:34} {row.provider:20} {row.mode:9} {figures}", flush=True)
            if not args.dry_run:
                append_rows(RESULTS / "ops.csv", rows)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
