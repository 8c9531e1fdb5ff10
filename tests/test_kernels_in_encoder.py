"""The encoder on the Triton kernels under torch.compile and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from encoder_cases import packed_inputs, small_config
from torch import Tensor

from bert_ds.encoder.pretraining_model import PretrainingModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = torch.tensor([1234567], device=DEVICE)


CONFIG = small_config(
    num_hidden_layers=1, num_attention_heads=1, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2
)


def model_of(*, activation_checkpointing: bool = False) -> PretrainingModel:
    model = PretrainingModel(CONFIG, kernels="triton", activation_checkpointing=activation_checkpointing)
    return model.to(DEVICE).train()


def batch_of(lengths: list[int]) -> dict[str, Any]:
    batch = packed_inputs(CONFIG, lengths)
    on_device = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return on_device | {"dropout_seed": SEED}


def gradients(model: PretrainingModel, forward: Callable[..., Any], batch: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    loss_sums, _ = forward(**batch)
    loss_sums.sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("activation_checkpointing", "batches"),
    [(False, ([5, 1],)), (True, ([5, 1], [3, 4]))],
    ids=["all kept", "recomputed"],
)
def test_the_whole_model_is_one_graph_and_gives_the_bits_of_eager(
    activation_checkpointing: bool, batches: tuple[list[int], ...]
) -> None:
    model = model_of(activation_checkpointing=activation_checkpointing)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    # Other lengths compile again, with sizes that are symbols.
    for lengths in batches:
        expected, found = (gradients(model, forward, batch_of(lengths)) for forward in (model, compiled))
        assert len(found) == len(list(model.parameters()))
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_recomputed_layer_drops_what_it_dropped_before() -> None:
    plain, saving = (model_of(activation_checkpointing=recompute) for recompute in (False, True))
    expected, found = (gradients(model, model, batch_of([5, 1])) for model in (plain, saving))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_the_graph_holds_the_operators_themselves() -> None:
    torch._dynamo.reset()
    explained = torch._dynamo.explain(model_of())(**batch_of([5, 1]))
    called = {str(node.target) for graph in explained.graphs for node in graph.graph.nodes}
    assert explained.graph_break_count == 0
    names = ("embedding", "attention", "layer_norm", "bias_gelu", "mlm_cross_entropy")
    assert {f"bert_kernels.{name}.default" for name in names} <= called
