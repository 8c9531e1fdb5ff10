"""Tasks that a pre-trained folder is scored on as it is: prompts, minimal pairs, word similarity."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.corpus.tokenizer.text_tokenizer import TextTokenizer
from bert_ds.downstream.kinds.split_rows import split_rows
from bert_ds.downstream.kinds.text_kinds import CLASSIFICATION
from bert_ds.downstream.rows.examples import Example, Say, label_of, score_of, text_of
from bert_ds.downstream.rows.records import Record, pick, read_records
from bert_ds.downstream.rows.splits import first_by_hash, scored_parts
from bert_ds.downstream.rows.tables import predictions_text
from bert_ds.downstream.scores.metrics import class_figures
from bert_ds.downstream.untrained.minimal_pairs import MinimalPair, judge_pairs, pair_accuracies
from bert_ds.downstream.untrained.prompts import Prompt, PromptWriter, Shot, check_prompt, prompt_scores
from bert_ds.downstream.untrained.word_similarity import WordPair, similarity_correlation, word_vectors
from bert_ds.encoder.pretraining_model import PretrainingModel


class Scored(NamedTuple):
    """What a folder gave without training: figures by name, and files of predictions, name -> text."""

    figures: dict[str, float]
    files: dict[str, str]
    parts: Mapping[str, dict[str, float]] = {}
    """Figures of the parts of an official side; see `scored_parts`."""
    facts: Mapping[str, Any] = {}
    """What else results.json says."""


ScoreKind = Callable[[PretrainingModel, TextTokenizer, TaskConfig, Say], Scored]
"""From the model of a folder, its tokenizer and the task; says counts of rows."""
_WORD_ROLES = ("left", "right", "score")


def score_prompts(model: PretrainingModel, tokenizer: TextTokenizer, task: TaskConfig, say: Say) -> Scored:
    """Classify the validation rows by label words; the rows and the split are those of fine-tuning."""
    settings = task.prompt
    assert settings is not None, "the task was checked"
    sides = split_rows(task, CLASSIFICATION, say=say)
    train, validation = sides.train, sides.validation
    prompt = Prompt(settings.template, settings.label_words)
    check_prompt(prompt, tokenizer, num_texts=len(validation[0].texts))
    unknown = sorted({example.target for example in (*train, *validation)} - set(prompt.label_words))
    if unknown:
        raise DataError(f"the label {unknown[0]!r} has no words in prompt.label_words of task {task.name}")
    writer = PromptWriter(tokenizer, prompt, min(task.max_seq_length, model.config.max_position_embeddings))
    shots = _shots(train, settings.num_shots, list(prompt.label_words), seed=task.seed)
    rows = [example.texts for example in validation]
    found = prompt_scores(model, writer, rows, shots=shots, calibrate=settings.calibrate)
    if shots:
        say(f"demonstrations in a prompt: {np.mean(found.num_shots):.1f} of {len(shots)} in the mean")
    answers = [max(scores, key=scores.__getitem__) for scores in found.scores]
    parts = scored_parts("validation", len(validation), sides.overlapping.get("validation"))
    figures = {
        name: class_figures([validation[i].target for i in part], [answers[i] for i in part], list(prompt.label_words))
        for name, part in parts.items()
        if part
    }
    lines = [(example.id, answer) for example, answer in zip(validation, answers, strict=True)]
    files = {"predictions.tsv": predictions_text(lines)}
    counts = {"train": len(train), **{name: len(part) for name, part in parts.items()}}
    facts = {"rows": counts, "rows_removed": sides.num_removed}
    return Scored(figures.pop("validation"), files, figures, facts)


def score_minimal_pairs(model: PretrainingModel, tokenizer: TextTokenizer, task: TaskConfig, say: Say) -> Scored:
    """Say of each pair which sentence is the likelier; half of them is what chance gives."""
    pairs = [
        MinimalPair(text_of(record, "good", task), text_of(record, "bad", task), _group(record, "paradigm", task))
        for record in _records(task)
    ]
    say(f"{len(pairs):,} pairs of {len({pair.paradigm for pair in pairs})} paradigms; chance is 0.5")
    judged = judge_pairs(model, tokenizer, pairs)
    lines = [
        json.dumps({**one.pair._asdict(), "good_score": one.good_score, "bad_score": one.bad_score}, ensure_ascii=False)
        for one in judged
    ]
    return Scored(pair_accuracies(judged), {"pairs.jsonl": "\n".join(lines) + "\n"})


def score_word_similarity(model: PretrainingModel, tokenizer: TextTokenizer, task: TaskConfig, say: Say) -> Scored:
    """Correlate cosines of word vectors with what people say, for each set of words and each kind of vector."""
    sets: dict[str, list[WordPair]] = {}
    records = _records(task)
    filled = [record for record in records if any(str(pick(record, task.data.fields[role])) for role in _WORD_ROLES)]
    if len(filled) < len(records):
        say(f"{len(records) - len(filled)} rows have neither words nor a score and are left out")
    for record in filled:
        score = score_of(record, "score", task)
        assert score is not None, "a score that is not optional"
        pair = WordPair(text_of(record, "left", task), text_of(record, "right", task), score)
        sets.setdefault(_group(record, "set", task), []).append(pair)
    vectors = word_vectors(
        model.bert, tokenizer, [word for pairs in sets.values() for pair in pairs for word in pair[:2]]
    )
    figures = {
        f"{kind}_{name}": similarity_correlation(getattr(vectors, kind), pairs)
        for kind in vectors._fields
        for name, pairs in sets.items()
    }
    means = {kind: float(np.mean([figures[f"{kind}_{name}"] for name in sets])) for kind in vectors._fields}
    say(", ".join(f"{name}: {len(pairs)} pairs" for name, pairs in sets.items()))
    return Scored(means | figures, {})


def _records(task: TaskConfig) -> list[Record]:
    records = [record for file in task.data.validation for record in read_records(file)]
    kept = first_by_hash([str(dict(record.values)) for record in records], task.data.max_validation_rows)
    return [records[index] for index in kept]


def _group(record: Record, role: str, task: TaskConfig) -> str:
    return label_of(record, role, task) or ""


def _shots(train: Sequence[Example], per_label: int, labels: Sequence[str], *, seed: int) -> list[Shot]:
    """Return that many random rows of each label, the labels taking turns, so that a cut leaves them balanced."""
    order = np.random.default_rng(seed).permutation(len(train))
    chosen = {label: [train[i] for i in order if train[i].target == label][:per_label] for label in labels}
    few = [label for label, rows in chosen.items() if len(rows) < per_label]
    if few:
        raise ConfigError(f"prompt.num_shots is {per_label}, but there are fewer training rows of {', '.join(few)}")
    return [Shot(chosen[label][turn].texts, label) for turn in range(per_label) for label in labels]
