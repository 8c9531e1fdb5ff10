"""Micro-batches filled up to a few sizes: which sizes, and that nothing real is touched."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from corpus_fixtures import random_documents, write_shards
from family_cases import EVERY_FAMILY, disturbed, of_size, ragged
from test_read_rows import assert_alike, losses_and_gradients
from torch import Tensor

from bert_ds.basics.micro_batch import Fillings, MicroBatch
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.distillation_config import DistillationConfig
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX, MaskingConfig, SequenceConfig
from bert_ds.corpus.batches.batch_stages import DataSettings
from bert_ds.corpus.batches.collate import collate, grouped_by_kind
from bert_ds.corpus.batches.few_shapes import filled, size_above
from bert_ds.corpus.batches.loader import PretrainingData, Source
from bert_ds.corpus.batches.mlm_masking import MaskedExample
from bert_ds.downstream.kinds import task_model
from bert_ds.downstream.kinds.heads import SequenceHead, TokenHead
from bert_ds.downstream.kinds.task_model import TaskModel
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.fused_ops import fused_ops
from bert_ds.encoder.objectives.distillation import TaughtWords
from bert_ds.encoder.objectives.masked_words import MaskedWords
from bert_ds.encoder.objectives.objective import Objective
from bert_ds.encoder.objectives.sentence_pair import SentencePair
from bert_ds.encoder.pretraining_model import PretrainingModel

SEED = torch.tensor([0x1234567_89ABCDEF])
TAUGHT = DistillationConfig(teacher="t", temperature=1.7, mlm_weight=0.5, soft_weight=3.0, hidden_weight=0.7)


def packed(lengths: tuple[int, ...] = (23, 1, 40, 7), vocab_size: int = 61) -> MicroBatch:
    """A micro-batch of sequences of these lengths, every third piece masked."""
    draw = np.random.default_rng(0)

    def example(length: int) -> MaskedExample:
        positions = np.arange(0, length, 3)
        ids, labels = (draw.integers(5, vocab_size, size) for size in (length, len(positions)))
        types = draw.integers(0, 2, length)
        return MaskedExample(ids, types, pair_label=length % 2, positions=positions, labels=labels, key=(0, 0, length))

    return collate([example(length) for length in lengths])


def test_sizes_are_multiples_of_8_and_above_256_sixteen_between_powers_of_two() -> None:
    found = {n: size_above(n) for n in (0, 1, 8, 9, 250, 256, 257, 512, 513, 8192, 8193, 16_000, 16_384, 16_385)}
    wanted = (0, 8, 8, 16, 256, 256, 272, 512, 544, 8192, 8704, 16_384, 16_384, 17_408)
    assert tuple(found.values()) == wanted
    assert len({size_above(n) for n in range(8193, 16_385)}) == 16
    assert max(size_above(n) / n for n in range(256, 40_000)) < 1 + 1 / 16


def test_tokens_sequences_and_words_are_filled_up_behind_what_is_real() -> None:
    batch = packed()
    full = filled(batch)
    assert (full.input_ids_T.shape[0], len(full.cu_seqlens) - 1) == (72, 8)
    assert full.fillings == Fillings(tokens=1, sequences=4, words=6)
    assert full.cu_seqlens.tolist() == [*batch.cu_seqlens.tolist(), 72, 72, 72, 72]
    assert full.targets["masked_positions"][-6:].tolist() == [71] * 6
    assert full.targets["masked_labels"][-6:].tolist() == [IGNORE_INDEX] * 6
    assert full.targets["pair_labels"][-4:].tolist() == [IGNORE_INDEX] * 4
    for name, tensor in batch.targets.items():
        assert torch.equal(full.targets[name][: len(tensor)], tensor)
    assert (full.counts, full.num_tokens, full.num_sequences) == (batch.counts, batch.num_tokens, batch.num_sequences)
    assert full.padded_tokens == batch.padded_tokens and full.cu_seqlens.dtype == torch.int32


def test_a_long_filling_is_cut_into_sequences_as_long_as_the_longest_real_one() -> None:
    full = filled(packed((5,) * 52))
    assert (full.num_tokens, full.fillings.tokens, full.max_seqlen) == (260, 12, 5)
    lengths = full.cu_seqlens.diff()[52:].tolist()
    assert lengths == [5, 5, 2, *[0] * (len(lengths) - 3)]
    starts = full.cu_seqlens.tolist()
    counted = [position for first, end in pairwise(starts) for position in range(end - first)]
    assert full.position_ids_T.tolist() == counted


def test_what_has_a_size_already_keeps_its_tokens_and_as_many_sequences_as_its_like() -> None:
    full, less = filled(packed((40, 32))), filled(packed((40, 31)))
    assert full.fillings.tokens == 0 and less.fillings.tokens == 1
    assert len(full.cu_seqlens) == len(less.cu_seqlens) == 9


def test_the_words_of_an_evaluation_keep_their_kinds() -> None:
    held_out = grouped_by_kind(packed(), mask_id=4)
    full = filled(held_out)
    assert full.kind_counts == held_out.kind_counts
    assert full.fillings == Fillings(tokens=1, sequences=4)
    assert len(full.targets["masked_labels"]) == sum(held_out.kind_counts.values())


def model_of(config: EncoderConfig, *, taught: bool) -> PretrainingModel:
    """A model in fp64 on all that its family can learn, by a teacher too."""
    teacher = disturbed(PretrainingModel(config, kernels="torch", has_pair_head=False), seed=9)
    words = TaughtWords(teacher, TAUGHT) if taught else MaskedWords()
    pairs = (SentencePair(),) if family_of(config).pair_head is not None else ()
    objectives: tuple[Objective, ...] = (words, *pairs)
    return disturbed(PretrainingModel(config, kernels="torch", objectives=objectives)).double()


def results(model: PretrainingModel, batch: MicroBatch) -> list[Tensor]:
    """Return losses, metrics and all gradients."""
    model.zero_grad()
    losses, metrics = model(**batch.model_inputs(), dropout_seed=SEED)
    (losses * torch.linspace(1.0, 2.0, len(losses))).sum().backward()
    return [losses.detach(), metrics, *(parameter.grad.clone() for parameter in model.parameters())]


@EVERY_FAMILY
@pytest.mark.parametrize("taught", [False, True], ids=["alone", "taught"])
def test_losses_and_gradients_are_those_of_the_real_rows(config: EncoderConfig, taught: bool) -> None:
    model, batch = model_of(of_size(config.with_dropout(0.1)), taught=taught).train(), packed()
    full = filled(batch)
    found = results(model, full)
    for one, wanted in zip(found, results(model, batch), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=2e-5)
    others = full.input_ids_T.clone()
    others[batch.num_tokens :] = 17
    changed = MicroBatch(**{**vars(full), "input_ids_T": others})
    assert all(torch.equal(one, other) for one, other in zip(found, results(model, changed), strict=True))


@EVERY_FAMILY
def test_an_evaluation_is_that_of_the_real_rows(config: EncoderConfig) -> None:
    model, batch = model_of(config, taught=True).eval(), grouped_by_kind(packed(), mask_id=4)
    with torch.no_grad():
        wanted, found = (model(**one.model_inputs()) for one in (batch, filled(batch)))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainingData, PretrainingData]:
    """The same corpus as it is and filled up."""
    folder = write_shards(tmp_path_factory.mktemp("shards"), random_documents(60), random_documents(9, seed=1))
    plain, few = (
        PretrainingData(
            [Source(folder, "text")],
            folder / "tokenizer",
            settings=DataSettings(SequenceConfig(max_seq_length=64), MaskingConfig(), 0, 32, few_shapes=few),
        )
        for few in (False, True)
    )
    return plain, few


def test_the_loader_fills_what_is_trained_held_out_and_tried(data: tuple[PretrainingData, PretrainingData]) -> None:
    plain, few = data
    assert plain.fingerprint == few.fingerprint
    split = BatchSplit(16, 1, 2)
    shapes = set()
    for step in range(12):
        (wanted,), (found,) = (one.rank_batches(step, rank=1, split=split) for one in data)
        assert torch.equal(found.input_ids_T[: wanted.num_tokens], wanted.input_ids_T)
        assert (found.counts, found.num_tokens) == (wanted.counts, wanted.num_tokens)
        shapes.add((found.input_ids_T.shape[0], len(found.cu_seqlens)))
        assert found.input_ids_T.shape[0] == size_above(found.num_tokens)
    assert len(shapes) <= 6
    held_out, wanted_out = (
        next(iter(one.evaluation_batches(8, batch_size=4, rank=0, world_size=1))) for one in (few, plain)
    )
    assert held_out.input_ids_T.shape[0] == size_above(wanted_out.num_tokens)
    assert few.longest_batch(3).fillings.sequences and not plain.longest_batch(3).fillings.sequences


@EVERY_FAMILY
@pytest.mark.parametrize("objective", ["one_of", "tags"])
def test_a_task_on_a_cpu_in_bf16_computes_few_shapes_and_the_same(
    config: EncoderConfig, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops, is_tags = fused_ops("torch"), objective == "tags"
    head = TokenHead(config, 3, ops=ops) if is_tags else SequenceHead(config, 3, objective="one_of", ops=ops)
    model: Any = disturbed(TaskModel(config, head, ops=ops)).double()
    _, inputs = ragged(config)
    tokens, sequences = len(inputs["input_ids_T"]), len(inputs["cu_seqlens"]) - 1
    targets = {"tag": torch.arange(tokens) % 3} if is_tags else {"label": torch.arange(sequences) % 3}
    shapes: list[int] = []
    model.bert.register_forward_pre_hook(lambda bert, stream: shapes.append(len(stream[0])))
    wanted = losses_and_gradients(model, **inputs, targets=targets)
    monkeypatch.setattr(task_model, "_FILLED_DTYPE", torch.float64)
    assert_alike(losses_and_gradients(model, **inputs, targets=targets), wanted)
    monkeypatch.undo()
    found = model.to(torch.bfloat16)(**inputs, targets=targets, with_scores=True)
    assert shapes == [tokens, size_above(tokens), size_above(tokens)] and size_above(tokens) > tokens
    assert all(len(scores) in (sequences, tokens) for scores in found[2].values())
