"""An unpadded model on two ranks: DDP, FSDP2 and DeepSpeed ZeRO make of it what they make of the plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import unpad_cases as cases
from ranks_harness import run_ranks
from torch import nn

from bert_kernels.hf import unpad

NAME = "BertForMaskedLM"
Step = Callable[[dict[str, Any]], float]
WAYS = ("ddp", "fsdp", "fsdp recomputed", "zero 1", "zero 2", "zero 3", "zero 3 recomputed", "zero 3 fused parts")


def stepper(way: str, model: Any, rank: int) -> tuple[Step, Callable[[], list[torch.Tensor]]]:
    """Wrap the model; return what takes a step on a batch, and what gives the whole weights."""
    if "recomputed" in way:
        model.gradient_checkpointing_enable()
    if way.startswith("zero"):
        return zero_stepper(int(way.split()[1]), model)
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.bert.encoder.layer:
            fully_shard(layer)
        wrapped = fully_shard(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)

    def step(inputs: dict[str, Any]) -> float:
        loss = wrapped(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def weights() -> list[torch.Tensor]:
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in wrapped.parameters()]
        return [each.detach().clone() for each in whole]

    return step, weights


def zero_stepper(stage: int, model: Any) -> tuple[Step, Callable[[], list[torch.Tensor]]]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)

    def step(inputs: dict[str, Any]) -> float:
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        return float(loss.detach())

    def weights() -> list[torch.Tensor]:
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            return [parameter.detach().clone() for parameter in model.parameters()]

    return step, weights


def batches(rank: int) -> Iterator[dict[str, Any]]:
    """Three ragged batches, other rows on each rank."""
    for number in range(3):
        batch = cases.make_batch(NAME, "ragged" if number else "holes", seed=number)
        yield {name: value[2 * rank : 2 * rank + 2] for name, value in batch.inputs.items()}


def train_both(rank: int, world_size: int, way: str) -> dict[str, float]:
    """Train the plain and the unpadded model; return how far apart they end and how many rows a layer saw."""
    plain = cases.make_model(NAME, hidden_act="gelu").float().train()
    ours = unpad(copy.deepcopy(plain), kernels="torch" if way.endswith("fused parts") else "auto")
    rows: list[int] = []
    ours.bert.encoder.layer[1].attention.output.dense.register_forward_hook(
        lambda module, args, output: rows.append(args[0].shape[:-1].numel())
    )
    before = [parameter.detach().clone() for parameter in plain.parameters()]
    ends, losses = [], []
    for model in (plain, ours):
        step, weights = stepper(way, model, rank)
        losses.append([step(batch) for batch in batches(rank)])
        ends.append(weights())
    return {
        "loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "weights": max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True)),
        "moved": max(float((a - b).abs().max()) for a, b in zip(before, ends[1], strict=True)),
        "rows": max(rows),
    }


def train_all(rank: int, world_size: int, ways: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Try all ways in one launch."""
    return {way: train_both(rank, world_size, way) for way in ways}


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict[str, float]]]:
    return run_ranks(train_all, 2, WAYS, timeout_s=300)


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_end_with_the_weights_of_the_plain_model(found: list[dict[str, dict[str, float]]], way: str) -> None:
    for rank in found:
        assert rank[way]["loss"] < 1e-5 and rank[way]["weights"] < 1e-5 and rank[way]["moved"] > 1e-2
        assert rank[way]["rows"] < 2 * cases.LENGTH
