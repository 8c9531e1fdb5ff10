"""Whole training steps on CUDA tensors that are not there (`fake_cuda`), and what in them would wait.

Every case makes a model and takes two steps, of one micro-batch and of two; the second is watched. The first may make
what later ones find again (a table, a constant on the card).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from encoder_cases import packed_inputs
from fake_plants import PLANTS, planted
from family_cases import OWN_LAYERS, WIRED, of_size
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from wait_watch import WaitError, WaitWatch

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.recipe.distillation_config import DistillationConfig
from bert_ds.configuration.task.task_sections import EmbeddingConfig, TaskDistillationConfig
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.features import Feature
from bert_ds.downstream.rows.task_batch import pack
from bert_ds.downstream.tuning.task_folder import make_task_model
from bert_ds.downstream.tuning.taught_model import TaughtTaskModel
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.objectives.distillation import TaughtWords
from bert_ds.encoder.objectives.sentence_pair import SentencePair
from bert_ds.encoder.objectives.table import make_objectives
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.training.loop.loss_guard import LossGuard
from bert_ds.training.loop.train_step import Judge, forward_backward, gradient_norm
from bert_ds.training.optimizers.factory import OWN_OPTIMIZERS, make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts
from bert_kernels._launch import record_launches

ALLOWED = {
    "kernels=torch": {
        (
            "kernels/bert_kernels/attention_reference.py",
            "_groups",
        ): "the reference cuts sequences on the host; kernels do not",
    },
    "stage 0": {
        ("bert_ds/training/loop/train_step.py", "gradient_norm"): "fp32 without ZeRO: nothing else judges the step",
    },
}
"""What may wait, and why, by the word in a case's name; the micro-step of pre-training with kernels has no entry."""
_MODE = FakeTensorMode(allow_non_fake_inputs=True)
"""One for all cases, because constants are kept between them."""
LENGTHS = (30, 17, 9, 4)
LABELS = ("a", "b", "c")
TASKS: dict[str, tuple[dict[str, tuple[str, ...]], dict[str, np.ndarray]]] = {
    "classification": ({"label": LABELS}, {"label": np.array([1])}),
    "multi_label": ({"label": LABELS}, {"label": np.ones((1, 3), np.float32)}),
    "regression": ({}, {"label": np.ones((1, 1), np.float32)}),
    "token_classification": ({"tag": LABELS}, {"tag": np.ones(12, np.int64)}),
    "intent_slot": ({"intent": LABELS, "tag": LABELS}, {"intent": np.array([1]), "tag": np.ones(12, np.int64)}),
    "multiple_choice": ({}, {"choice": np.array([1]), "num_choices": np.array([2])}),
    "question_answering": ({}, {"span": np.array([[3, 5]])}),
    "sentence_embedding": ({}, {"cosine": np.ones(1, np.float32)}),
    "sentence_embedding, cosent": ({}, {"cosine": np.ones(1, np.float32)}),
    "sentence_embedding, contrastive": ({}, {"partner": np.array([0]), "texts": np.array([[1, 2]])}),
}
"""Labels of a kind and the targets of one feature of twelve tokens."""
OWN_ENCODERS, OWN_FRONTS = OWN_LAYERS, ("classification", "token_classification", "question_answering")
"""Families whose way through the layers is their own, and kinds of which the second one's heads have a front of theirs;
what the others call is called by these."""


class Engine:
    """What the loop asks of DeepSpeed's engine."""

    def __init__(self, module: nn.Module, micro_steps: int) -> None:
        self.module, self.device, self._micro_steps = module, torch.device("cuda", 0), micro_steps

    def gradient_accumulation_steps(self) -> int:
        return self._micro_steps

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None: ...


class Case(NamedTuple):
    """A training: its model, a batch of it, and how it steps."""

    make: Callable[[], nn.Module]
    batch: Callable[[nn.Module], MicroBatch]
    optimizer: type | None = None
    """Settings of an optimizer; None: the weights are bf16 and nothing steps."""
    lr_scales: bool = False
    pins: bool = True
    """Whether a loader has pinned the batch, as that of pre-training does."""


def pretraining_batch(model: Any) -> MicroBatch:
    inputs = packed_inputs(_bert_like(model.config), LENGTHS, masked=7)
    inputs["token_type_ids_T"] %= max(1, model.config.num_segments)
    names = ("input_ids_T", "token_type_ids_T", "position_ids_T", "cu_seqlens", "max_seqlen")
    counts = {"masked_words": 7.0, "sentence_pair": 4.0, "tokens": float(sum(LENGTHS))}
    return MicroBatch(**{name: inputs[name] for name in names}, targets=inputs["targets"], counts=counts)


def _bert_like(config: Any) -> Any:
    class Sizes:
        vocab_size, type_vocab_size = config.vocab_size, 2

    return Sizes


def task_batch(kind: str, targets: Mapping[str, np.ndarray], model: nn.Module) -> MicroBatch:
    lengths = (7, 5) if kind in ("multiple_choice", "sentence_embedding") else ()
    ids = np.arange(12, dtype=np.int32)
    features = [Feature(place, ids, np.zeros(12, np.int8), dict(targets), lengths=lengths) for place in range(3)]
    return pack(features, counts=KINDS[kind].count_targets(features))


def pretraining(config: Any, **options: Any) -> nn.Module:
    return PretrainingModel(config, has_pair_head=config.family == "bert", **options)


def taught(config: Any) -> nn.Module:
    settings = DistillationConfig(teacher="t", hidden_weight=0.5)
    objectives = (TaughtWords(PretrainingModel(config), settings), SentencePair())
    return PretrainingModel(config, objectives=objectives)


def replaced(config: Any) -> nn.Module:
    weights = {"masked_words": 1.0, "replaced_tokens": 50.0}
    return PretrainingModel(config, objectives=make_objectives(weights, generator=config.generator(0.5)))


def task_model(config: Any, word: str, labels: Any, *, taught: bool = False) -> nn.Module:
    kind, _, loss = word.partition(", ")
    section = EmbeddingConfig(loss=loss or "cosine") if kind == "sentence_embedding" else None
    weights = (0.5, 1.0, 2.0) if kind in ("classification", "token_classification") else None
    make: Any = partial(
        make_task_model, KINDS[kind], config, labels, kernels="auto", class_weights=weights, settings=section
    )
    if not taught:
        return make()
    settings = TaskDistillationConfig(teacher="t")
    return make(make=partial(TaughtTaskModel, teacher=make(), settings=settings))


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    found: dict[str, Case] = {}
    encoders = {name: of_size(config, num_hidden_layers=2).with_dropout(0.1) for name, config in WIRED.items()}
    for name, config in encoders.items():
        found[f"pretrain {name}"] = Case(partial(pretraining, config), pretraining_batch)
        if name in OWN_ENCODERS:
            make = partial(pretraining, config, activation_checkpointing=True)
            found[f"pretrain {name}, recompute"] = Case(make, pretraining_batch)
    make = partial(pretraining, encoders["bert"], kernels="torch")
    found["pretrain bert, kernels=torch"] = Case(make, pretraining_batch)
    found["pretrain bert, distillation"] = Case(partial(taught, encoders["bert"]), pretraining_batch)
    found["pretrain electra, replaced tokens"] = Case(partial(replaced, encoders["electra"]), pretraining_batch)
    one_layer = {name: of_size(config, num_hidden_layers=1) for name, config in WIRED.items()}
    for settings in OWN_OPTIMIZERS:
        word = settings.model_fields["type"].default
        for name in ("bert", "modernbert") if word in ("lamb", "muon") else ("bert",):
            make = partial(pretraining, one_layer[name])
            found[f"stage 0 {name}, {word}"] = Case(make, pretraining_batch, settings, lr_scales=name == "bert")
    for word, (labels, targets) in TASKS.items():
        kind = word.partition(",")[0]
        batch = partial(task_batch, kind, targets)
        for name in OWN_ENCODERS if kind in OWN_FRONTS else ("bert",):
            make = partial(task_model, one_layer[name].with_dropout(0.1), word, labels)
            found[f"task {name}, {word}"] = Case(make, batch, pins=False)
        if kind in ("classification", "regression", "token_classification"):
            make = partial(task_model, one_layer["bert"], kind, labels, taught=True)
            found[f"task bert, {word}, distillation"] = Case(make, batch, pins=False)
    return found


def waits_of(case: Case, allowed: Mapping[tuple[str, str], str] = {}) -> dict[str, Any]:
    """Take two steps and return what waits in the second: {"waits", "used", "error"}."""
    model = case.make().train()
    with ExitStack() as entered:
        # Another thread, as a card has one for its backward pass, would not be watched.
        entered.enter_context(torch.autograd.set_multithreading_enabled(False))
        entered.enter_context(_MODE)
        watch = entered.enter_context(WaitWatch(allowed))
        entered.enter_context(record_launches("sm_90"))
        _move(model, torch.float32 if case.optimizer else torch.bfloat16)
        optimizer = _optimizer(case, model)
        guard = LossGuard(4.0, 8, recent=[], device="cuda")
        error = None
        for step in (1, 2):
            watch.waits.clear()
            watch.used.clear()
            try:
                _step(Engine(model, step), case, watch, optimizer=optimizer, judge=Judge(guard, armed=True), step=step)
            except Exception as caught:  # a number that was not read leads to shapes that do not fit
                if not isinstance(caught, WaitError) and not watch.waits:
                    raise
                error = str(caught)
                break
    return {"waits": [wait._asdict() for wait in watch.waits], "used": sorted(watch.used), "error": error}


def _move(model: Any, dtype: torch.dtype) -> None:
    """Give a model, and a teacher that hides from it, weights on the card in place of its own."""
    teachers = [*getattr(model, "_teacher", ())]
    teachers += [
        objective.teacher._model for objective in getattr(model, "objectives", ()) if hasattr(objective, "teacher")
    ]
    for module in (*model.modules(), *(inner for teacher in teachers for inner in teacher.modules())):
        assert not module._buffers
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fresh = torch.empty(parameter.shape, dtype=dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)


def _step(engine: Any, case: Case, watch: WaitWatch, *, optimizer: Any, judge: Judge, step: int) -> None:
    batches, micro_steps = [], engine.gradient_accumulation_steps()
    for _ in range(micro_steps):
        batch = case.batch(engine.module)
        batches.append(batch._map(lambda tensor: watch.pinned(tensor.clone())) if case.pins else batch)
    counts = {name: micro_steps * count for name, count in batches[0].counts.items()}
    forward_backward(engine, batches, counts=counts, seed=1, step=step, judge=judge)
    if optimizer is not None:
        gradient_norm(engine.module)
        optimizer.step()
        optimizer.zero_grad()


def _optimizer(case: Case, model: Any) -> Any:
    if case.optimizer is None:
        return None
    return make_optimizer(
        case.optimizer(lr=0.01),
        model.named_parameters(),
        facts=TensorFacts(*weight_patterns(model.config)),
        lr_scale_of=(lambda name: 0.5 if ".layer." in name else 1.0) if case.lr_scales else None,
    )


def allowed_in(name: str) -> dict[tuple[str, str], str]:
    """Return what may wait in a case."""
    return {place: why for word, places in ALLOWED.items() if word in name for place, why in places.items()}


def main(out: Path) -> None:
    """Write what waits in every case, and in those that a wait is planted in, to a JSON file."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    torch.set_num_threads(1)
    known = cases()
    found = {name: waits_of(case, allowed_in(name)) for name, case in known.items()}
    for plant in PLANTS:
        with planted(plant):
            found[plant.name] = waits_of(known[plant.case], allowed_in(plant.case))
    out.write_text(json.dumps(found))
