"""The commands that the documents show: found, divided into words, and made small enough to be run."""

from __future__ import annotations

import csv
import json
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bert_ds.launch.launcher import launcher_words
from bert_ds.launch.verbs import VERBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("slurm/*.md"), *ROOT.glob("kernels/*.md")])
NOT_RUN = {
    r"^make (pretrain|test|check|env-dev|test-fast)$": "long: what a change has to pass runs them as printed",
    r"^pip install ": "network: it changes the environment; test_wheel installs what it makes",
    r"^sbatch |^cp slurm/": "cluster: make test-slurm submits these scripts",
    r"^deepspeed --hostfile ": "cluster: it wants several machines; test_launcher starts ranks",
    r"--push_to_hub": "network: test_hub has a hub on this machine",
    r"--search ": "long: test_search runs whole searches",
    r"--onnx": "long: test_hf_onnx and test_int8 make and run these files",
    r"^text-embeddings-router ": "a server that is not installed; test_embedding_kind holds what it reads",
    r"^tensorboard ": "a server that does not end",
}
"""Commands, as patterns, that are not run here, and why."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Command(NamedTuple):
    """A command as a page shows it."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Words of the last command of a pipe."""
        return shlex.split(self.text)

    @property
    def verb(self) -> str | None:
        """The verb that is run, by whatever launcher; None where it is none."""
        names = {Path(word).stem for word in self.words if re.fullmatch(r"bert_ds/\w+\.py", word)}
        if self.words[0] == "bert-ds":
            names = {self.words[1]}
        return next(iter(names)) if names else None

    @property
    def verb_words(self) -> list[str]:
        """What the verb itself is told: without its launcher, and without the launcher's options."""
        words = self.words
        scripts = [index for index, word in enumerate(words) if word == f"bert_ds/{self.verb}.py"]
        own = words[scripts[0] + 1 :] if scripts else words[2:]
        return launcher_words(own)[1] if VERBS[self.verb or ""].is_launched else own

    @property
    def reason(self) -> str | None:
        """Why it is not run; None for what is."""
        return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, self.text)), None)

    @property
    def form(self) -> tuple[str | None, frozenset[str]]:
        """What of it one run stands for: the verb and the names of its options; of score what is scored, too."""
        words = self.verb_words
        scored = words[words.index("--task") + 1] if self.verb == "score" else ""
        return self.verb, frozenset([scored, *(word for word in words if word.startswith("--"))])


def commands_of(page: Path) -> Iterator[Command]:
    """Yield the commands of every block that has no language, and those behind a $ in one of a terminal."""
    for language, block in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language not in ("", "sh", "bash", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            text = re.sub(r"(^|\s)#.*", "", line).strip()
            if language == "console":
                text = text.removeprefix("$ ") if text.startswith("$ ") else ""
            text = re.sub(r"^\w+=\S+ ", "", text.rpartition(" | ")[2])
            if text and not text.startswith("echo "):
                yield Command(str(page.relative_to(ROOT)), " ".join(text.split()))


def blocks_of(page: Path, language: str) -> list[str]:
    """Return the blocks of a page in a language."""
    return [block for name, block in _FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


PLACES = {
    "R.json": "my_run.json",
    **dict.fromkeys(("DIR", "FOLDER", "ANY", "OWNER/NAME", "runs/my_retriever/hf"), "runs/mine/hf"),
    "TEXT": "corpus",
    **dict.fromkeys(("cmrc", "laws_zh", "ud_pos"), "sst2"),
    **dict.fromkeys(("runs/sst2/hf", "runs/wnut17/hf", "runs/my_task/seed_1/hf"), "runs/my_task/hf"),
}
"""What a page leaves to its reader -> what there is here."""
_ONE_EPOCH = ("--set", "training.epochs=1")
OVERRIDES: dict[str, tuple[str, ...]] = {
    "train_wordpiece": ("--vocab_size", "150"),
    "build_shards": ("--validation_fraction", "0.2"),
    "init": ("--minutes", "0.1"),
    "pretrain": ("--set", "training.max_minutes=null", "--set", "training.total_steps=4"),
    "finetune": (*_ONE_EPOCH, "--set", "training.train_batch_size=16"),
    "probe": ("--max_vectors", "200"),
    "submit": ("--set", "training.train_batch_size=64", "--dry_run"),
}
OPTION_OVERRIDES = {"--layers": "0", "--seeds": "1"}
"""Verb, or option where it is given -> words that make it small; of an option that comes twice the later counts."""


def small_words(command: Command, run_dir: str | None = None) -> list[str]:
    """Return the words that run a command at a tiny size.

    Args:
        command: of a verb.
        run_dir: another run folder than the page's, for what trains.
    """
    words = [PLACES.get(word, word.replace('"TRAIN"', '"corpus"')) for word in command.verb_words if word != "--watch"]
    if command.verb == "predict" and "--input" not in words:
        words += ["--input", "new.txt"]
    if run_dir is not None and command.verb in ("pretrain", "finetune"):
        words += ["--run_dir", run_dir]
    words += [word for option, value in OPTION_OVERRIDES.items() if option in words for word in (option, value)]
    return words + list(OVERRIDES.get(command.verb or "", ()))


def shape(line: str) -> str:
    """Return a line that a command prints without its numbers, and the words that hang on them."""
    return (
        re.sub(r"[0-9a-f]{64}|\d+(?:[,.:]\d+)*(?:e[+-]?\d+)?", "#", line)
        .replace("subjective", "objective")
        .replace("above the model", "below the model")
    )


def write_world(folder: Path, task: str, questions: str) -> None:
    """Write what a reader brings along: text, labelled rows, a task file, texts to be answered, a space to search."""
    chance = random.Random(7)
    subjects, ends = ("the film", "this story", "a play", "the book"), ("and we left early", "from the first scene on")
    words = {"subjective": ("is lovely", "is dull", "is clumsy"), "objective": ("begins in paris", "was made in 1931")}
    rows = [
        (f"{chance.choice(subjects)} {number} {chance.choice(words[label])} {chance.choice(ends)} .", label)
        for number in range(60)
        for label in words
    ]
    (folder / "corpus").mkdir()
    for name in range(2):
        texts = ["\n".join(row[0] for row in chance.sample(rows, 8)) for _ in range(40)]
        (folder / f"corpus/{name}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    _write_rows(folder / "labelled.csv", ("text", "label"), rows, ",")
    _write_rows(folder / "reviews.csv", ("review", "stars"), rows[:5], ",")
    (folder / "DATA/sst2").mkdir(parents=True)
    signs = [(text, str(int(label == "subjective"))) for text, label in rows]
    _write_rows(folder / "DATA/sst2/train.tsv", ("sentence", "label"), signs, "\t")
    _write_questions(folder / "DATA/squad2_half_dev/train_like_v1_noxquad.json", [text for text, _ in rows[:8]])
    (folder / "my_task.json").write_text(task, encoding="utf-8")
    (folder / "new.txt").write_text(questions, encoding="utf-8")
    (folder / "space.json").write_text('{"settings": {"optimizer.lr": [1e-4, 3e-4]}}', encoding="utf-8")


def _write_rows(path: Path, head: tuple[str, str], rows: list[tuple[str, str]], between: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=between, lineterminator="\n").writerows([head, *rows])


def _write_questions(path: Path, texts: list[str]) -> None:
    paragraphs = [
        {
            "context": text,
            "qas": [{"id": text, "question": f"who saw {text} ?", "answers": [{"text": text[:3], "answer_start": 0}]}],
        }
        for text in texts
    ]
    path.parent.mkdir()
    path.write_text(json.dumps({"data": [{"title": "films", "paragraphs": paragraphs}]}), encoding="utf-8")
