"""What a run computes in reaches the optimizer that the verbs make: Muon's polynomial goes by it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bert_ds import finetune, pretrain


@pytest.mark.parametrize("verb", [pretrain, finetune])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_precision_of_a_run_reaches_its_optimizer(
    verb: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    model = SimpleNamespace(config=None, named_parameters=list)
    built = model if verb is pretrain else (model, None)
    monkeypatch.setattr(verb, "build_model", lambda *_, **__: built)
    monkeypatch.setattr(verb, "weight_patterns", lambda _: ((), None, ()))
    monkeypatch.setattr(verb, "make_optimizer", lambda *_, **settings: made.update(settings))
    monkeypatch.setattr(verb, "make_engine", lambda *_: None)
    training = SimpleNamespace(precision=precision, kernels="auto", compile=False)
    starts = {"init_from": None, "word_vectors": None, "output_bias": "zeros", "distillation": None}
    run = SimpleNamespace(training=training, optimizer=None, **starts)
    if verb is pretrain:
        verb.build_engine(SimpleNamespace(run=run), None, {}, log=SimpleNamespace(run_dir=Path()))
    else:
        start = SimpleNamespace(
            rows=None, args=SimpleNamespace(random_weights=True), ds=SimpleNamespace(activation_checkpointing=False)
        )
        run.task = SimpleNamespace(distillation=None)
        verb.build_engine(run, {}, start=start, log=SimpleNamespace(info=print))
    assert made["precision"] == precision
