"""Record how exact Muon is under ZeRO, what its peers do instead, and what a step costs.

    python tests/campaign_muon.py errors     20 steps of a small BERT against Muon in fp64 on whole tensors, stages 0-3,
                                             1-4 ranks; beside it a plain Muon in DeepSpeed's hands, and DeepSpeed's own
    python tests/campaign_muon.py times      optimizer step at BERT-base size: AdamW, LAMB, Muon, 1 and 2 ranks, stage 2
    python tests/campaign_muon.py messages   elements sent and work of the ranks at BERT-base and BERT-large size on 2,
                                             8 and 64 ranks, computed by the optimizer's own dealing
    python tests/campaign_muon.py table      print what is recorded as Markdown

Every measurement is appended to tests/results/muon.jsonl; nothing recorded is changed. Times are processor seconds of
each rank, with one torch thread: other work on the machine disturbs them little, and waiting for a rank is not in them.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from campaign_lamb import BertBaseShapes  # noqa: E402
from campaign_rows import add_row, read_rows  # noqa: E402
from lamb_bert import decay_of, make_model, train_unsharded  # noqa: E402
from lamb_optimizers import CLIP, whole_model_value  # noqa: E402
from lamb_reference import Formula, Settings, State, adamw, relative_error  # noqa: E402
from lamb_runs import Case, ds_config, quiet_deepspeed, run_cases, train  # noqa: E402
from muon_optimizers import MOMENTUM, MUON_SETTINGS, muon, muon_formula_of, newton_schulz  # noqa: E402
from ranks_harness import run_ranks  # noqa: E402

from bert_ds.configuration.recipe.muon_polynomials import orthogonalising_flops  # noqa: E402
from bert_ds.training.optimizers.elementwise_optimizers import AdamW  # noqa: E402
from bert_ds.training.optimizers.lamb import Lamb  # noqa: E402
from bert_ds.training.optimizers.muon import Muon  # noqa: E402
from bert_ds.training.optimizers.muon_exchange import deal  # noqa: E402

RESULTS = ROOT / "tests/results/muon.jsonl"
STAGES, WORLD_SIZES = (0, 1, 2, 3), (1, 2, 3, 4)
NUM_STEPS, NUM_WARM_STEPS, NUM_TIMED_STEPS = 20, 1, 3


def measure_errors() -> None:
    """Append the worst deviation of every stage and number of ranks after 20 steps, ours and the peers'."""
    truths = {
        kind: train_unsharded(
            formula_of, NUM_STEPS, settings=MUON_SETTINGS, clip=CLIP, model=make_model().double()
        ).weights
        for kind, formula_of in (("muon", muon_formula_of), ("deepspeed", deepspeed_formula_of))
    }
    cases = [Case(stage, optimizer=kind, num_steps=NUM_STEPS) for kind in ("muon", "plain_muon") for stage in STAGES]
    for world_size in WORLD_SIZES:
        for case, report in zip(cases, run_ranks(run_cases, world_size, cases, timeout_s=3000)[0], strict=True):
            record_errors(case.optimizer, case.stage, world_size, report.weights, truths["muon"])
        for stage, weights in run_ranks(run_deepspeed_muon, world_size, timeout_s=3000)[0].items():
            found = {name: torch.from_numpy(array) for name, array in weights.items()}
            record_errors("deepspeed", stage, world_size, found, truths["deepspeed"])


def record_errors(kind: str, stage: int, ranks: int, found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Append the worst error of a matrix of the layers and of any tensor."""
    errors = {name: relative_error(found[name], truth[name]) for name in truth}
    matrices = [error for name, error in errors.items() if muon_formula_of(name) is muon]
    row = {"optimizer": kind, "stage": stage, "ranks": ranks, "matrices": max(matrices), "all": max(errors.values())}
    record("errors", {**row, "num_steps": NUM_STEPS, "clip": CLIP})


def deepspeed_formula_of(name: str) -> Formula:
    """What DeepSpeed's own Muon says it does, on whole tensors: its choice of matrices and its scale."""
    is_matrix = "embed" not in name and "LayerNorm" not in name and "bias" not in name
    return deepspeed_muon if is_matrix else adamw


def deepspeed_muon(w: Tensor, g: Tensor, state: State, s: Settings) -> Tensor:
    """Jordan et al. 2024 with the scale of that text, sqrt(max(1, rows / columns))."""
    state.m = MOMENTUM * state.m + (1 - MOMENTUM) * g
    update = newton_schulz(MOMENTUM * state.m + (1 - MOMENTUM) * g)
    return w * (1 - s.lr * s.decay) - s.lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * update


def run_deepspeed_muon(rank: int, world_size: int) -> dict[int, dict[str, Any]]:
    """Worker: train with `optimizer.type` Muon in the DeepSpeed file; stage -> weights as numpy."""
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # the same products, without minutes of compiling
    import deepspeed

    quiet_deepspeed()
    found = {}
    for stage in STAGES:
        case = Case(stage, num_steps=NUM_STEPS, zero={"reduce_scatter": False} if stage == 3 else {})
        s = MUON_SETTINGS
        params = {"lr": s.lr, "momentum": MOMENTUM, "betas": [s.beta1, s.beta2], "eps": s.eps, "weight_decay": 0.1}
        config = {**ds_config(case, world_size), "optimizer": {"type": "Muon", "params": params}}
        model = make_model()
        named = list(model.named_parameters())
        groups = [
            {"params": [p for name, p in named if (decay_of(name) > 0) == decayed], "weight_decay": 0.1 * decayed}
            for decayed in (True, False)
        ]
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config, dist_init_required=False)
        train(engine, 0, NUM_STEPS)
        found[stage] = {name: whole_model_value(p).numpy().copy() for name, p in model.named_parameters()}
        engine.destroy()
    return found


def measure_times() -> None:
    """Append the processor seconds of an optimizer step, AdamW, LAMB and Muon in turn."""
    for world_size in (1, 2):
        per_rank = run_ranks(time_steps, world_size, timeout_s=3000)
        for kind in per_rank[0]:
            record("times", {"optimizer": kind, "ranks": world_size, "stage": 2, "cpu_s": [r[kind] for r in per_rank]})


def time_steps(rank: int, world_size: int) -> dict[str, float]:
    """Worker: median processor seconds of `engine.step()` of each optimizer."""
    import deepspeed

    quiet_deepspeed()
    spent: dict[str, float] = {}
    kinds: dict[str, Any] = {"adamw": AdamW, "lamb": Lamb, "muon": Muon}
    for kind, optimizer_class in kinds.items():
        model = BertBaseShapes()
        own = {"matrices": matrices_of(model)} if kind == "muon" else {}
        optimizer = optimizer_class(model.named_parameters(), lr=1e-4, weight_decay=0.01, **own)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config(Case(2), world_size), dist_init_required=False
        )
        times = []
        while len(times) < NUM_WARM_STEPS + NUM_TIMED_STEPS:
            engine.backward(engine(torch.zeros(())))
            is_last = engine.is_gradient_accumulation_boundary()  # of the step that is about to be taken
            start = time.process_time()
            engine.step()
            if is_last:
                times.append(time.process_time() - start)
        spent[kind] = statistics.median(times[NUM_WARM_STEPS:])
        engine.destroy()
    return spent


def matrices_of(model: nn.Module) -> list[str]:
    """The 72 matrices of BERT-base's layers."""
    return [name for name, p in model.named_parameters() if p.dim() == 2 and not name.startswith("parts.0.")]


def measure_messages() -> None:
    """Append elements sent per step and the work of the busiest rank, as the optimizer would deal the matrices."""
    for size, hidden, layers in (("base", 768, 12), ("large", 1024, 24)):
        of_layer = [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]
        shapes = dict(enumerate(of_layer * layers))
        total = sum(height * width for height, width in shapes.values())
        for ranks in (2, 8, 64):
            for way in ("flat", "zero3"):
                lengths = (flat_lengths if way == "flat" else even_lengths)(shapes, ranks)
                owners = deal(shapes, lengths)
                sent = [
                    sum(of_rank[row] for row in shapes if owners[row] != rank)
                    + sum(
                        height * width - of_rank[row] for row, (height, width) in shapes.items() if owners[row] == rank
                    )
                    for rank, of_rank in enumerate(lengths)
                ]
                work = [0] * ranks
                for row, shape in shapes.items():
                    work[owners[row]] += orthogonalising_flops(*shape, steps=5)
                bound = 2 * total * (ranks - 1) / ranks**2
                row = {"size": size, "ranks": ranks, "way": way, "elements": total, "flops": sum(work)}
                row |= {"sent_mean": sum(sent) / ranks, "sent_worst": max(sent), "bound": bound}
                record("messages", {**row, "busiest_over_mean": max(work) * ranks / sum(work)})


def flat_lengths(shapes: dict[int, tuple[int, int]], ranks: int) -> list[dict[int, int]]:
    """Stages 1 and 2: embeddings, then the matrices one after the other, cut into equal parts; biases are left out."""
    hidden = shapes[0][1]
    before, after = (30528 + 512 + 2) * hidden, 2 * hidden * hidden
    share = -(-(before + sum(height * width for height, width in shapes.values()) + after) // ranks)
    lengths: list[dict[int, int]] = [dict.fromkeys(shapes, 0) for _ in range(ranks)]
    begin = before
    for row, (height, width) in shapes.items():
        end = begin + height * width
        for rank in range(begin // share, -(-end // share)):
            lengths[rank][row] = min(end, (rank + 1) * share) - max(begin, rank * share)
        begin = end
    return lengths


def even_lengths(shapes: dict[int, tuple[int, int]], ranks: int) -> list[dict[int, int]]:
    """Stage 3: every tensor is cut into equal parts."""
    return [{row: height * width // ranks for row, (height, width) in shapes.items()} for _ in range(ranks)]


def record(kind: str, row: dict[str, Any]) -> None:
    """Append one measurement."""
    import deepspeed

    software = {"deepspeed": deepspeed.__version__, "torch": torch.__version__}
    facts = {**software, "processor": platform.machine(), "amx": torch.cpu._is_amx_tile_supported()}
    add_row(RESULTS, {"kind": kind, **row, **facts, "cores": os.cpu_count(), "unix_s": int(time.time())})


def print_table() -> None:
    """Print the newest record of each configuration as Markdown."""
    names = ("kind", "optimizer", "stage", "ranks", "size", "way")
    rows = list({tuple(row.get(name) for name in names): row for row in read_rows(RESULTS)}.values())
    print("| optimizer | ranks | stage 0 | stage 1 | stage 2 | stage 3 |\n|---|---|---|---|---|---|")
    for kind in ("muon", "plain_muon", "deepspeed"):
        for ranks in WORLD_SIZES:
            cells = [
                f"{row['matrices']:.1e} / {row['all']:.1e}"
                for row in sorted((r for r in rows if r["kind"] == "errors"), key=lambda r: r["stage"])
                if (row["optimizer"], row["ranks"]) == (kind, ranks)
            ]
            print(f"| {kind} | {ranks} | {' | '.join(cells)} |")
    print("\n| optimizer | ranks | processor seconds of a step, per rank |\n|---|---|---|")
    for row in rows:
        if row["kind"] == "times":
            print(f"| {row['optimizer']} | {row['ranks']} | {', '.join(f'{s:.2f}' for s in row['cpu_s'])} |")
    print("\n| size | ranks | way | sent, mean (worst) | bound | busiest / mean |\n|---|---|---|---|---|---|")
    for row in rows:
        if row["kind"] == "messages":
            sent = f"{row['sent_mean'] / 1e6:.1f} M ({row['sent_worst'] / 1e6:.1f})"
            end = f"{row['bound'] / 1e6:.1f} M | {row['busiest_over_mean']:.2f}"
            print(f"| {row['size']} | {row['ranks']} | {row['way']} | {sent} | {end} |")


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = {"errors": measure_errors, "times": measure_times, "messages": measure_messages, "table": print_table}
    parser.add_argument("what", choices=ways)
    ways[parser.parse_args().what]()


if __name__ == "__main__":
    main()
