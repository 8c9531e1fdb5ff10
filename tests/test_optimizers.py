"""From a recipe to an optimizer, and what DeepSpeed's construction must not do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lamb_reference import PUBLISHED
from tiny_training import TinyModel, ds_config, full_weights, join_alone, micro_batch

from bert_ds.configuration.recipe.optimizer_config import (
    OPTIMIZERS,
    AdamWConfig,
    ApexFusedLambConfig,
    DeepSpeedCpuAdamConfig,
    DeepSpeedFusedAdamConfig,
    DeepSpeedFusedLambConfig,
    LambConfig,
    LansConfig,
    LionConfig,
    StableAdamWConfig,
)
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.train_step import forward_backward, set_learning_rate, take_step
from bert_ds.training.optimizers.factory import OWN_OPTIMIZERS, StepGuard, make_optimizer
from bert_ds.training.optimizers.lamb import Lamb
from bert_ds.training.optimizers.param_groups import TensorFacts, decay_groups

OWN = {kind: settings for kind, settings in OPTIMIZERS.items() if settings in OWN_OPTIMIZERS}
CONFIGS = [AdamWConfig, LambConfig, LansConfig, StableAdamWConfig, LionConfig]


def engine_and_start(config: Any, stage: int, precision: str) -> tuple[Any, list[torch.Tensor]]:
    join_alone()
    model = TinyModel()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(config(lr=0.5, weight_decay=0.5), model.named_parameters())
    return make_engine(model, optimizer, ds_config(stage, precision=precision)), start


def state_steps(engine: Any) -> set[float]:
    return {float(state["step"]) for state in engine.basic_optimizer.state.values()}


@pytest.mark.parametrize("config", CONFIGS)
def test_building_the_engine_at_stage_0_in_bf16_changes_neither_weights_nor_step_count(config: Any) -> None:
    engine, start = engine_and_start(config, 0, "bf16")
    masters = full_weights(engine, flat=False)
    assert all(torch.equal(a, b) for a, b in zip(masters, start, strict=True))
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(engine.module.parameters(), start, strict=True))
    assert state_steps(engine) <= {0.0}
    assert engine.basic_optimizer.step.__name__ == "step"  # DeepSpeed's wrapper is the guard of all further steps


def test_without_the_guard_building_that_engine_does_change_them() -> None:
    import deepspeed

    join_alone()
    model = TinyModel()
    start = model.dense.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(0, precision="bf16"))
    assert not torch.equal(engine.optimizer.fp32_groups[0][0], start)
    assert state_steps(engine) == {1.0}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_step_of_training_is_step_1_at_every_stage(stage: int, precision: str) -> None:
    engine, _ = engine_and_start(AdamWConfig, stage, precision)
    forward_backward(engine, [micro_batch(1, 0)], counts=micro_batch(1, 0).counts, seed=0, step=1)
    applied, _ = take_step(engine)
    assert applied
    assert state_steps(engine) == {1.0}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_learning_rate_reaches_the_optimizer_at_every_stage(stage: int) -> None:
    engine, _ = engine_and_start(AdamWConfig, stage, "fp32")
    before = full_weights(engine)
    set_learning_rate(engine.optimizer, 0.0)
    forward_backward(engine, [micro_batch(1, 0)], counts=micro_batch(1, 0).counts, seed=0, step=1)
    take_step(engine)
    assert torch.equal(full_weights(engine), before)


@pytest.mark.parametrize("config", CONFIGS)
def test_our_optimizers_hold_everything_in_one_group(config: Any) -> None:
    (group,) = make_optimizer(config(lr=1e-3), TinyModel().named_parameters()).param_groups
    assert len(group["params"]) == 6


def test_adamw_is_torchs_fused_adamw_with_two_groups_bit_for_bit() -> None:
    ours, theirs = TinyModel(), TinyModel()
    groups = decay_groups(theirs.named_parameters(), 0.1)
    peers = [
        make_optimizer(AdamWConfig(lr=1e-2, weight_decay=0.1), ours.named_parameters()),
        torch.optim.AdamW(groups, lr=1e-2, eps=1e-6, fused=True),
    ]
    for step in range(5):
        for model, optimizer in zip((ours, theirs), peers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours.pair.weight, TinyModel().pair.weight)


def test_without_flags_lamb_is_what_a_recipe_without_flags_says_and_what_apex_defaults_to() -> None:
    by_recipe: Any = make_optimizer(LambConfig(lr=1e-3), TinyModel().named_parameters())
    assert by_recipe.flags == Lamb(TinyModel().named_parameters(), lr=1e-3).flags == PUBLISHED["apex"]
    assert by_recipe.flags.use_nvlamb is False


@pytest.mark.parametrize("kind", OWN)
def test_each_of_ours_is_made_of_its_section_and_holds_the_moments_that_the_estimate_counts(kind: str) -> None:
    changed: Any = {"lr": 2e-3, "betas": (0.8, 0.95), **({} if kind == "lion" else {"eps": 1e-5})}
    facts = TensorFacts(matrices=("pair.weight",))
    made: Any = make_optimizer(OWN[kind](**changed), TinyModel().named_parameters(), facts=facts)
    group = made.param_groups[0]
    assert {name: group[name] for name in changed} == changed
    assert type(made) is OWN_OPTIMIZERS[OWN[kind]] and len(made.param_groups) == 1
    assert OWN[kind].moment_bytes == 4 * len(made.moment_names)


def test_lans_takes_a_trust_ratio_for_every_tensor() -> None:
    by_recipe: Any = make_optimizer(LansConfig(lr=1e-3), TinyModel().named_parameters())
    assert by_recipe.flags.use_nvlamb is True


def test_lamb_takes_its_flags_from_the_recipe_and_one_group() -> None:
    config = LambConfig(lr=1e-3, bias_correction=False, grad_averaging=False, max_trust=1.0)
    optimizer: Any = make_optimizer(config, TinyModel().named_parameters())
    flags = optimizer.flags
    assert (flags.bias_correction, flags.grad_averaging, flags.max_trust) == (False, False, 1.0)
    assert len(optimizer.param_groups) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels may build here")
@pytest.mark.parametrize("config", [DeepSpeedFusedAdamConfig, DeepSpeedFusedLambConfig, ApexFusedLambConfig])
def test_without_a_gpu_a_cuda_kernel_is_a_config_error_that_says_so(config: Any) -> None:
    with pytest.raises(ConfigError, match=r'optimizer.type "\w+" needs a CUDA device'):
        make_optimizer(config(lr=1e-3), TinyModel().named_parameters())


def test_a_host_without_compiler_cannot_have_deepspeeds_cpu_adam_and_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r'"deepspeed_cpu_adam" needs a C\+\+ compiler .*, ninja'):
        make_optimizer(DeepSpeedCpuAdamConfig(lr=1e-3), TinyModel().named_parameters())


def test_another_package_called_apex_is_told_from_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise ImportError('cannot import name UnencryptedCookieSession')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"NVIDIA's apex, built from .*UnencryptedCookieSession"):
        make_optimizer(ApexFusedLambConfig(lr=1e-3), TinyModel().named_parameters())


def test_a_setting_that_the_optimizer_cannot_run_under_is_a_config_error_when_the_engine_is_built() -> None:
    join_alone()
    model = TinyModel()
    optimizer = make_optimizer(LambConfig(lr=1e-3), model.named_parameters())
    config = ds_config(2, precision="bf16")
    config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    with pytest.raises(ConfigError, match=r"Lamb does not run .* fp32 master weights"):
        make_engine(model, optimizer, config | {"data_types": {"grad_accum_dtype": "bf16"}})


def test_a_disarmed_guard_ignores_the_step_and_an_armed_one_takes_it() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = StepGuard(optimizer)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == 1.0
    guard.armed = True
    optimizer.step()
    assert weight.item() == 0.0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "compute_grad_norm"),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, "check_grad_overflow"),
        ({"fp16": {"enabled": True}, "zero_optimization": {"stage": 0}}, "fp16"),
    ],
)
def test_a_configuration_without_a_nan_guard_is_refused(changes: dict[str, Any], field: str) -> None:
    model = TinyModel()
    optimizer = make_optimizer(AdamWConfig(lr=1e-3), model.named_parameters())
    with pytest.raises(ValueError, match=field):
        make_engine(model, optimizer, ds_config(1) | changes)


def test_a_precision_that_the_device_lacks_is_refused_with_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    model = TinyModel()
    optimizer = make_optimizer(AdamWConfig(lr=1e-3), model.named_parameters())
    with pytest.raises(ConfigError, match=r'training.precision is "fp16".*wanted bf16 or fp32'):
        make_engine(model, optimizer, ds_config(1) | {"bf16": {"enabled": False}, "fp16": {"enabled": True}})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where there is no GPU")
def test_the_kernels_setting_chooses_the_side_of_lamb_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    import bert_kernels.lamb as lamb

    used, weights = [], {}
    triton = lamb.lamb_moments_triton
    monkeypatch.setattr(
        lamb, "lamb_moments_triton", lambda *args, **options: used.append(1) or triton(*args, **options)
    )
    for kernels in ("torch", "triton"):
        weight = torch.nn.Parameter(torch.linspace(-1.0, 1.0, 300).view(20, 15).clone())
        named = [("dense.weight", weight), ("dense.bias", torch.nn.Parameter(torch.ones(20)))]
        optimizer = make_optimizer(LambConfig(lr=0.1), named, facts=TensorFacts(("*bias",)), kernels=kernels)
        for _, parameter in named:
            parameter.grad = torch.cos(torch.arange(parameter.numel())).view(parameter.shape)
        optimizer.step()
        weights[kernels] = weight.detach().clone()
        assert bool(used) == (kernels == "triton")
    torch.testing.assert_close(weights["triton"], weights["torch"], atol=1e-6, rtol=1e-6)
