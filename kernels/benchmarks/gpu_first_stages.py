"""What `gpu_first` does on a card, in order of importance: a table of stages, and the recipes they train.

A stage is a chain of commands with a time limit. A command prints what it has measured as lines of `figure_line`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURE = "figure: "
GOES_ON = "run again to go on"
"""Printed by a benchmark that has left something for the next call."""
ZERO_STAGES = (1, 2, 3)
_MARKS = {".": "passed", "F": "failed", "E": "errors", "s": "skipped", "x": "xfailed", "X": "xpassed"}


@dataclass(frozen=True)
class Stage:
    """One thing to do on a card."""

    name: str
    limit_s: float
    """Seconds after which it is stopped; less where less is left of the call."""
    commands: tuple[tuple[str, ...], ...]
    """Arguments of Python, one process after the other. `{minutes}` becomes what the process has."""
    least_s: float = 20.0
    """It is not begun with less."""
    environment: Mapping[str, str] = field(default_factory=dict)


def figure_line(name: str, value: Any, unit: str = "") -> str:
    """Return the line by which a command hands over a figure."""
    return FIGURE + json.dumps([name, str(value), unit])


def figures_in(text: str) -> list[tuple[str, str, str]]:
    """Return (name, value, unit) of all figures in the output of a command."""
    lines = (line for line in text.splitlines() if line.startswith(FIGURE))
    return [tuple(json.loads(line[len(FIGURE) :])) for line in lines]


def counts_of_tests(text: str) -> list[tuple[str, str, str]]:
    """Return how many tests passed, failed and so on as figures, from the output of `pytest -q`.

    They stand in its last line; where it was stopped before that they are counted by its marks.
    """
    ends = re.findall(r"^=*\s*((?:\d+ [a-z]+, )*\d+ [a-z]+) in [\d.]+s", text, re.MULTILINE)
    if ends:
        counts = [part.split() for part in ends[-1].split(", ")]
    else:
        rows = re.findall(r"^([.sxXFE]+)(?:\s+\[\s*\d+%\])?$", text, re.MULTILINE)
        marks = Counter("".join(rows))
        counts = [[str(marks[mark]), name] for mark, name in _MARKS.items() if marks[mark]]
    return [(f"tests {name}", number, "") for number, name in counts]


def facts_stage(commit: str | None) -> Stage:
    """Return the stage that says what machine this is; it comes first in every call."""
    return Stage("facts", 90.0, (_step("facts", *(("--commit", commit) if commit else ())),), least_s=0.0)


def make_stages(work: Path, *, results: Path, commit: str | None, dry_run: bool) -> list[Stage]:
    """Return all other stages, the most important first, and write the recipes that they train.

    Args:
        work: folder for runs and recipes.
        results: folder of the records, for the benchmarks.
        commit: what the rows say in a copy of the files that git does not know.
        dry_run: tiny sizes, on any device.
    """
    work.mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        (work / f"{name}.json").write_text(json.dumps(recipe(name, dry_run=dry_run), indent=2) + "\n", encoding="utf-8")
    bench = ("--results", str(results), "--minutes", "{minutes}", *(("--commit", commit) if commit else ()))
    base = _words(work, "bert_base", 1)
    interpreted = {"TRITON_INTERPRET": "1"} if dry_run else {}
    tiny_unpad = ("--sizes", "small", "--dtypes", "fp32", "--dry_run")
    stages = [
        Stage("kernel_tests", 75.0, (_kernel_tests(dry_run),), environment=interpreted),
        Stage("waits", 75.0, (_step("waits", *base, "--run_dir", str(work / "waits")),)),
        Stage("pretrain", 150.0, _pretrain_and_export(work, dry_run=dry_run)),
        *(Stage(f"zero{stage}", 75.0, _run(work, "bert_base", stage)) for stage in ZERO_STAGES),
        Stage("modernbert", 75.0, _run(work, "modernbert_base", 1)),
        Stage("muon", 75.0, _run(work, "bert_base_muon", 1)),
        Stage(
            "benchmarks", 3600.0, ((_beside("bench_gpu.py"), *bench, *(("--dry_run",) if dry_run else ())),),
            least_s=90.0, environment=interpreted,
        ),
        Stage("unpad", 100.0, ((_beside("bench_unpad.py"), *bench, *(tiny_unpad if dry_run else ())),)),
        Stage("profile", 75.0, (_step("profile", *base, "--run_dir", str(work / "profile")),)),
        *(
            Stage(f"memory_zero{stage}", 60.0, (
                _step("memory", *_words(work, "bert_base", stage), "--run_dir", str(work / f"memory_zero{stage}")),
            ))
            for stage in ZERO_STAGES
        ),
    ]  # fmt: skip
    # Of a CPU's time nothing is learned.
    return [replace(stage, limit_s=3600.0) for stage in stages] if dry_run else stages


RECIPES = {
    "bert_base": "bert_base_phase1",
    "bert_base_muon": "bert_base_muon",
    "modernbert_base": "modernbert_base_phase1",
}
"""Recipes of short runs, and the shipped one that each is like."""


def recipe(name: str, *, dry_run: bool) -> dict[str, Any]:
    """Return a shipped recipe on the embedded corpus, for a few steps; of a tiny model in a dry run."""
    shipped = ROOT / "ds_configs/recipes"
    found = json.loads((shipped / f"{RECIPES[name]}.json").read_text(encoding="utf-8"))
    embedded = json.loads((shipped / "embedded_default.json").read_text(encoding="utf-8"))["corpus"]
    kept = ("format", "seed", "model", "sequences", "masking")
    found = {key: value for key, value in found.items() if key in kept} | {
        "name": f"gpu_first_{name}",
        "corpus": embedded | ({"vocab_size": 512, "max_bytes": 800_000} if dry_run else {}),
        "optimizer": found["optimizer"] | {"lr": 1e-3},
        "schedule": {"type": "linear", "warmup_steps": 2},
        "training": {
            "total_steps": 3 if dry_run else 20, "train_batch_size": 8 if dry_run else 512, "precision": "bf16",
            "log_every_steps": 1, "num_workers": 0 if dry_run else 2,
        },
        "evaluation": {"every_steps": 1000, "num_examples": 16 if dry_run else 512},
        "checkpoints": {"every_steps": 1000, "keep_last": 1},
    }  # fmt: skip
    found["model"] |= {"vocab_size": found["corpus"]["vocab_size"]}
    found["sequences"]["max_seq_length"] = 32 if dry_run else 128
    if dry_run:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        found["model"] |= sizes
    return found


def _kernel_tests(dry_run: bool) -> tuple[str, ...]:
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/test_kernels_on_gpu.py"))
    return (*tests, *(("-k", "a_nan or (small_sizes and bias_gelu)") if dry_run else ("-m", "gpu", "--maxfail", "5")))


def _pretrain_and_export(work: Path, *, dry_run: bool) -> tuple[tuple[str, ...], ...]:
    """Return what `make pretrain` does, with the tiny recipe in a dry run, whose loss is not looked at."""
    folder = str(work / "default")
    config = ("--deepspeed_config", str(ROOT / "ds_configs/zero2.json"), "--run_dir", folder, "--resume", "auto")
    tiny = ("--run", str(work / "bert_base.json")) if dry_run else ()
    return (
        (_verb("pretrain"), *tiny, *config),
        (_verb("report"), "--run_dir", folder, *(() if dry_run else ("--require_below_unigram", "1.5"))),
        (_verb("export_hf"), "--run_dir", folder),
        (_verb("show_masks"), "--model", f"{folder}/hf"),
        _step("figures", folder),
    )


def _run(work: Path, name: str, stage: int) -> tuple[tuple[str, ...], ...]:
    folder = str(work / f"{name}_zero{stage}")
    return (_verb("pretrain"), *_words(work, name, stage), "--run_dir", folder), _step("figures", folder)


def _words(work: Path, name: str, stage: int) -> tuple[str, ...]:
    config = str(ROOT / f"ds_configs/zero{stage}.json")
    return "--run", str(work / f"{name}.json"), "--deepspeed_config", config, "--resume", "auto"


def _verb(name: str) -> str:
    return str(ROOT / f"bert_ds/{name}.py")


def _step(*words: str) -> tuple[str, ...]:
    return _beside("gpu_first_step.py"), *words


def _beside(script: str) -> str:
    return str(Path(__file__).with_name(script))
