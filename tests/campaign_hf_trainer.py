"""The same fine-tuning by this project and by Hugging Face's Trainer: scores within noise, and time, side by side.

    python tests/campaign_hf_trainer.py --data FOLDER --model FOLDER --work FOLDER [--tasks trec] [--seeds 1 2 3]

MODEL is the Hugging Face folder of a pre-trained BERT. Both sides get the same rows (read, split and cut by this
project), pieces, steps, batch, peak rate, schedule, weight decay, dropout and clipping, in fp32, and take turns seed by
seed on the same machine; each draws its own order and dropout. Time is that of the training steps alone. The Trainer
pads every batch to its longest row; this project does not pad.

The Trainer wants accelerate, which the extra dev brings.
Results are appended to tests/results/hf_trainer.jsonl; what is there is not run again. --table prints them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/hf_trainer.jsonl"
SIDES = ("bert-ds", "Trainer")


def main() -> None:
    """Run what has no result yet, one side after the other, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["trec"], help="names of shipped classification tasks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override one setting")
    parser.add_argument("--table", action="store_true", help="print the table of what is recorded and stop")
    parser.add_argument("--trainer_child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.trainer_child is not None:
        args.trainer_child.write_text(json.dumps(train_with_trainer(args)))
        return
    if not args.table:
        if None in (args.data, args.model, args.work):
            parser.error("--data, --model and --work are wanted")
        for task in args.tasks:
            for seed in args.seeds:
                for side in SIDES if seed % 2 else reversed(SIDES):
                    record(task, seed, side, args)
    print("\n".join(table(stored())))


def record(task: str, seed: int, side: str, args: argparse.Namespace) -> None:
    """Train one seed on one side, unless its result is stored."""
    model = hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest()[:12]
    key = {"task": task, "seed": seed, "side": side, "settings": args.set, "model": model}
    if any(all(row[name] == value for name, value in key.items()) for row in stored()):
        return
    run = train_with_project if side == "bert-ds" else train_in_child
    row = {**key, **run(task, seed, args), "versions": versions()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def train_with_project(task: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run finetune.py and return its figures and the seconds of its steps."""
    run_dir = args.work / f"{task}_{seed}"
    command = [sys.executable, ROOT / "bert_ds/finetune.py", "--task", task, "--data", args.data]
    command += ["--model", args.model, "--run_dir", run_dir, "--deepspeed_config", ROOT / "ds_configs/zero1.json"]
    for setting in (*args.set, f"seed={seed}", "evaluation.every_epochs=null"):
        command += ["--set", setting]
    subprocess.run(list(map(str, command)), check=True, env=environment(), stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    seconds, number = (steps[-1][name] - steps[0][name] for name in ("time", "step"))
    figures = json.loads((run_dir / "results.json").read_text())["validation"]
    return {"figures": figures, "step_s": seconds / number, "steps": steps[-1]["step"]}


def train_in_child(task: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run the Trainer in a process of its own, as finetune.py has one."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--data", args.data, "--model", args.model, "--tasks", task]
        command += ["--seeds", seed, "--trainer_child", answer]
        for setting in args.set:
            command += ["--set", setting]
        subprocess.run(list(map(str, command)), check=True, env=environment(), stdout=subprocess.DEVNULL)
        return json.loads(answer.read_text())


def train_with_trainer(args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune by Hugging Face's Trainer on this project's rows; its figures come from this project's metrics."""
    import numpy as np
    import transformers

    from bert_ds.configuration.families.bert import BertConfig
    from bert_ds.configuration.task.task_config import load_task, trained_task
    from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
    from bert_ds.downstream.scores.metrics import class_figures
    from bert_ds.downstream.tuning.task_rows import read_task

    (name,), (seed,) = args.tasks, args.seeds
    task = load_task(name, args.set, data=args.data)
    rows = read_task(task, load_tokenizer(args.model), say=print)
    plan = trained_task(task, BertConfig(), num_sequences=len(rows.train.features))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        args.model,
        num_labels=len(rows.labels["label"]),
        hidden_dropout_prob=task.dropout,
        attention_probs_dropout_prob=task.dropout,
    )
    data = [
        [
            {
                "input_ids": feature.input_ids.tolist(),
                "token_type_ids": feature.token_type_ids.tolist(),
                "labels": int(feature.targets["label"][0]),
            }
            for feature in side.features
        ]
        for side in (rows.train, rows.validation)
    ]
    clock = StepClock()
    trainer = transformers.Trainer(
        model,
        trainer_arguments(plan, seed),
        train_dataset=data[0],
        data_collator=transformers.DataCollatorWithPadding(transformers.AutoTokenizer.from_pretrained(args.model)),
        callbacks=[clock.callback()],
    )
    trainer.train()
    found = [rows.labels["label"][index] for index in np.argmax(trainer.predict(data[1]).predictions, axis=1)]
    figures = class_figures([example.target for example in rows.validation.examples], found, rows.labels["label"])
    return {"figures": figures, "step_s": clock.mean_step_s, "steps": len(clock.times)}


def trainer_arguments(plan: Any, seed: int) -> Any:
    """Return what the Trainer has to know to do what finetune.py does."""
    import transformers

    optimizer, steps = plan.optimizer, plan.training.total_steps
    assert plan.schedule.type == "linear", plan.schedule.type
    return transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        seed=seed,
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=plan.training.train_batch_size,
        per_device_eval_batch_size=64,
        learning_rate=optimizer.lr,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=plan.training.gradient_clipping,
        lr_scheduler_type="linear",
        warmup_steps=plan.schedule.num_warmup_steps(steps),
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class StepClock:
    """The time at the end of every step, taken by a callback of the Trainer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def callback(self) -> Any:
        """Return the callback."""
        import transformers

        times = self.times

        class Callback(transformers.TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                times.append(time.time())

        return Callback()

    @property
    def mean_step_s(self) -> float:
        """Seconds per step, without the first."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def environment() -> dict[str, str]:
    """Return the environment of both sides: one thread each, where the user says nothing else."""
    return {"OMP_NUM_THREADS": "1", **os.environ, "DS_ACCELERATOR": "cpu"}


def versions() -> dict[str, str]:
    """Return the versions that a result belongs to."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")}


def stored() -> list[dict[str, Any]]:
    """Return the rows that are recorded."""
    if not RESULTS.is_file():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table: mean, deviation and time per step of both sides, over the same seeds."""
    lines = ["| task | side | seeds | accuracy | step, relative |", "|---|---|---|---|---|"]
    groups: dict[tuple[Any, ...], dict[str, dict[int, Any]]] = {}
    for row in rows:
        group = groups.setdefault((row["task"], row["model"], *row["settings"]), {side: {} for side in SIDES})
        group[row["side"]][row["seed"]] = row
    for (task, *_), of in groups.items():
        seeds = sorted(of[SIDES[0]].keys() & of[SIDES[1]].keys())
        if not seeds:
            continue
        base = statistics.mean(of["Trainer"][seed]["step_s"] for seed in seeds)
        for side in SIDES:
            scores = [of[side][seed]["figures"]["accuracy"] for seed in seeds]
            deviation = f" +- {statistics.stdev(scores):.4f}" if len(seeds) > 1 else ""
            ratio = statistics.mean(of[side][seed]["step_s"] for seed in seeds) / base
            lines.append(f"| {task} | {side} | {len(seeds)} | {statistics.mean(scores):.4f}{deviation} | {ratio:.2f} |")
    return lines


if __name__ == "__main__":
    main()
