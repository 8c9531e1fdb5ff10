"""The recipe: one frozen, validated object that describes a pre-training run.

A recipe is a JSON file. It owns everything that decides *what* is trained (model, text, objectives, optimizer,
schedule, global batch, precision, steps, seed, evaluation, checkpoints). How the run is spread over ranks belongs to
the DeepSpeed file (`ds_config.py`); every check that needs both files lives in `run_plan.py`.

Only the standard library and pydantic are imported, so that a login node validates a recipe without torch.
Validators check and never change a value; derived numbers are properties.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field, ValidationError

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.families.table import ModelSection
from bert_ds.configuration.reading.config_files import (
    ConfigError,
    ConfigFile,
    apply_overrides,
    raise_problems,
    read_config_file,
    resolve_paths,
    shipped_file,
)
from bert_ds.configuration.reading.config_problems import section_problems
from bert_ds.configuration.reading.config_section import (
    Section,
)
from bert_ds.configuration.reading.shipped_files import named_file
from bert_ds.configuration.recipe.corpus_config import (
    IGNORE_INDEX,
    EmbeddedCorpus,
    MaskingConfig,
    SequenceConfig,
    ShardCorpus,
    ShardSource,
)
from bert_ds.configuration.recipe.distillation_config import DistillationConfig
from bert_ds.configuration.recipe.objective_config import ObjectiveConfig, generator_of, objective_weights
from bert_ds.configuration.recipe.optimizer_config import AdamWConfig, LambConfig, OptimizerConfig
from bert_ds.configuration.recipe.schedule_config import ScheduleConfig
from bert_ds.configuration.recipe.stage_config import StageConfig
from bert_ds.configuration.recipe.training_config import (
    CheckpointConfig,
    EvaluationConfig,
    RecoveryConfig,
    TrainingConfig,
)

__all__ = [
    "IGNORE_INDEX",
    "AdamWConfig",
    "CheckpointConfig",
    "ConfigError",
    "DistillationConfig",
    "EmbeddedCorpus",
    "EvaluationConfig",
    "LambConfig",
    "MaskingConfig",
    "RecoveryConfig",
    "RunConfig",
    "ScheduleConfig",
    "SequenceConfig",
    "ShardCorpus",
    "ShardSource",
    "StageConfig",
    "TrainedRun",
    "TrainingConfig",
    "dump_run_config",
    "load_run_config",
    "parse_run_config",
    "shipped_file",
]

RECIPE_PATHS = (
    *("init_from", "corpus.tokenizer", "corpus.sources.*.path", "masking.word_list", "distillation.teacher"),
    *("word_vectors", "$schema"),
)
"""Settings that name a file or folder; `*` stands for every item of a list."""


class TrainedRun(Protocol):
    """What a DeepSpeed file has to agree with, whatever is trained: a recipe, or a task with its number of steps."""

    @property
    def model(self) -> EncoderConfig:
        """Shape of the network."""
        ...

    @property
    def optimizer(self) -> OptimizerConfig:
        """The optimizer and its peak learning rate."""
        ...

    @property
    def schedule(self) -> ScheduleConfig:
        """The learning rate over the steps."""
        ...

    @property
    def training(self) -> TrainingConfig:
        """Steps, global batch and precision."""
        ...

    @property
    def max_seq_length(self) -> int:
        """Tokens of the longest sequence."""
        ...


class RunConfig(Section):
    """A whole recipe, as loaded from one JSON file."""

    schema_: Annotated[str | None, Field(alias="$schema")] = None
    """Path of schema.json, for editors."""
    format: Annotated[int, Field(ge=1, le=1)] = 1
    """Version of this file format."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    """Name of the run; part of file names."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initialisation, data order, masks and dropout."""
    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Folder of an exported or Hugging Face encoder, or of a run, whose weights start this run."""
    word_vectors: Annotated[str, Field(min_length=1)] | None = None
    """File of word vectors in word2vec's text form, from which the embedding of each word that is a piece starts."""
    output_bias: Literal["zeros", "log_unigram"] = "zeros"
    """Where the bias of the word scores starts: log_unigram at how often each piece is in the training text."""
    model: ModelSection
    corpus: Annotated[EmbeddedCorpus | ShardCorpus, Field(discriminator="type")]
    sequences: SequenceConfig = SequenceConfig()
    masking: MaskingConfig = MaskingConfig()
    objectives: tuple[ObjectiveConfig, ...] | None = None
    """What is trained, each once; null: masked words and, where sequences.sentence_pair makes them, pairs, weight 1."""
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    training: TrainingConfig
    stages: Annotated[tuple[StageConfig, ...], Field(max_length=4)] = ()
    """Parts of the run with another batch, length or share of masks, in turn; what follows is as the recipe says."""
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    distillation: DistillationConfig | None = None
    """A larger model that teaches this one; null trains without."""

    @property
    def max_seq_length(self) -> int:
        """Tokens of the longest sequence."""
        return self.sequences.max_seq_length

    @property
    def objective_weights(self) -> dict[str, float]:
        """Weight of each objective that is trained, by its type."""
        return objective_weights(self.objectives, sentence_pair=self.sequences.sentence_pair)

    @property
    def generator(self) -> EncoderConfig | None:
        """The encoder that replaces tokens for `model` to find; None where that is not trained."""
        return generator_of(self.objectives, self.model)

    @property
    def encoders(self) -> tuple[EncoderConfig, ...]:
        """All that is trained, the generator behind the model."""
        return (self.model,) if self.generator is None else (self.model, self.generator)

    @property
    def draws(self) -> bool:
        """Whether a step draws random numbers: for dropout, layers or tokens."""
        return self.model.drops or any(self.training.left_out.values()) or self.generator is not None

    def form(self) -> dict[str, str]:
        """Return what trained weights belong to, by field."""
        generator = self.generator
        text = "none" if generator is None else f"of width {generator.hidden_size}"
        return self.model.form() | ({"generator": text} if self.model.learns_replaced else {})


def load_run_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate a recipe.

    Relative paths in the file are taken from the file's folder, those in overrides from the current folder; in the
    result all are absolute.

    Args:
        path: a JSON file, or the name of a shipped recipe.
        overrides: "section.name=value" each; value is JSON, or else a plain string.

    Raises:
        ConfigError: with one line per problem of the file, all at once.
    """
    file = read_config_file(named_file(path, "recipe"))
    apply_overrides(file, overrides)
    return parse_run_config(file)


def parse_run_config(file: ConfigFile) -> RunConfig:
    """Validate a recipe that has been read.

    Raises:
        ConfigError: with one line per problem of the file, all at once.
    """
    data = resolve_paths(file, RECIPE_PATHS)
    run, problems = None, []
    try:
        run = RunConfig.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = section_problems(error, RunConfig)
    raise_problems(file, problems)
    assert run is not None, "no problem was raised and nothing was validated"
    return run


def dump_run_config(run: RunConfig) -> str:
    """Return the recipe as JSON with every default written out; load_run_config gives the same object back."""
    return json.dumps(run.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"
