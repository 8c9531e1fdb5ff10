"""What pre-training is worth: real tasks from a pre-trained model, from random weights, and by a trivial method.

    python tests/campaign_downstream.py --data FOLDER --work FOLDER [--only sst2 trec ...] [--seeds 1 2 3] [--jobs 2]

FOLDER of data holds wikipedia_en, wikipedia_zh and the folders that the shipped tasks name. First a small BERT per
language is pre-trained on its Wikipedia by `campaign_downstream_en.json` and `..._zh.json`, and exported. Then every
task is fine-tuned from it and from the same network with random weights: same rows, epochs, learning rate and seeds,
at most 10,000 training rows. The trivial methods (`downstream/kinds/trivial.py`) see the same rows on the same
split.

With --longer the English model is trained on by `campaign_downstream_en_longer.json`, with wikipedia_en_more beside its
first text, and the English tasks are fine-tuned from that too.

Results are appended to tests/results/downstream.jsonl, one line per training; what is there is not run again. All tasks
are trained with their first seed before any with its second. At the end, and with --table alone, the table of
BENCHMARKS.md is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
import transformers

from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.trivial import trivial_figures
from bert_ds.downstream.tuning.task_rows import read_task

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/downstream.jsonl"
DEEPSPEED_CONFIG = ROOT / "ds_configs/zero1.json"
VOCAB_SIZES = {"en": 8192, "zh": 12000}
MAX_TRAIN_ROWS = 10_000
APPENDING = Lock()


class Run(NamedTuple):
    """How a task is trained here."""

    language: str
    epochs: float
    num_seeds: int = 3
    max_seq_length: int | None = None
    """Instead of the task's own, where that is more than these models' 128 positions."""
    validation_fraction: float | None = None
    """Instead of the task's own, where the training rows are not all used and a score would be known too badly."""


TASKS = {
    "sst2": Run("en", 3, num_seeds=1, validation_fraction=0.4),
    "trec": Run("en", 6),
    "subjectivity": Run("en", 3, num_seeds=1),
    "stsb_en": Run("en", 4, num_seeds=1),
    "cola": Run("en", 4),
    "rte": Run("en", 4),
    "ud_pos": Run("en", 3, num_seeds=1),
    "wnut17": Run("en", 6),
    "squad1": Run("en", 3, num_seeds=1, max_seq_length=128),
    "stsb_zh": Run("zh", 4, num_seeds=1),
    "laws_zh": Run("zh", 10, max_seq_length=128),
    "weibo_ner": Run("zh", 8, max_seq_length=128),
    "cmrc": Run("zh", 2, num_seeds=1, max_seq_length=128),
}
LEARNING_RATE = 3e-4
"""Peak, for these models of 5 million weights; both starts get the same."""


def main() -> None:
    """Run what has no result yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, help="instead of each task's own number of seeds")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the processor's threads")
    parser.add_argument("--longer", action="store_true", help="English also from a longer pre-training; two hours more")
    parser.add_argument("--table", action="store_true", help="print the table of what is recorded and stop")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.data is None or arguments.work is None:
            parser.error("--data and --work are missing")
        data, work = arguments.data.absolute(), arguments.work.absolute()
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))
        with ThreadPoolExecutor(arguments.jobs) as pool:
            names = languages(arguments.only)
            models = dict(zip(names, pool.map(lambda name: pretrained(name, data, work), names), strict=True))
            for name in arguments.only:
                record_trivial(name, data, models[TASKS[name].language])
            if arguments.longer and "en" in models:
                models["longer"] = pretrained_longer(data, work, first=models["en"])
            trainings = [
                pool.submit(record, training, data=data, model=model_of(training, models), work=work)
                for training in runs(arguments.only, arguments.seeds, longer=arguments.longer)
            ]
            for training in trainings:
                training.result()
    print("\n".join(table(stored())))


class Training(NamedTuple):
    """One fine-tuning."""

    task: str
    start: str
    seed: int


def runs(names: Iterable[str], seeds: list[int] | None, *, longer: bool) -> list[Training]:
    """Return what is to be trained, seed by seed."""
    trainings = [
        Training(name, start, seed)
        for name in names
        for start in ("pretrained", "random", "longer")
        for seed in seeds or range(1, TASKS[name].num_seeds + 1)
        if start != "longer" or (longer and TASKS[name].language == "en")
    ]
    return sorted(trainings, key=lambda training: training.seed)


def model_of(training: Training, models: dict[str, Path]) -> Path:
    """Return the folder that a training starts from; random weights take its configuration and tokenizer."""
    return models["longer" if training.start == "longer" else TASKS[training.task].language]


def languages(names: Iterable[str]) -> list[str]:
    """Return the languages of the tasks, each once."""
    return list(dict.fromkeys(TASKS[name].language for name in names))


def pretrained(language: str, data: Path, work: Path) -> Path:
    """Return the export of the language's model; what of it is missing is made."""
    text, folder = data / f"wikipedia_{language}", work / language
    if not (folder / "tokenizer/vocab.txt").is_file():
        places = ("--input", text, "--output", folder / "tokenizer")
        _verb("train_wordpiece", *places, "--vocab_size", VOCAB_SIZES[language])
    shards = _shards(text, folder / "tokenizer", folder / "shards")
    return _trained(language, folder / "run", tokenizer=folder / "tokenizer", sources=[shards])


def pretrained_longer(data: Path, work: Path, *, first: Path) -> Path:
    """Return the export of the English model that was trained on from its first export; what is missing is made."""
    folder, tokenizer = work / "en_longer", work / "en/tokenizer"
    sources = [work / "en/shards", _shards(data / "wikipedia_en_more", tokenizer, folder / "shards")]
    return _trained("en_longer", folder / "run", "--init_from", first, tokenizer=tokenizer, sources=sources)


def _shards(text: Path, tokenizer: Path, folder: Path) -> Path:
    if not (folder / "manifest.json").is_file():
        places = ("--input", text, "--tokenizer", tokenizer, "--output", folder)
        _verb("build_shards", *places, "--validation_fraction", 0.03)
    return folder


def _trained(recipe: str, run_dir: Path, *options: object, tokenizer: Path, sources: list[Path]) -> Path:
    if not (run_dir / "DONE").is_file():
        path = ROOT / f"tests/campaign_downstream_{recipe}.json"
        files = ("--run", path, "--deepspeed_config", ROOT / "ds_configs/zero2.json", "--run_dir", run_dir)
        settings = [f"corpus.sources.{number}.path={shards}" for number, shards in enumerate(sources)]
        places = [word for one in (f"corpus.tokenizer={tokenizer}", *settings) for word in ("--set", one)]
        _verb("pretrain", *files, *places, *options, "--resume", "auto")
    if not (run_dir / "hf/model.safetensors").is_file():
        _verb("export_hf", "--run_dir", run_dir)
    return run_dir / "hf"


def settings(name: str) -> list[str]:
    """Return the overrides that a task is trained with here."""
    length, fraction = TASKS[name].max_seq_length, TASKS[name].validation_fraction
    return [
        *([] if length is None else [f"max_seq_length={length}"]),
        *([] if fraction is None else [f"data.validation_fraction={fraction}"]),
        f"data.max_train_rows={MAX_TRAIN_ROWS}",
        f"optimizer.lr={LEARNING_RATE}",
        f"training.epochs={TASKS[name].epochs}",
        "training.precision=bf16",
        # As the recorded figures were made: without the validation rows that are part of a training row.
        "data.official=[]",
        "checkpoints.keep_last=1",
    ]


def record(training: Training, *, data: Path, model: Path, work: Path) -> None:
    """Fine-tune one seed from one start, unless its result is stored."""
    name, start, seed = training
    key = training._asdict()
    if any(all(row[field] == value for field, value in key.items()) for row in stored()):
        return
    run_dir = work / "tasks" / name / f"{start}_{seed}"
    begun = time.perf_counter()
    if not (run_dir / "DONE").is_file():
        options = [word for setting in settings(name) for word in ("--set", setting)]
        places = ("--task", name, "--data", data, "--model", model, "--deepspeed_config", DEEPSPEED_CONFIG)
        random = ("--random_weights",) if start == "random" else ()
        _verb("finetune", *places, "--run_dir", run_dir, "--seed", seed, *options, *random, "--resume", "auto")
    results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    metric = results["metric"]
    row = {**key, "metric": metric, "value": results["validation"][metric], "figures": results["validation"]}
    append({**row, "settings": settings(name), "seconds": round(time.perf_counter() - begun, 1), **facts_of(model)})


def record_trivial(name: str, data: Path, model: Path) -> None:
    """Measure the trivial method on the rows that the models see, unless its result is stored."""
    if any(row["task"] == name and row["start"] == "trivial" for row in stored()):
        return
    task = load_task(name, settings(name), data=data)
    rows = read_task(task, load_tokenizer(model), say=print)
    found = trivial_figures(KINDS[task.kind], rows.train.examples, rows.validation.examples, rows.labels)
    assert found is not None, f"no trivial method for a {task.kind} task"
    metric = task.chosen_metric
    append({"task": name, "start": "trivial", "metric": metric, "value": found[metric], "figures": found})


def facts_of(model: Path) -> dict[str, Any]:
    """Return which model was fine-tuned, and with what."""
    evaluations = [
        json.loads(line)
        for line in (model.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if '"evaluation"' in line
    ]
    loss = evaluations[-1]["loss_mlm_masked"]
    return {"pretraining_loss_masked": loss, "torch": torch.__version__, "transformers": transformers.__version__}


def stored() -> list[dict[str, Any]]:
    """Return the rows recorded so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def append(row: dict[str, Any]) -> None:
    """Record and print one row."""
    RESULTS.parent.mkdir(exist_ok=True)
    with APPENDING, RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table: a task per line, mean and deviation over seeds of each start."""
    starts = ("longer", "pretrained", "random", "trivial")
    titles = "| task | metric | pre-trained for longer | pre-trained | random weights | trivial method | seeds |"
    lines = [titles, "|---|---|---|---|---|---|---|"]
    for name in TASKS:
        by_start: dict[str, list[float]] = {}
        for row in rows:
            if row["task"] == name:
                by_start.setdefault(row["start"], []).append(row["value"])
        if not by_start:
            continue
        metric = next(row["metric"] for row in rows if row["task"] == name)
        cells = [_spread(by_start.get(start, [])) for start in starts]
        seeds = max(len(by_start.get("pretrained", [])), len(by_start.get("random", [])))
        lines.append(f"| {name} | {metric} | {' | '.join(cells)} | {seeds} |")
    return lines


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def _verb(name: str, *arguments: object) -> None:
    script = str(ROOT / f"bert_ds/{name}.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, script, *map(str, arguments)], check=True, env=environment)


if __name__ == "__main__":
    main()
