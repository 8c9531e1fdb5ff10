"""What can be said of a fine-tuning before it starts, without torch: its checks with the model, and its sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from bert_ds.configuration.deepspeed_file.ds_batch import BatchSplit
from bert_ds.configuration.deepspeed_file.ds_config import DsConfig
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.model_folder import folder_model
from bert_ds.configuration.plan_table import batch_text, memory_rows
from bert_ds.configuration.recipe.precision import precision_text
from bert_ds.configuration.recipe.run_config import (
    ConfigError,
    EmbeddedCorpus,
    MaskingConfig,
    RunConfig,
    SequenceConfig,
)
from bert_ds.configuration.run_plan import RunPlan, memory_warnings, size_text
from bert_ds.configuration.task.task_checks import checked_split
from bert_ds.configuration.task.task_config import DEFAULT_EPOCHS, TaskConfig, TrainedTask, trained_task

Rows = list[tuple[str, str]]


def task_table(
    task: TaskConfig,
    ds: DsConfig,
    model: Path,
    *,
    world_size: int,
    num_rows: int | None,
    gpu_memory_bytes: int | None = None,
) -> tuple[Rows, list[str]]:
    """Return the derived numbers of a fine-tuning as rows of name and text, and the warnings.

    Args:
        task: the task, alone and with the DeepSpeed file already checked.
        ds: the DeepSpeed file.
        model: folder of the pre-trained model, or of several of its form.
        world_size: number of ranks.
        num_rows: training rows in the files; None where they have not been counted.
        gpu_memory_bytes: memory of one GPU, for a warning where the estimate is larger.

    Raises:
        ConfigError: with one line per problem, all at once.
    """
    shape = _shape(model)
    run = trained_task(task, shape, num_sequences=num_rows or 1)
    split = checked_split(run, ds, world_size, knows_steps=task.training.total_steps is not None)
    plan = _of_the_same_size(run, ds, split)
    precision = precision_text(task.training.precision)
    length = task.max_seq_length
    rows = [
        ("run", f"{task.name}: {task.kind}, {task.optimizer.type}, {precision}, ZeRO stage {ds.zero_stage}"),
        ("metric", task.chosen_metric),
        ("global batch", batch_text(split)),
        ("tokens per step", f"at most {split.train_batch_size * length:,} ({split.train_batch_size:,} x {length})"),
        ("training rows", "counted at the launch" if num_rows is None else f"about {num_rows:,}"),
        ("steps", _steps_text(run, num_rows)),
        ("parameters", f"about {plan.num_parameters:,} ({shape.padded_vocab_size:,} rows in the vocabulary)"),
        *memory_rows(plan),
        ("checkpoints", f"{size_text(plan.checkpoint_bytes)} each (estimate)"),
    ]
    return rows, memory_warnings(plan, gpu_memory_bytes)


def rows_left(task: TaskConfig, num_rows: int) -> int:
    """Return how many of the rows in the training files are trained on, but for those that overlap another side."""
    kept = round(num_rows * (1 - (task.data.validation_fraction or 0.0)))
    return max(1, min(kept, task.data.max_train_rows or kept))


def _shape(model: Path) -> EncoderConfig:
    folders = [model, *sorted(path.parent for path in model.glob("*/config.json"))]
    found = next((shape for shape in map(folder_model, folders) if shape is not None), None)
    if found is None:
        raise ConfigError(f"--model {model}: config.json does not hold the sizes of an encoder")
    return found


def _steps_text(run: TrainedTask, num_rows: int | None) -> str:
    settings, steps = run.task.training, run.training.steps
    warmup = run.schedule.num_warmup_steps(steps)
    if settings.total_steps is not None:
        return f"{steps:,}, the first {warmup:,} of them warm-up"
    epochs = f"{settings.epochs or DEFAULT_EPOCHS:g} epochs"
    return epochs if num_rows is None else f"about {steps:,} ({epochs}), the first {warmup:,} of them warm-up"


def _of_the_same_size(run: TrainedTask, ds: DsConfig, split: BatchSplit) -> RunPlan:
    """Return a pre-training of this encoder, batch and optimizer; its word head stands for the head of the task."""
    recipe = RunConfig(
        name=run.task.name,
        model=cast(Any, run.model),  # of any family
        corpus=EmbeddedCorpus(vocab_size=max(8, run.model.vocab_size)),
        sequences=SequenceConfig(max_seq_length=run.max_seq_length, sentence_pair="none"),
        masking=MaskingConfig(mlm_probability=1e-9),  # a task has no scores over the vocabulary
        optimizer=run.optimizer,
        schedule=run.schedule,
        training=run.training,
        checkpoints=run.task.checkpoints,
    )
    return RunPlan(recipe, ds, split)
