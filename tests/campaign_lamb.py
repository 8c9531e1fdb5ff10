"""Record how exact LAMB is under ZeRO, and what it costs.

    python tests/campaign_lamb.py errors    20 steps of a small BERT against unsharded LAMB, plain LAMB beside it,
                                            stages 0-3, world sizes 1-4: about 10 core minutes
    python tests/campaign_lamb.py times     optimizer step at BERT-base size on two ranks, stages 0-3: 12 GB of memory
    python tests/campaign_lamb.py table     print what is recorded as Markdown

Every measurement is appended to tests/results/lamb.jsonl; nothing recorded is changed. `plain` is a textbook LAMB that
steps whatever tensor DeepSpeed gives it. In `times` there is also `one_ratio`: our own code with one segment per shard
and no reduction, so that exact / one_ratio is the price of exactness alone; all three step the same tensors in turn,
and the ratios are medians over the steps. Rows that were measured beside other work hold the ratios alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from lamb_bert import train_unsharded  # noqa: E402
from lamb_optimizers import CLIP, SETTINGS  # noqa: E402
from lamb_reference import PlainLamb, paper, worst_error  # noqa: E402
from lamb_runs import Case, quiet_deepspeed, run_cases  # noqa: E402
from ranks_harness import run_ranks  # noqa: E402

from bert_ds.training.optimizers.lamb import Lamb  # noqa: E402
from bert_kernels.flat_shard import Segment, SegmentTable  # noqa: E402

RESULTS = ROOT / "tests/results/lamb.jsonl"
STAGES = (0, 1, 2, 3)
NUM_WARM_STEPS, NUM_TIMED_STEPS = 2, 12


class OneRatio(Lamb):
    """Our code doing what a plain LAMB does: each shard is one tensor."""

    def _find(self, groups: Any) -> Any:
        return [
            layout._replace(process_group=None, shards=tuple((t, _one_segment(table)) for t, table in layout.shards))
            for layout in super()._find(groups)
        ]


def _one_segment(table: SegmentTable) -> SegmentTable:
    first = table.segments[0]
    return SegmentTable((Segment(0, table.num_elements, first.row, first.decay),), table.num_elements, table.num_rows)


class InTurn(Lamb):
    """Steps with three optimizers on the same tensors in turn, so that whoever else uses the machine disturbs all."""

    def __init__(self, named_parameters: Any, **settings: Any) -> None:
        named = list(named_parameters)
        super().__init__(named, **settings)
        self.param_groups[0]["weight_decay"] = settings["weight_decay"]
        self.one_ratio = OneRatio(named, **settings)
        self.plain = PlainLamb([p for _, p in named], betas=(0.9, 0.999), eps=1e-6, **settings)
        self.spent: dict[str, list[float]] = {"exact": [], "one_ratio": [], "plain": []}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Time each from one barrier to the next."""
        steps = {"exact": super().step, "one_ratio": self.one_ratio.step, "plain": self.plain.step}
        self.one_ratio.param_groups = self.plain.param_groups = self.param_groups
        for optimizer in (self, self.one_ratio):  # the layout is verified against weights that nobody has stepped yet
            optimizer._find(self.param_groups)
        turn = len(self.spent["exact"]) % len(steps)
        for name in [*steps, *steps][turn : turn + len(steps)]:
            torch.distributed.barrier()
            start = time.perf_counter()
            steps[name]()
            torch.distributed.barrier()
            self.spent[name].append(time.perf_counter() - start)


class BertBaseShapes(nn.Module):
    """The parameters of BERT-base, and a loss that touches each of them once and costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([_Weights(_embedding_shapes()), *[_Weights(_layer_shapes()) for _ in range(12)]])

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([part() for part in self.parts]).sum()


class _Weights(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes])

    def forward(self) -> Tensor:
        return torch.stack([weight.mean() for weight in self.weights]).sum()


def _embedding_shapes() -> list[tuple[int, ...]]:
    head = [(768, 768), (768,), (768,), (768,), (30528,), (768, 768), (768,), (2, 768), (2,)]
    return [(30528, 768), (512, 768), (2, 768), (768,), (768,), *head]


def _layer_shapes() -> list[tuple[int, ...]]:
    attention = [(768, 768), (768,)] * 4
    return [*attention, (768,), (768,), (3072, 768), (3072,), (768, 3072), (768,), (768,), (768,)]


def measure_errors() -> None:
    """Append the error of every stage and world size after 20 steps."""
    unsharded = train_unsharded(lambda name: paper, 20, settings=SETTINGS, clip=CLIP)
    cases = [Case(stage, optimizer=name) for name in ("lamb", "plain") for stage in STAGES]
    for world_size in (1, 2, 3, 4):
        for case, report in zip(cases, run_ranks(run_cases, world_size, cases, timeout_s=1800)[0], strict=True):
            error, tensor = worst_error(report.weights, unsharded.weights)
            error = "inf" if math.isinf(error) else error
            row = {"world_size": world_size, "stage": case.stage, "optimizer": case.optimizer}
            record("errors", {**row, "max_relative_error": error, "worst_tensor": tensor, "num_steps": 20})


def measure_times() -> None:
    """Append the time of an optimizer step on two ranks."""
    for stage in STAGES:
        record("times", run_ranks(time_steps, 2, stage, timeout_s=1800)[0])


def time_steps(rank: int, world_size: int, stage: int) -> dict[str, Any]:
    """Worker: return median times and ratios of the optimizers, each step of all three on the same tensors."""
    import deepspeed

    quiet_deepspeed()
    model = BertBaseShapes()
    optimizer = InTurn(model.named_parameters(), lr=1e-4, weight_decay=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    for _ in range(NUM_WARM_STEPS + NUM_TIMED_STEPS):
        engine.backward(engine(torch.zeros(())))
        engine.step()
    engine.destroy()
    spent = {name: times[NUM_WARM_STEPS:] for name, times in optimizer.spent.items()}
    row: dict[str, Any] = {f"{name}_s": statistics.median(times) for name, times in spent.items()}
    for name in ("one_ratio", "plain"):
        ratios = sorted(ours / other for ours, other in zip(spent["exact"], spent[name], strict=True))
        row[f"exact_over_{name}"] = statistics.median(ratios)
        row[f"exact_over_{name}_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    facts = {"num_steps": NUM_TIMED_STEPS, "num_parameters": num_parameters}
    return {"world_size": world_size, "stage": stage, **row, **facts}


def record(kind: str, row: dict[str, Any]) -> None:
    """Append one measurement."""
    import deepspeed

    software = {"deepspeed": deepspeed.__version__, "torch": torch.__version__}
    facts = {**software, "processor": platform.machine(), "cores": os.cpu_count(), "unix_s": int(time.time())}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps({"kind": kind, **row, **facts}) + "\n")
    print(row, flush=True)


def print_table() -> None:
    """Print the newest record of each configuration as Markdown."""
    newest = {}
    for line in RESULTS.read_text().splitlines():
        row = json.loads(line)
        newest[row["kind"], row["stage"], row["world_size"], row.get("optimizer")] = row
    print("| stage | optimizer | 1 rank | 2 ranks | 3 ranks | 4 ranks |\n|---|---|---|---|---|---|")
    for stage in STAGES:
        for name in ("lamb", "plain"):
            rows = [newest.get(("errors", stage, world_size, name)) for world_size in (1, 2, 3, 4)]
            cells = ["" if row is None else f"{float(row['max_relative_error']):.1e}" for row in rows]
            print(f"| {stage} | {name} | {' | '.join(cells)} |")
    print("\n| stage | exact / one ratio | exact / plain |\n|---|---|---|")
    for stage in STAGES:
        if row := newest.get(("times", stage, 2, None)):
            print(f"| {stage} | {ratio_cell(row, 'one_ratio')} | {ratio_cell(row, 'plain')} |")


def ratio_cell(row: dict[str, Any], other: str) -> str:
    """Return the median ratio and its quartiles."""
    low, high = row[f"exact_over_{other}_quartiles"]
    return f"{row[f'exact_over_{other}']:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "times", "table"))
    {"errors": measure_errors, "times": measure_times, "table": print_table}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
