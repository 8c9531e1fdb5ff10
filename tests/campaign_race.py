"""What is learned from the same text in the same minutes: our recipe, its parts, and plain transformers.

    python tests/campaign_race.py screen   --text FOLDER --work FOLDER   # 3 minutes: rates and batch sizes, one seed
    python tests/campaign_race.py final    --text FOLDER --work FOLDER   # 10 minutes, ours 5 too: the best of each
    python tests/campaign_race.py parts    --text FOLDER --work FOLDER   # 3 minutes: ours, a part of it exchanged
    python tests/campaign_race.py families --text FOLDER --work FOLDER   # 15 minutes: three networks of one size
    python tests/campaign_race.py tasks    --work FOLDER --data FOLDER   # three tasks from the models of families
    python tests/campaign_race.py table

4 layers of 256, sequences of 64. Ours is `campaign_race.json`, its parts `campaign_race_parts.json`, with
`training.max_minutes`, which pays for its evaluations and for timing itself; the rivals of `plain_transformers.py` are
not charged for theirs. All are judged by `score.py --task masked_words` on the validation split of the shards. The
contestants of a phase are run one after the other, in turns of their seeds. Rows: tests/results/race.jsonl; what is
there for this kind of machine (AMX or not) and text is not repeated. Chinese wants more --pieces, another --work.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from campaign_rows import add_row, read_rows
from race_table import draw, print_tables

from bert_ds.configuration.recipe.run_config import RunConfig, load_run_config
from bert_ds.corpus.batches.batch_stages import DataSettings
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.reporting.metrics_file import numbered_rows
from bert_ds.training.launch.launch_precision import faster_precision, gemm_rates

ROOT = Path(__file__).resolve().parents[1]
RECIPE, RESULTS = ROOT / "tests/campaign_race.json", ROOT / "tests/results/race.jsonl"
RATES, BATCHES, SEEDS = (1e-3, 2e-3, 4e-3), (32, 64), (1, 2, 3)

PARTS: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/campaign_race_parts.json").read_bytes())
"""Name -> what of our recipe is exchanged."""
FAMILIES = ("modernbert of 696", "pre-norm bert", "post-norm bert")
"""Parts of one budget: 5.36 million parameters each."""
RIVALS: dict[str, tuple[str, ...]] = {
    "A bert": ("--network", "bert"),
    "A modernbert": ("--network", "modernbert"),
    "B": ("--network", "modernbert", "--masked", "0.3", "--all_mask"),
}
"""Name -> options of `plain_transformers.py`; B has Muon, at twice AdamW's rate."""
TASKS = {"trec": 6, "stsb_en": 4, "ud_pos": 3}
"""Task -> epochs."""


class Entry(NamedTuple):
    """One training."""

    name: str
    lr: float
    """Of AdamW; Muon's matrices get twice that."""
    batch: int
    seed: int
    minutes: float


def main() -> None:
    """Run what has no row yet; print the tables and draw the picture."""
    args = _arguments()
    if args.phase == "tasks":
        run_tasks(args)
    elif args.phase != "table":
        prepare(args)
        for entry in entries(args):
            if not args.only or entry.name in args.only:
                row_of(entry, args)
    print_tables(read_rows(RESULTS))
    draw(read_rows(RESULTS), RESULTS.with_suffix(".png"))


def prepare(args: argparse.Namespace) -> None:
    """Make tokenizer and shards, and what the rivals read, once."""
    work, tokenizer, shards = args.work, args.work / "tokenizer", args.work / "shards"
    if not (tokenizer / "vocab.txt").exists():
        _verb("train_wordpiece", "--input", args.text, "--output", tokenizer, "--vocab_size", args.pieces)
    if not (shards / "manifest.json").exists():
        places = ("--input", args.text, "--tokenizer", tokenizer, "--output", shards)
        _verb("build_shards", *places, "--validation_fraction", 0.03)
    if (work / "held_out.npz").exists():
        return
    run = load_run_config(RECIPE, _paths(work))
    settings = DataSettings(run.sequences, run.masking, run.seed, run.training.train_batch_size)
    data = PretrainingData([Source(shards, "text")], tokenizer, settings=settings)
    split = data._splits[0]
    np.save(work / "train.npy", split.tokens(0, split.num_tokens))
    unigram = data.unigram_cross_entropy(run.evaluation.num_examples, batch_size=32, world_size=1)
    np.savez(work / "held_out.npz", unigram=unigram, **padded(data, run))


def padded(data: PretrainingData, run: RunConfig) -> dict[str, np.ndarray]:
    """Return the run's own evaluation as padded sequences with labels at [MASK] and -1 elsewhere."""
    inputs, labels = [], []
    for batch in data.evaluation_batches(run.evaluation.num_examples, batch_size=32, rank=0, world_size=1):
        of_batch = torch.full_like(batch.input_ids_T, -1)
        at_mask = slice(0, batch.kind_counts["masked"])
        of_batch[batch.targets["masked_positions"][at_mask]] = batch.targets["masked_labels"][at_mask]
        for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
            inputs.append(batch.input_ids_T[start:stop].numpy())
            labels.append(of_batch[start:stop].numpy())
    longest = max(map(len, inputs))
    return {
        "inputs": np.stack([np.pad(row, (0, longest - len(row))) for row in inputs]),
        "labels": np.stack([np.pad(row, (0, longest - len(row)), constant_values=-1) for row in labels]),
        "lengths": np.array([len(row) for row in inputs]),
    }


def entries(args: argparse.Namespace) -> Iterator[Entry]:
    """Yield what a phase trains."""
    if args.phase == "screen":
        for name, lr, batch in itertools.product((*RIVALS, "ours"), RATES, BATCHES):
            yield Entry(name, lr, batch, 1, 3.0)
    elif args.phase == "final":
        for seed in SEEDS[: args.seeds]:
            yield Entry("ours", *best_of("ours"), seed, 5.0)
            yield from (Entry(name, *best_of(name), seed, 10.0) for name in (*reversed(RIVALS), "ours"))
    elif args.phase == "parts":
        yield from (Entry(name, *best_of("ours"), 1, 3.0) for name in PARTS)
    else:
        yield from (Entry(name, 2e-3, 32, 1, args.minutes) for name in FAMILIES)


def best_of(name: str) -> tuple[float, int]:
    """Return rate and batch with the lowest loss of the screening."""
    rows = [row for row in recorded() if row["name"] == name and row["minutes"] == 3.0]
    if not rows:
        raise SystemExit(f"{RESULTS}: nothing of {name} has been screened on this kind of machine")
    best = min(rows, key=lambda row: row["loss"])
    return best["lr"], best["batch"]


def recorded() -> list[dict[str, Any]]:
    """Return the rows of this kind of machine."""
    return [row for row in read_rows(RESULTS) if row["amx"] == _has_amx()]


def row_of(entry: Entry, args: argparse.Namespace) -> dict[str, Any]:
    """Return the recorded row of a training, or train, judge and record it."""
    key = {"text": args.text.name, **entry._asdict()}
    for row in recorded():
        if all(row.get(name) == value for name, value in key.items()):
            return row
    folder = folder_of(entry, args.work)
    outcome = rival(entry, folder, args) if entry.name in RIVALS else ours(entry, folder, args)
    score_dir = folder / "score"
    where = ("--data", args.work / "shards", "--set", "max_seq_length=64", "--output", score_dir)
    _verb("score", "--task", "masked_words", "--model", folder / "hf", *where)
    figures = json.loads((score_dir / "results.json").read_bytes())["validation"]
    unigram = float(np.load(args.work / "held_out.npz")["unigram"])
    judged = {"loss": figures["loss_mlm_masked"], "accuracy": figures["mlm_masked_accuracy"], "unigram": unigram}
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "commit": _commit()}
    row = {**key, **judged, **outcome, "amx": _has_amx(), "cores": os.cpu_count(), **facts}
    add_row(RESULTS, row)
    return row


def folder_of(entry: Entry, work: Path) -> Path:
    """Return the folder of a training; its export is `hf` in it."""
    return work / "runs" / "-".join(str(part).replace(" ", "_").replace("/", "_") for part in entry)


def ours(entry: Entry, run_dir: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Pre-train by the verb and export; return steps, tokens, seconds and the curve."""
    optimizer = {**json.loads(RECIPE.read_text())["optimizer"], "lr": 2 * entry.lr, "adamw_lr": entry.lr}
    changes = {"optimizer": optimizer, **PARTS.get(entry.name, {})}
    if changes["optimizer"]["type"] == "adamw":
        changes["optimizer"] = {**changes["optimizer"], "lr": entry.lr}
    training = {"training.train_batch_size": entry.batch, "training.max_minutes": entry.minutes, "seed": entry.seed}
    settings = {**changes, **training, "evaluation.every_steps": every_steps(entry)}
    words = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    options = [option for word in (*words, *_paths(args.work)) for option in ("--set", word)]
    if not (run_dir / "DONE").exists():
        spread = ("--deepspeed_config", ROOT / "ds_configs/zero1.json", "--run_dir", run_dir)
        _verb("pretrain", "--run", RECIPE, *spread, *options)
    _verb("export_hf", "--run_dir", run_dir)
    return outcome_of(list(numbered_rows(run_dir / "metrics.jsonl")))


def outcome_of(numbered: Iterable[Any]) -> dict[str, Any]:
    """Return what a run's metrics say of its speed and its curve; time runs from the first step that was timed."""
    rows = [row for _, row in numbered]
    timing = next(row for row in rows if row["kind"] == "timing")
    begun = next(row["time"] for row in rows if row["kind"] == "start") - timing["spent_s"]
    trained = [row for row in rows if row["kind"] == "train"]
    per_step = statistics.mean(row["num_tokens"] for row in trained)
    judged = [row for row in rows if row["kind"] == "evaluation"]
    curve = [
        ((row["time"] - begun) / 60, row["step"] * per_step, row["loss_mlm_masked"], row["mlm_masked_accuracy"])
        for row in judged
    ]
    steps, tokens_per_s = trained[-1]["step"], statistics.median(row["tokens_per_s"] for row in trained[1:])
    ended = {"seconds": judged[-1]["time"] - begun, "tokens_per_s": tokens_per_s}
    return {"steps": steps, "tokens": round(steps * per_step), **ended, "curve": curve}


def every_steps(entry: Entry) -> int | None:
    """Return a tenth of the steps that an earlier, shorter training makes expect; short ones are judged at their end.

    Their evaluations would take a tenth of their time.
    """
    rows = [row for row in recorded() if row.get("batch") == entry.batch and row["minutes"] < entry.minutes]
    alike = [row for row in rows if row["name"] == entry.name] or [row for row in rows if row["name"] == "ours"]
    if entry.minutes < 10 or not alike:
        return None
    return max(1, round(alike[-1]["steps"] * entry.minutes / alike[-1]["minutes"] / 10))


def rival(entry: Entry, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train a plain loop in a process of its own; return steps, tokens, seconds and the curve."""
    run = load_run_config(RECIPE, _paths(args.work))
    options = ["--lr", entry.lr, "--batch", entry.batch, "--seed", entry.seed, "--minutes", entry.minutes]
    options += ["--muon_lr", 2 * entry.lr] if entry.name == "B" else []
    options += ["--precision", faster_precision(gemm_rates(run.model))]
    places = ["--work", args.work, "--output", folder / "hf"]
    script = ROOT / "tests/plain_transformers.py"
    subprocess.run([sys.executable, script, *map(str, (*places, *RIVALS[entry.name], *options))], check=True)
    result = json.loads((folder / "hf/result.json").read_bytes())
    return {**result, "tokens_per_s": result["tokens"] / result["seconds"]}


def run_tasks(args: argparse.Namespace) -> None:
    """Fine-tune the models of the families phase on three tasks and record the scores."""
    for (task, epochs), entry, seed in itertools.product(TASKS.items(), entries(args), SEEDS[: args.seeds]):
        key = {"task": task, "name": entry.name, "seed": seed, "minutes": entry.minutes}
        if any(all(row.get(name) == value for name, value in key.items()) for row in recorded()):
            continue
        folder = folder_of(entry, args.work)
        run_dir = folder / f"{task}-{seed}"
        settings = (f"training.epochs={epochs}", "optimizer.lr=3e-4", f"seed={seed}", "max_seq_length=64")
        words = [word for setting in settings for word in ("--set", setting)]
        spread = ("--deepspeed_config", ROOT / "ds_configs/zero1.json", "--data", args.data, "--run_dir", run_dir)
        if not (run_dir / "results.json").exists():
            _verb("finetune", "--task", task, "--model", folder / "hf", *spread, *words)
        results = json.loads((run_dir / "results.json").read_bytes())
        score = results["validation"][results["metric"]]
        add_row(RESULTS, {**key, "score": score, "amx": _has_amx(), "commit": _commit()})


def _paths(work: Path) -> list[str]:
    pieces = len((work / "tokenizer/vocab.txt").read_text(encoding="utf-8").splitlines())
    places = [f"corpus.tokenizer={work.resolve()}/tokenizer", f"corpus.sources.0.path={work.resolve()}/shards"]
    return [*places, f"model.vocab_size={pieces}"]


def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _verb(name: str, *arguments: object) -> None:
    subprocess.run([sys.executable, str(ROOT / f"bert_ds/{name}.py"), *map(str, arguments)], cwd=ROOT, check=True)


def _commit() -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=("screen", "final", "parts", "families", "tasks", "table"))
    parser.add_argument("--text", type=Path, help="folder of text")
    parser.add_argument("--data", type=Path, help="folder of the data sets that the shipped tasks name")
    parser.add_argument("--work", type=Path, default=Path("runs/campaign-race"))
    parser.add_argument("--pieces", type=int, default=8192, help="of the tokenizer, where it is not there yet")
    parser.add_argument("--only", nargs="+", default=[], help="names of contestants: nothing else is trained now")
    parser.add_argument("--minutes", type=float, default=15.0, help="of the families phase")
    parser.add_argument("--seeds", type=int, default=3, help="of the phases final and tasks")
    args = parser.parse_args()
    name = "data" if args.phase == "tasks" else "text"
    if args.phase != "table" and not (folder := getattr(args, name) or Path("-")).is_dir():
        parser.error(f"--{name} {folder}: wanted a folder that is there")
    return args


if __name__ == "__main__":
    main()
