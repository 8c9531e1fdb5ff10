"""Sentence embeddings: the losses; the same vectors from our evaluation, sentence-transformers and onnxruntime."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import transformers
from downstream_cases import CONFIG, PIECES, write_lines, write_task, write_tiny_export
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tiny_training import join_alone
from tokenizers import Tokenizer

from bert_ds.basics.ranks import DataError
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.configuration.task.task_config import load_task
from bert_ds.configuration.task.task_sections import EmbeddingConfig
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.kinds.embedding_head import EmbeddingHead
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import HeadInput
from bert_ds.downstream.tuning.outcome import measure_side
from bert_ds.downstream.tuning.predictor import Predictor
from bert_ds.downstream.tuning.task_folder import TaskFacts, make_task_model, read_task_folder, write_task_folder
from bert_ds.downstream.tuning.task_rows import TaskRows, read_task
from bert_ds.encoder.hf_onnx import write_onnx

TOKENIZER = WordPieceTokenizer(PIECES, TextRules())
KIND = KINDS["sentence_embedding"]
PAIRS = (("the film is great", "The play is superb.", 4.5), ("we saw paris", "a dull book", 0.5), ("中文", "it", 2.0))
LONG_PAIRS = (*PAIRS, ("the film is very " * 8, "we saw it and " * 3, 1.0))


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
    assert KIND.count_targets(contrastive) == {"pair": 1.0}
    lower = {"loss": "contrastive", "positive_score": 2.0}  # the third pair has just that
    found = rows_of(pair_task(tmp_path, sentence_embedding=lower)).train.features
    assert [feature.targets["partner"].tolist() for feature in found] == [[0], [IGNORE_INDEX], [0]]
    tenth = rows_of(pair_task(tmp_path, sentence_embedding={"max_score": 10.0})).train.features
    assert tenth[0].targets["cosine"].tolist() == pytest.approx([0.45])


def test_both_losses_are_those_of_their_papers() -> None:
    lengths = [3, 1, 2, 4]
    hidden_TD = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    stream = HeadInput(hidden_TD, None, torch.tensor([0, *lengths]).cumsum(0).int(), None)
    vectors = torch.stack([part.mean(dim=0) for part in hidden_TD.split(lengths)])
    cosines = F.cosine_similarity(vectors[[0, 2]][:, None], vectors[[1, 3]][None], dim=-1)
    found = EmbeddingHead()(stream, {"cosine": torch.tensor([0.2, 0.9])})
    wanted = ((cosines.diagonal() - torch.tensor([0.2, 0.9])) ** 2).sum()
    assert found.loss_sums_L.tolist() == pytest.approx([wanted.item()], rel=1e-5)
    targets = {"partner": torch.tensor([IGNORE_INDEX, 0]), "texts": torch.arange(4).view(2, 2)}
    found = EmbeddingHead(EmbeddingConfig(loss="contrastive")).eval()(stream, targets)
    wanted = F.cross_entropy(cosines[1:] / 0.05, torch.tensor([1]))
    assert found.loss_sums_L.tolist() == pytest.approx([wanted.item()], rel=1e-5)


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random weights, hf/, with the task, whose sequences have at most 24 tokens, beside it."""
    folder = tmp_path_factory.mktemp("embedding")
    write_tiny_export(folder / "export")
    pair_task(folder, rows=LONG_PAIRS)
    model = make_task_model(KIND, CONFIG, {}, kernels="torch", init_seed=5)
    facts = TaskFacts("tiny", "sentence_embedding", {}, TOKENIZER.fingerprint, 24, {})
    write_task_folder(folder / "hf", model, facts=facts, tokenizer=folder / "tokenizer")
    return folder


def test_sentence_transformers_gives_the_same_vectors_from_the_folder(fine_tuned: Path) -> None:
    join_alone()
    rows = rows_of(fine_tuned / "task.json")
    read, labels = read_task_folder(fine_tuned / "hf", KIND, kernels="torch")
    found = measure_side(read, load_task(fine_tuned / "task.json"), rows.validation, labels)
    theirs = SentenceTransformer(str(fine_tuned / "hf"), device="cpu")
    assert theirs.max_seq_length == 24
    left, right = (theirs.encode([pair[side] for pair in LONG_PAIRS], convert_to_tensor=True) for side in (0, 1))
    wanted = F.cosine_similarity(left, right).tolist()
    assert [prediction.value for prediction in found.predictions] == pytest.approx(wanted, abs=1e-5)
    assert theirs.similarity(left, right).diagonal().tolist() == pytest.approx(wanted, abs=1e-5)
    assert set(found.figures) >= {"pearson", "spearman", "loss_pair"}


def test_onnxruntime_gives_the_vectors_of_sentence_transformers(fine_tuned: Path) -> None:
    (fine_tuned / "onnx").mkdir()
    write_onnx(fine_tuned / "hf", fine_tuned / "onnx")
    session = onnxruntime.InferenceSession(fine_tuned / "onnx" / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(fine_tuned / "onnx")
    texts = [text for pair in LONG_PAIRS for text in pair[:2]]
    inputs = dict(tokenizer(texts, padding=True, truncation=True, return_tensors="np"))
    assert inputs["input_ids"].shape == (len(texts), 24)
    (hidden_NSD,) = session.run(None, inputs)
    kept_NS1 = inputs["attention_mask"][..., None]
    found_ND = (hidden_NSD * kept_NS1).sum(axis=1) / kept_NS1.sum(axis=1)
    wanted_ND = SentenceTransformer(str(fine_tuned / "hf"), device="cpu").encode(texts)
    assert abs(found_ND - wanted_ND).max() < 1e-5 * abs(wanted_ND).max()
    pooling = fine_tuned / "onnx/1_Pooling/config.json"
    assert pooling.read_text() == (fine_tuned / "hf/1_Pooling/config.json").read_text()
    pooling.write_text('{"pooling_mode": "cls"}')
    vectors = [answer["vector"] for answer in Predictor(fine_tuned / "onnx")(texts)]
    assert np.allclose(vectors, hidden_NSD[:, 0], atol=1e-5)


def test_the_folder_has_what_text_embeddings_inference_reads(fine_tuned: Path) -> None:
    """Names without a default in its router/src/lib.rs and backends/candle/src/models/bert.rs."""
    folder = fine_tuned / "hf"
    pooling = json.loads((folder / "1_Pooling/config.json").read_text())
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    assert [pooling[f"pooling_mode_{mode}"] for mode in modes] == [False, True, False, False]
    config = json.loads((folder / "config.json").read_text())
    numbers = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    numbers += ("max_position_embeddings", "type_vocab_size", "pad_token_id")
    assert all(type(config[name]) is int for name in numbers)
    assert all(type(config[name]) is float for name in ("hidden_dropout_prob", "initializer_range", "layer_norm_eps"))
    assert (config["architectures"], config["model_type"], config["hidden_act"]) == (["BertModel"], "bert", "gelu")
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 24
    tensors = load_file(folder / "model.safetensors")
    names = ("embeddings.word_embeddings", "encoder.layer.0.attention.self.query")
    assert {f"bert.{name}.weight" for name in names} <= set(tensors), "it reads them with and without bert."
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("the film").tokens[0] == "[CLS]"


@pytest.mark.parametrize(
    ("score", "message"), [("nan", "wanted a finite number"), ("5.5", r"score is 5.5, wanted 0 to 5")]
)
def test_a_score_that_is_none_is_refused_with_its_line(tmp_path: Path, score: str, message: str) -> None:
    with pytest.raises(DataError, match=f"pairs.tsv:3: .*{message}"):
        rows_of(pair_task(tmp_path, rows=[PAIRS[0], ("we", "it", score)]))
