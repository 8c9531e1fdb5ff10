"""Probes of the layers: the vectors are those of transformers, the classifier finds what is there, control tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from downstream_cases import BAD, GOOD, OTHER, review_task, task_of, write_lines, write_task
from forked_verbs import run_verb

import bert_ds.probe
from bert_ds.configuration.task.task_config import TaskConfig, load_task
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task
from bert_ds.downstream.untrained.probing import (
    ProbeRows,
    control_targets,
    layer_vectors,
    majority_accuracy,
    probe_layers,
)
from bert_ds.encoder.families.bert import BertEncoder
from bert_ds.encoder.pretrained import load_pretrained, make_encoder
from bert_ds.folders.output_folders import open_results_folder

ROOT = Path(__file__).resolve().parents[1]


def tag_task(folder: Path, *, rows: int = 40) -> Path:
    """Sentences in which a word's tag is whether it praises, blames, or neither."""
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(rows):
        for word in generator.choice([*GOOD, *BAD, *OTHER, "unwanted"], size=6):
            lines.append(f"{word}\t{'UP' if word in GOOD else 'DOWN' if word in BAD else 'NONE'}")
        lines.append("")
    write_lines(folder / "train.conll", lines)
    data = {
        "train": [{"path": "train.conll", "format": "conll"}],
        "fields": {"words": 0, "tags": 1},
        "validation_fraction": 0.25,
        "tag_scheme": "none",
        "drop_overlap": False,
    }
    return write_task(folder, {"kind": "token_classification", "data": data})


def read(task: TaskConfig, folder: Path) -> TaskRows:
    return read_task(task, load_tokenizer(folder), say=lambda text: None)


def encoder_of(folder: Path) -> BertEncoder:
    pretrained = load_pretrained(folder)
    return make_encoder(pretrained.config, pretrained.tensors, kernels="torch")


def test_the_vectors_of_tags_are_the_hidden_states_that_transformers_computes(
    tiny_export: Path, tmp_path: Path
) -> None:
    import transformers

    task = task_of(tmp_path, json.loads(tag_task(tmp_path).read_text()))
    features = read(task, tiny_export).train.features
    found = layer_vectors(encoder_of(tiny_export), features, kind=task.kind, batch_size=4, limit=10**6, seed=3)
    theirs = transformers.BertModel.from_pretrained(tiny_export, add_pooling_layer=False).eval()
    order = np.random.default_rng(3).permutation(len(features)).tolist()
    batches = [sorted(order[first : first + 4], key=lambda i: -len(features[i].input_ids)) for first in range(0, 99, 4)]
    wanted, targets = [], []
    for feature in (features[index] for batch in batches for index in batch):
        with torch.no_grad():
            states = theirs(torch.from_numpy(feature.input_ids[None]).long(), output_hidden_states=True).hidden_states
        places = np.flatnonzero(feature.targets["tag"] >= 0)
        wanted.append(torch.stack(states)[:, 0, places].numpy())
        targets.append(feature.targets["tag"][places])
    assert found.vectors_LnD.shape[0] == 3
    np.testing.assert_allclose(found.vectors_LnD, np.concatenate(wanted, axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.targets_n, np.concatenate(targets))


def test_a_row_of_text_is_the_mean_of_its_tokens(tiny_export: Path, tmp_path: Path) -> None:
    task = load_task(review_task(tmp_path, rows=8))
    features = read(task, tiny_export).train.features
    encoder = encoder_of(tiny_export)
    one = layer_vectors(encoder, features[:1], kind=task.kind, batch_size=1, limit=5, seed=0)
    ids = torch.from_numpy(features[0].input_ids).long()
    with torch.no_grad():
        hidden_TD = encoder(
            ids,
            torch.zeros_like(ids),
            position_ids_T=torch.arange(len(ids)),
            cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
            max_seqlen=len(ids),
        )
    np.testing.assert_allclose(one.vectors_LnD[-1, 0], hidden_TD.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert one.words == ()


def test_words_are_told_apart_by_all_their_pieces(tiny_export: Path, tmp_path: Path) -> None:
    task = task_of(tmp_path, json.loads(tag_task(tmp_path).read_text()))
    features = read(task, tiny_export).train.features
    found = layer_vectors(encoder_of(tiny_export), features, kind=task.kind, batch_size=8, limit=10**6, seed=0)
    tokenizer = load_tokenizer(tiny_export)
    pieces = np.frombuffer(tokenizer.encode("unwanted"), dtype=tokenizer.dtype).astype(np.int32)
    assert len(pieces) > 1 and pieces.tobytes() in found.words
    assert len(found.words) == len(found.targets_n)
    limited = layer_vectors(encoder_of(tiny_export), features, kind=task.kind, batch_size=8, limit=10, seed=0)
    assert len(limited.targets_n) == len(limited.words) == limited.vectors_LnD.shape[1] == 10


def planted(number: int, *, seed: int) -> ProbeRows:
    """Vectors whose layer 1 holds the label, and layer 0 nothing; ten word types."""
    generator = np.random.default_rng(seed)
    targets = generator.integers(0, 2, size=number)
    noise = generator.normal(size=(2, number, 8)).astype(np.float32)
    noise[1, :, 0] += 6.0 * targets
    return ProbeRows(noise, targets, tuple(bytes([word]) for word in generator.integers(0, 10, size=number)))


def test_a_probe_finds_what_a_layer_holds_and_nothing_where_there_is_nothing() -> None:
    train, held_out = planted(2000, seed=1), planted(1000, seed=2)
    first, second = probe_layers(train, held_out, ["no", "yes"], seed=0)
    majority = majority_accuracy(train, held_out)
    assert abs(first.accuracy - 0.5) < 0.06 and abs(majority - 0.5) < 0.06
    assert second.accuracy > 0.98 and second.macro_f1 > 0.98
    # Nothing tells these words apart, so their random labels cannot be learned.
    assert first.control_accuracy is not None and first.control_accuracy < 0.8
    assert second.selectivity == pytest.approx(second.accuracy - (second.control_accuracy or 0.0))


def test_a_control_task_gives_every_word_type_one_label_on_both_sides() -> None:
    types = [bytes([first, second]) for first in range(64) for second in range(64)]
    train = ProbeRows(np.zeros((1, 4096, 1), np.float32), np.arange(4096) % 4 // 3, tuple(types))
    held_out = ProbeRows(np.zeros((1, 4096, 1), np.float32), np.zeros(4096, np.int64), tuple(reversed(types)))
    first, second = control_targets(train, held_out, 2, seed=0)
    np.testing.assert_array_equal(first, second[::-1])
    assert abs(first.mean() - 0.25) < 0.03, "labels are drawn as often as they occur in training"
    assert (first != control_targets(train, held_out, 2, seed=1)[0]).any()


def run_probe(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_verb(ROOT / "bert_ds/probe.py", *arguments)


def test_the_verb_prints_a_line_per_layer_and_writes_it(tiny_export: Path, tmp_path: Path) -> None:
    open_results_folder(tmp_path / "out")
    mine = [tmp_path / "out" / name for name in ("probes.json", "probes.png")]
    for path in mine:
        path.write_text("mine")
    done = run_probe("--model", tiny_export, "--task", tag_task(tmp_path), "--output", tmp_path / "out")
    assert [path.with_name(f"{path.name}.kept-1").read_text() for path in mine] == ["mine", "mine"]
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    header = next(number for number, line in enumerate(lines) if line.split()[:2] == ["layer", "accuracy"])
    assert [line.split()[0] for line in lines[header + 1 :]] == ["0", "1", "2"]
    written = json.loads((tmp_path / "out/probes.json").read_text())
    assert [row["layer"] for row in written["this model"]] == [0, 1, 2]
    # The tag is decided by the word, which the embeddings hold even where nothing was learned.
    assert written["this model"][0]["accuracy"] > 0.95
    assert written["random weights"][0]["accuracy"] > 0.95
    assert (tmp_path / "out/probes.png").stat().st_size > 1000


def test_the_verb_goes_by_the_seed_of_the_task_and_the_limit(
    tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--task", tag_task(tmp_path), "--set", "seed=3", "--max_vectors", 40, "--output", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", list(map(str, ("probe.py", "--model", tiny_export, *words))))
    bert_ds.probe.main()
    written = json.loads((tmp_path / "out/probes.json").read_text())
    task, pretrained = load_task(tmp_path / "task.json"), load_pretrained(tiny_export)
    rows, batch_size = read(task, tiny_export), task.evaluation.batch_size
    for name, tensors in zip(bert_ds.probe.MODELS, (pretrained.tensors, None), strict=True):
        encoder = make_encoder(pretrained.config, tensors, kernels="torch", init_seed=3)
        train, held_out = (
            layer_vectors(encoder, side.features, kind=task.kind, batch_size=batch_size, limit=40, seed=3)
            for side in (rows.train, rows.validation)
        )
        assert len(train.targets_n) == len(held_out.targets_n) == 40
        wanted = probe_layers(train, held_out, rows.labels["tag"], seed=3)
        assert written[name] == [probe._asdict() | {"selectivity": probe.selectivity} for probe in wanted]


def test_random_weights_go_by_the_seed(tiny_export: Path) -> None:
    config = load_pretrained(tiny_export).config
    first, other = (make_encoder(config, None, kernels="torch", init_seed=seed) for seed in (3, 4))
    assert not torch.equal(first.embeddings.word_weight, other.embeddings.word_weight)


def test_what_cannot_be_probed_for_is_refused(tiny_export: Path, tmp_path: Path) -> None:
    fields = {"text": "text", "score": "score"}
    write_lines(tmp_path / "train.tsv", ["text\tscore", "we saw it\t1.0", "it saw we\t2.0"])
    data = {"train": [{"path": "train.tsv", "format": "tsv"}], "fields": fields, "validation_fraction": 0.5}
    task = write_task(tmp_path, {"kind": "regression", "data": data})
    done = run_probe("--model", tiny_export, "--task", task)
    assert done.returncode == 2
    assert "is regression; what can be probed for is classification or token_classification" in done.stderr
    done = run_probe("--model", tiny_export, "--task", review_task(tmp_path / "a"), "--max_vectors", 0)
    assert done.returncode == 2 and "--max_vectors is 0, wanted at least 1" in done.stderr


def test_a_probe_is_fitted_on_the_training_rows_and_measured_on_the_others() -> None:
    train, held_out = planted(2000, seed=1), planted(1000, seed=2)
    turned = train._replace(targets_n=1 - train.targets_n)
    assert probe_layers(turned, held_out, ["no", "yes"], seed=0)[1].accuracy < 0.02
    assert majority_accuracy(turned._replace(targets_n=np.array([1, 1, 0])), held_out) == held_out.targets_n.mean()
