"""The short step of one rank under ZeRO-1 is DeepSpeed's to the bit, and is taken only where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lamb_runs import quiet_deepspeed
from tiny_training import TinyModel, ds_config, full_weights, join_alone, micro_batch, optimizer_digest, tiny_engine
from torch import nn

from bert_ds.configuration.recipe.optimizer_config import AdamWConfig, LambConfig
from bert_ds.training import engine as engines
from bert_ds.training import one_rank
from bert_ds.training.loop.train_step import forward_backward, take_step
from bert_ds.training.one_rank import _ShortStep, sum_of_squares
from bert_ds.training.optimizers.factory import make_optimizer


class ModelWithARest(TinyModel):
    """A weight that no loss sees, and an odd number of weights, for which DeepSpeed's flat tensors end in a zero."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(1 + sum(one.numel() for one in self.parameters()) % 2))


def engine_of(kind: str, config: dict[str, Any], *, is_short: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    quiet_deepspeed()
    join_alone()
    model = ModelWithARest()
    with monkeypatch.context() as patch:
        if not is_short:
            patch.setattr(engines, "shorten_step", lambda engine: None)
        if kind == "two groups":
            engine = tiny_engine(config, model=model)
        else:
            settings = {"adamw": AdamWConfig, "lamb": LambConfig}[kind](lr=1e-2, weight_decay=0.1)
            engine = engines.make_engine(model, make_optimizer(settings, model.named_parameters()), config)
    assert isinstance(engine.optimizer.step, _ShortStep) == is_short
    return engine


def stepped(engine: Any, steps: range, *, bad: int = 0) -> list[Any]:
    """Return the sums, whether the step was applied, the norm, the weights and the state of each step."""
    accumulation, rows = engine.gradient_accumulation_steps(), []
    for step in steps:
        parts = [micro_batch(step, part) for part in range(accumulation)]
        if step == bad:
            parts[-1].y_T[0] = float("inf")
        counts = {name: sum(part.counts[name] for part in parts) for name in parts[0].counts}
        sums = forward_backward(engine, parts, counts=counts, seed=5, step=step)
        applied, norm = take_step(engine)
        rows.append((sums.tolist(), applied, float(norm), full_weights(engine).tolist(), optimizer_digest(engine)))
    return rows


@pytest.mark.parametrize(
    ("kind", "clip", "accumulation"), [("adamw", 1.0, 1), ("lamb", 0.0, 2), ("two groups", 0.01, 2), ("adamw", 1e9, 1)]
)
def test_every_step_has_the_bits_of_deepspeeds(
    kind: str, clip: float, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "lamb":  # a sum whose last bit is in doubt
        monkeypatch.setattr(one_rank, "sum_of_squares", lambda tensors: None)
    config = {**ds_config(1, accumulation=accumulation), "gradient_clipping": clip}
    short, long = (engine_of(kind, config, is_short=is_short, monkeypatch=monkeypatch) for is_short in (True, False))
    found = stepped(short, range(1, 6), bad=3)
    assert [str(row) for row in found] == [str(row) for row in stepped(long, range(1, 6), bad=3)]
    assert [row[1] for row in found] == [True, True, False, True, True]
    assert any(row[2] > clip for row in found if row[1]) == (clip < 1e9)  # gradients are cut where they are to be
    assert short.module.unused.data_ptr() == short.optimizer.single_partition_of_fp32_groups[0].data_ptr()


def test_a_checkpoint_of_deepspeeds_step_goes_on_with_the_short_one_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = engine_of("adamw", ds_config(1), is_short=False, monkeypatch=monkeypatch)
    wanted = stepped(whole, range(1, 4))
    for first in (True, False):
        begun, ended = (
            engine_of("adamw", ds_config(1), is_short=one, monkeypatch=monkeypatch) for one in (first, not first)
        )
        stepped(begun, range(1, 3))
        state = begun.optimizer.state_dict()
        torch.save(state, tmp_path / "state")
        ended.module.load_state_dict(begun.module.state_dict())
        loaded = torch.load(tmp_path / "state", weights_only=False)
        ended.optimizer.load_state_dict([loaded], load_optimizer_states=True, load_from_fp32_weights=True)
        assert stepped(ended, range(3, 4)) == wanted[2:]


def test_a_sum_of_squares_is_that_of_deepspeeds_order_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_rank, "_SQUARED_TOGETHER", 100)
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in range(1, 200):
        tensors = [torch.randn(size, 7, generator=generator), torch.randn(size * size, generator=generator)]
        norms = torch.stack([torch.linalg.vector_norm(one.double()) for one in tensors])
        found.append(sum_of_squares(tensors))
        assert found[-1] is None or torch.equal(found[-1], norms.pow(2.0).sum().float())
    assert sum(one is None for one in found) < 3
    middle = torch.tensor([1.0, 2.0**-12, *[0.0] * 200])  # of two fp32 numbers
    assert sum_of_squares([middle]) is None and sum_of_squares([middle[:2]]) == 1.0
    assert sum_of_squares([middle * float("nan")]) is None


OTHER = {
    "stage 2": (2, {}),
    "bf16": (1, {"precision": "bf16"}),
    "overlap": (1, {"zero": {"overlap_comm": True}}),
    "reduced in bf16": (1, {"top": {"communication_data_type": "bf16"}}),
    "two ranks": (1, {"ranks": 2}),
    "timers": (1, {"top": {"wall_clock_breakdown": True}}),
}


@pytest.mark.parametrize("case", OTHER)
def test_other_settings_keep_deepspeeds_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    join_alone()
    stage, settings = OTHER[case]
    config = {**ds_config(stage, precision=settings.get("precision", "fp32")), **settings.get("top", {})}
    config["zero_optimization"] |= settings.get("zero", {})
    with monkeypatch.context() as patch:
        patch.setattr(engines, "shorten_step", lambda engine: None)
        engine = tiny_engine(config)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: settings.get("ranks", 1))
    engines.shorten_step(engine)
    assert not isinstance(engine.optimizer.step, _ShortStep)
