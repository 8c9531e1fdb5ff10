"""What fine-tuning adds around the loop: where the model starts, frozen layers, rates by layer, the best step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bert_ds.configuration.task.task_config import FreezeConfig, TaskConfig, TrainedTask
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.kinds.task_model import TaskModel
from bert_ds.downstream.rows.examples import Labels
from bert_ds.downstream.tuning.evaluation_history import (
    Measured,
    best_of,
    extended,
    is_exhausted,
    read_history,
    write_history,
)
from bert_ds.downstream.tuning.outcome import measure_side
from bert_ds.downstream.tuning.task_folder import make_task_model
from bert_ds.downstream.tuning.task_rows import Side, TaskRows, balanced_weights
from bert_ds.downstream.tuning.taught_model import TaughtTaskModel
from bert_ds.encoder.pretrained import start_from
from bert_ds.training.agreement import on_main_rank
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.loop.evaluation import Evaluation


def build_model(
    trained: TrainedTask,
    rows: TaskRows,
    *,
    tensors: Mapping[str, Tensor],
    teacher: TaskModel | None = None,
    activation_checkpointing: bool,
    say: Callable[[str], None],
) -> tuple[TaskModel, Callable[[str], float] | None]:
    """Return the model at its start, partly frozen where the task asks for it, and the factors of the learning rate.

    Args:
        trained: the task and the network.
        rows: of the task.
        tensors: of the pre-trained encoder; {} starts from random weights.
        teacher: of the task, where it names one.
        activation_checkpointing: recompute each layer in the backward pass.
        say: takes the names of what starts from random weights or is frozen.
    """
    task = trained.task
    weights = None
    if task.class_weights == "balanced":
        name = next(iter(rows.labels))
        weights = balanced_weights(rows.labels[name], rows.train.features, target=name)
    make: Callable[..., TaskModel] = TaskModel
    if teacher is not None and task.distillation is not None:
        make = partial(TaughtTaskModel, teacher=teacher, settings=task.distillation)
    model = make_task_model(
        KINDS[task.kind],
        trained.model,
        rows.labels,
        kernels=task.training.kernels,
        class_weights=weights,
        make=make,
        activation_checkpointing=activation_checkpointing,
        init_seed=task.seed,
        settings=task.own_section,
    )
    fresh = start_from(model, tensors) if tensors else ["the whole network"]
    if fresh:
        say(f"random weights at the start: {', '.join(fresh)}")
    frozen = freeze(model, task.freeze)
    if frozen:
        say(f"frozen: {frozen:,} weights")
    if task.layerwise_lr_decay == 1.0:
        return model, None
    return model, lambda name: layer_lr_scale(name, trained.model.num_hidden_layers, task.layerwise_lr_decay)


def freeze(model: nn.Module, settings: FreezeConfig) -> int:
    """Take the gradient from the frozen weights of a model and return how many numbers they are."""
    prefixes = ["bert.embeddings."] if settings.embeddings or settings.encoder else []
    prefixes += [f"bert.layer.{layer}." for layer in range(settings.layers)]
    prefixes += ["bert.layer.", "bert.final_norm."] if settings.encoder else []
    frozen = [p for name, p in model.named_parameters() if prefixes and name.startswith(tuple(prefixes))]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen)


def layer_lr_scale(name: str, num_layers: int, decay: float) -> float:
    """Return the factor of the learning rate of a weight: decay to the number of layers above it, plus one.

    Head and pooler have 1, the top layer and the LayerNorm behind it decay, the embeddings decay ** (num_layers + 1)
    (Howard and Ruder 2018, arXiv 1801.06146; for BERT Sun et al. 2019, arXiv 1905.05583).
    """
    if name.startswith("bert.embeddings."):
        return decay ** (num_layers + 1)
    if name.startswith("bert.layer."):
        return decay ** (num_layers - int(name.split(".")[2]))
    if name.startswith("bert.final_norm."):
        return decay
    return 1.0


class EvaluationHistory:
    """The evaluations of a run: they decide which step is kept and when there is nothing more to gain."""

    def __init__(
        self, engine: Any, task: TaskConfig, side: Side, labels: Labels, *, run_dir: Path, from_step: int
    ) -> None:
        self._engine, self._task, self._side, self._labels = engine, task, side, labels
        self._path = run_dir / "evaluations.json"
        rows = on_main_rank(lambda: [row._asdict() for row in read_history(self._path, until_step=from_step)])
        self._history = [Measured(**row) for row in rows]

    @property
    def step(self) -> int:
        """The step with the best metric."""
        best = best_of(self._history)
        assert best is not None, "nothing has been evaluated yet"
        return best.step

    @property
    def is_exhausted(self) -> bool:
        """Whether the run has used up its patience."""
        return is_exhausted(self._history, self._task.evaluation.patience)

    def evaluate(self, state: TrainState) -> Evaluation:
        """Measure the validation rows; a collective."""
        task = self._task
        found = measure_side(self._engine, task, self._side, self._labels)
        self._history = extended(self._history, Measured(state.step, found.figures[task.chosen_metric]))
        on_main_rank(lambda: write_history(self._path, self._history))
        return Evaluation(found.figures, save=self.step == state.step, stop=self.is_exhausted)

    def kept_steps(self) -> frozenset[int]:
        """The best step and the one that was best before it, whose successor may not be on the disk yet."""
        best = best_of(self._history)
        before = best_of([row for row in self._history if best is not None and row.step < best.step])
        return frozenset(row.step for row in (best, before) if row is not None)
