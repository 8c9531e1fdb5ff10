"""Time the operators against others on this GPU and append the rows to results/ops.csv.

    python kernels/benchmarks/bench_ops.py                      every operator; needs a CUDA device
    python kernels/benchmarks/bench_ops.py --ops lamb embedding --minutes 5
    python kernels/benchmarks/bench_ops.py --on_cpu             the torch references on a CPU, into results/ops_cpu.csv
    TRITON_INTERPRET=1 python kernels/benchmarks/bench_ops.py --dry_run    tiny sizes, anywhere, writes nothing

An operator whose tests fail is not timed. Times are cold: the L2 cache is flushed before every call. The roofline of a
row is max(bytes / copy bandwidth, FLOPs / GEMM rate), both measured in the same run. The most important cases come
first; what --minutes cuts off is done by the next call, which leaves out what the record has of the same GPU, versions
and commit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_cases import Case, Inputs, attention_cases, bias_gelu_cases, layer_norm_cases
from bench_cases_cpu import CPU_OPS
from bench_cases_ends import embedding_cases, lamb_cases, mlm_cross_entropy_cases
from bench_cases_pre_norm import geglu_cases, pre_norm_cases, rotary_cases
from bench_harness import (
    RESULTS,
    Budget,
    Ceilings,
    Row,
    Work,
    append_rows,
    circumstances,
    measure_ceilings,
    reason,
    recorded,
    red_ops,
    roofline_s,
    time_cold,
)
from torch import Tensor

OPS = {
    "attention": (attention_cases,),
    "rotary": (rotary_cases,),
    "layer_norm": (layer_norm_cases, pre_norm_cases),
    "bias_gelu": (bias_gelu_cases,),
    "geglu": (geglu_cases,),
    "mlm_cross_entropy": (mlm_cross_entropy_cases,),
    "embedding": (embedding_cases,),
    "lamb": (lamb_cases,),
}
# What a case may take, most of it torch.compile.
_CASE_S = 30.0


def modes_of(
    case: Case, provider: Callable[[Inputs], Any], inputs: Inputs
) -> Iterator[tuple[str, Callable[[], object], Work]]:
    """Yield (mode, what to time, least work) of a provider."""
    if not case.differentiable:
        yield "step", lambda: provider(inputs), case.forward
        return
    both = Work(*(a + b for a, b in zip(case.forward, case.backward, strict=True)))
    outs = _tensors(provider(inputs))
    douts = [torch.randn_like(out) for out in outs]
    yield "forward", lambda: provider(inputs), case.forward
    yield (
        "backward",
        lambda: torch.autograd.grad(outs, inputs.tensors, douts, retain_graph=True, allow_unused=True),
        case.backward,
    )

    def forward_and_backward() -> None:
        torch.autograd.grad(_tensors(provider(inputs)), inputs.tensors, douts, allow_unused=True)

    yield "both", forward_and_backward, both


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True)
class Bench:
    """What all cases of one command share."""

    device: torch.device
    facts: dict[str, str]
    ceilings: Ceilings
    budget: Budget
    recorded: set[tuple[str, ...]]
    """(op, shape, provider) that need not be timed again."""
    dry_run: bool


def time_case(case: Case, bench: Bench) -> Iterator[Row]:
    """Yield a row for each provider and mode; what a provider cannot do is printed and left out."""
    waiting = [name for name in case.providers if (case.op, case.shape, name) not in bench.recorded]
    inputs = case.make() if waiting else None
    for name in waiting:
        assert inputs is not None
        try:
            # All modes or none: a provider with some rows in the record would count as done.
            yield from list(_time_provider(case, name, inputs, bench))
        except Exception as error:
            # Other people's code may raise anything where it cannot do a case or does not build.
            if name == "ours":
                raise
            print(f"{case.op} {case.shape}: {name} left out: {reason(error)}", file=sys.stderr)


def _time_provider(case: Case, name: str, inputs: Inputs, bench: Bench) -> Iterator[Row]:
    for mode, function, work in modes_of(case, case.providers[name], inputs):
        times = time_cold(function, bench.device, dry_run=bench.dry_run)
        percent = 100.0 * roofline_s(work, bench.ceilings) / times.p50
        names = ("p20_us", "p50_us", "p80_us")
        numbers = {column: f"{1e6 * value:.2f}" for column, value in zip(names, times, strict=True)}
        numbers |= {"bytes": f"{work.bytes:.0f}", "flops": f"{work.flops:.0f}", "roofline_percent": f"{percent:.1f}"}
        numbers["copy_bytes_per_s"] = f"{bench.ceilings.bytes_per_s:.4e}"
        numbers["gemm_flops_per_s"] = f"{bench.ceilings.flops_per_s:.4e}"
        yield Row(**bench.facts, op=case.op, shape=case.shape, provider=name, mode=mode, **numbers)


def time_all(cases: list[Case], bench: Bench, path: Path) -> int:
    """Time the cases in order of priority and append their rows; return how many the budget left out."""
    ordered = sorted(cases, key=lambda case: case.priority)
    for i, case in enumerate(ordered):
        if not bench.budget.allows(_CASE_S):
            print(f"the time is spent: {len(ordered) - i} cases left, run again to go on", file=sys.stderr)
            return len(ordered) - i
        for row in time_case(case, bench):
            figures = "ran" if bench.dry_run else f"{row.p50_us:>12} us {row.roofline_percent:>6} %"
            print(f"{row.op:18} {row.shape:34} {row.provider:20} {row.mode:9} {figures}", flush=True)
            if not bench.dry_run:
                append_rows(path, [row])
    return 0


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no case that would end later")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--commit", help="what the rows say in a copy of the files that git does not know")
    parser.add_argument("--on_cpu", "--on-cpu", action="store_true", help="time the torch references on the CPU")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="tiny sizes on any device, writes nothing")
    return parser.parse_args()


def main() -> int:
    """Parse, test, time, append."""
    args = parse()
    budget = Budget(args.minutes)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.on_cpu else "cpu")
    if device.type == "cpu" and not args.dry_run and not args.on_cpu:
        raise SystemExit("no CUDA device: --on_cpu times the torch references, --dry_run tries the script itself")
    torch.manual_seed(0)
    facts, path = circumstances(device, args.commit), args.results / ("ops_cpu.csv" if args.on_cpu else "ops.csv")
    red = [] if args.dry_run else red_ops(args.ops, facts, args.results)
    if red:
        print(f"not timed, because their tests fail: {', '.join(red)}", file=sys.stderr)
    known = recorded(path, facts, ("op", "shape", "provider"))
    bench = Bench(device, facts, measure_ceilings(device, dry_run=args.dry_run), budget, known, args.dry_run)
    ops = [op for op in args.ops if op not in red]
    makers = [maker for op in ops for maker in (CPU_OPS if args.on_cpu else OPS)[op]]
    cases = [case for maker in makers for case in maker(device, dry_run=args.dry_run)]
    time_all(cases, bench, path)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
