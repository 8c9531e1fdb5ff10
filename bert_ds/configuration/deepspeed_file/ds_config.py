"""The DeepSpeed file: how a run is spread over ranks, in DeepSpeed's own schema.

It owns ZeRO, offload, the micro-batch, communication, activation checkpointing, monitors and profilers. What the recipe
owns may be left out or be "auto". `resolve_ds_config` joins both into the dictionary that DeepSpeed gets, with every
value written out: DeepSpeed's defaults move between releases, and it drops "auto" silently.

Standard library and pydantic only.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bert_ds.configuration.deepspeed_file.ds_agreement import disagreements, recipe_overrides, settled
from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit, split_batch
from bert_ds.configuration.deepspeed_file.ds_effective import effective_settings
from bert_ds.configuration.deepspeed_file.ds_keys import check_settings, setting_names
from bert_ds.configuration.deepspeed_file.ds_support import unsupported_settings
from bert_ds.configuration.reading.config_files import (
    ConfigError,
    ConfigFile,
    apply_overrides,
    raise_problems,
    read_config_file,
    set_value,
    shipped_file,
)
from bert_ds.configuration.reading.config_problems import Problem
from bert_ds.configuration.reading.shipped_files import named_file
from bert_ds.configuration.recipe.precision import PrecisionSetting
from bert_ds.configuration.recipe.run_config import RunConfig, TrainedRun, load_run_config, parse_run_config

DEFAULT_RECIPE = "recipes/embedded_default.json"
"""What is trained without a recipe."""


@dataclass(frozen=True)
class DsConfig:
    """A DeepSpeed file whose names, types and supported values have been checked."""

    name: str
    """As the user spelled it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The content, in first names; never changed after loading."""
    recipe_name: str = "the recipe"
    """How messages call the recipe it is paired with."""

    @property
    def zero_stage(self) -> int:
        """0, 1, 2 or 3."""
        return self.settings.get("zero_optimization", {}).get("stage", 0)

    @property
    def micro_batch_size(self) -> int | None:
        """Examples per rank and micro-step; None where `split_batch` chooses."""
        found = self.settings.get("train_micro_batch_size_per_gpu", "auto")
        return None if found == "auto" else found

    @property
    def accumulation(self) -> int | None:
        """Micro-steps per step; None where it follows."""
        found = self.settings.get("gradient_accumulation_steps", "auto")
        return None if found == "auto" else found

    def split_batch(self, run: TrainedRun, world_size: int) -> BatchSplit | Problem:
        """Cut a recipe's or a task's global batch as the file wants it, or say what is wrong."""
        return split_batch(run, world_size, micro=self.micro_batch_size, accumulation=self.accumulation)

    @property
    def offload_optimizer(self) -> str:
        """Where optimizer state lies: "none" (with the weights), "cpu" or "nvme"."""
        return (self.settings.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none")

    @property
    def offload_param(self) -> str:
        """Where stage 3's weights lie: "none" (on the accelerator), "cpu" or "nvme"."""
        return (self.settings.get("zero_optimization", {}).get("offload_param") or {}).get("device", "none")

    @property
    def activation_checkpointing(self) -> bool:
        """Whether every layer is recomputed in the backward pass."""
        return self.settings.get("activation_checkpointing", {}).get("number_checkpoints") is not None


def load_ds_config(path: str | Path) -> DsConfig:
    """Read and check a DeepSpeed file, given by path or by the name of a shipped one.

    Raises:
        ConfigError: with one line per problem of the file, all at once.
    """
    file = read_config_file(named_file(path, "DeepSpeed file"))
    settings, problems = _checked(file)
    raise_problems(file, problems)
    return DsConfig(file.name, settings)


def load_pair(
    run_path: str | Path | None, ds_path: str | Path, *, overrides: Sequence[str] = ()
) -> tuple[RunConfig, DsConfig]:
    """Read both files of a run, by path or by the names of shipped ones; without a recipe the default one, as the
    DeepSpeed file modifies it.

    Raises:
        ConfigError: with one line per problem of both files, all at once.
    """
    if run_path is None:
        return _load_default_pair(ds_path, overrides)
    messages: list[str] = []
    file = run = None
    settings: dict[str, Any] = {}
    problems: list[Problem] = []
    try:
        file = read_config_file(named_file(ds_path, "DeepSpeed file"))
        settings, problems = _checked(file)
    except ConfigError as error:
        messages.append(str(error))
    try:
        run = settled(load_run_config(run_path, overrides), settings)
    except ConfigError as error:
        messages.append(str(error))
        _refuse_swapped(run_path, file)
    try:
        if file is not None and (problems or file.problems):
            problems += disagreements(run, settings, str(run_path)) if run is not None else []
            raise_problems(file, problems)
    except ConfigError as error:
        messages.insert(0, str(error))
    if messages:
        raise ConfigError("\n".join(messages))
    assert run is not None and file is not None
    return run, DsConfig(file.name, settings, str(run_path))


def pair_problems(run: TrainedRun, ds: DsConfig) -> list[Problem]:
    """Return what is wrong with the two files together, whatever the number of ranks."""
    problems = disagreements(run, ds.settings, ds.recipe_name)
    precision, stage = run.training.precision, ds.zero_stage
    if precision == "fp16" and stage == 0:
        text = (
            f'needs stage 1, 2 or 3, as training.precision is "fp16" in {ds.recipe_name}: at stage 0 DeepSpeed never '
            "scales the loss and still divides the gradients by the scale"
        )
        problems.append(Problem("zero_optimization.stage", text))
    if ds.offload_optimizer == "nvme" and run.optimizer.runs_on == "both":
        text = f'found "nvme", wanted "cpu": "{run.optimizer.type}" steps on what is in memory'
        problems.append(Problem("zero_optimization.offload_optimizer.device", text))
    accumulate = ds.settings.get("data_types", {}).get("grad_accum_dtype")
    if stage == 0 and accumulate not in (None, "auto", *_SPELLINGS[precision]):
        text = f'found "{accumulate}", wanted "{precision}": zero_optimization.stage 0 accumulates as it computes'
        problems.append(Problem("data_types.grad_accum_dtype", text))
    checkpoints = ds.settings.get("activation_checkpointing", {}).get("number_checkpoints")
    if checkpoints not in (None, run.model.num_hidden_layers):
        text = f"found {checkpoints}, wanted {run.model.num_hidden_layers}: every layer is a checkpoint here"
        problems.append(Problem("activation_checkpointing.number_checkpoints", text))
    return problems


def resolve_ds_config(run: TrainedRun, ds: DsConfig, world_size: int, *, run_dir: str | None = None) -> dict[str, Any]:
    """Return the dictionary for `deepspeed.initialize`: every value explicit, no "auto", no optimizer or scheduler.

    The optimizer and the schedule are the recipe's and are handed over as objects; a leftover block would change how
    DeepSpeed wraps them.

    Args:
        run: the recipe, or a task; its precision is decided.
        ds: the DeepSpeed file.
        world_size: number of ranks.
        run_dir: where monitors write that have no output_path of their own; None leaves that to DeepSpeed.

    Raises:
        ConfigError: the files contradict each other, or the batch cannot be split over the ranks.
    """
    problems = pair_problems(run, ds)
    split = ds.split_batch(run, world_size)
    if isinstance(split, BatchSplit):
        raise_ds_problems(ds, problems)
        return effective_settings(run, copy.deepcopy(ds.settings), split, run_dir=run_dir)
    raise_ds_problems(ds, [*problems, split])
    raise AssertionError("raise_ds_problems returned although there was a problem")


def raise_ds_problems(ds: DsConfig, problems: Sequence[Problem]) -> None:
    """Raise one ConfigError with a line per problem, if there is any; a problem may name another source."""
    raise_problems(ConfigFile(ds.name, "", {}), problems)


_SPELLINGS: dict[PrecisionSetting, tuple[str, ...]] = {
    "auto": (),
    "fp32": ("fp32", "float32", "float"),
    "bf16": ("bf16", "bfloat16"),
    "fp16": ("fp16", "float16", "half"),
}


def _default_run(ds: DsConfig | None, overrides: Sequence[str]) -> RunConfig:
    path = shipped_file(DEFAULT_RECIPE)
    if ds is None:
        return load_run_config(path, overrides)
    file = read_config_file(path)
    problems: list[Problem] = []
    for dotted, value in recipe_overrides(ds.settings, load_run_config(path), problems).items():
        set_value(file, dotted, value)
        file.overridden[dotted] = ds.name
    raise_ds_problems(ds, problems)
    apply_overrides(file, overrides)
    return settled(parse_run_config(file), ds.settings)


def _load_default_pair(ds_path: str | Path, overrides: Sequence[str]) -> tuple[RunConfig, DsConfig]:
    """Read a DeepSpeed file, and the default recipe as the file modifies it."""
    messages = []
    ds = run = None
    try:
        ds = load_ds_config(ds_path)
    except ConfigError as error:
        messages.append(str(error))
    try:
        run = _default_run(ds, overrides)
    except ConfigError as error:
        messages.append(str(error))
    if messages:
        raise ConfigError("\n".join(messages))
    assert run is not None and ds is not None
    return run, replace(ds, recipe_name="the default recipe")


def _checked(file: ConfigFile) -> tuple[dict[str, Any], list[Problem]]:
    """Return the settings of a DeepSpeed file that are right, and what is wrong with the others."""
    problems: list[Problem] = []
    settings = check_settings(file.data, problems)
    stage_is_known = not {"zero_optimization", "zero_optimization.stage"} & {problem.path for problem in problems}
    problems += unsupported_settings(settings, stage_is_known=stage_is_known)
    return settings, problems


def _refuse_swapped(run_path: str | Path, ds_file: ConfigFile | None) -> None:
    """Say so in one sentence where each of the two files was given as the other."""
    if ds_file is None or not {"model", "corpus"} <= ds_file.data.keys() or not Path(run_path).is_file():
        return
    known = {name.partition(".")[0] for name in setting_names()}
    if read_config_file(run_path).data.keys() <= known:
        raise ConfigError(
            f"--run {run_path} is a DeepSpeed file and --deepspeed_config {ds_file.name} is a recipe: swap them"
        )
