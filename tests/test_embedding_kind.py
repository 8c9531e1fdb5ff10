"""Sentence embeddings: the losses, and the same vectors from our evaluation and from sentence-transformers."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from downstream_cases import CONFIG, PIECES, write_lines, write_task, write_tiny_export
from sentence_transformers import SentenceTransformer
from tiny_training import join_alone

from bert_ds.configuration.run_config import IGNORE_INDEX
from bert_ds.configuration.task_config import load_task
from bert_ds.corpus.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.embedding_head import EmbeddingHead
from bert_ds.downstream.kinds import KINDS
from bert_ds.downstream.outcome import measure_side
from bert_ds.downstream.task_folder import TaskFacts, make_task_model, read_task_folder, write_task_folder
from bert_ds.downstream.task_model import HeadInput
from bert_ds.downstream.task_rows import TaskRows, read_task
from bert_ds.ranks import DataError

TOKENIZER = WordPieceTokenizer(PIECES, TextRules())
KIND = KINDS["sentence_embedding"]
PAIRS = (("the film is great", "The play is superb.", 4.5), ("we saw paris", "a dull book", 0.5), ("中文", "it", 2.0))


def pair_task(folder: Path, *, rows: Any = PAIRS, **changes: Any) -> Path:
    write_lines(folder / "pairs.tsv", ["a\tb\tscore", *(f"{a}\t{b}\t{score}" for a, b, score in rows)])
    file = {"path": "pairs.tsv", "format": "tsv"}
    fields = {"text": "a", "text_pair": "b", "score": "score"}
    data = {"train": [file], "validation": [file], "fields": fields, "drop_overlap": False}
    return write_task(folder, {"kind": "sentence_embedding", "data": data, **changes})


def rows_of(task_file: Path) -> TaskRows:
    return read_task(load_task(task_file), TOKENIZER, say=print)


def test_a_pair_is_two_sequences_and_its_target_is_what_the_loss_wants(tmp_path: Path) -> None:
    feature = rows_of(pair_task(tmp_path)).train.features[0]
    assert (
        TOKENIZER.decode(feature.input_ids.tolist()) == "[CLS] the film is great [SEP] [CLS] the play is superb. [SEP]"
    )
    assert feature.sequence_lengths == (6, 7)
    assert feature.targets["cosine"].tolist() == pytest.approx([0.9])
    contrastive = rows_of(pair_task(tmp_path, sentence_embedding={"loss": "contrastive"})).train.features
    assert [feature.targets["partner"].tolist() for feature in contrastive] == [[0], [IGNORE_INDEX], [IGNORE_INDEX]]
    assert KIND.count_targets(contrastive) == (1.0,)


def test_both_losses_are_those_of_their_papers() -> None:
    lengths = [3, 1, 2, 4]
    hidden_TD = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    stream = HeadInput(hidden_TD, None, torch.tensor([0, *lengths]).cumsum(0).int(), None)
    vectors = torch.stack([part.mean(dim=0) for part in hidden_TD.split(lengths)])
    cosines = F.cosine_similarity(vectors[[0, 2]][:, None], vectors[[1, 3]][None], dim=-1)
    found = EmbeddingHead()(stream, {"cosine": torch.tensor([0.2, 0.9])})
    wanted = ((cosines.diagonal() - torch.tensor([0.2, 0.9])) ** 2).sum()
    assert found.loss_sums_L.tolist() == pytest.approx([wanted.item()], rel=1e-5)
    found = EmbeddingHead()(stream, {"partner": torch.tensor([IGNORE_INDEX, 0])})
    wanted = F.cross_entropy(cosines[1:] / 0.05, torch.tensor([1]))
    assert found.loss_sums_L.tolist() == pytest.approx([wanted.item()], rel=1e-5)


def test_sentence_transformers_gives_the_same_vectors_from_the_folder(tmp_path: Path) -> None:
    join_alone()
    write_tiny_export(tmp_path / "export")
    rows = rows_of(pair_task(tmp_path))
    model = make_task_model(KIND, CONFIG, {}, kernels="torch", init_seed=5)
    facts = TaskFacts("tiny", "sentence_embedding", {}, TOKENIZER.fingerprint, {})
    write_task_folder(tmp_path / "hf", model, facts=facts, tokenizer=tmp_path / "tokenizer")
    read, labels = read_task_folder(tmp_path / "hf", KIND, kernels="torch")
    found = measure_side(read, load_task(tmp_path / "task.json"), rows.validation, labels)
    theirs = SentenceTransformer(str(tmp_path / "hf"), device="cpu")
    assert theirs.max_seq_length == CONFIG.max_position_embeddings
    left, right = (theirs.encode([pair[side] for pair in PAIRS], convert_to_tensor=True) for side in (0, 1))
    wanted = F.cosine_similarity(left, right).tolist()
    assert [prediction.value for prediction in found.predictions] == pytest.approx(wanted, abs=1e-5)
    assert theirs.similarity(left, right).diagonal().tolist() == pytest.approx(wanted, abs=1e-5)
    assert set(found.figures) >= {"pearson", "spearman", "loss_pair"}


@pytest.mark.parametrize(
    ("score", "message"), [("nan", "wanted a finite number"), ("5.5", r"score is 5.5, wanted 0 to 5")]
)
def test_a_score_that_is_none_is_refused_with_its_line(tmp_path: Path, score: str, message: str) -> None:
    with pytest.raises(DataError, match=f"pairs.tsv:3: .*{message}"):
        rows_of(pair_task(tmp_path, rows=[PAIRS[0], ("we", "it", score)]))
