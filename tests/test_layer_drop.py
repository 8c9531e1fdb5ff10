"""Layers that a step is taken without: which, what that does to weights at every stage, and networks of the rest."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
import torch
from call_watch import Calls
from config_cases import RECIPE, changed
from family_cases import EVERY_FAMILY, FORMS, disturbed, of_size, ragged
from family_runs import STEPS, TOKENIZER, Run, losses, run_folder, train_all, write_inputs
from ranks_harness import run_ranks

from bert_ds import export_hf
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import ConfigError, RunConfig
from bert_ds.configuration.run_checks import recipe_problems
from bert_ds.configuration.run_size import flops_per_token
from bert_ds.encoder.initial_weights import layers_alone
from bert_ds.encoder.pretrained import load_masked_lm
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.export_hf import export
from bert_ds.launch.verb_arguments import export_hf_arguments
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict
from bert_ds.training.loop.dropout_seeds import passed_over

NONE: frozenset[int] = frozenset()
DROPPED = frozenset({1, 2})


def gradients_of(model: PretrainingModel, dropped: frozenset[int] = NONE) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a batch and the gradient of every weight."""
    packed = ragged(model.config)[1]
    places = torch.arange(0, 60, 3)
    targets = {"masked_positions": places, "masked_labels": packed["input_ids_T"][places]}
    loss_sums_L, _ = model.train()(**packed, targets=targets, passed_over=dropped)
    loss_sums_L.sum().backward()
    return float(loss_sums_L.detach()), {name: weight.grad for name, weight in model.named_parameters()}  # type: ignore[misc]


@EVERY_FAMILY
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_without_layers_is_that_of_the_network_of_the_others(config: EncoderConfig, recompute: bool) -> None:
    """And the layers have gradients of zeros, none at all would be another thing to DeepSpeed."""
    model = PretrainingModel(config, kernels="torch", has_pair_head=False, activation_checkpointing=recompute)
    disturbed(model).double()
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in DROPPED]
    weights, smaller = layers_alone(model.state_dict(), config, kept)
    rest = PretrainingModel(smaller, kernels="torch", has_pair_head=False).double()
    rest.load_state_dict(weights)
    found, gradients = gradients_of(model, DROPPED)
    wanted, rest_gradients = gradients_of(rest)
    assert smaller.num_hidden_layers == len(kept) and found == pytest.approx(wanted, rel=1e-12)
    of_rest, _ = layers_alone(gradients, config, kept)
    assert of_rest.keys() == rest_gradients.keys()
    for name, gradient in of_rest.items():
        assert torch.allclose(gradient, rest_gradients[name], rtol=1e-9, atol=1e-12), name
    left_out = [name for name in gradients if name.startswith(("bert.layer.1.", "bert.layer.2."))]
    assert bool(left_out) != config.shares_layers
    assert not any(gradients[name].any() for name in left_out)


@EVERY_FAMILY
def test_a_network_without_any_layer_of_effect_has_a_loss(config: EncoderConfig) -> None:
    model = PretrainingModel(config, kernels="torch", has_pair_head=False)
    loss, gradients = gradients_of(model, frozenset(range(config.num_hidden_layers)))
    assert loss > 0 and all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert gradients["bert.embeddings.word_weight"].any()


def test_which_layers_are_left_out_goes_by_seed_step_and_layer_alone() -> None:
    drawn = [passed_over(7, step, num_layers=12, layer_drop=0.2) for step in range(1, 2001)]
    assert [sorted(layers) for layers in drawn[:4]] == [[0, 6], [0, 9], [1, 2, 7], [3, 6, 8, 11]]
    assert drawn[:50] != [passed_over(8, step, num_layers=12, layer_drop=0.2) for step in range(1, 51)]
    shares = [sum(layer in layers for layers in drawn) / len(drawn) for layer in range(12)]
    assert all(abs(share - 0.2) < 0.035 for share in shares)
    fewer = [passed_over(7, step, num_layers=4, layer_drop=0.2) for step in range(1, 9)]
    assert fewer == [layers & {0, 1, 2, 3} for layers in drawn[:8]]


PLAIN = Run("plain")
DROPS = [Run(f"drops{stage}", stage, settings=("training.layer_drop=0.5",)) for stage in range(4)]
DEEP = Run("deep", 3, settings=("training.stochastic_depth=0.9",))
BOTH = ("training.layer_drop=0.5", "training.stochastic_depth=0.5")
WHOLE = Run("whole", 3, dropout=0.1, recompute=True, settings=BOTH)
RESUMED = Run("resumed", 3, dropout=0.1, resumes="whole", settings=BOTH)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[EncoderConfig, Path]:
    """Runs whose steps leave out layers, or blocks of layers for some of the sequences."""
    folder = tmp_path_factory.mktemp("drops")
    config = of_size(FORMS["bert"], vocab_size=TOKENIZER.vocab_size)
    write_inputs(folder, config)
    run_ranks(train_all, 1, folder, [PLAIN, DROPS[0], DEEP])
    run_ranks(train_all, 2, folder, [*DROPS, DEEP, WHOLE, RESUMED])
    return config, folder


def test_every_stage_on_one_and_two_ranks_is_one_curve_and_resumes_to_the_same_bits(
    trained: tuple[EncoderConfig, Path],
) -> None:
    _, folder = trained
    wanted = losses(run_folder(folder, 1, DROPS[0]))
    assert wanted != pytest.approx(losses(run_folder(folder, 1, PLAIN)), rel=1e-4)
    for run in DROPS:
        assert losses(run_folder(folder, 2, run)) == pytest.approx(wanted, rel=2e-5), run
    deep = losses(run_folder(folder, 1, DEEP))
    assert deep != pytest.approx(losses(run_folder(folder, 1, PLAIN)), rel=1e-4)
    assert losses(run_folder(folder, 2, DEEP)) == pytest.approx(deep, rel=2e-5)
    assert losses(run_folder(folder, 2, WHOLE)) == losses(run_folder(folder, 2, RESUMED))
    ends = [
        load_fp32_state_dict(run_folder(folder, 2, run) / f"checkpoints/global_step{STEPS}") for run in (WHOLE, RESUMED)
    ]
    assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())


def test_a_network_of_some_layers_is_exported(trained: tuple[EncoderConfig, Path], tmp_path: Path) -> None:
    _, folder = trained
    run_dir = run_folder(folder, 2, DROPS[3])
    assert "tokenizer equal" in export(run_dir, None, tmp_path, shown=tmp_path, layers=[0, 2])
    found = load_masked_lm(tmp_path, kernels="torch").state_dict()
    weights = load_fp32_state_dict(run_dir / f"checkpoints/global_step{STEPS}")
    for name in found:
        if "token_type" not in name:
            assert torch.equal(found[name], weights[name.replace("layer.1.", "layer.2.")]), name
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| layers | 0, 2 of 3; figures are of all |" in card and "| layers left out of a step | 0.5 |" in card
    for layers in ([0, 3], [1, 0], []):
        with pytest.raises(ConfigError) as refused:
            export(run_dir, None, tmp_path, shown=tmp_path, layers=layers)
        assert str(refused.value) == f"--layers: found {layers}, wanted numbers from 0 to 2 that rise"


def test_the_verb_hands_on_which_layers_of_which_checkpoint_and_wants_a_place_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, export_hf, export="said")
    words = ["--run_dir", str(tmp_path), "--layers", "0", "2"]
    args = export_hf_arguments([*words, "--checkpoint", "global_step3", "--output", str(tmp_path / "few")])
    export_hf.written(args, tmp_path, tmp_path / "few", shown=tmp_path / "few")
    assert [(call["name"], call["layers"]) for call in calls["export"]] == [("global_step3", [0, 2])]
    with pytest.raises(SystemExit):
        export_hf_arguments(words)


def test_the_card_says_what_steps_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(export_hf, "read_manifest", lambda path: {"state": {"step": 3, "consumed_examples": 9}})
    recipe = changed(changed(RECIPE, "training.layer_drop", 0.5), "training.stochastic_depth", 0.25)
    facts = export_hf._facts(RunConfig.model_validate(recipe), tmp_path, tmp_path / "metrics.jsonl")
    assert (facts["layers left out of a step"], facts["stochastic depth"]) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("form", "layers", "said"),
    [
        ("modernbert", [1, 2], "wanted 0 among them: no other can be ModernBERT's first layer"),
        ("albert, groups, erf gelu", [0, 1], "some of the layers share weights"),
        ("albert, attention shared", [0, 1], "some of the layers share weights"),
    ],
)
def test_what_can_be_no_network_of_its_own_is_refused(form: str, layers: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FORMS[form].with_layers(layers)


def test_layers_that_are_left_out_cost_nothing_and_are_not_compiled() -> None:
    recipe = changed(RECIPE, "training.layer_drop", 0.5)
    plain, half = (RunConfig.model_validate(one) for one in (RECIPE, recipe))
    hidden, inner, layers = plain.model.hidden_size, plain.model.intermediate_size, plain.model.num_hidden_layers
    in_layers = 6 * layers * (4 * hidden * hidden + 2 * hidden * inner) + 12 * hidden * layers * 32
    assert flops_per_token(plain, 32.0) - flops_per_token(half, 32.0) == pytest.approx(in_layers / 2)
    (problem,) = recipe_problems(RunConfig.model_validate(changed(recipe, "training.compile", True)))
    assert problem.path == "training.compile" and "training.layer_drop is 0.5: wanted 0 there" in problem.text
