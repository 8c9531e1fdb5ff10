"""How fast a run will be on cards that are known: a prediction from data sheets and counted work, nothing measured.

A step of a rank is A micro-steps, each as long as the longer of what the host launches and what the card computes, then
the optimizer and the messages between ranks, none of which overlap (the shipped files switch overlap off).

Letters: T tokens of a micro-batch, D hidden size, L layers, N parameters, R ranks, A micro-steps of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.configuration.run_size import optimizer_flops

WORLD_SIZES = (1, 8, 64, 512)
"""Numbers of cards that a speed is predicted for."""


class Card(NamedTuple):
    """One GPU, by its data sheet."""

    flops_per_s: float
    """Dense bf16."""
    memory_bytes_per_s: float
    node_bytes_per_s: float
    """To others of its node, one direction: half of the data sheet's NVLink figure, which counts both."""
    network_bytes_per_s: float = 50e9
    """To other nodes: one 400 Gbit/s adapter for each GPU (NVIDIA DGX H100 data sheet)."""


CARDS = {
    "A100": Card(312e12, 2.039e12, 300e9),
    "H100": Card(989e12, 3.35e12, 450e9),
    "H200": Card(989e12, 4.8e12, 450e9),
}
"""NVIDIA's data sheets of the SXM boards: A100 80GB, H100, H200."""
GPUS_PER_NODE = 8
GEMM_SHARE, ATTENTION_SHARE, MEMORY_SHARE = 0.6, 0.23, 0.85
"""Assumed shares of the data sheet: products of BERT's width; 230 of 989 TFLOP/s, and 85 % of the bandwidth, which are
bars that the kernels are to reach (`kernels/benchmarks/bench_bars.py`)."""
TRAFFIC_PER_LAYER = 51
"""Values of T D read and written by a layer's forward and backward beside its products, counted for BERT at length 128
with these kernels: attention 13, twice dropout, residual and LayerNorm 18, GELU 20."""
ACCUMULATION_BYTES = 10
"""Of a parameter and micro-step: a bf16 gradient is read and added to a sum in fp32."""
HOST_LAYER_S = 1.3e-3
"""Host time of a layer, forward and backward: 0.89 ms on an AMD EPYC core (`layer of bert`, the least times, in
`kernels/benchmarks/results/host_time.csv`), which records the launches, and 11 launches of Triton at about 36 us."""
OPTIMIZER_BYTES = 42
"""Of a parameter and step: LAMB's two passes over gradients, master weights, moments and low-precision weights."""


class StepTimes(NamedTuple):
    """Seconds of one rank's step, by what takes them."""

    host: float
    """Launching the micro-steps."""
    products: float
    attention: float
    memory: float
    """Element-wise work and accumulated gradients."""
    optimizer: float
    messages: float

    @property
    def card(self) -> float:
        """Of the micro-steps on the card."""
        return self.products + self.attention + self.memory

    @property
    def step(self) -> float:
        """Of the whole step."""
        return max(self.host, self.card) + self.optimizer + self.messages

    @property
    def bound(self) -> str:
        """What takes most of the step: the largest part of it that is not hidden behind another."""
        if self.host > self.card:
            shown = {"the host's launches": self.host}
        else:
            shown = {"matrix products": self.products, "attention": self.attention, "memory traffic": self.memory}
        shown |= {"the optimizer": self.optimizer, "messages between ranks": self.messages}
        return max(shown, key=lambda name: shown[name])


def step_times(plan: RunPlan, card: Card) -> list[StepTimes]:
    """Return the times of a step in each stage of the recipe, its sequences all full.

    Args:
        plan: of bf16 or fp16; another precision is taken as bf16.
        card: all ranks have this one.
    """
    run, found = plan.run, []
    for stage in plan.stages:
        length, encoders = stage.run.sequences.max_seq_length, stage.run.encoders
        tokens = stage.split.micro_batch_size * stage.split.accumulation * length
        attention = sum(attention_flops(model, length) for model in encoders) * tokens
        products = plan.flops_per_token(length, stage.run) * tokens - attention
        widths = sum(model.hidden_size * model.num_hidden_layers for model in encoders)
        traffic = 2 * TRAFFIC_PER_LAYER * tokens * widths
        traffic += ACCUMULATION_BYTES * plan.num_parameters * stage.split.accumulation
        shards = plan.world_size if plan.zero_stage else 1
        products += optimizer_flops(run) / shards
        found.append(
            StepTimes(
                host=HOST_LAYER_S * sum(one.num_hidden_layers for one in encoders) * stage.split.accumulation,
                products=products / (GEMM_SHARE * card.flops_per_s),
                attention=attention / (ATTENTION_SHARE * card.flops_per_s),
                memory=traffic / (MEMORY_SHARE * card.memory_bytes_per_s),
                optimizer=OPTIMIZER_BYTES * plan.num_parameters / shards / (MEMORY_SHARE * card.memory_bytes_per_s),
                messages=message_bytes(plan, stage.split.accumulation) / bandwidth(plan.world_size, card),
            )
        )
    return found


def attention_flops(model: EncoderConfig, length: int) -> float:
    """Return the FLOPs of scores and values per token, forward and backward: 12 D keys."""
    return 12.0 * model.hidden_size * model.attended_tokens(length)


def message_bytes(plan: RunPlan, accumulation: int) -> float:
    """Return the bytes that a rank sends in a step (Rajbhandari et al. 2020, arXiv 1910.02054, rings of R ranks).

    Gradients are reduced in fp32, 4 N, twice that at stage 0 (all-reduce); the new weights are gathered, 2 N. Stages 2
    and 3 reduce in every micro-step; stage 3 gathers the weights for each forward and each backward.
    """
    reductions = accumulation if plan.zero_stage >= 2 else 1
    gradients = 4 * reductions * (2 if plan.zero_stage == 0 else 1)
    weights = {0: 0, 1: 2, 2: 2, 3: 4 * accumulation}[plan.zero_stage]
    return plan.num_parameters * (gradients + weights) * (plan.world_size - 1) / plan.world_size


def bandwidth(world_size: int, card: Card) -> float:
    """Return bytes per second of a rank's slowest link: in a node, or between nodes."""
    return card.node_bytes_per_s if world_size <= GPUS_PER_NODE else card.network_bytes_per_s


def speed_rows(
    plan: RunPlan, name: str, card: Card, *, world_sizes: Sequence[int] = WORLD_SIZES
) -> list[tuple[str, str]]:
    """Return what is predicted for some numbers of a card, as rows of name and text.

    Args:
        plan: of any number of ranks; the others are planned anew.
        name: of the card, for people.
        card: what it can do.
        world_sizes: numbers of cards.
    """
    return [(f"predicted, {number} {name}", _speed_text(plan, card, number)) for number in world_sizes]


def _speed_text(plan: RunPlan, card: Card, world_size: int) -> str:
    try:
        spread = make_plan(plan.run, plan.ds, world_size)
    except ConfigError:
        return f"the global batch cannot be spread over {world_size} ranks"
    times = step_times(spread, card)
    longest = max(range(len(times)), key=lambda index: times[index].step)
    stage = spread.stages[longest]
    speed = stage.max_tokens_per_step / times[longest].step
    text = f"{speed:,.0f} tokens/s, {1e3 * times[longest].step:,.1f} ms a step, bound by {times[longest].bound}"
    if plan.run.training.total_steps is None:
        return text
    seconds = sum(each.step * part.num_steps for each, part in zip(times, spread.stages, strict=True))
    whole = f"{seconds / 86400:,.2f} days" if seconds >= 8640 else f"{seconds / 60:,.1f} minutes"
    return f"{text}; {whole} in all"
