"""Tasks that a pre-trained folder is scored on as it is, and score.py as a user starts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from downstream_cases import review_task, write_lines, write_task
from forked_verbs import run_verb

import bert_ds.score
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.kinds import untrained_kinds
from bert_ds.downstream.kinds.split_rows import split_rows
from bert_ds.downstream.kinds.table import UNTRAINED
from bert_ds.downstream.kinds.text_kinds import CLASSIFICATION
from bert_ds.downstream.kinds.untrained_kinds import Scored
from bert_ds.downstream.untrained.prompts import PromptScores, PromptWriter, Shot, prompt_scores
from bert_ds.encoder.pretrained import load_masked_lm
from bert_ds.folders.output_folders import open_results_folder

ROOT = Path(__file__).resolve().parents[1]


def scored(task_file: Path, folder: Path) -> tuple[Scored, list[str]]:
    """What a folder gives on an untrained task, and what is said of it."""
    said: list[str] = []
    task = load_task(task_file)
    model = load_masked_lm(folder, kernels="torch")
    return UNTRAINED[task.kind](model, load_tokenizer(folder), task, said.append), said


def pair_task(folder: Path) -> Path:
    """Two pairs of one paradigm, the second with its sentences exchanged."""
    pairs = [{"sentence_good": "we saw it.", "sentence_bad": "it saw we.", "UID": "order"}]
    pairs.append({"sentence_good": "it saw we.", "sentence_bad": "we saw it.", "UID": "order"})
    write_lines(folder / "pairs.jsonl", list(map(json.dumps, pairs)))
    fields = {"good": "sentence_good", "bad": "sentence_bad", "paradigm": "UID"}
    data = {"validation": [{"path": "pairs.jsonl", "format": "jsonl"}], "fields": fields}
    return write_task(folder, {"kind": "minimal_pairs", "data": data})


def test_minimal_pairs_are_judged_by_paradigm(tiny_export: Path, tmp_path: Path) -> None:
    found, _ = scored(pair_task(tmp_path), tiny_export)
    assert found.figures == {"accuracy": 0.5, "accuracy_order": 0.5}
    first, second = map(json.loads, found.files["pairs.jsonl"].splitlines())
    assert first["good_score"] == pytest.approx(second["bad_score"])


def test_at_most_as_many_pairs_are_judged_as_the_task_wants(tiny_export: Path, tmp_path: Path) -> None:
    task = pair_task(tmp_path)
    content = json.loads(task.read_text())
    content["data"]["max_validation_rows"] = 1
    task.write_text(json.dumps(content))
    found, said = scored(task, tiny_export)
    assert len(found.files["pairs.jsonl"].splitlines()) == 1
    assert said == ["1 pairs of 1 paradigms; chance is 0.5"]


def test_word_similarity_is_measured_by_set_and_kind_of_vector(tiny_export: Path, tmp_path: Path) -> None:
    rows = ["word1,word2,similarity", "great,superb,9", "film,play,7.5", "dull,paris,1", "in,it,0.5", ",,"]
    write_lines(tmp_path / "words.csv", rows)
    file = {"path": "words.csv", "format": "csv", "values": {"set": "mine"}}
    fields = {"left": "word1", "right": "word2", "score": "similarity"}
    task = write_task(tmp_path, {"kind": "word_similarity", "data": {"validation": [file], "fields": fields}})
    found, said = scored(task, tiny_export)
    assert set(found.figures) == {"embedding", "encoder", "embedding_mine", "encoder_mine"}
    assert all(-1 <= value <= 1 for value in found.figures.values())
    assert said == ["1 rows have neither words nor a score and are left out", "mine: 4 pairs"]


PROMPT = {"template": "{text} is {label}.", "label_words": {"good": ["great"], "bad": ["dull", "clumsy film"]}}


def test_a_prompt_scores_what_overlaps_in_an_official_side_apart(tiny_export: Path, tmp_path: Path) -> None:
    file = {"path": "train.tsv", "format": "tsv"}
    data = {"train": [file], "validation": [file, {"path": "more.tsv", "format": "tsv"}], "official": ["validation"]}
    data |= {"fields": {"text": "text", "label": "label"}}
    write_lines(tmp_path / "more.tsv", ["text\tlabel", "we saw it\tgood"])
    task = review_task(tmp_path, rows=4, kind="prompted_classification", prompt=PROMPT, max_seq_length=40, data=data)
    found, _ = scored(task, tiny_export)
    assert found.facts["rows"] == {
        **{"train": 4, "validation": 5},
        **{"validation_overlapping": 4, "validation_others": 1},
    }
    whole = found.figures["accuracy"] * 5
    assert whole == pytest.approx(
        4 * found.parts["validation_overlapping"]["accuracy"] + found.parts["validation_others"]["accuracy"]
    )


@pytest.mark.parametrize("num_shots", [0, 2])
def test_a_prompt_classifies_the_validation_rows_of_fine_tuning(
    tiny_export: Path, tmp_path: Path, num_shots: int
) -> None:
    prompt = {**PROMPT, "num_shots": num_shots}
    task = review_task(tmp_path, kind="prompted_classification", prompt=prompt, max_seq_length=40)
    found, said = scored(task, tiny_export)
    assert {"accuracy", "macro_f1", "matthews"} <= set(found.figures)
    header, *rows = found.files["predictions.tsv"].splitlines()
    assert header == "index\tprediction"
    assert {row.split("\t")[1] for row in rows} <= {"good", "bad"}
    assert ("demonstrations in a prompt: 3.0 of 4 in the mean" in said) == bool(num_shots)


def test_the_verb_writes_the_parts_of_an_official_side(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"path": "train.tsv", "format": "tsv"}
    data = {"train": [file], "validation": [file], "official": ["validation"]}
    data |= {"fields": {"text": "text", "label": "label"}}
    task = review_task(tmp_path, rows=4, kind="prompted_classification", prompt=PROMPT, max_seq_length=40, data=data)
    words = ("score.py", "--model", tiny_export, "--task", task, "--output", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    bert_ds.score.main()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["validation_overlapping"] == results["validation"] and results["rows"]["validation_overlapping"] == 4


def test_a_prompt_goes_by_the_settings_of_its_task(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[PromptWriter, list[Shot], bool]] = []

    def watched(model: Any, writer: PromptWriter, rows: Any, *, shots: list[Shot], calibrate: bool) -> PromptScores:
        asked.append((writer, shots, calibrate))
        return prompt_scores(model, writer, rows, shots=shots, calibrate=calibrate)

    monkeypatch.setattr(untrained_kinds, "prompt_scores", watched)
    prompt = {**PROMPT, "num_shots": 1, "calibrate": False}
    task = review_task(tmp_path, kind="prompted_classification", prompt=prompt, max_seq_length=20, seed=4)
    scored(task, tiny_export)
    ((writer, shots, calibrate),) = asked
    assert not calibrate
    context = writer.context(["we saw it and " * 9], ())
    assert len(context.before) + len(context.after) + 2 == 20  # "clumsy film", the longest of the words
    train = split_rows(load_task(task), CLASSIFICATION, say=print).train
    order = [train[index] for index in np.random.default_rng(4).permutation(len(train))]
    wanted = [next(row.texts for row in order if row.target == label) for label in ("good", "bad")]
    assert [shot.texts for shot in shots] == wanted


def test_the_verb_prints_and_writes_the_figures(tiny_export: Path, tmp_path: Path) -> None:
    command = [ROOT / "bert_ds/score.py", "--task", pair_task(tmp_path), "--model", tiny_export]
    mine = [tmp_path / "out/results.json", tmp_path / "out/predictions/validation/pairs.jsonl"]
    open_results_folder(tmp_path / "out")
    mine[1].parent.mkdir(parents=True)
    for path in mine:
        path.write_text("mine")
    done = run_verb(*command, "--output", tmp_path / "out")
    assert [path.with_name(f"{path.name}.kept-1").read_text() for path in mine] == ["mine", "mine"]
    assert done.returncode == 0, done.stderr
    assert "tiny, validation: accuracy 0.5000  accuracy_order 0.5000" in done.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["validation"] == {"accuracy": 0.5, "accuracy_order": 0.5}
    assert (tmp_path / "out/predictions/validation/pairs.jsonl").is_file()


def test_a_prompt_that_does_not_fit_its_task_is_refused(tiny_export: Path, tmp_path: Path) -> None:
    task = review_task(tmp_path, kind="prompted_classification", prompt={**PROMPT, "template": "{text} is."})
    with pytest.raises(ConfigError, match=r"has the gaps \['text'\], wanted each of \['text', 'label'\] once"):
        scored(task, tiny_export)
    words = {"good": ["great"], "nice": ["lovely"]}
    task = review_task(tmp_path, kind="prompted_classification", prompt={**PROMPT, "label_words": words})
    with pytest.raises(DataError, match=r"the label 'bad' has no words in prompt.label_words of task tiny"):
        scored(task, tiny_export)
    with pytest.raises(ConfigError, match="prompt: is missing, wanted template and label_words"):
        load_task(review_task(tmp_path, kind="prompted_classification"))


def test_a_trained_task_without_training_rows_is_refused(tmp_path: Path) -> None:
    data = {"validation": [{"path": "train.tsv", "format": "tsv"}], "fields": {"text": "text", "label": "label"}}
    with pytest.raises(ConfigError, match=r"data.train: is empty, wanted at least one file"):
        load_task(review_task(tmp_path, data=data))
