"""A student with its teacher, from the settings of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.distillation_config import DistillationConfig
from bert_ds.encoder.initial_weights import start_from_layers
from bert_ds.encoder.objectives.distillation import TaughtWords
from bert_ds.encoder.objectives.masked_words import MaskedWords
from bert_ds.encoder.objectives.objective import Objective
from bert_ds.encoder.pretrained import load_masked_lm
from bert_ds.encoder.pretraining_model import PretrainingModel


def make_student(
    config: EncoderConfig,
    settings: DistillationConfig,
    *,
    kernels: str,
    objectives: Sequence[Objective],
    **others: Any,
) -> PretrainingModel:
    """Load the teacher and return a student, started from the teacher's layers where the settings say so.

    Args:
        config: of the student.
        settings: name the teacher's folder; they were checked against both models.
        kernels: of both.
        objectives: of the student without a teacher; masked words are replaced by those that the teacher teaches.
        others: see `PretrainingModel`.

    Raises:
        ConfigError, CheckpointError: see `load_masked_lm`.
    """
    multiple = config.pad_vocab_size_to_multiple_of
    teacher = load_masked_lm(Path(settings.teacher), kernels=kernels, pad_vocab_size_to_multiple_of=multiple)
    words = TaughtWords(teacher, settings)
    taught = [words if isinstance(objective, MaskedWords) else objective for objective in objectives]
    student = PretrainingModel(config, kernels=kernels, objectives=taught, **others)
    if settings.init_layers is not None:
        start_from_layers(student, teacher, settings.init_layers)
    return student
