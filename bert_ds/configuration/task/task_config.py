"""The task: one frozen, validated object that describes a fine-tuning run.

A task file names the kind of task, its files with their columns, and the metric; everything else has a default. It has
the sections `optimizer`, `schedule`, `training`, `evaluation` and `checkpoints` of a recipe, counted in epochs where
that is more natural. `TrainedTask` is the task once its number of steps and its network are known; to the DeepSpeed
file it looks like a recipe.

Standard library and pydantic only. Validators check and never change a value.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.reading.config_files import (
    ConfigFile,
    apply_overrides,
    raise_problems,
    read_config_file,
    resolve_paths,
)
from bert_ds.configuration.reading.config_problems import Problem, did_you_mean, found_wanted, one_of, section_problems
from bert_ds.configuration.reading.config_section import DropoutProbability, Section, Size
from bert_ds.configuration.reading.shipped_files import named_file
from bert_ds.configuration.recipe.optimizer_config import AdamWConfig, OptimizerConfig
from bert_ds.configuration.recipe.run_config import CheckpointConfig, TrainingConfig
from bert_ds.configuration.recipe.schedule_config import ScheduleConfig
from bert_ds.configuration.task.task_data_config import SIDES, TaskDataConfig, file_problems, retrieval_problems
from bert_ds.configuration.task.task_kinds import ENTITY_METRICS, KIND_FACTS, RANKING_METRICS, WORD_METRICS, KindName
from bert_ds.configuration.task.task_sections import (
    EmbeddingConfig,
    FreezeConfig,
    PromptConfig,
    QuestionAnsweringConfig,
    RetrievalConfig,
    TaskDistillationConfig,
    TaskEvaluationConfig,
    TaskTrainingConfig,
    embedding_problems,
)

TASK_PATHS = (
    "data.train.*.path",
    "data.validation.*.path",
    "data.test.*.path",
    "data.corpus.*.path",
    "distillation.teacher",
    "retrieval.reranker",
)
"""Settings that name a file; `*` stands for every item of a list."""

DEFAULT_EPOCHS = 3.0

DEFAULT_SECTIONS = {
    "optimizer": {"type": "adamw", "lr": 5e-5},
    "schedule": {"type": "linear", "warmup_fraction": 0.1},
}
"""Sections that a file may leave out and an override may still change in part."""


class TaskConfig(Section):
    """A whole task, as loaded from one JSON file."""

    schema_: Annotated[str | None, Field(alias="$schema")] = None
    """Path of task_schema.json, for editors."""
    format: Annotated[int, Field(ge=1, le=1)] = 1
    """Version of this file format."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the task; part of file names."""
    kind: KindName
    """What is predicted from what."""
    data: TaskDataConfig
    metric: Annotated[str, Field(min_length=1)] | None = None
    """Figure by which the best step is chosen; null is the first of the kind."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1
    """Seed of the head's initial weights, data order and dropout."""
    max_seq_length: Size = 128
    """Longest sequence in tokens; what is longer is cut or split, as the kind allows."""
    dropout: DropoutProbability = 0.1
    """Dropout in the encoder and before the head, whatever the pre-trained config says."""
    classifier_dropout: DropoutProbability | None = None
    """Dropout before the head where it is another than in the encoder."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a row counts in inverse proportion to how frequent its label is; the mean weight is 1."""
    freeze: FreezeConfig = FreezeConfig()
    layerwise_lr_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Each layer has this times the learning rate of the layer above it."""
    optimizer: OptimizerConfig = AdamWConfig(lr=5e-5)
    """The optimizer and its peak learning rate."""
    schedule: ScheduleConfig = ScheduleConfig(type="linear", warmup_fraction=0.1)
    """The learning rate over the steps."""
    training: TaskTrainingConfig = TaskTrainingConfig()
    evaluation: TaskEvaluationConfig = TaskEvaluationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    distillation: TaskDistillationConfig | None = None
    """A fine-tuned model that teaches; null learns from the labels alone."""
    question_answering: QuestionAnsweringConfig | None = None
    """For tasks of this kind; null takes its defaults."""
    sentence_embedding: EmbeddingConfig | None = None
    """For tasks of this kind; null takes its defaults."""
    retrieval: RetrievalConfig | None = None
    """For tasks of this kind; null reranks nothing."""
    prompt: PromptConfig | None = None
    """For prompted_classification, which has no default."""

    @property
    def answering(self) -> QuestionAnsweringConfig:
        """The settings of question answering."""
        return self.question_answering or QuestionAnsweringConfig()

    @property
    def embedding(self) -> EmbeddingConfig:
        """The settings of sentence embeddings."""
        return self.sentence_embedding or EmbeddingConfig()

    @property
    def own_section(self) -> Section | None:
        """The section for this kind alone, with its defaults; None where it has none."""
        return {"question_answering": self.answering, "sentence_embedding": self.embedding}.get(self.kind)

    @property
    def chosen_metric(self) -> str:
        """The metric, or the first of the kind that goes with its rows."""
        if self.metric is None and self.kind == "token_classification" and self.data.tag_scheme == "none":
            return "accuracy"
        if self.metric is None and self.kind == "sentence_embedding" and not self.data.gives("score"):
            return RANKING_METRICS[0]
        return self.metric or KIND_FACTS[self.kind].metrics[0]


@dataclass(frozen=True)
class TrainedTask:
    """A task with its number of steps and its network: what the DeepSpeed file has to agree with."""

    task: TaskConfig
    model: EncoderConfig
    training: TrainingConfig

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer of the task."""
        return self.task.optimizer

    @property
    def schedule(self) -> ScheduleConfig:
        """The schedule of the task."""
        return self.task.schedule

    @property
    def max_seq_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.task.max_seq_length

    def every_steps(self, epochs: float | None, *, num_sequences: int) -> int | None:
        """Return a number of epochs in optimizer steps, rounded up."""
        if epochs is None:
            return None
        return math.ceil(epochs * num_sequences / self.training.train_batch_size)


def trained_task(task: TaskConfig, model: EncoderConfig, *, num_sequences: int) -> TrainedTask:
    """Return the task as it will be trained on num_sequences training sequences."""
    settings = task.training
    steps = settings.total_steps
    if steps is None:
        steps = math.ceil((settings.epochs or DEFAULT_EPOCHS) * num_sequences / settings.train_batch_size)
    shared = settings.model_dump(exclude={"epochs", "total_steps"})
    return TrainedTask(task, model, TrainingConfig(total_steps=steps, num_workers=0, **shared))


def load_task(task: str | Path, overrides: Sequence[str] = (), *, data: Path | None = None) -> TaskConfig:
    """Read, override and validate a task.

    Args:
        task: a JSON file, or the name of a shipped task.
        overrides: "section.name=value" each; value is JSON, or else a plain string.
        data: folder that relative paths of data files start from; None takes the folder of the task file.

    Raises:
        ConfigError: with one line per problem of the file, all at once.
    """
    file = read_config_file(named_file(task, "task"))
    file.folder = file.folder if data is None else str(data.absolute())
    file.data = {**copy.deepcopy(DEFAULT_SECTIONS), **file.data}
    apply_overrides(file, overrides)
    return _parse_task(file)


def dump_task(task: TaskConfig) -> str:
    """Return the task as JSON with every default written out; load_task gives the same object back."""
    content = task.model_dump(mode="json", by_alias=True, exclude={"schema_"})
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def task_problems(task: TaskConfig) -> list[Problem]:
    """Return contradictions inside a task."""
    facts, data, problems = KIND_FACTS[task.kind], task.data, []
    for role in data.fields:
        if role not in facts.roles:
            known = f"wanted {one_of(facts.roles)}{did_you_mean(role, facts.roles)}"
            problems.append(Problem(f"data.fields.{role}", f"a {task.kind} task has no such field; {known}", True))
    files = (*data.train, *data.validation)
    given = {*data.fields, *(name for file in files for name in file.values)}
    for role in facts.fields:
        if role not in given and not all(file.format in facts.own_formats for file in files):
            problems.append(Problem(f"data.fields.{role}", "is missing, wanted the column that holds it"))
    if task.metric is not None and task.metric not in facts.metrics:
        text = found_wanted(task.metric, one_of(facts.metrics)) + did_you_mean(task.metric, facts.metrics)
        problems.append(Problem("metric", text))
    if bool(data.validation) == (data.validation_fraction is not None):
        text = "give exactly one of data.validation and data.validation_fraction"
        problems.append(Problem("data.validation", text))
    problems += [
        Problem("data.official", f"the {side} side has no files, wanted data.{side}")
        for side in data.official
        if not getattr(data, side)
    ]
    if "validation" in data.official and data.max_validation_rows is not None:
        text = f"is {data.max_validation_rows}, and the validation side is official: a part of it is not it"
        problems.append(Problem("data.max_validation_rows", f"{text}; wanted null, or data.official without it"))
    if task.training.epochs is not None and task.training.total_steps is not None:
        problems.append(Problem("training.epochs", "give training.epochs or training.total_steps, not both"))
    if task.class_weights != "none" and not facts.has_class_weights:
        problems.append(Problem("class_weights", f'"{task.class_weights}" is for classification and token tasks'))
    others = ENTITY_METRICS if data.tag_scheme == "none" else WORD_METRICS
    if "tags" in facts.roles and task.metric in others:
        problems.append(Problem("metric", f'"{task.metric}" does not go with data.tag_scheme "{data.tag_scheme}"'))
    if data.tag_scheme != "none" and "tags" not in facts.roles:
        problems.append(Problem("data.tag_scheme", f"a {task.kind} task has no tags"))
    problems += _section_problems(task)
    if task.kind == "sentence_embedding":
        problems += embedding_problems(task.embedding, data, task.metric)
    if task.kind == "retrieval":
        problems += retrieval_problems(data)
    elif data.corpus:
        problems.append(Problem("data.corpus", f"is for retrieval tasks, the kind is {task.kind}"))
    return problems + _format_problems(task) + file_problems(data)


def _format_problems(task: TaskConfig) -> list[Problem]:
    """Return files of running text where rows are wanted, and the reverse."""
    is_text, problems = KIND_FACTS[task.kind].is_text, []
    for side in SIDES:
        for index, file in enumerate(getattr(task.data, side)):
            if (file.format == "text") != is_text:
                wanted = '"text"' if is_text else "a format with rows"
                text = f'a {task.kind} task wants {wanted}, found "{file.format}"'
                problems.append(Problem(f"data.{side}.{index}.format", text))
    if is_text and task.data.validation_fraction is not None:
        problems.append(Problem("data.validation_fraction", f"is not for {task.kind} tasks, wanted data.validation"))
    return problems


def _section_problems(task: TaskConfig) -> list[Problem]:
    """Return sections of other kinds, and the ones that are missing."""
    problems = [
        Problem(facts.section, f"is for {kind} tasks, the kind is {task.kind}")
        for kind, facts in KIND_FACTS.items()
        if facts.section and getattr(task, facts.section) is not None and task.kind != kind
    ]
    if task.distillation is not None and not KIND_FACTS[task.kind].can_be_taught:
        kinds = one_of([name for name, facts in KIND_FACTS.items() if facts.can_be_taught])
        problems.append(Problem("distillation", f"is for {kinds}, the kind is {task.kind}"))
    own = KIND_FACTS[task.kind]
    if own.needs_section and getattr(task, own.section) is None:
        wanted = " and ".join(name for name, one in PromptConfig.model_fields.items() if one.is_required())
        problems.append(Problem(own.section, f"is missing, wanted {wanted}"))
    if not task.data.train and own.needs_train:
        problems.append(Problem("data.train", "is empty, wanted at least one file"))
    return problems


def _parse_task(file: ConfigFile) -> TaskConfig:
    data = resolve_paths(file, TASK_PATHS)
    task, problems = None, []
    try:
        task = TaskConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = section_problems(error, TaskConfig)
    else:
        problems = task_problems(task)
    raise_problems(file, problems)
    assert task is not None, "no problem was raised and nothing was validated"
    return task
