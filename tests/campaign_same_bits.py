"""Whether two commits train the same bits, and whether the later one continues what the earlier one saved.

    python tests/campaign_same_bits.py --before CHECKOUT --after CHECKOUT --work FOLDER [--only fp32-1x-stage0 ...]

Both are checkouts; this environment runs them. `campaign_same_bits.json` is trained for 24 steps by each, in one
folder, so from one corpus: fp32 and bf16, 1 and 2 ranks, ZeRO 0 and 2; then cases with a pair objective, dropout, LAMB,
Muon and a teacher. Every row of the log has to be equal in all that is no time, and every exported tensor. Then the
later commit continues checkpoints of the earlier one from step 12, at every ZeRO stage, and has to reach the same rows.
What the earlier one has done is kept in FOLDER and not repeated. Exit code 0 if everything is equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from campaign_rows import use_own_extensions

from bert_ds.reporting.run_log import read_metrics

TIMES = (
    *("time", "tokens_per_s", "mfu", "data_wait_share", "seconds", "eta_s", "attempt", "ranks"),
    *("slow_rank", "rank_data_wait_s", "rank_forward_s"),
)
STEPS, MIDDLE = 24, 12
RECIPE = Path(__file__).with_suffix(".json").resolve()


class Case(NamedTuple):
    """A short run."""

    name: str
    ranks: int
    stage: int
    settings: dict[str, Any]


def cases(work: Path) -> list[Case]:
    """Return the runs that are compared."""
    found = [
        Case(f"{precision}-{ranks}x-stage{stage}", ranks, stage, {"training.precision": precision})
        for precision in ("fp32", "bf16")
        for ranks in (1, 2)
        for stage in (0, 2)
    ]
    dropout = {"model.hidden_dropout_prob": 0.1, "model.attention_probs_dropout_prob": 0.1}
    lamb, muon = '{"type":"lamb","lr":0.01}', '{"type":"muon","lr":0.003}'
    fp32 = {"training.precision": "fp32"}
    teacher = {"distillation": json.dumps({"teacher": str(work / "teacher"), "hidden_weight": 1.0})}
    return [
        *found,
        Case("sop-lamb-stage1", 2, 1, {**fp32, **dropout, "sequences.sentence_pair": "sop", "optimizer": lamb}),
        Case("nsp-muon-stage3", 2, 3, {**fp32, **dropout, "sequences.sentence_pair": "nsp", "optimizer": muon}),
        Case("distilled-stage1", 1, 1, {**fp32, **dropout, **teacher}),
        Case("stage3", 2, 3, fp32),
    ]


def main() -> int:
    """Train, compare, continue."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--after", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[])
    arguments = parser.parse_args()
    work, use_after = arguments.work.resolve(), arguments.after.resolve()
    known = [case.name for case in cases(work)]
    for name in set(arguments.only) - set(known):
        parser.error(f"--only: found {name}, wanted one of {', '.join(known)}")
    for checkout in (arguments.before, arguments.after):
        if not (checkout / "bert_ds/pretrain.py").is_file():
            parser.error(f"{checkout} holds no bert_ds/pretrain.py: wanted a checkout")
    work.mkdir(parents=True, exist_ok=True)
    unequal = []
    for case in cases(work):
        if arguments.only and case.name not in arguments.only:
            continue
        before = trained(arguments.before.resolve(), work / f"before-{case.name}", case, work)
        if not (work / "teacher").exists():
            shutil.copytree(before / "hf", work / "teacher")
        shutil.rmtree(work / f"after-{case.name}", ignore_errors=True)
        after = trained(use_after, work / f"after-{case.name}", case, work)
        answers = {"trained": facts(after) == facts(before), "continued": continues(use_after, before, case, work)}
        print(f"{case.name}: {answers}", flush=True)
        unequal += [f"{case.name} {what}" for what, is_equal in answers.items() if not is_equal]
    print("all equal" if not unequal else f"not equal: {', '.join(unequal)}")
    return int(bool(unequal))


def trained(checkout: Path, run_dir: Path, case: Case, work: Path) -> Path:
    """Train a case to its end, unless it is, and export it; returns the run folder."""
    if not (run_dir / "hf/model.safetensors").exists():
        train(checkout, run_dir, case, work)
        call(checkout, "bert_ds/export_hf.py", "--run_dir", run_dir)
    return run_dir


def continues(checkout: Path, before: Path, case: Case, work: Path) -> bool:
    """Return whether this checkout gets from the other's checkpoint in the middle to the same end."""
    run_dir = work / f"continued-{case.name}"
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(before, run_dir)
    shutil.rmtree(run_dir / f"checkpoints/global_step{STEPS}")
    shutil.rmtree(run_dir / "hf")
    (run_dir / "DONE").unlink()
    (run_dir / "checkpoints/latest").write_text(f"global_step{MIDDLE}")
    train(checkout, run_dir, case, work)
    call(checkout, "bert_ds/export_hf.py", "--run_dir", run_dir)
    attempts = {row["attempt"] for row in read_metrics(run_dir / "metrics.jsonl") if row["kind"] == "train"}
    return attempts == {1, 2} and facts(run_dir) == facts(before)


def train(checkout: Path, run_dir: Path, case: Case, work: Path) -> None:
    """Run or continue a case."""
    config = work / f"zero{case.stage}-{case.ranks}.json"
    content = json.loads((checkout / f"ds_configs/zero{case.stage}.json").read_text())
    config.write_text(json.dumps({**content, "train_micro_batch_size_per_gpu": 20}))
    settings = {"training.total_steps": STEPS, "training.log_every_steps": 1, "schedule.warmup_steps": 6}
    settings |= {"evaluation.every_steps": MIDDLE, "checkpoints.every_steps": MIDDLE, "evaluation.num_examples": 256}
    words = [word for name, value in (settings | case.settings).items() for word in ("--set", f"{name}={value}")]
    words += ["--run", str(RECIPE), "--deepspeed_config", str(config), "--run_dir", str(run_dir), "--resume", "auto"]
    with socket.socket() as free:  # the launcher's own port may be another run's
        free.bind(("127.0.0.1", 0))
        launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", case.ranks, "--master_port", free.getsockname()[1])
    call(checkout, *launcher, checkout / "bert_ds/pretrain.py", *words)


def call(checkout: Path, *words: object) -> None:
    """Run Python words with the code of a checkout."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}:{checkout / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=checkout, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{words} in {checkout}: exit {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def facts(run_dir: Path) -> dict[str, Any]:
    """Return the rows of a run without its times, the newest of each step, and the hash of the exported weights."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for kind in ("train", "evaluation"):
        for row in read_metrics(run_dir / "metrics.jsonl", kind):
            rows[kind, row["step"]] = {name: value for name, value in row.items() if name not in TIMES}
    weights = hashlib.sha256((run_dir / "hf/model.safetensors").read_bytes()).hexdigest()
    assert len(rows) == STEPS + STEPS // MIDDLE, f"{run_dir} has the rows {sorted(rows)}"
    return {"rows": rows, "weights": weights}


if __name__ == "__main__":
    use_own_extensions()
    sys.exit(main())
