"""What each verb does with an output folder of each kind: the table of BENCHMARKS.md.

    python tests/campaign_folders.py [--verbs export_hf ...] [--kinds foreign ...]

Every case is the verb itself, as its command line starts it. Of a refusal it is checked that no byte, name or time
stamp has changed; of everything else that what somebody else had put there is still there, unchanged.

Rows go to tests/results/folders.jsonl; --print only prints the table that is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from campaign_rows import add_row, read_rows
from forked_verbs import run_verb

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results/folders.jsonl"
KINDS = (
    "new",
    "empty",
    "ours",
    "ours, earlier version",
    "ours and a file more",
    "foreign",
    "link",
    "unwritable",
    "file",
)
MINE = (
    *(".git/HEAD", "README.md", "thesis.tex", "train-00000.tokens", "tokenizer/vocab.txt", "report.html"),
    *("predictions/test/predictions.tsv", "figures/loss.png", "logs/run.log", "checkpoints/global_step9/mine"),
)
NOT_OURS = ("config.json", "run_config.json", "results.json", "probes.json", "submit.json", "metrics.jsonl")
FOREIGN = {**dict.fromkeys(MINE, "mine"), **dict.fromkeys(NOT_OURS, '{"mine": 1}')}
"""Names that the verbs write, and others."""
ADDED = "notes.txt"
MARKS = ("bert_ds_folder.json", "export_manifest.json")
"""What an earlier version did not write."""


class Workshop:
    """Small inputs of every verb; untrained, only what a refusal needs of them."""

    def __init__(self, folder: Path, *, trained: bool = True) -> None:
        from downstream_cases import review_task, write_tiny_export

        from bert_ds.corpus.tokenizer.wordpiece_training import train_wordpiece

        self.folder = folder
        (folder / "sbatch").write_text("#!/bin/sh\necho 17\n", encoding="utf-8")
        (folder / "sbatch").chmod(0o755)
        words = ("the cat sees a dog .", "a bird finds the tree .", "the king paints a river .")
        lines = [" ".join(words[(i + j) % 3] for j in range(4)) for i in range(120)]
        (folder / "text.txt").write_text("\n\n".join(f"{line}\n{line}" for line in lines), encoding="utf-8")
        train_wordpiece(lines, vocab_size=60, lowercase=True, output=folder / "tokenizer")
        self.export = write_tiny_export(folder / "pretrained/hf")
        self.task = review_task(folder / "task", rows=24, training={"epochs": 1, "train_batch_size": 8})
        self.run_dir, self.tuned = folder / "run", folder / "tuned/hf" if trained else self.export
        self._recipe()
        self.run_dir.mkdir()
        for verb, output in (("pretrain", self.run_dir), ("finetune", folder / "tuned")) if trained else ():
            code, said = self.run(verb, output)
            assert code == 0, said

    def _recipe(self) -> None:
        """Shards and a recipe that trains on them."""
        self.run("build_shards", folder := self.folder / "shards")
        assert (folder / "manifest.json").is_file()
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        recipe = {
            "name": "tiny",
            "model": {"vocab_size": 60, "max_position_embeddings": 64, **sizes},
            "corpus": {"type": "shards", "sources": [{"path": "shards"}], "tokenizer": "tokenizer"},
            "sequences": {"max_seq_length": 32, "sentence_pair": "none"},
            "optimizer": {"type": "adamw", "lr": 1e-3},
            "schedule": {"type": "linear", "warmup_steps": 0},
            "training": {"total_steps": 1, "train_batch_size": 4, "log_every_steps": 1, "num_workers": 0},
            "evaluation": {"num_examples": 4, "batch_size": 4},
            "checkpoints": {"every_steps": 1},
        }
        (self.folder / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")

    def command(self, verb: str, output: Path) -> list[object]:
        """Script and arguments."""
        here, ds = self.folder, ROOT / "ds_configs/zero1.json"
        run = ("--run", here / "recipe.json", "--deepspeed_config", ds)
        task = ("--model", self.export, "--task", self.task)
        commands: dict[str, tuple[object, ...]] = {
            "train_wordpiece": ("--input", here / "text.txt", "--vocab_size", 60, "--output", output),
            "build_shards": (
                *("--input", here / "text.txt", "--tokenizer", here / "tokenizer", "--output", output),
                *("--validation_fraction", 0.3, "--workers", 1),
            ),
            "pretrain": (*run, "--run_dir", output, "--resume", "auto"),
            "finetune": (*task, "--deepspeed_config", ds, "--run_dir", output, "--resume", "auto"),
            "export_hf": ("--run_dir", here / "run", "--output", output),
            "export_hf --onnx": ("--model", self.export, "--onnx", "--output", output),
            "score": ("--model", self.tuned, "--task", self.task, "--output", output),
            "probe": (*task, "--max_vectors", 50, "--output", output),
            "report --html": ("--run_dir", output, "--html"),
            "submit": (*run, "--run_dir", output, "--gpus_per_node", 0),
        }
        return [ROOT / f"bert_ds/{verb.split()[0]}.py", *commands[verb]]

    def run(self, verb: str, output: Path) -> tuple[int, str]:
        """Run a verb; its exit code and what it said."""
        done = run_verb(*self.command(verb, output), env={"PATH": f"{self.folder}:{os.environ['PATH']}"})
        return done.returncode, done.stdout + done.stderr


def state(folder: Path) -> dict[str, object]:
    """Everything below a path: name -> bytes or target and time stamp; the path itself too."""
    found: dict[str, object] = {}
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink() or path.exists():
            what = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            # Trying whether a folder can be written touches its own time stamp.
            found[str(path)] = (what, path.lstat().st_mtime_ns if path.is_file() else 0)
    return found


def prepared(kind: str, place: Path, ours: Path | None) -> Path | None:
    """A folder of a kind; None where a verb has no such kind."""
    if kind.startswith("ours"):
        if ours is None:
            return None
        shutil.copytree(ours, place)
        if "earlier" in kind:
            for name in MARKS:
                for path in place.rglob(name):
                    path.unlink()
        if "more" in kind:
            (place / ADDED).write_text("mine", encoding="utf-8")
    elif kind == "foreign":
        for name, text in FOREIGN.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text, encoding="utf-8")
    elif kind == "empty":
        place.mkdir()
    elif kind == "link":
        place.with_name("target").mkdir()
        place.symlink_to(place.with_name("target"))
    elif kind == "unwritable":
        return Path("/proc/output")
    elif kind == "file":
        place.write_text("mine", encoding="utf-8")
    return place


def measure(workshop: Workshop, verb: str, kinds: tuple[str, ...]) -> Iterator[dict[str, object]]:
    """Yield a row per kind of folder."""
    ours: Path | None = None
    if any(kind.startswith("ours") for kind in kinds) and verb != "train_wordpiece":
        ours = workshop.folder / f"ours {verb}"
        if verb == "report --html":
            shutil.copytree(workshop.run_dir, ours)
        code, said = workshop.run(verb, ours)
        assert code == 0, said
    if verb == "train_wordpiece":
        ours = workshop.folder / "tokenizer"
    for kind in kinds:
        parent = Path(tempfile.mkdtemp(dir=workshop.folder))
        place = prepared(kind, parent / "output", ours)
        before = state(parent)
        code, said = workshop.run(verb, place or parent / "output")
        after = state(parent)
        mine = {path: what for path, what in before.items() if Path(path).name == ADDED or kind == "foreign"}
        sentence = next((line for line in said.splitlines() if "error: " in line), "")
        row = {"verb": verb, "kind": kind, "code": code, "kept": all(after.get(p) == what for p, what in mine.items())}
        if code:
            row["unchanged"] = after == before
            row["said"] = (
                sentence.partition("error: ")[2].replace(str(parent), "...").replace(str(workshop.folder), "...")
            )
            row["traceback"] = "Traceback" in said
        yield row
        shutil.rmtree(parent, ignore_errors=True)


def table(rows: list[dict[str, object]]) -> str:
    """The rows as a table in Markdown."""
    verbs = list(dict.fromkeys(str(row["verb"]) for row in rows))
    lines = [f"| | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    by_case = {(row["verb"], row["kind"]): row for row in rows}
    for verb in verbs:
        cells = [_cell(by_case[verb, kind]) if (verb, kind) in by_case else "" for kind in KINDS]
        lines.append(f"| `{verb}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, object]) -> str:
    if not row["kept"] or row.get("traceback"):
        return "**LOST**" if not row["kept"] else "**traceback**"
    if not row["code"]:
        return "written"
    return "refused" if row["unchanged"] else "refused, **changed**"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", nargs="+")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--print", action="store_true")
    args = parser.parse_args()
    if not args.print:
        args.results.unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            workshop = Workshop(Path(folder))
            for verb in args.verbs or VERBS:
                for row in measure(workshop, verb, tuple(args.kinds)):
                    add_row(args.results, row)
    print(table(read_rows(args.results)))


VERBS = (
    *("train_wordpiece", "build_shards", "pretrain", "finetune", "export_hf", "export_hf --onnx"),
    *("score", "probe", "report --html", "submit"),
)


if __name__ == "__main__":
    main()
