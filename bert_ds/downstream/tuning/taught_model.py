"""A model that learns a task from a larger one which is fine-tuned on it (Hinton et al. 2015, arXiv 1503.02531).

Beside the labels there is one more loss term, summed over the same targets, t being the temperature:

    labels    t^2 KL(softmax(teacher / t) || softmax(student / t))
    numbers   (teacher - student)^2

The teacher is no submodule of the student: it is not trained, not sharded and in no checkpoint, and every rank holds it
whole. It is asked while training only. Letters as in `kinds/heads.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.recipe.run_config import IGNORE_INDEX, ConfigError
from bert_ds.configuration.task.task_config import TaskConfig
from bert_ds.configuration.task.task_sections import TaskDistillationConfig
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import TaskModel
from bert_ds.downstream.rows.examples import Labels
from bert_ds.downstream.tuning.task_folder import read_task_folder, tokenizer_folder
from bert_ds.encoder.objectives.distillation import soft_divergence
from bert_ds.encoder.pretrained import check_tokenizer


class TaughtTaskModel(TaskModel):
    """`TaskModel` with a loss term of its teacher's; weights, names and export are those of the plain model.

    Args:
        config, head: see `TaskModel`; the head has one loss term.
        teacher: of the same kind and labels.
        settings: temperature and weights.
        others: see `TaskModel`.
    """

    def __init__(
        self, config: Any, head: Any, *, teacher: TaskModel, settings: TaskDistillationConfig, **others: Any
    ) -> None:
        super().__init__(config, head, **others)
        self.temperature = settings.temperature
        (labels,) = head.terms
        soft = LossTerm("soft", count=labels.count, weight=settings.soft_weight)
        self.terms = (replace(labels, weight=settings.label_weight), soft)
        # In a tuple, so that nobody trains, shards or saves it.
        self._teacher = (teacher.eval().requires_grad_(False),)

    def forward(self, *, targets: Mapping[str, Tensor], with_scores: bool = False, **stream: Any) -> Any:
        """See `TaskModel.forward`; loss_sums_L has the teacher's term at its end, 0 outside of training."""
        losses, metrics, scores = super().forward(targets=targets, with_scores=True, **stream)
        soft = self._soft_loss(scores, targets, stream) if self.training else losses.new_zeros(1)
        sums = torch.cat((losses, soft)), metrics
        return (*sums, scores) if with_scores else sums

    def _soft_loss(self, scores: Mapping[str, Tensor], targets: Mapping[str, Tensor], stream: dict[str, Any]) -> Tensor:
        (teacher,) = self._teacher
        ((name, own_RL),) = scores.items()
        with torch.no_grad():
            teacher.to(device=own_RL.device, dtype=self.bert.embeddings.word_weight.dtype)
            wanted_RL = teacher(**{**stream, "dropout_seed": None}, targets={}, with_scores=True)[2][name]
        ((_, target),) = targets.items()
        if target.is_floating_point():
            return F.mse_loss(own_RL, wanted_RL, reduction="sum")[None]
        # A row without a target agrees with the teacher. Leaving it out would need its number on the host.
        own_RL = torch.where((target != IGNORE_INDEX)[:, None], own_RL, wanted_RL)
        return soft_divergence(own_RL, wanted_RL, self.temperature)[None]


def load_teacher(task: TaskConfig, labels: Labels, *, vocab_size: int, fingerprint: str) -> TaskModel:
    """Return the model that teaches a task, on the CPU.

    Args:
        task: names its folder.
        labels: of the training rows.
        vocab_size, fingerprint: of the student's tokenizer.

    Raises:
        ConfigError: it has other labels, or too few positions.
        CheckpointError, DataError: it is no model of this kind, is damaged, or has another tokenizer.
    """
    assert task.distillation is not None
    folder, kind = Path(task.distillation.teacher), KINDS[task.kind]
    teacher, known = read_task_folder(folder, kind, kernels=task.training.kernels)
    check_tokenizer(tokenizer_folder(folder, kind), vocab_size=vocab_size, fingerprint=fingerprint)
    if {name: tuple(known.get(name, ())) for name in labels} != labels:
        raise ConfigError(f"distillation.teacher: {folder} has the labels {known}, the task has {labels}")
    positions = teacher.config.max_position_embeddings
    if positions < task.max_seq_length:
        text = f"distillation.teacher: {folder} has {positions} positions, max_seq_length is {task.max_seq_length}"
        raise ConfigError(text)
    return teacher
