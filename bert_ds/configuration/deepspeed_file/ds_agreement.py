"""Settings that both files can spell: the recipe owns them, the DeepSpeed file may repeat them.

A DeepSpeed file leaves such a setting out, says "auto", or says what the recipe says. Anything else is an error that
names both files. Without a recipe (`--run` not given) the DeepSpeed file speaks for the default recipe instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from bert_ds.configuration.deepspeed_file.ds_keys import leaves
from bert_ds.configuration.reading.config_problems import Problem, describe, did_you_mean, one_of
from bert_ds.configuration.recipe.optimizer_config import OPTIMIZERS, OptimizerSettings
from bert_ds.configuration.recipe.precision import Precision, Trained, with_precision
from bert_ds.configuration.recipe.run_config import RunConfig, TrainedRun

_DTYPES = {"half": "fp16", "float16": "fp16", "bfloat16": "bf16", "float": "fp32", "float32": "fp32"}

OPTIMIZER_TYPES = {
    spelled: kind for kind, settings in OPTIMIZERS.items() for spelled in (kind, *settings.deepspeed_types)
}
"""What a type in a DeepSpeed file means here, in lower case; the recipe's own names are understood too."""

_CLIPPING = "clipping is gradient_clipping (training.gradient_clipping of the recipe), not an optimizer's"


class Owned(NamedTuple):
    """A setting of the DeepSpeed file and what the recipe says about it."""

    path: str
    recipe_path: str
    value: Any


def owned_settings(run: TrainedRun) -> list[Owned]:
    """Return what the recipe decides, as far as it does not depend on the number of ranks."""
    training = run.training
    owned = [
        Owned("train_batch_size", "training.train_batch_size", training.train_batch_size),
        Owned("gradient_clipping", "training.gradient_clipping", training.gradient_clipping),
    ]
    if training.precision == "auto":
        return owned
    return [
        *owned,
        Owned("bf16.enabled", "training.precision", training.precision == "bf16"),
        Owned("fp16.enabled", "training.precision", training.precision == "fp16"),
        Owned("data_types.param_dtype", "training.precision", training.precision),
    ]


def fixed_precision(settings: dict[str, Any]) -> Precision | None:
    """Return the precision that a DeepSpeed file fixes for a run that leaves it open; None where it does not either."""
    given = dict(leaves(settings))
    spelled = str(given.get("data_types.param_dtype"))
    dtype = _DTYPES.get(spelled, spelled)
    low: tuple[Precision, ...] = ("bf16", "fp16")
    for name in low:
        if given.get(f"{name}.enabled") is True or dtype == name:
            return name
    return "fp32" if given.get("bf16.enabled") is False or dtype == "fp32" else None


def settled(run: Trained, settings: dict[str, Any]) -> Trained:
    """Return a recipe or a task with the precision that the DeepSpeed file fixes, where it leaves that open itself."""
    fixed = fixed_precision(settings) if run.training.precision == "auto" else None
    return run if fixed is None else with_precision(run, fixed)


def disagreements(run: TrainedRun, settings: dict[str, Any], recipe_name: str) -> list[Problem]:
    """Return one problem per setting of the DeepSpeed file that contradicts the recipe."""
    problems = []
    given = dict(leaves(settings))
    for path, recipe_path, value in owned_settings(run):
        found = given.get(path, "auto")
        found = _DTYPES.get(found, found) if path.startswith("data_types.") else found
        if found not in ("auto", None, value):
            said = run.training.precision if recipe_path == "training.precision" else value
            problems.append(_contradiction(path, found, recipe_name, recipe_path, said))
    vocabulary = settings.get("vocabulary_size")
    if vocabulary not in (None, run.model.vocab_size, run.model.padded_vocab_size):
        problems.append(
            _contradiction("vocabulary_size", vocabulary, recipe_name, "model.vocab_size", run.model.vocab_size)
        )
    problems += _optimizer_problems(run, settings.get("optimizer", {}), recipe_name)
    problems += _schedule_problems(run, settings.get("scheduler", {}), recipe_name)
    return problems


def recipe_overrides(settings: dict[str, Any], default: RunConfig, problems: list[Problem]) -> dict[str, Any]:
    """Return recipe settings (dotted path -> value) that a DeepSpeed file without a recipe stands for."""
    given = dict(leaves(settings))
    result: dict[str, Any] = {}
    for path in ("train_batch_size", "gradient_clipping"):
        if given.get(path, "auto") != "auto":
            result[f"training.{path}"] = given[path]
    block = settings.get("optimizer", {})
    if block.get("type", "auto") != "auto":
        result["optimizer"] = _optimizer_from_block(block, default, problems)
    return result


def _contradiction(path: str, found: Any, recipe_name: str, recipe_path: str, value: Any) -> Problem:
    text = f"found {describe(found)}, but {recipe_path} is {describe(value)} in {recipe_name}"
    return Problem(path, f"{text}; make them equal, or leave it out here")


def _optimizer_from_block(block: dict[str, Any], default: RunConfig, problems: list[Problem]) -> dict[str, Any]:
    kind = _optimizer_kind(block, problems)
    section: dict[str, Any] = {"type": kind}
    if kind == default.optimizer.type:
        section |= default.optimizer.model_dump(mode="json")
    for _, name, value in _parameters(block, kind):
        if name not in _facts(kind).deepspeed_constants and name != "max_grad_norm":
            section[name] = value
    if kind and "lr" not in section:
        problems.append(Problem("optimizer.params.lr", "is missing, wanted the peak learning rate"))
    problems += _fixed_parameter_problems(block, kind)
    return section


def _optimizer_problems(run: TrainedRun, block: dict[str, Any], recipe_name: str) -> list[Problem]:
    problems: list[Problem] = []
    if block.get("type", "auto") == "auto":
        kind: str = run.optimizer.type
    else:
        kind = _optimizer_kind(block, problems)
        if not kind:
            return problems
        if kind != run.optimizer.type:
            return [_contradiction("optimizer.type", block["type"], recipe_name, "optimizer.type", run.optimizer.type)]
    recipe = run.optimizer.model_dump(mode="json")
    for spelled, name, value in _parameters(block, kind):
        path = f"optimizer.params.{spelled}"
        if name in _facts(kind).deepspeed_constants or name == "max_grad_norm":
            continue
        if name not in recipe:
            problems.append(Problem(path, f"unknown to {kind}{did_you_mean(name, recipe)}"))
        elif value != recipe[name] or isinstance(value, bool) != isinstance(recipe[name], bool):
            problems.append(_contradiction(path, value, recipe_name, f"optimizer.{name}", recipe[name]))
    return problems + _fixed_parameter_problems(block, kind)


def _optimizer_kind(block: dict[str, Any], problems: list[Problem]) -> str:
    spelled = str(block["type"])
    kind = OPTIMIZER_TYPES.get(spelled.lower(), spelled.lower())
    if kind in OPTIMIZERS:
        return kind
    wanted = one_of(sorted(OPTIMIZERS))
    near = did_you_mean(spelled.lower(), OPTIMIZER_TYPES)
    problems.append(Problem("optimizer.type", f"found {describe(spelled)}, wanted {wanted}{near}"))
    return ""


def _facts(kind: str) -> type[OptimizerSettings]:
    """Return what is known of an optimizer; nothing of one that was refused."""
    return OPTIMIZERS.get(kind, OptimizerSettings)


def _parameters(block: dict[str, Any], kind: str) -> Iterator[tuple[str, str, Any]]:
    """Yield spelled name, the recipe's name, and value of every parameter that is not "auto"."""
    for spelled, value in block.get("params", {}).items():
        if value != "auto":
            yield spelled, _facts(kind).deepspeed_names.get(spelled, spelled), value


def _fixed_parameter_problems(block: dict[str, Any], kind: str) -> list[Problem]:
    problems = []
    fixed = _facts(kind).deepspeed_constants
    for spelled, name, value in _parameters(block, kind):
        path = f"optimizer.params.{spelled}"
        if name == "max_grad_norm":
            problems.append(Problem(path, _CLIPPING))
        elif name in fixed and value is not fixed[name]:
            problems.append(
                Problem(path, f"found {describe(value)}, wanted {describe(fixed[name])}: {kind} has no other")
            )
    return problems


def _schedule_problems(run: TrainedRun, block: dict[str, Any], recipe_name: str) -> list[Problem]:
    kind = block.get("type", "auto")
    if kind == "auto":
        return [
            Problem(f"scheduler.params.{name}", "given without scheduler.type")
            for name, value in block.get("params", {}).items()
            if value != "auto"
        ]
    if run.training.total_steps is None:
        return []  # looked at again when max_minutes has become steps
    expected = _deepspeed_schedules(run)
    if kind not in expected:
        text = f"found {describe(kind)}, but schedule.type is {describe(run.schedule.type)} in {recipe_name}"
        return [Problem("scheduler.type", f"{text}; leave the block out: the recipe owns the schedule")]
    problems = []
    for name, value in block.get("params", {}).items():
        path = f"scheduler.params.{name}"
        if name not in expected[kind]:
            problems.append(Problem(path, f"unknown to {kind}{did_you_mean(name, expected[kind])}"))
        elif value not in ("auto", expected[kind][name]):
            problems.append(_contradiction(path, value, recipe_name, "the schedule's value", expected[kind][name]))
    return problems


def _deepspeed_schedules(run: TrainedRun) -> dict[str, dict[str, Any]]:
    """DeepSpeed's schedules that compute what the recipe's does, with the parameters they would need."""
    schedule, steps, lr = run.schedule, run.training.steps, run.optimizer.lr
    warmup = {"warmup_num_steps": schedule.num_warmup_steps(steps), "warmup_type": "linear"}
    at_zero = schedule.min_lr_fraction == 0.0
    rates = {"warmup_min_lr": 0.0, "warmup_max_lr": lr}
    if schedule.type == "constant":
        return {"WarmupLR": {**warmup, **rates}}
    if schedule.type == "linear" and at_zero:
        return {"WarmupDecayLR": {**warmup, **rates, "total_num_steps": steps}}
    if schedule.type == "cosine":
        ratios = {"warmup_min_ratio": 0.0, "cos_min_ratio": schedule.min_lr_fraction}
        return {"WarmupCosineLR": {**warmup, **ratios, "total_num_steps": steps}}
    return {}
