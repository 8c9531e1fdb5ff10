"""A loss over all rows of a step: the gradients of one big batch, however the step is cut; the same at every stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from downstream_cases import CONFIG, PIECES, write_lines, write_task
from ranks_harness import run_ranks
from tiny_training import ds_config, full_weights

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.recipe.optimizer_config import AdamWConfig
from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.tokenizer.wordpiece import TextRules, WordPieceTokenizer
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.task_batches import step_batches
from bert_ds.downstream.tuning.task_folder import make_task_model
from bert_ds.downstream.tuning.task_rows import read_task
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.bad_steps import gradient_report
from bert_ds.training.loop.dropout_seeds import dropout_seed
from bert_ds.training.loop.train_step import agree_on_totals, forward_backward, take_step
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts

KIND = KINDS["sentence_embedding"]
TRIPLES = (
    ("the film", "a great film", "the film is dull"),
    ("the film", "we saw a film", "boring"),  # the same text with another partner
    ("the play", "a great film", "the book is moving and very charming"),  # the same partner
    ("this story", "this story", "in paris"),  # its own partner, as SimCSE has it
    ("in paris", "we saw it in paris", "the film"),  # its negative is the text of others
    ("is it very clumsy", "the play is clumsy", "the play is superb"),
    ("we saw london", "london", "this story"),
    ("a lovely book", "the book is moving", "we saw a film"),  # its negative is the partner of another
)
SCORES = (0.0, 5.0, 1.0, 4.0, 4.0, 2.5, 3.0, 0.5)
CUTS = {1: (1, 4), 2: (2,)}
"""Ranks -> micro-steps."""


def make_task(folder: Path, loss: str, **settings: Any) -> Any:
    """Load a task of triples, or of scored pairs."""
    folder.mkdir(exist_ok=True)
    is_scored = loss == "cosent"
    rows = [(a, b, score if is_scored else c) for (a, b, c), score in zip(TRIPLES, SCORES, strict=True)]
    write_lines(folder / "rows.tsv", ["a\tb\tc", *("\t".join(map(str, row)) for row in rows)])
    file = {"path": "rows.tsv", "format": "tsv"}
    fields = {"text": "a", "text_pair": "b", "score" if is_scored else "negatives": "c"}
    data = {"train": [file], "validation": [file], "fields": fields, "drop_overlap": False}
    section = {"loss": loss, **settings}
    return load_task(write_task(folder, {"kind": "sentence_embedding", "data": data, "sentence_embedding": section}))


def batches_of(task: Any, *, rank: int, split: BatchSplit) -> list[MicroBatch]:
    tokenizer = WordPieceTokenizer(PIECES, TextRules())
    features = read_task(task, tokenizer, say=lambda text: None).train.features
    return next(step_batches(features, 0, seed=1, rank=rank, split=split, count_targets=KIND.count_targets))


def model_of(task: Any, dropout: float) -> Any:
    config = CONFIG.with_dropout(dropout)
    return make_task_model(KIND, config, {}, kernels="torch", init_seed=3, settings=task.own_section).train()


def engine_of(model: Any, stage: int, accumulation: int, world_size: int) -> Any:
    facts = TensorFacts(*weight_patterns(model.config))
    optimizer = make_optimizer(AdamWConfig(lr=1e-2, eps=1e-2), model.named_parameters(), facts=facts)
    return make_engine(model, optimizer, ds_config(stage, accumulation=accumulation, world_size=world_size))


def gradients_of(rank: int, world_size: int, folder: str) -> list[dict[str, Any]]:
    """Of each case and cut: the loss over all ranks, and all gradients."""
    found = []
    for name, dropout, settings in CASES:
        task = make_task(Path(folder) / str(rank), name, **settings)
        for accumulation in CUTS[world_size]:
            num_rows = len(TRIPLES) // (world_size * accumulation)
            split = BatchSplit(num_rows, accumulation, world_size)
            batches = batches_of(task, rank=rank, split=split)
            engine = engine_of(model_of(task, dropout), 0, accumulation, world_size)
            totals = agree_on_totals(batches, data_wait_s=0.0, stop=False)
            report = gradient_report(engine, batches, counts=totals.counts, seed=7, step=1)
            sums = forward_backward(engine, batches, counts=totals.counts, seed=7, step=1)
            torch.distributed.all_reduce(sums)
            shares = sum(part["loss_shares"]["pair"] for part in report)
            gradients = {name: one.grad.clone() for name, one in engine.module.named_parameters()}
            facts = {"loss": float(sums[0]) / totals.counts["pair"], "share": shares, "gradients": gradients}
            found.append(facts | {"case": (name, dropout, settings), "parts": world_size * accumulation})
    return found


CASES: tuple[tuple[str, float, dict[str, Any]], ...] = (
    ("contrastive", 0.0, {}),
    ("contrastive", 0.2, {"matryoshka": [8, 20], "scale": 7.0, "pooling": "cls"}),
    ("cosent", 0.0, {"scale": 7.0, "pooling": "last_layers", "pooled_layers": 2}),
)


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cuts")
    return [one for world_size in CUTS for one in run_ranks(gradients_of, world_size, str(folder))[0]]


def plain(task: Any, dropout: float, num_parts: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of all rows with one graph, sequence by sequence and row by row."""
    model, settings = model_of(task, dropout), task.embedding
    vectors, texts = [], []
    kept: list[torch.Tensor] = []
    model.bert.layer[-2].register_forward_hook(lambda module, inputs, output: kept.append(output))
    for part in range(num_parts):
        split = BatchSplit(len(TRIPLES) // num_parts, 1, num_parts)
        (batch,) = batches_of(task, rank=part, split=split)
        inputs = {name: value for name, value in batch.model_inputs().items() if name != "targets"}
        ids_T, types_T = inputs.pop("input_ids_T"), inputs.pop("token_type_ids_T")
        hidden_TD = model.bert(ids_T, types_T, **inputs, dropout_seed=dropout_seed(7, 1, part, device="cpu"))
        if settings.pooling == "last_layers":
            hidden_TD = (kept[-1] + hidden_TD) / 2
        bounds = batch.cu_seqlens.tolist()
        for start, stop in itertools.pairwise(bounds):
            own_TD = hidden_TD[start:stop]
            vectors.append(own_TD[0] if settings.pooling == "cls" else own_TD.mean(dim=0))
            texts.append(tuple(ids_T[start:stop].tolist()))
    width = len(vectors) // len(TRIPLES)
    rows = [range(first, first + width) for first in range(0, len(vectors), width)]
    losses = []
    for size in (*settings.matryoshka, CONFIG.hidden_size):
        cut = [vector[:size] for vector in vectors]
        if settings.loss == "cosent":
            scores = {text: score for text, score in zip(texts_of_rows(task), SCORES, strict=True)}
            losses.append(cosent(cut, rows, [scores[texts[row[0]], texts[row[1]]] for row in rows], settings.scale))
        else:
            losses.append(torch.stack([contrast(cut, texts, rows, row, settings.scale) for row in rows]).mean())
    loss = torch.stack(losses).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    return loss.item(), dict(zip(names, gradients, strict=True))


def texts_of_rows(task: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    features = read_task(task, WordPieceTokenizer(PIECES, TextRules()), say=lambda text: None).train.features
    split = [(feature.input_ids.tolist(), feature.lengths[0]) for feature in features]
    return [(tuple(ids[:length]), tuple(ids[length:])) for ids, length in split]


def contrast(vectors: Any, texts: Any, rows: Sequence[range], row: range, scale: float) -> torch.Tensor:
    anchor, partner = row[0], row[1]
    candidates = [partner]
    for other in rows:
        for place in other[1:]:
            is_wrong = texts[place] in (texts[anchor], texts[partner])
            is_wrong |= place == other[1] and texts[other[0]] == texts[anchor]
            if place != partner and not is_wrong:
                candidates.append(place)
    cosines = torch.stack([F.cosine_similarity(vectors[anchor], vectors[place], dim=0) for place in candidates])
    return -torch.log_softmax(cosines * scale, dim=0)[0]


def cosent(vectors: Any, rows: Sequence[range], scores: Sequence[float], scale: float) -> torch.Tensor:
    cosines = [F.cosine_similarity(vectors[row[0]], vectors[row[1]], dim=0) * scale for row in rows]
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if scores[i] > scores[j]]
    return torch.log(1 + sum(torch.exp(cosines[j] - cosines[i]) for i, j in pairs))


@pytest.mark.parametrize("case", CASES, ids=[f"{name}-{dropout}" for name, dropout, _ in CASES])
def test_gradients_are_those_of_one_big_batch_however_the_step_is_cut(
    case: tuple[str, float, dict[str, Any]], cut: list[dict[str, Any]], tmp_path: Path
) -> None:
    name, dropout, settings = case
    found = [one for one in cut if one["case"] == case]
    assert [one["parts"] for one in found] == [1, 4, 4]
    task = make_task(tmp_path / "plain", name, **settings)
    for one in found:
        loss, gradients = plain(task, dropout, one["parts"])
        assert one["loss"] == pytest.approx(loss, rel=1e-5)
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for key, gradient in gradients.items():
            assert torch.allclose(one["gradients"][key], gradient, rtol=1e-4, atol=1e-5 * largest), key


def test_the_same_parts_on_other_ranks_draw_the_same_masks(cut: list[dict[str, Any]]) -> None:
    dropped = [one["loss"] for one in cut if one["case"] == CASES[1]]
    assert dropped[1] == pytest.approx(dropped[2], rel=1e-5)
    assert dropped[0] != pytest.approx(dropped[1], rel=1e-3)


def test_the_report_of_a_bad_step_has_the_shares_of_the_loss(cut: list[dict[str, Any]]) -> None:
    alone = [one for one in cut if one["parts"] == 1]
    assert [one["share"] for one in alone] == pytest.approx([one["loss"] for one in alone], rel=1e-5)


def weights_of(rank: int, world_size: int, folder: str) -> list[Any]:
    """The weights after two steps at each ZeRO stage."""
    task = make_task(Path(folder) / str(rank), "contrastive")
    found = []
    for stage in range(4):
        batches = batches_of(task, rank=rank, split=BatchSplit(2, 2, world_size))
        engine = engine_of(model_of(task, 0.2), stage, 2, world_size)
        for step in (1, 2):
            counts = agree_on_totals(batches, data_wait_s=0.0, stop=False).counts
            forward_backward(engine, batches, counts=counts, seed=7, step=step)
            assert take_step(engine)[0]
        found.append(full_weights(engine))
    return found


def test_every_stage_takes_the_same_steps(tmp_path: Path) -> None:
    first, *others = run_ranks(weights_of, 2, str(tmp_path))[0]
    for weights in others:
        assert torch.allclose(torch.as_tensor(weights), torch.as_tensor(first), atol=2e-6)
