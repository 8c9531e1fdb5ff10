"""Muon on whole tensors: its formula, who orthogonalises what, and what a recipe may say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from config_cases import RECIPE, changed, write_json
from lamb_reference import Settings, State, adamw, relative_error
from muon_optimizers import muon
from tiny_training import TinyModel, ds_config, join_alone
from torch import nn

from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.plan_table import plan_table
from bert_ds.configuration.recipe.optimizer_config import MuonConfig
from bert_ds.configuration.recipe.run_config import ConfigError, load_run_config
from bert_ds.configuration.run_plan import make_plan
from bert_ds.configuration.run_size import optimizer_flops
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.training.engine import make_engine
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.muon import JORDAN, Muon
from bert_ds.training.optimizers.muon_exchange import deal
from bert_ds.training.optimizers.newton_schulz import orthogonalise, orthogonalising_dtype, update_scale
from bert_ds.training.optimizers.param_groups import TensorFacts

FACTS = TensorFacts(("*bias",), {"qkv": ("query", "key", "value")}, ("qkv", "tall"))


def parameters() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(5)
    shapes = {"qkv": (15, 5), "tall": (17, 6), "embedding": (31, 5), "dense_bias": (17,)}
    return [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]


def gradient(step: int, p: torch.Tensor) -> torch.Tensor:
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(step))


def test_twelve_steps_follow_the_formulas_with_every_setting_of_the_recipe() -> None:
    config = MuonConfig(lr=0.02, adamw_lr=0.005, momentum=0.95, betas=(0.8, 0.97), eps=1e-5, weight_decay=0.3)
    named = parameters()
    scales = {"qkv": 1.0, "tall": 0.5, "embedding": 0.25, "dense_bias": 1.0}
    optimizer = make_optimizer(config, named, facts=FACTS, lr_scale_of=scales.__getitem__)
    decays = {"qkv": 0.3, "tall": 0.3, "embedding": 0.3, "dense_bias": 0.0}
    truth = {name: list(p.detach().double().chunk(3 if name == "qkv" else 1)) for name, p in named}
    states = {name: [State(part) for part in parts] for name, parts in truth.items()}
    for step in range(12):
        optimizer.param_groups[0]["lr"] = lr = 0.02 * (step + 1) / 12
        for name, p in named:
            p.grad = gradient(step, p)
            is_matrix = name in ("qkv", "tall")
            own = lr * scales[name] * (1.0 if is_matrix else 0.25)
            settings = Settings(own, 0.8, 0.97, 1e-5, decays[name])
            grads = p.grad.double().chunk(len(truth[name]))
            pairs = zip(truth[name], grads, states[name], strict=True)
            truth[name] = [(muon if is_matrix else adamw)(w, g, state, settings) for w, g, state in pairs]
        optimizer.step()
    assert max(relative_error(p.detach(), torch.cat(truth[name])) for name, p in named) < 1e-6


def test_without_a_rate_of_its_own_the_rest_learns_at_the_rate_of_the_matrices() -> None:
    moved = {}
    for adamw_lr in (None, 0.02):
        named = parameters()
        optimizer = make_optimizer(MuonConfig(lr=0.02, adamw_lr=adamw_lr), named, facts=FACTS)
        for _, p in named:
            p.grad = gradient(1, p)
        optimizer.step()
        moved[adamw_lr] = [p.detach().clone() for _, p in named]
    assert all(torch.equal(a, b) for a, b in zip(*moved.values(), strict=True))


def two_steps(**settings: Any) -> list[torch.Tensor]:
    named = parameters()
    optimizer = make_optimizer(MuonConfig(lr=0.02, **settings), named, facts=FACTS)
    for step in range(2):
        for _, p in named:
            p.grad = gradient(step, p)
        optimizer.step()
    return [p.detach().clone() for _, p in named]


@pytest.mark.parametrize(
    ("settings", "changed_tensors"),
    [
        ({"ns_steps": 4}, {"qkv", "tall"}),
        ({"ns_coefficients": (1.5, -0.5, 0.0)}, {"qkv", "tall"}),
        ({"ns_coefficients": (*[JORDAN] * 4, (1.5, -0.5, 0.0))}, {"qkv", "tall"}),
        ({"nesterov": False}, {"qkv", "tall"}),
        ({"momentum": 0.9}, {"qkv", "tall"}),
        ({"adamw_lr": 0.03}, {"embedding", "dense_bias"}),
        ({"betas": (0.9, 0.9)}, {"embedding", "dense_bias"}),
        ({"eps": 1e-2}, {"embedding", "dense_bias"}),
        ({"weight_decay": 0.1}, {"qkv", "tall", "embedding"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_every_setting_reaches_the_tensors_that_it_is_for(settings: Any, changed_tensors: set[str]) -> None:
    before, after = two_steps(), two_steps(**settings)
    names = [name for name, _ in parameters()]
    assert {name for name, a, b in zip(names, before, after, strict=True) if not torch.equal(a, b)} == changed_tensors


def test_a_wide_matrix_moves_as_far_as_a_tall_one() -> None:
    assert update_scale(6, 17) == update_scale(17, 6) == pytest.approx(0.2 * 17**0.5)


@pytest.mark.parametrize("shape", [(17, 6), (6, 17)])
def test_torch_muon_takes_the_same_steps_without_nesterov_and_with(shape: tuple[int, int]) -> None:
    for nesterov in (True, False):
        ours, theirs = (nn.Parameter(gradient(9, torch.empty(shape))) for _ in range(2))
        settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
        peers = [
            Muon([("matrix", ours)], matrices=("matrix",), **settings),
            torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings),
        ]
        for step in range(4):
            for optimizer, p in zip(peers, (ours, theirs), strict=True):
                p.grad = gradient(step, p)
                optimizer.step()
        # torch's products are in bf16.
        assert relative_error(ours.detach(), theirs.detach()) < 5e-3


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (24, 24)])
def test_singular_values_are_brought_near_one_and_the_singular_vectors_stay(shape: tuple[int, int]) -> None:
    x = gradient(3, torch.empty(shape))
    found = orthogonalise(x, polynomials=[JORDAN] * 5).double()
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    value = s / math.sqrt(float((s * s).sum()))
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    assert relative_error(found, u @ torch.diag(value) @ vh) < 1e-5
    assert 0.1 < float(value.min()) <= float(value.max()) < 1.3


def test_the_norm_of_a_large_matrix_is_summed_in_fp64() -> None:
    x = gradient(4, torch.empty(768, 3072)) * torch.linspace(0.01, 3.0, 3072)
    scaled = orthogonalise(x, polynomials=[(1.0, 0.0, 0.0)] * 1)
    assert float(scaled.double().norm()) == pytest.approx(1.0, abs=1e-7)


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonalise(torch.zeros(4, 6), polynomials=[JORDAN] * 5).any()


def test_the_cubic_polynomial_converges_to_an_orthogonal_matrix() -> None:
    x = orthogonalise(gradient(2, torch.empty(6, 9)), polynomials=[(1.5, -0.5, 0.0)] * 20)
    assert torch.allclose(x @ x.T, torch.eye(6), atol=1e-4)


def test_products_are_in_bf16_on_a_gpu_and_where_a_run_computes_in_it() -> None:
    assert orthogonalising_dtype(torch.device("cpu")) == torch.float32
    assert orthogonalising_dtype(torch.device("cuda")) == torch.bfloat16
    weights = {"layer.0.output_weight": nn.Parameter(gradient(1, torch.empty(6, 4)))}
    facts = TensorFacts(no_decay=(), matrices=("layer.*",))
    for precision, wanted in (("fp32", None), ("bf16", torch.bfloat16), ("fp16", None)):
        made = make_optimizer(MuonConfig(lr=0.1), weights.items(), facts=facts, precision=precision)
        assert isinstance(made, Muon) and made.ns_dtype == wanted


def test_a_matrix_goes_to_the_rank_that_holds_most_of_it_while_that_one_has_room() -> None:
    shapes = {0: (8, 8), 1: (8, 8), 2: (8, 8), 3: (8, 8)}
    held_by_one = [{row: 64 for row in shapes}, dict.fromkeys(shapes, 0)]
    assert deal(shapes, held_by_one) == {0: 0, 1: 0, 2: 1, 3: 1}
    crossed = [{0: 0, 1: 0, 2: 64, 3: 40}, {0: 64, 1: 64, 2: 0, 3: 24}]
    assert deal(shapes, crossed) == {0: 1, 1: 1, 2: 0, 3: 0}


def test_the_largest_matrices_are_dealt_first() -> None:
    shapes = {0: (4, 4), 1: (4, 4), 2: (16, 16)}
    lengths = [dict.fromkeys(shapes, 0)] * 2
    assert deal(shapes, lengths) == {2: 0, 0: 1, 1: 1}


def test_the_engine_lets_it_share_the_work_where_every_rank_holds_everything() -> None:
    join_alone()
    for stage in (0, 1, 2, 3):
        model = TinyModel()
        facts = TensorFacts(matrices=("dense.weight",))
        optimizer: Any = make_optimizer(MuonConfig(lr=1e-3), model.named_parameters(), facts=facts)
        make_engine(model, optimizer, ds_config(stage))
        assert (optimizer.replicas is not None) == (stage == 0)


def test_the_matrices_are_those_of_the_layers() -> None:
    config = BertConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    bert = PretrainingModel(config, kernels="torch")
    facts = TensorFacts(*weight_patterns(config))
    optimizer: Any = make_optimizer(MuonConfig(lr=1e-3), bert.named_parameters(), facts=facts)
    layer = {
        **{f"attention.qkv_weight.{part}": (24, 24) for part in ("query", "key", "value")},
        "attention.output_weight": (24, 24),
        "feed_forward.intermediate_weight": (40, 24),
        "feed_forward.output_weight": (24, 40),
    }
    wanted = {f"bert.layer.{index}.{name}": shape for index in range(2) for name, shape in layer.items()}
    assert optimizer.matrix_shapes == wanted


def test_where_the_layers_are_frozen_or_there_are_none_muon_is_refused() -> None:
    named = parameters()
    for _, p in named[:2]:
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match=r'"muon" wants a matrix of the layers .* \(are the layers frozen\?\)'):
        make_optimizer(MuonConfig(lr=1e-3), named, facts=TensorFacts(("*bias",), None, FACTS.matrices))
    with pytest.raises(ConfigError, match='"muon" wants a matrix'):
        make_optimizer(MuonConfig(lr=1e-3), TinyModel().named_parameters())


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (
            {"lr": 1e-3, "ns_coefficients": [3.0, 2.0, 1.0]},
            r"optimizer: ns_coefficients \[3.0, 2.0, 1.0\] diverge: a singular value of 0.01 becomes .* at most 2$",
        ),
        ({"lr": 1e-3, "ns_coefficients": [-1.0, 0.0, 0.0]}, "becomes -0.01 after 1 steps"),
        (
            {"lr": 1e-3, "ns_coefficients": [[1.5, -0.5, 0.0], [3.0, 2.0, 1.0]], "ns_steps": 2},
            r"ns_coefficients \[3.0, 2.0, 1.0\] diverge: .* after 2 steps",
        ),
        ({"lr": 1e-3, "ns_coefficients": [[1.5, -0.5, 0.0]]}, "has polynomials of 1 steps, ns_steps is 5"),
        (
            {"lr": 1e-3, "ns_coefficients": [[1.5, -0.5, {}]]},
            r"ns_coefficients\.0\.2: found an object, wanted",
        ),
        ({"lr": 1e-3, "ns_coefficients": [1.5, "x", 0.0]}, r'ns_coefficients\.1: found "x", wanted a number$'),
        ({"lr": 1e-3, "ns_steps": 0}, "optimizer.ns_steps: found 0, wanted >= 1$"),
        ({"lr": 0.0}, "optimizer.lr: found 0.0, wanted > 0.0$"),
        ({"lr": 1e-3, "adamw_lr": 0.0}, "optimizer.adamw_lr: found 0.0, wanted > 0.0$"),
        ({"lr": 1e-3, "momentum": 1.0}, "optimizer.momentum: found 1.0, wanted < 1.0$"),
    ],
)
def test_a_section_that_cannot_work_is_refused_by_name(settings: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    path = write_json(tmp_path, "run.json", changed(RECIPE, "optimizer", {"type": "muon", **settings}))
    with pytest.raises(ConfigError, match=wanted):
        load_run_config(path)


def test_type_and_rate_are_a_whole_section(tmp_path: Path) -> None:
    path = write_json(tmp_path, "run.json", changed(RECIPE, "optimizer", {"type": "muon", "lr": 1e-3}))
    assert load_run_config(path).optimizer == MuonConfig(lr=1e-3)


def test_a_deepspeed_file_may_repeat_it_in_its_own_words(tmp_path: Path) -> None:
    recipe = write_json(
        tmp_path, "run.json", changed(RECIPE, "optimizer", {"type": "muon", "lr": 1e-3, "adamw_lr": 2e-3})
    )
    block = {"type": "Muon", "params": {"muon_lr": 1e-3, "adam_lr": 2e-3, "momentum": 0.95}}
    make_plan(*load_pair(recipe, write_json(tmp_path, "ds.json", {"optimizer": block})), 1)
    block["params"]["adam_lr"] = 3e-3
    with pytest.raises(ConfigError, match=r"optimizer.params.adam_lr: found 0.003, but optimizer.adamw_lr is 0.002"):
        make_plan(*load_pair(recipe, write_json(tmp_path, "ds.json", {"optimizer": block})), 1)


def test_the_planner_counts_the_optimizers_products_and_the_state_of_adamw(tmp_path: Path) -> None:
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    recipe = {**RECIPE, "model": {**RECIPE["model"], **sizes}}
    recipes = {kind: {**recipe, "optimizer": {"type": kind, "lr": 1e-3}} for kind in ("muon", "adamw")}
    plans = {}
    for kind, content in recipes.items():
        files = load_pair(write_json(tmp_path, f"{kind}.json", content), write_json(tmp_path, "ds.json", {}))
        plans[kind] = make_plan(*files, 1)
    # 12 layers of 4 (768, 768) and 2 (768, 3072), five steps of 4 s^2 l + 2 s^3 each: by hand.
    assert optimizer_flops(plans["muon"].run) == 12 * 5 * (4 * 6 * 768**3 + 2 * (4 * 4 * 768**3 + 2 * 768**3))
    assert plans["muon"].memory() == plans["adamw"].memory()
    assert plans["muon"].checkpoint_bytes == plans["adamw"].checkpoint_bytes
    assert "FLOPs of the optimizer" in dict(plan_table(plans["muon"]))
    assert "FLOPs of the optimizer" not in dict(plan_table(plans["adamw"]))
