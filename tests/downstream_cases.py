"""A tiny pre-trained export and small files of each format, for the tests of fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encoder_cases import small_config, spread_weights

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.families.marks import BERT_MARKS
from bert_ds.configuration.task.task_config import TaskConfig, load_task
from bert_ds.corpus.tokenizer.subwords import UnigramTokenizer
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.corpus.tokenizer.wordpiece import SPECIAL_PIECES, TextRules, WordPieceTokenizer
from bert_ds.encoder.hf_folder import model_card_text, special_ids, write_hf_folder
from bert_ds.encoder.hf_mapping import hf_config, to_hf
from bert_ds.encoder.pretraining_model import PretrainingModel

GOOD = ("lovely", "great", "charming", "superb", "moving")
BAD = ("dull", "awful", "tedious", "clumsy", "boring")
OTHER = (
    "the",
    "film",
    "is",
    "very",
    "play",
    "and",
    "book",
    "this",
    "story",
    "in",
    "paris",
    "london",
    "we",
    "saw",
    "it",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIECES = [
    *SPECIAL_PIECES,
    *GOOD,
    *BAD,
    *OTHER,
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
    ".",
    ",",
    "?",
    "中",
    "文",
]
SCORED = [
    *((piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")),
    *((f"▁{word}", -1.0) for word in (*GOOD, *BAD, *OTHER)),
    *((f"▁{letter}", -5.0) for letter in LETTERS),
    *((letter, -6.0) for letter in LETTERS[:-1]),
    *((piece, -6.0) for piece in ("▁", ".", ",", "?", "中", "文")),
]
"""As many pieces for a family with RoBERTa's special ones."""
CONFIG = small_config(vocab_size=len(PIECES), hidden_size=32, max_position_embeddings=48)


def tokenizer_of(encoder: EncoderConfig) -> TextTokenizer:
    """Return a tokenizer with the special pieces that a family wants."""
    if encoder.MARKS == BERT_MARKS:
        return WordPieceTokenizer(PIECES, TextRules())
    return UnigramTokenizer(SCORED, encoder.MARKS)


def write_tiny_export(
    folder: Path, *, has_pair_head: bool = True, fingerprint: str | None = None, encoder: EncoderConfig = CONFIG
) -> Path:
    """Write a folder as export_hf.py does, of an encoder that has learned nothing, and return it."""
    tokenizer = folder.with_name("tokenizer")
    tokenizer_of(encoder).save(tokenizer)
    folder.mkdir()
    model = PretrainingModel(encoder, has_pair_head=has_pair_head)
    spread_weights(model, encoder, scale=0.05)
    objective = "nsp" if has_pair_head else "none"
    config = hf_config(encoder, sentence_pair=objective, special_ids=special_ids(tokenizer))
    write_hf_folder(
        folder,
        config=config if fingerprint is None else {**config, "tokenizer_fingerprint": fingerprint},
        tensors=to_hf(model.state_dict(), encoder),
        tokenizer=tokenizer,
        model_card=model_card_text("tiny", encoder, {"steps": 0}),
    )
    return folder


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    """Write lines, each with its end, and return the path."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def review_rows(number: int) -> list[str]:
    """Rows "text<TAB>label" of which the adjective decides the label; all differ."""
    rows = []
    for index in range(number):
        word = (GOOD if index % 2 else BAD)[index // 2 % 5]
        rows.append(f"the film is {word} {index}\t{'good' if index % 2 else 'bad'}")
    return rows


def write_task(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write a task file beside its data and return its path."""
    path = folder / "task.json"
    path.write_text(json.dumps({"name": "tiny", "max_seq_length": 24, **content}), encoding="utf-8")
    return path


def review_task(folder: Path, *, rows: int = 64, **content: Any) -> Path:
    """Write a task of two classes with its file and return the task file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.tsv", ["text\tlabel", *review_rows(rows)])
    data = {
        "train": [{"path": "train.tsv", "format": "tsv"}],
        "fields": {"text": "text", "label": "label"},
        "validation_fraction": 0.25,
    }
    settings = {"kind": "classification", "optimizer": {"type": "adamw", "lr": 5e-3}, "dropout": 0.0}
    return write_task(folder, {**settings, "data": data, **content})


def task_of(folder: Path, content: Mapping[str, Any]) -> TaskConfig:
    """Write a task and load it."""
    return load_task(write_task(folder, content))
