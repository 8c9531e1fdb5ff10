"""score.py --task masked_words: our model, another family, and what pre-training itself says of the same text."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from downstream_cases import BAD, GOOD, OTHER, write_tiny_export
from forked_verbs import run_verb
from tiny_training import ds_config, join_alone
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.configuration.recipe.optimizer_config import AdamWConfig
from bert_ds.configuration.recipe.run_config import ConfigError, MaskingConfig, SequenceConfig
from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.batches.batch_stages import DataSettings
from bert_ds.corpus.batches.evaluation_masks import EvaluationMasker, text_key
from bert_ds.corpus.batches.examples import Example
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.corpus.shards.build import BuildSettings, build_shards
from bert_ds.corpus.shards.encode_documents import split_of
from bert_ds.corpus.text.input_files import find_input_files
from bert_ds.corpus.text.text_input import FileInput
from bert_ds.downstream.untrained.masked_lm import open_masked_lm, open_with_transformers
from bert_ds.downstream.untrained.masked_words import masked_word_figures, score_masked_words
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.pretrained import load_masked_lm
from bert_ds.launch.launch_checks import checked_scoring, score_arguments
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.evaluation import evaluate
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT_SHARE = 0.4


class Workshop(NamedTuple):
    """A text in which every document is one example, its halves, and its shards."""

    train: Path
    held_out: Path
    shards: Path
    model: Path


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("masked_words")
    draw = random.Random(3)
    words = [*GOOD, *BAD, *OTHER, "unknown-word", "☃"]
    documents = [" ".join(draw.choices(words, k=draw.randint(3, 12))) + "." for _ in range(400)]
    halves = {
        side: [one for one in documents if split_of(one, HELD_OUT_SHARE) == side] for side in ("train", "validation")
    }
    for name, texts in (("all", documents), ("train", halves["train"]), ("held_out", halves["validation"])):
        (folder / f"{name}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    model = write_tiny_export(folder / "hf")
    text = FileInput(find_input_files([folder / "all.txt"]).files)
    settings = BuildSettings(validation_fraction=HELD_OUT_SHARE, tokens_per_shard=500)
    build_shards(text, model, folder / "shards", settings=settings)
    return Workshop(folder / "train.txt", folder / "held_out.txt", folder / "shards", model)


def scored(model: Path, data: Path, *settings: str, train: Path | None = None) -> tuple[dict[str, float], list[str]]:
    """The figures, and what is said."""
    said: list[str] = []
    sides = [] if train is None else [f"data.train={json.dumps([{'path': str(train), 'format': 'text'}])}"]
    return score_masked_words(model, load_task("masked_words", [*settings, *sides], data=data), said.append), said


def test_pre_training_and_score_agree_on_the_same_text(workshop: Workshop) -> None:
    sequences = SequenceConfig(max_seq_length=48, sentence_pair="none", short_seq_prob=0.0)
    masking = MaskingConfig(mlm_probability=0.4, whole_word_mask=True)
    data = PretrainingData(
        [Source(workshop.shards, "text")], workshop.model, settings=DataSettings(sequences, masking, 9, 8)
    )
    join_alone()
    model = load_masked_lm(workshop.model, kernels="torch")
    facts = TensorFacts(weight_patterns(model.config)[0])
    optimizer = make_optimizer(AdamWConfig(lr=1e-3), model.named_parameters(), facts=facts)
    engine = make_engine(model, optimizer, ds_config(2))
    wanted = evaluate(engine, data.evaluation_batches(10**6, batch_size=16, rank=0, world_size=1))
    wanted["unigram_cross_entropy"] = data.unigram_cross_entropy(10**6, batch_size=16, world_size=1)
    of_text, said = scored(workshop.model, workshop.held_out, train=workshop.train)
    assert said[0].startswith("this project's bert, sequences of 48 tokens; ")
    of_shards, more_said = scored(workshop.model, workshop.shards, train=workshop.shards)
    assert more_said[1] == "no nats_per_character: shards hold pieces and no characters"
    assert wanted["mlm_masked_targets"] > 200
    names = [name for name in wanted if name not in ("loss", "loss_mlm")]
    for found in (of_text, of_shards):
        assert {name: found[name] for name in names} == pytest.approx({name: wanted[name] for name in names}, rel=1e-6)


def test_transformers_gives_the_figures_of_our_model(workshop: Workshop) -> None:
    ours = open_masked_lm(workshop.model, kernels="torch", device="cpu")
    theirs = open_with_transformers(workshop.model, device="cpu")
    assert theirs.name == "transformers' BertForMaskedLM"
    assert (theirs.before, theirs.after, theirs.max_length) == (ours.before, ours.after, ours.max_length)
    assert (theirs.vocab_size, sorted(theirs.special_ids)) == (ours.vocab_size, sorted(ours.special_ids))
    task = load_task("masked_words", data=workshop.held_out)
    found, wanted = (masked_word_figures(model, task, lambda text: None) for model in (theirs, ours))
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def xlm_roberta(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XLM-RoBERTa of another vocabulary: bytes and a few merges, marks of its own, positions that begin at 2."""
    folder = tmp_path_factory.mktemp("xlm_roberta") / "hf"
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train([str(workshop.train)], trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **dict(zip(names, special, strict=True)), cls_token="<s>", sep_token="</s>"
    )
    config = transformers.XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=34,
        type_vocab_size=1,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    transformers.XLMRobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_another_family_is_scored_with_its_own_pieces_and_marks_and_a_roberta_as_it_by_ours(
    xlm_roberta: Path, workshop: Workshop, tmp_path: Path
) -> None:
    text = workshop.held_out.with_name("few.txt")
    documents = workshop.held_out.read_text().split("\n\n")[:40]
    documents[3] = "a <mask> in a text </s> is text, and this is a longer document than a sequence has room for"
    text.write_text("\n\n".join(documents))
    found, said = scored(xlm_roberta, text, "max_seq_length=512", train=workshop.train)
    assert said[0].startswith("transformers' XLMRobertaForMaskedLM, sequences of 32 tokens; ")

    tokenizer = transformers.AutoTokenizer.from_pretrained(xlm_roberta)
    tokenizer.backend_tokenizer.encode_special_tokens = True

    def encode(one: str) -> list[int]:
        return tokenizer.backend_tokenizer.encode(one, add_special_tokens=False).ids

    pieces = [encode(document) for document in documents]
    whole = np.concatenate(pieces)
    assert not set(whole.tolist()) & set(range(5))
    masker = EvaluationMasker(vocab_size=len(tokenizer), special_ids=range(5), mask_id=4)
    model = transformers.AutoModelForMaskedLM.from_pretrained(xlm_roberta).eval()
    losses: dict[str, list[float]] = {"masked": [], "random": [], "kept": []}
    labels, place = [], 0
    for document in pieces:
        for first in range(0, len(document), 30):
            part = np.array(document[first : first + 30], dtype=np.int32)
            example = Example(part, np.zeros(len(part), np.int8), -100, (0, 0, 0))
            places = [np.arange(place, place + len(part))]
            key = np.array([text_key(whole, len(whole))], dtype=np.uint64)
            (masked,) = masker.mask([example], places, keys=key)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[0, *masked.input_ids.tolist(), 2]])).logits[0, 1:-1]
            for at, label in zip(masked.positions.tolist(), masked.labels.tolist(), strict=True):
                kind = {4: "masked", label: "kept"}.get(int(masked.input_ids[at]), "random")
                losses[kind].append(-float(logits[at].log_softmax(-1)[label]))
                labels += [label] if kind == "masked" else []
            place += len(part)
    for kind, values in losses.items():
        assert found[f"mlm_{kind}_targets"] == len(values) > 5
        assert found[f"loss_mlm_{kind}"] == pytest.approx(np.mean(values), rel=1e-5)
    trained = np.concatenate([encode(one) for one in workshop.train.read_text().split("\n\n")])
    counts = np.bincount(trained, minlength=len(tokenizer)) + 1
    assert found["unigram_cross_entropy"] == pytest.approx(-np.log(counts / counts.sum())[labels].mean())
    num_characters = sum(map(len, documents))
    assert found["nats_per_character"] == pytest.approx(found["loss_mlm_masked"] * len(whole) / num_characters)

    ours = shutil.copytree(xlm_roberta, tmp_path / "roberta")
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    same, said = scored(ours, text, "max_seq_length=512", train=workshop.train)
    assert said[0].startswith("this project's roberta, sequences of 32 tokens; ")
    assert same == pytest.approx(found, rel=1e-5)


def test_without_training_text_there_is_no_unigram_and_fewer_sequences_are_scored_where_asked(
    workshop: Workshop,
) -> None:
    found, said = scored(workshop.model, workshop.held_out)
    assert "unigram_cross_entropy" not in found
    assert said[1:] == ["no unigram_cross_entropy: data.train names no training text, whose pieces it is counted from"]
    fewer, _ = scored(workshop.model, workshop.held_out, "data.max_validation_rows=20")
    assert 0 < fewer["mlm_masked_targets"] < found["mlm_masked_targets"] / 4


def test_a_folder_that_cannot_be_scored_is_refused_by_name(
    xlm_roberta: Path, workshop: Workshop, tmp_path: Path
) -> None:
    def refused(error: type[Exception], match: str, model: Path, data: Path = workshop.held_out) -> None:
        with pytest.raises(error, match=match):
            scored(model, data)

    refused(ConfigError, "has no config.json", tmp_path)
    refused(DataError, "not of this model's: wanted its text", xlm_roberta, workshop.shards)
    headless = tmp_path / "headless"
    transformers.AutoModel.from_pretrained(xlm_roberta).save_pretrained(headless)
    transformers.AutoTokenizer.from_pretrained(xlm_roberta).save_pretrained(headless)
    refused(CheckpointError, "no masked-word head or not all of its model: lm_head", headless)
    config = json.loads((headless / "config.json").read_text())
    (headless / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    refused(ConfigError, "transformers opens no masked language model", headless)
    (tmp_path / "empty.txt").write_text("\n")
    refused(DataError, r"empty\.txt: no piece of text", workshop.model, tmp_path / "empty.txt")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (['data.validation=[{"path": "a.tsv", "format": "tsv"}]'], 'a masked_words task wants "text", found "tsv"'),
        (["kind=minimal_pairs"], 'a minimal_pairs task wants a format with rows, found "text"'),
        (["data.validation=[]", "data.validation_fraction=0.1"], "data.validation_fraction: is not for masked_words"),
        (["metric=accuracy"], "metric: found "),
    ],
)
def test_a_task_of_text_has_text_files_and_no_other_task_has(settings: list[str], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        load_task("masked_words", settings)


def test_the_verb_wants_a_text_and_writes_the_figures(workshop: Workshop, tmp_path: Path) -> None:
    words = ["--task", "masked_words", "--model", str(workshop.model), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="--data: is missing, wanted the text"):
        checked_scoring(score_arguments(words))
    done = run_verb(ROOT / "bert_ds/score.py", *words, "--data", workshop.held_out)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["metric"] == "loss_mlm_masked"
    loss, targets = (results["validation"][name] for name in ("loss_mlm_masked", "mlm_masked_targets"))
    assert f"loss_mlm_masked {loss:.4f}" in done.stdout and f"mlm_masked_targets {targets}" in done.stdout
