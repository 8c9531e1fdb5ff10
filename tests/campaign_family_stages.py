"""Every family's training at each ZeRO stage, on one rank and two, with each optimizer: one curve, resumed to the bit.

    python tests/campaign_family_stages.py --work FOLDER

One forked launch per family and number of ranks makes all runs. Curves: 4 steps without dropout, compared with stage 0
on one rank under the same optimizer. Resumed: with dropout, from the checkpoint of step 2; losses and weights after
step 4 must have the bits of the run that was left alone. Rows: tests/results/families.jsonl; what is there is not
repeated.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from campaign_rows import add_row, read_rows
from family_cases import WIRED, of_size
from family_runs import STEPS, TOKENIZER, Run, losses, run_folder, train_all, write_inputs
from ranks_harness import run_ranks

from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

RESULTS = Path(__file__).parent / "results/families.jsonl"
OPTIMIZERS = ("adamw", "lamb", "muon")
SETTINGS = {"adamw": ("optimizer.lr=0.005",), "muon": ("optimizer.adamw_lr=0.005",)}
CASES = [(optimizer, stage) for optimizer in OPTIMIZERS for stage in range(4)]


def main() -> None:
    """Train, compare, add the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    done = {row["family"] for row in read_rows(RESULTS) if row.get("ranks") == 2}
    for family, form in WIRED.items():
        if family not in done:
            folder = args.work / family.replace(", ", "_")
            folder.mkdir(parents=True)
            write_inputs(folder, of_size(form, vocab_size=TOKENIZER.vocab_size))
            for ranks in (1, 2):
                run_ranks(train_all, ranks, folder, runs(), timeout_s=1200.0)
            rows = [row_of(folder, family, ranks, *case) for ranks in (1, 2) for case in CASES]
            for row in rows:
                assert row["difference"] <= 2e-5 and row["resumed_equal"], row
                add_row(RESULTS, row)


def runs() -> list[Run]:
    """Return all runs of a launch, those that are resumed behind those that they resume."""
    found = []
    for optimizer, stage in CASES:
        shared: dict[str, Any] = {"optimizer": optimizer, "settings": SETTINGS.get(optimizer, ())}
        found.append(Run(f"curve-{optimizer}{stage}", stage, **shared))
        found.append(Run(f"whole-{optimizer}{stage}", stage, dropout=0.1, **shared))
        found.append(Run(f"resumed-{optimizer}{stage}", stage, dropout=0.1, resumes=found[-1].name, **shared))
    return found


def row_of(folder: Path, family: str, ranks: int, optimizer: str, stage: int) -> dict[str, Any]:
    """Return how far the curve is from the reference, and whether a resumed run had the bits of a whole one."""

    def at(name: str, ranks: int = ranks, stage: int = stage) -> Path:
        return run_folder(folder, ranks, Run(f"{name}-{optimizer}{stage}"))

    found, wanted = losses(at("curve")), losses(at("curve", ranks=1, stage=0))
    assert len(wanted) == STEPS and wanted[-1] < wanted[0]
    whole, resumed = (
        load_fp32_state_dict(at(name) / f"checkpoints/global_step{STEPS}") for name in ("whole", "resumed")
    )
    same_weights = whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    return {
        **{"family": family, "ranks": ranks, "stage": stage, "optimizer": optimizer},
        "difference": max(abs(one / other - 1) for one, other in zip(found, wanted, strict=True)),
        "resumed_equal": same_weights and losses(at("whole")) == losses(at("resumed")),
    }


if __name__ == "__main__":
    main()
