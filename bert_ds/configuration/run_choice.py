"""A recipe that suits a corpus, a machine and a time: which size, batch and rate, and why.

The family, optimizer and masks are those that learned most from the same text in the same minutes
(`make campaign-race`). The size is the largest whose layers see enough tokens in the time, of which 40 epochs of the
corpus count. How many are enough for a weight grows with the work C of the run, (C / 1e14)^0.22: 1 for some minutes of
a CPU, about 16 for a day of an H100 and 20, as in Hoffmann et al. 2022 (arXiv 2203.15556), beyond. It is a rule between
those ends, not a law.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from bert_ds.configuration.deepspeed_file.ds_config import DsConfig
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.reading.config_problems import section_problems
from bert_ds.configuration.recipe.precision import Precision
from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.configuration.run_size import optimizer_flops
from bert_ds.configuration.run_speed import Card, step_times

SIZES = (
    *((2, 128, 320), (4, 192, 512), (4, 256, 640), (6, 384, 960), (8, 512, 1280), (12, 768, 1152), (22, 768, 1152)),
    (28, 1024, 2624),
)
"""Layers, hidden and intermediate size, each with two or three times the weights of the one before; the last two are
those of ModernBERT."""
CPU_SHARES: dict[Precision, float] = {"bf16": 0.67, "fp32": 1.1}
"""Of the measured rate of a small matrix product, what a whole step reaches, its products being larger:
`tests/campaign_race.json` on two AMD cores, a step of 0.203 s beside 344 GFLOP/s in bf16, and an earlier form, 0.47 s
beside 129 in fp32. No other size has been tried."""
MIN_STEPS, WANTED_STEPS = 50, 1500
SMALLEST_BATCH, LARGEST_BATCH = 1 << 10, 1 << 19
"""Tokens of a step."""
SHORT, LONG, LONG_FROM = 64, 128, 20_000_000
"""Tokens of a sequence, and of the run from which on it is the longer one."""
NEAR, NEAR_THETA = 8, 1000.0
"""In a run of short sequences all layers but the last see half of so many tokens to each side, and the last has this
base of its rotary frequencies: what a network learns first lies beside a word (`make campaign-race`)."""
RATE_AT_256, LOWEST_RATE = 4e-3, 5e-4
"""Muon's rate at hidden size 256 (`make campaign-race`) and that of `bert_base_muon`; in proportion to 1 / hidden."""
RANGE_AT_256, LOWEST_RANGE = 0.05, 0.02
"""Deviation of the first weights at hidden size 256 (`make campaign-race`) and that of ModernBERT; in proportion to
1 / sqrt(hidden), which leaves what a matrix gives as large as what it takes."""
NUM_EVALUATIONS = 4
USEFUL_EPOCHS = 40


class Speed(NamedTuple):
    """How fast a recipe trains, in seconds."""

    step_s: float
    evaluation_s: float
    """Of one evaluation."""


class Choice(NamedTuple):
    """A recipe, as it is to be written, and what is predicted of it."""

    recipe: Mapping[str, Any]
    plan: RunPlan
    speed: Speed
    num_steps: int
    """Beside all evaluations."""

    @property
    def tokens(self) -> int:
        """Of the whole run, every sequence full."""
        return self.num_steps * self.plan.max_tokens_per_step

    @property
    def weights(self) -> int:
        """Matrix weights of all layers."""
        return sum(rows * columns for rows, columns in self.plan.run.model.own_matrices())

    @property
    def epochs(self) -> float | None:
        """Of the corpus, where its tokens are known."""
        return self.tokens / self.plan.corpus_tokens if self.plan.corpus_tokens else None


Measure = Callable[[RunPlan], Speed]


def on_card(card: Card) -> Measure:
    """Return what predicts the speed on cards of a kind, from data sheets."""

    def measure(plan: RunPlan) -> Speed:
        step_s = max(times.step for times in step_times(plan, card))
        return Speed(step_s, step_s * _evaluated_share(plan))

    return measure


def on_cpu(reached: Callable[[RunConfig], float]) -> Measure:
    """Return what predicts the speed on the cores here, whatever the number of ranks on them.

    Args:
        reached: FLOP/s of all cores together in a step of a recipe.
    """

    def measure(plan: RunPlan) -> Speed:
        work = plan.flops_per_token(plan.run.max_seq_length) * plan.max_tokens_per_step
        rate = reached(plan.run)
        return Speed((work + optimizer_flops(plan.run)) / rate, work / rate * _evaluated_share(plan))

    return measure


def choose(base: Mapping[str, Any], ds: DsConfig, *, minutes: float, measure: Measure, world_size: int) -> Choice:
    """Return the recipe for a corpus and a time.

    Args:
        base: sections of the recipe that are given: its name and corpus, and whatever else is not to be chosen.
        ds: the DeepSpeed file.
        minutes: of training and evaluation.
        measure: predicts the speed of a plan.
        world_size: number of ranks.

    Raises:
        ConfigError: the time is too short, or what is given contradicts itself.
    """
    chosen: Choice | None = None
    for size in SIZES if "type" not in base["model"] else SIZES[:1]:
        found = _of_size(base, ds, size, minutes=minutes, measure=measure, world_size=world_size)
        if chosen is not None and useful_tokens(found) < enough_tokens(found) * found.weights:
            break
        chosen = found
    assert chosen is not None
    if chosen.num_steps < MIN_STEPS:
        least = (MIN_STEPS * chosen.speed.step_s + NUM_EVALUATIONS * chosen.speed.evaluation_s) / 60
        raise ConfigError(
            f"{minutes:g} minutes are too few: {MIN_STEPS} steps and {NUM_EVALUATIONS} evaluations of "
            f"{'the given model' if 'type' in base['model'] else 'the smallest recipe'} take about {least:.1f}"
        )
    return chosen


def useful_tokens(choice: Choice) -> int:
    """Return the tokens of the run, but those that read the corpus once more than BERT read its own."""
    corpus = choice.plan.corpus_tokens
    return min(choice.tokens, USEFUL_EPOCHS * corpus) if corpus else choice.tokens


def enough_tokens(choice: Choice) -> float:
    """Return how many tokens a weight of the layers wants in a run of this work; see the head of this file."""
    work = choice.tokens * choice.plan.flops_per_token(choice.plan.run.max_seq_length)
    return min(20.0, max(0.5, (work / 1e14) ** 0.22))


def _of_size(
    base: Mapping[str, Any],
    ds: DsConfig,
    size: tuple[int, int, int],
    *,
    minutes: float,
    measure: Measure,
    world_size: int,
) -> Choice:
    """Return the recipe of a size; batch and length follow from the tokens that fit, and those from the speed."""
    tokens, steps = 4_000_000, WANTED_STEPS
    for _ in range(3):
        recipe = _recipe(base, size, tokens=tokens, steps=steps, minutes=minutes, ranks=world_size)
        try:
            run = RunConfig.model_validate_json(json.dumps(recipe))
        except ValidationError as error:
            raise ConfigError("\n".join(one.line("recipe") for one in section_problems(error, RunConfig))) from None
        plan = make_plan(run, ds, world_size)
        speed = measure(plan)
        steps = max(0, int((60 * minutes - NUM_EVALUATIONS * speed.evaluation_s) / speed.step_s))
        choice = Choice(recipe, plan, speed, steps)
        tokens = max(1, choice.tokens)
    return choice


def _recipe(
    base: Mapping[str, Any], size: tuple[int, int, int], *, tokens: int, steps: int, minutes: float, ranks: int
) -> dict[str, Any]:
    """Return the sections, with those of base in place of what is chosen."""
    model = dict(base["model"]) if "type" in base["model"] else {**modern_model(size, tokens), **base["model"]}
    sequences = {
        "max_seq_length": min(_length(tokens), model.get("max_position_embeddings", LONG)),
        "sentence_pair": "none",
        "short_seq_prob": 0.0,
        "cross_documents": True,
        **base.get("sequences", {}),
    }
    if sequences["sentence_pair"] == "none" and not sequences["short_seq_prob"]:
        sequences = {"whole_sentences": False, **sequences}
    of_a_step = min(LARGEST_BATCH, max(SMALLEST_BATCH, 2 ** round(math.log2(max(1, tokens / WANTED_STEPS)))))
    batch = -(-max(1, of_a_step // sequences["max_seq_length"]) // ranks) * ranks
    optimizer = base.get("optimizer") or _muon(model["hidden_size"])
    training = {name: value for name, value in base.get("training", {}).items() if name != "total_steps"}
    if (given := training.get("train_batch_size")) is not None:
        while given > batch and given % (2 * ranks) == 0:  # too large for so few tokens
            given //= 2
        optimizer = _with_rate(optimizer, math.sqrt(given / training["train_batch_size"]))
    every = max(1, steps // NUM_EVALUATIONS)
    return {
        "masking": {"mlm_probability": 0.3, "mask_token_fraction": 1.0, "random_token_fraction": 0.0},
        "schedule": {"type": "linear", "warmup_fraction": 0.05},
        **base,
        "model": model,
        "sequences": sequences,
        "optimizer": optimizer,
        "training": {**training, "train_batch_size": given or batch, "max_minutes": minutes},
        "evaluation": {"num_examples": 1024, **base.get("evaluation", {}), "every_steps": every},
        "checkpoints": {"keep_last": 2, "every_steps": every},
    }


def modern_model(size: tuple[int, int, int], tokens: int) -> dict[str, Any]:
    """Return the section of a ModernBERT of one of SIZES for a run of so many tokens."""
    layers, hidden, intermediate = size
    windows: dict[str, Any] = {"local_attention": LONG}
    if _length(tokens) == SHORT:
        types = ["sliding_attention"] * (layers - 1) + ["full_attention"]
        windows = {"layer_types": types, "local_attention": NEAR, "global_rope_theta": NEAR_THETA}
    return {
        "type": "modernbert",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "intermediate_size": intermediate,
        "max_position_embeddings": 512,
        "initializer_range": max(LOWEST_RANGE, round(RANGE_AT_256 * math.sqrt(256 / hidden), 3)),
        **windows,
    }


def _length(tokens: int) -> int:
    return SHORT if tokens < LONG_FROM else LONG


def _muon(hidden: int) -> dict[str, Any]:
    rate = min(RATE_AT_256, max(LOWEST_RATE, RATE_AT_256 * 256 / hidden))
    return _with_rate({"type": "muon", "lr": rate, "adamw_lr": rate / 2, "betas": [0.9, 0.98]}, 1.0)


def _with_rate(optimizer: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return the settings with rates times a factor, the root of the batch's (You et al. 2020, arXiv 1904.00962)."""
    rates = {name: optimizer[name] for name in ("lr", "adamw_lr") if optimizer.get(name) is not None}
    return {**optimizer, **{name: float(f"{factor * rate:.2g}") for name, rate in rates.items()}}


def _evaluated_share(plan: RunPlan) -> float:
    """Return the work of an evaluation in steps: a third of forward and backward."""
    return plan.run.evaluation.num_examples * plan.run.max_seq_length / (3 * plan.max_tokens_per_step)
