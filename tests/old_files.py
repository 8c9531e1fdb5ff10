"""Makes small files of every kind that version 0.1.0 has written, for `test_old_files`.

    python tests/old_files.py --checkout CHECKOUT --work FOLDER

CHECKOUT is one of version 0.1.0 (f1d7161), FOLDER must not exist. A tokenizer, shards, a run at each ZeRO stage with
its checkpoint of step 2 and the rows of all 4 steps, exports, a fine-tuned folder and its predictions become
tests/old_files.tar.xz. What names the machine is left out: logs, environments; paths are made relative.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

ARCHIVE = Path(__file__).with_suffix(".tar.xz")
STEPS, MIDDLE = 4, 2
RUNS = {
    "stage0": (1, 0, {"training.precision": "fp32"}),
    "stage1": (1, 1, {"training.precision": "bf16", "optimizer": {"type": "muon", "lr": 5e-3}}),
    "stage2": (2, 2, {"training.precision": "fp32", "optimizer": {"type": "lamb", "lr": 5e-3}}),
    "stage3": (2, 3, {"training.precision": "bf16", "sequences.sentence_pair": "sop"}),
}
"""Name -> ranks, ZeRO stage, settings."""
RECIPE: dict[str, Any] = {
    "name": "old",
    "seed": 5,
    "model": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    },
    "corpus": {"type": "shards", "sources": [{"path": "shards"}], "tokenizer": "tokenizer"},
    "sequences": {"max_seq_length": 32, "sentence_pair": "none"},
    "optimizer": {"type": "adamw", "lr": 5e-3},
    "schedule": {"type": "linear", "warmup_steps": 2},
    "training": {"total_steps": STEPS, "train_batch_size": 4, "log_every_steps": 1, "num_workers": 0},
    "evaluation": {"num_examples": 8, "batch_size": 4},
    "checkpoints": {"every_steps": MIDDLE},
}
TASK: dict[str, Any] = {
    "name": "old",
    "kind": "classification",
    "data": {
        "train": [{"path": "train.tsv", "format": "tsv"}],
        "fields": {"text": "text", "label": "label"},
        "validation_fraction": 0.25,
    },
    "max_seq_length": 16,
    "optimizer": {"type": "adamw", "lr": 5e-3},
    "training": {"epochs": 1, "train_batch_size": 4, "precision": "fp32"},
}
WORDS = ("farmer", "river", "king", "cloud", "child", "stone")


def main() -> None:
    """Make everything and write the archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    work, checkout = arguments.work.resolve(), arguments.checkout.resolve()
    if work.exists() or not (checkout / "bert_ds/pretrain.py").is_file():
        parser.error(f"wanted a checkout and a folder that does not exist, found {checkout} and {work}")
    work.mkdir(parents=True)
    os.chdir(work)  # a checkpoint holds the name of its run folder as it was given
    write_sources(work)
    places = ("--tokenizer", work / "tokenizer", "--output", work / "shards")
    text = ("--input", work / "text.txt")
    call(checkout, "train_wordpiece.py", *text, "--vocab_size", 64, "--output", work / "tokenizer")
    call(checkout, "build_shards.py", *text, *places, "--validation_fraction", 0.2)
    for name, (ranks, stage, settings) in RUNS.items():
        files = ("--run", work / "recipe.json", "--deepspeed_config", work / f"zero{stage}.json")
        content = json.loads((checkout / f"ds_configs/zero{stage}.json").read_text())
        (work / f"zero{stage}.json").write_text(json.dumps({**content, "train_micro_batch_size_per_gpu": 2}))
        call(checkout, "pretrain.py", *files, "--run_dir", f"runs/{name}", *overrides(settings), ranks=ranks)
        run_dir = work / "runs" / name
        call(checkout, "export_hf.py", "--run_dir", run_dir, "--checkpoint", f"global_step{MIDDLE}")
    files = ("--task", work / "task.json", "--deepspeed_config", work / "zero0.json")
    call(checkout, "finetune.py", *files, "--model", work / "runs/stage0/hf", "--run_dir", "task", ranks=1)
    strip(work)
    with tarfile.open(ARCHIVE, "w:xz") as archive:
        for path in sorted(work.rglob("*")):
            if path.is_file():
                archive.add(path, path.relative_to(work), filter=anonymous)


def write_sources(work: Path) -> None:
    """Write text, rows of a task, recipe and task."""
    draw = random.Random(0)
    lines = [f"the {draw.choice(WORDS)} sees the {draw.choice(WORDS)} near 北京 ." for _ in range(240)]
    documents = [" ".join(lines[start : start + 6]) for start in range(0, 240, 6)]
    (work / "text.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    rows = [f"the {word} sees the {other}\t{int(word < other)}" for word in WORDS for other in WORDS]
    (work / "train.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    (work / "recipe.json").write_text(json.dumps(RECIPE, indent=1))
    (work / "task.json").write_text(json.dumps(TASK, indent=1))


def overrides(settings: dict[str, Any]) -> list[str]:
    """Return settings as words of a command line."""
    return [
        word
        for name, value in settings.items()
        for word in ("--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    ]


def call(checkout: Path, script: str, *words: object, ranks: int | None = None) -> None:
    """Run a verb of the checkout, on ranks under DeepSpeed's launcher."""
    environment = {**os.environ, "PYTHONPATH": f"{checkout}:{checkout / 'kernels'}"}
    launcher = (
        [] if ranks is None else ["-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", "29617"]
    )
    command = [sys.executable, *launcher, str(checkout / "bert_ds" / script), *map(str, words)]
    subprocess.run(command, check=True, env=environment)


def strip(work: Path) -> None:
    """Leave the checkpoints of the middle, and nothing that names the machine."""
    for run_dir in (work / "runs").iterdir():
        shutil.rmtree(run_dir / f"checkpoints/global_step{STEPS}")
        (run_dir / "checkpoints/latest").write_text(f"global_step{MIDDLE}")
        (run_dir / "DONE").unlink()
    shutil.rmtree(work / "task/checkpoints")
    for pattern in ("environment.json", "run.lock", "recipe.json", "task.json", "zero*.json"):
        for path in work.rglob(pattern):
            path.unlink()
    for folder in [path for name in ("logs", "examples", "figures") for path in work.rglob(name)]:
        shutil.rmtree(folder)
    for path in [path for name in ("*.json", "*.jsonl") for path in work.rglob(name)]:
        text = path.read_text(encoding="utf-8")
        if str(work) in text:
            above = "/".join([".."] * (len(path.relative_to(work).parts) - 1))
            path.write_text(text.replace(str(work), above), encoding="utf-8")


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Return a member without owner and time."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
