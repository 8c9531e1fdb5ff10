"""A folder with everything a recipe may name, and runs of a small recipe made in it, in this process."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_verbs import run_verb
from settings_walk import changed
from tiny_training import join_alone

import bert_ds.pretrain
from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.run_plan import make_plan
from bert_ds.corpus.shards import embedded
from bert_ds.corpus.text.documents import Document
from bert_ds.launch.command_line import USER_ERRORS, report_error
from bert_ds.launch.launch_checks import checked_run
from bert_ds.launch.verb_arguments import pretrain_arguments
from bert_ds.training.launch import run_folder
from bert_ds.training.launch.restart import StopRequest

ROOT = Path(__file__).resolve().parents[1]
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seed": 5,
    "model": {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
    },
    "corpus": {"type": "shards", "sources": [{"path": "shards"}], "tokenizer": "tokenizer"},
    "sequences": {"max_seq_length": 32},
    "optimizer": {"type": "adamw", "lr": 5e-3},
    "schedule": {"type": "linear", "warmup_steps": 2},
    "training": {
        "total_steps": 4,
        "train_batch_size": 4,
        "log_every_steps": 1,
        "num_workers": 0,
        "precision": "fp32",
        "kernels": "torch",
    },
    "evaluation": {"num_examples": 8, "batch_size": 4},
}
SUBJECTS = ("farmer", "river", "king", "cloud", "child", "stone")
CHINESE = ("北京天气很好", "我们在北京学习", "天气学习很好", "我们学习北京")


def text(seed: int) -> str:
    """Documents of two languages."""
    draw = random.Random(seed)
    subjects = SUBJECTS[seed:]
    lines = [
        f"the {draw.choice(subjects)} sees the {draw.choice(subjects)} near {draw.choice(CHINESE)} ."
        for _ in range(240)
    ]
    return "\n\n".join("\n".join(lines[first : first + 8]) for first in range(0, len(lines), 8))


def must(*command: object) -> str:
    """Run a verb that ends well, and return what it said."""
    done = run_verb(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documents(max_bytes: int) -> Iterator[Document]:
    """A tenth of so much text, in place of the docstrings, which take a second to read."""
    draw, size = random.Random(0), 0
    syllables = ("ba", "Ba", "ne", "ri", "Ri", "sha", "lo", "mi")
    while size < max_bytes / 10:
        words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(12)]
        yield Document("one", found := " ".join(words) + ".")
        size += len(found)


def run_here(action: Callable[[], int]) -> int:
    """Return the exit code of a run of this process, which prints what refuses it.

    It computes on one thread, as what is launched from here, and without the lock, which would be held to the end.
    """
    join_alone()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "lock_run_folder", lambda run_dir: None)
        patch.setattr(embedded, "docstring_documents", documents)
        patch.setattr(embedded, "MIN_CHARACTERS", 1)
        torch.set_num_threads(1)
        try:
            return action()
        except USER_ERRORS as error:
            return report_error(error)
        finally:
            torch.set_num_threads(threads)


def pretrained(*words: object) -> int:
    """Run pretrain.py with these words in this process, all but the way into a launch; its exit code."""
    args = pretrain_arguments([str(word) for word in words])

    def train() -> int:
        plan = make_plan(*checked_run(args), 1)
        return bert_ds.pretrain.pretrain(plan, Ranks(0, 0, 1), args=args, stop=StopRequest())

    return run_here(train)


class Workshop:
    """A folder with everything a recipe may name, and the runs made in it."""

    def __init__(self, folder: Path, *, with_teachers: bool = True) -> None:
        self.folder = folder
        self.made: dict[str, Any] = {}
        (folder / "words.txt").write_text("北京\n学习\n", encoding="utf-8")
        (folder / "words2.txt").write_text("天气很好\n我们\n", encoding="utf-8")
        vectors = [f"{word} {' '.join(['0.5', '-0.5'] * 8)}" for word in (*SUBJECTS, "the", "sees")]
        (folder / "vectors.txt").write_text("\n".join([f"{len(vectors)} 16", *vectors]), encoding="utf-8")
        for seed, tokenizer, shards in ((1, "tokenizer", "shards"), (2, "other", "more")):
            (folder / f"{shards}.txt").write_text(text(seed), encoding="utf-8")
            source = ("--input", folder / f"{shards}.txt")
            size = ("--vocab_size", RECIPE["model"]["vocab_size"])
            must(ROOT / "bert_ds/train_wordpiece.py", *source, "--output", folder / tokenizer, *size)
            places = ("--tokenizer", folder / "tokenizer", "--output", folder / shards)
            must(ROOT / "bert_ds/build_shards.py", *source, *places, "--validation_fraction", 0.2)
        for seed, teacher in ((1, "teacher"), (2, "teacher2")) if with_teachers else ():
            run_dir = self.run({"seed": seed})
            must(ROOT / "bert_ds/export_hf.py", "--run_dir", run_dir, "--output", folder / teacher)

    def run(self, changes: dict[str, Any], *, code: int = 0) -> Path:
        """Run a changed recipe and return its run folder; the same recipe runs once."""
        recipe = json.dumps(changed(RECIPE, changes), sort_keys=True)
        run_dir = self.folder / f"runs/{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
        if not run_dir.exists():
            path, codes = self.folder / f"{run_dir.name}.json", (code, 5) if "recovery" in changes else (code,)
            path.write_text(recipe, encoding="utf-8")
            files = ("--run", path, "--deepspeed_config", ROOT / "ds_configs/zero0.json")
            assert pretrained(*files, "--run_dir", run_dir, "--hang_limit", 0) in codes
        return run_dir


@cache
def plain_workshop(session: Path) -> Workshop:
    """A workshop without teachers, one for all modules of a session, whose folder for temporary files this is."""
    (session / "plain_workshop").mkdir()
    return Workshop(session / "plain_workshop", with_teachers=False)
