"""Behind the last attention only the tokens that something reads are computed, and nothing that is read changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from family_cases import EVERY_FAMILY, WIRED, disturbed, ragged
from torch import Tensor, nn

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.distillation_config import DistillationConfig
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX
from bert_ds.downstream.kinds.heads import SequenceHead
from bert_ds.downstream.kinds.task_model import TaskModel
from bert_ds.encoder.blocks import at_their_tokens
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.fused_ops import fused_ops
from bert_ds.encoder.objectives.distillation import TaughtWords
from bert_ds.encoder.objectives.objective import Seen
from bert_ds.encoder.pretraining_model import PretrainingModel


@contextmanager
def rows_of_last_layer(encoder: Any) -> Iterator[list[int]]:
    """Note how many rows each forward of the last feed-forward block has."""
    rows: list[int] = []
    entered: list[nn.Module] = []
    block: nn.Module = encoder.layer[-1].feed_forward  # which other layers may call too

    def note(_: nn.Module, inputs: Any) -> None:
        if entered:
            rows.append(len(inputs[0]))
            entered.clear()

    hooks = [encoder.layer[-1].register_forward_pre_hook(lambda layer, _: entered.append(layer))]
    hooks.append(block.register_forward_pre_hook(note))
    yield rows
    for hook in hooks:
        hook.remove()


def targets_of(packed: dict[str, Any], *, pairs: bool) -> dict[str, Tensor]:
    places_P = torch.arange(1, len(packed["input_ids_T"]), 3)
    targets = {"masked_positions": places_P, "masked_labels": packed["input_ids_T"].flip(0)[places_P]}
    labels_N = torch.arange(len(packed["cu_seqlens"]) - 1) % 2
    labels_N[packed["cu_seqlens"].diff() == 0] = IGNORE_INDEX
    return targets | ({"pair_labels": labels_N} if pairs else {})


def losses_and_gradients(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses_L = model(**inputs)[0]
    losses_L.sum().backward()
    return losses_L.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-10)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, wanted[1][name], rtol=1e-8, atol=1e-9, msg=name)


@EVERY_FAMILY
@pytest.mark.parametrize("recompute", [False, True])
def test_pre_training_computes_what_its_objectives_read(
    config: EncoderConfig, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = family_of(config).pair_head is not None
    model = PretrainingModel(config, kernels="torch", has_pair_head=pairs, activation_checkpointing=recompute)
    model = disturbed(model).double()  # type: ignore[assignment]
    _, packed = ragged(config)
    targets = targets_of(packed, pairs=pairs)
    with rows_of_last_layer(model.bert) as rows:
        found = losses_and_gradients(model, **packed, targets=targets)
    num_read = len(targets["masked_positions"]) + len(targets.get("pair_labels", ()))
    assert set(rows) == {num_read} and num_read < len(packed["input_ids_T"])
    monkeypatch.setattr(Seen, "will_read", lambda *_: None)
    with rows_of_last_layer(model.bert) as rows:
        wanted = losses_and_gradients(model, **packed, targets=targets)
    assert set(rows) == {len(packed["input_ids_T"])}
    assert_alike(found, wanted)


@EVERY_FAMILY
def test_a_task_of_sequences_computes_their_first_tokens(config: EncoderConfig) -> None:
    ops = fused_ops("torch")
    model: Any = disturbed(TaskModel(config, SequenceHead(config, 3, objective="one_of", ops=ops), ops=ops)).double()
    _, packed = ragged(config)
    inputs = {**packed, "targets": {"label": torch.arange(len(packed["cu_seqlens"]) - 1) % 3}}
    with rows_of_last_layer(model.bert) as rows:
        found = losses_and_gradients(model, **inputs)
    assert rows == [len(packed["cu_seqlens"]) - 1]
    model._reads_tokens = True
    with rows_of_last_layer(model.bert) as rows:
        wanted = losses_and_gradients(model, **inputs)
    assert rows == [len(packed["input_ids_T"])]
    assert_alike(found, wanted)


def test_a_mean_of_tokens_reads_all_of_them() -> None:
    config = WIRED["modernbert"].model_copy(update={"classifier_pooling": "mean"})
    ops = fused_ops("torch")
    model: Any = TaskModel(config, SequenceHead(config, 2, objective="one_of", ops=ops), ops=ops).double()
    _, packed = ragged(config)
    with rows_of_last_layer(model.bert) as rows:
        model(**packed, targets={})
    assert rows == [len(packed["input_ids_T"])]


@pytest.mark.parametrize("hidden_weight", [0.0, 1.0])
def test_a_teacher_computes_what_is_compared(hidden_weight: float) -> None:
    config = WIRED["bert"]
    teacher = PretrainingModel(config, kernels="torch", has_pair_head=False, init_seed=1).double()
    settings = DistillationConfig(teacher="t", soft_weight=0.5, mlm_weight=0.5, hidden_weight=hidden_weight)
    model = PretrainingModel(config, kernels="torch", objectives=[TaughtWords(teacher, settings)]).double()
    _, packed = ragged(config)
    targets = targets_of(packed, pairs=False)
    with rows_of_last_layer(model.bert) as mine, rows_of_last_layer(teacher.bert) as its:
        model(**packed, targets=targets)
    wanted = len(packed["input_ids_T"]) if hidden_weight else len(targets["masked_positions"])
    assert (mine, its) == ([wanted], [wanted])


def test_a_token_named_twice_has_its_gradient_once() -> None:
    hidden_RD = torch.arange(8.0).view(4, 2).requires_grad_()
    read_R = torch.tensor([5, 2, 5, 0])
    placed_TD = at_their_tokens(hidden_RD, read_R, num_tokens=6)
    assert placed_TD[read_R].tolist() == [[0, 1], [2, 3], [0, 1], [6, 7]]
    placed_TD[[5, 0]].sum().backward()
    assert hidden_RD.grad is not None and hidden_RD.grad.tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]


def test_no_word_to_predict_reads_all() -> None:
    model = PretrainingModel(WIRED["bert"], kernels="torch", has_pair_head=False)
    _, packed = ragged(WIRED["bert"])
    none = {"masked_positions": torch.zeros(0, dtype=torch.int64), "masked_labels": torch.zeros(0, dtype=torch.int64)}
    with rows_of_last_layer(model.bert) as rows:
        losses_L, _ = model(**packed, targets=none)
    assert rows == [len(packed["input_ids_T"])] and losses_L.tolist() == [0.0]


def test_where_dropout_is_on_its_masks_are_those_of_whole_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    config = WIRED["bert"].model_copy(update={"hidden_dropout_prob": 0.3})
    model = PretrainingModel(config, kernels="torch", has_pair_head=False).double()
    _, packed = ragged(config)
    inputs = {**packed, "targets": targets_of(packed, pairs=False), "dropout_seed": torch.tensor([5])}
    with rows_of_last_layer(model.bert) as rows:
        found = losses_and_gradients(model, **inputs)
        model.eval()(**inputs)
    assert rows == [len(packed["input_ids_T"]), len(inputs["targets"]["masked_positions"])]
    monkeypatch.setattr(Seen, "will_read", lambda *_: None)
    assert_alike(found, losses_and_gradients(model.train(), **inputs))
