"""Runs that learn replaced tokens: one curve at every ZeRO stage, resumed to the bit, exported as two models."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from config_cases import DEEPSPEED, DELETED, RECIPE, changed, write_json
from family_cases import FORMS, of_size
from family_runs import STEPS, TOKENIZER, Run, losses, run_folder, train_all, write_inputs
from ranks_harness import run_ranks
from tiny_training import join_alone

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.plan_table import plan_table
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.configuration.run_size import activation_bytes, flops_per_token, optimizer_flops
from bert_ds.downstream.untrained.masked_lm import open_masked_lm
from bert_ds.encoder.hf_folder import load_hf_folder
from bert_ds.encoder.hf_mapping import discriminator_from_hf, from_hf
from bert_ds.encoder.objectives.replaced_tokens import halves
from bert_ds.encoder.objectives.table import make_objectives
from bert_ds.encoder.pretrained import load_masked_lm, load_pretrained
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.export_hf import export
from bert_ds.reporting.run_history import read_history, summary_lines
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

BOTH = [{"type": "masked_words"}, {"type": "replaced_tokens", "generator_fraction": 0.5}]
CONFIG = of_size(FORMS["electra"], vocab_size=TOKENIZER.vocab_size)
LEARNS = (f"objectives={json.dumps(BOTH)}",)
STAGES = (0, 1, 2, 3)
PLAIN = [Run(f"zero{stage}", stage, settings=LEARNS) for stage in STAGES]
MUON = Run("muon", 2, optimizer="muon", settings=LEARNS)
WHOLE = Run("whole", 3, dropout=0.1, recompute=True, settings=LEARNS)
RESUMED = Run("resumed", 3, dropout=0.1, resumes="whole", settings=LEARNS)
RUNS = {1: [*PLAIN, MUON], 2: [*PLAIN, MUON, WHOLE, RESUMED]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs; a step is two micro-batches on any number of ranks."""
    folder = tmp_path_factory.mktemp("replaced")
    write_inputs(folder, CONFIG)
    for path in folder.glob("zero*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "train_micro_batch_size_per_gpu": 4}))
    for world_size, runs in RUNS.items():
        run_ranks(train_all, world_size, folder, runs)
    return folder


def test_every_stage_on_one_and_two_ranks_is_one_curve(trained: Path) -> None:
    wanted = losses(run_folder(trained, 1, PLAIN[0]))
    assert len(wanted) == STEPS and wanted[-1] < wanted[0]
    for world_size in (1, 2):
        for run in PLAIN:
            assert losses(run_folder(trained, world_size, run)) == pytest.approx(wanted, rel=2e-5), run
    muon = [losses(run_folder(trained, world_size, MUON)) for world_size in (1, 2)]
    assert muon[0] == pytest.approx(muon[1], rel=2e-5) and muon[0] != pytest.approx(wanted, rel=1e-3)


def test_what_is_logged_is_of_both_halves_and_the_same_on_any_number_of_ranks(trained: Path) -> None:
    rows = [
        [*read_metrics(folder / "metrics.jsonl"), *read_metrics(folder / "metrics.jsonl", "evaluation")]
        for folder in (run_folder(trained, 1, PLAIN[0]), run_folder(trained, 2, PLAIN[3]))
    ]
    names = ("loss_mlm", "loss_replaced", "replaced_accuracy", "replaced_found")
    for one, other in zip(*rows, strict=True):
        assert one["loss"] == pytest.approx(one["loss_mlm"] + 50.0 * one["loss_replaced"], rel=1e-6)
        assert [other[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)
        assert (
            0.0 < one["loss_replaced"] < 1.0
            and 0.0 < one["replaced_accuracy"] < 1.0
            and 0 <= one["replaced_found"] <= 1
        )
    assert "loss_mlm_masked" in rows[0][-1] and "mlm_masked_accuracy" in rows[0][-1]
    said = summary_lines(read_history(run_folder(trained, 1, PLAIN[0])))
    assert f"replaced tokens: loss {rows[0][-1]['loss_replaced']:.3f} nats, accuracy" in said[-1]


def test_a_resumed_run_replaces_the_same_tokens_and_ends_with_the_same_bits(trained: Path) -> None:
    ends = [
        load_fp32_state_dict(run_folder(trained, 2, run) / f"checkpoints/global_step{STEPS}")
        for run in (WHOLE, RESUMED)
    ]
    assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())
    curves = [losses(run_folder(trained, 2, run)) for run in (WHOLE, RESUMED)]
    assert curves[0] == curves[1] != losses(run_folder(trained, 2, PLAIN[3]))


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    folder = trained / "hf"
    folder.mkdir()
    assert "tokenizer equal" in export(run_folder(trained, 2, PLAIN[3]), None, folder, shown=folder)
    return folder


def test_both_halves_are_exported_and_each_is_what_it_was(trained: Path, exported: Path) -> None:
    weights = load_fp32_state_dict(run_folder(trained, 2, PLAIN[3]) / f"checkpoints/global_step{STEPS}")
    wanted = halves(weights)
    for folder, half, name in (
        (exported, wanted.discriminator, "ElectraForPreTraining"),
        (exported / "generator", wanted.generator, "ElectraForMaskedLM"),
    ):
        assert json.loads((folder / "config.json").read_text())["architectures"] == [name]
        source = load_hf_folder(folder)
        if folder == exported:
            found = discriminator_from_hf(source.tensors, source.config)
        else:
            found = from_hf(source.tensors, source.config, has_pair_head=False)
        assert found.keys() == half.keys()
        assert all(torch.equal(found[n], half[n]) for n in half if "token_type" not in n)
    cards = [(folder / "README.md").read_text() for folder in (exported, exported / "generator")]
    assert "fill-mask" not in cards[0] and "ElectraForPreTraining" in cards[0] and "fill-mask" in cards[1]


def test_tasks_take_the_discriminator_and_words_are_the_generator_s(trained: Path, exported: Path) -> None:
    weights = load_fp32_state_dict(run_folder(trained, 2, PLAIN[3]) / f"checkpoints/global_step{STEPS}")
    begun = load_pretrained(exported)
    name = "bert.layer.1.attention.qkv_weight"
    assert torch.equal(begun.tensors[name], weights[name]) and len(begun.unused) == 4
    with pytest.raises(CheckpointError, match=r"no discriminator; its generator predicts words: .*hf/generator$"):
        load_masked_lm(exported)
    assert open_masked_lm(exported / "generator", kernels="torch", device="cpu").name == "this project's electra"
    words = load_masked_lm(exported / "generator")
    assert torch.equal(words.state_dict()[name], weights["generator.layer.1.attention.qkv_weight"])


def test_a_run_starts_from_both_halves_of_a_run_and_of_a_folder(trained: Path, exported: Path) -> None:
    starts = (run_folder(trained, 2, PLAIN[3]), exported)
    runs = [
        Run(f"of_{at.name}", settings=(*LEARNS, f"init_from={at}", "optimizer.lr=1e-12", "optimizer.weight_decay=0"))
        for at in starts
    ]
    join_alone()
    train_all(0, 1, trained, runs)
    curves = [losses(run_folder(trained, 1, run)) for run in runs]
    assert curves[0] == curves[1] != losses(run_folder(trained, 1, PLAIN[0]))
    ends = load_fp32_state_dict(run_folder(trained, 1, runs[1]) / f"checkpoints/global_step{STEPS}")
    begins = load_fp32_state_dict(starts[0] / f"checkpoints/global_step{STEPS}")
    assert all(torch.allclose(ends[name], begins[name], atol=1e-6) for name in ends if "token_type" not in name)


def test_a_checkpoint_and_weights_without_this_generator_are_refused(
    trained: Path, exported: Path, tmp_path: Path
) -> None:
    join_alone()
    whole = f"objectives={json.dumps([BOTH[0], {**BOTH[1], 'generator_fraction': 1.0}])}"
    said = r"saved with generator of width 12, this run has generator of width 24"
    with pytest.raises(CheckpointError, match=said):
        train_all(0, 1, trained, [Run("whole", resumes="zero0", settings=(whole,))])
    shutil.copy(exported / "config.json", tmp_path)
    files = (trained / "recipe0.0.json", trained / "zero0.json")
    with pytest.raises(ConfigError, match=r"init_from: .* has no generator: wanted the run or the export of one that"):
        make_plan(*load_pair(*files, overrides=[*LEARNS, f"init_from={tmp_path}"]), 1)


def recipe_of(**changes: Any) -> dict[str, Any]:
    """A recipe of ELECTRA with both objectives, changed."""
    recipe = {**RECIPE, "objectives": BOTH, "sequences": {"max_seq_length": 64, "sentence_pair": "none"}}
    recipe["model"] = {**RECIPE["model"], "type": "electra", "embedding_size": 32}
    for path, value in changes.items():
        recipe = changed(recipe, path, value)
    return recipe


def plan_of(folder: Path, recipe: dict[str, Any]) -> RunPlan:
    run, ds = load_pair(write_json(folder, "run.json", recipe), write_json(folder, "ds.json", DEEPSPEED))
    return make_plan(run, ds, 1)


def test_a_plan_counts_both_halves(tmp_path: Path) -> None:
    plan, alone = (plan_of(tmp_path, recipe_of(**more)) for more in ({}, {"objectives": None}))
    run, generator = plan.run, plan.run.generator
    assert generator is not None and generator.hidden_size == run.model.hidden_size // 2
    model = PretrainingModel(run.model, objectives=make_objectives(run.objective_weights, generator=generator))
    assert plan.num_parameters == sum(weight.numel() for weight in model.parameters())
    row = dict(plan_table(plan))["generator"]
    assert row == "2 layers of 64 with 1 head, the model's embeddings; its loss weighs 1, the detector's 50"
    d, g, e, f, v = 128, 64, 32, run.model.intermediate_size, run.model.padded_vocab_size
    assert (run.model.hidden_size, run.model.num_attention_heads, run.model.num_hidden_layers) == (d, 2, 2)
    layers = 2 * (4 * g * g + 2 * g * f // 2)
    added = 6 * (e * g + layers + d * d + d) + 12 * g * 2 * 32 + 0.15 * (6 * e * (g - d) + 2 * e * v)
    assert flops_per_token(run, 32.0) - flops_per_token(alone.run, 32.0) == pytest.approx(added)
    kept = [activation_bytes(one.run, 4, recompute=False) for one in (plan, alone)]
    assert kept[0] - kept[1] == 4 * 64 * (8 * g + 2 * f // 2) * 2 * 2  # two layers of values in bf16
    assert plan.memory(0).optimizer > alone.memory(0).optimizer and plan.checkpoint_bytes > alone.checkpoint_bytes
    muon = {"optimizer": {"type": "muon", "lr": 0.01}}
    assert optimizer_flops(plan_of(tmp_path, recipe_of(**muon)).run) > optimizer_flops(
        plan_of(tmp_path, recipe_of(**muon, objectives=None)).run
    )


WORDS, REPLACED = BOTH


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.type": "bert", "model.embedding_size": DELETED},
            'objectives.1.type: "replaced_tokens" wants a generator and a detector, which bert has not: wanted',
        ),
        ({"objectives": [REPLACED]}, 'objectives: found replaced_tokens, wanted "masked_words" among them'),
        ({"objectives": [WORDS, {**REPLACED, "weight": 0.0}]}, "objectives.1.weight: found 0.0, wanted > 0.0"),
        (
            {"objectives": [WORDS, {**REPLACED, "generator_fraction": 0.3}]},
            "objectives.1.generator_fraction: 0.3 of model.num_attention_heads 2 is 0.6, wanted a fraction that",
        ),
        (
            {"objectives": [WORDS, {**REPLACED, "generator_fraction": 1.5}]},
            "objectives.1.generator_fraction: found 1.5, wanted <= 1.0",
        ),
        (
            {"objectives": [{**WORDS, "generator_fraction": 0.5}]},
            'objectives.0.generator_fraction: 0.5 is of no generator: wanted it with "replaced_tokens", null here',
        ),
        (
            {"sequences.sentence_pair": "sop", "objectives": [*BOTH, {"type": "sentence_pair"}]},
            "wants a head for pairs",
        ),
        (
            {"distillation": {"teacher": "t"}},
            "which no teacher teaches: wanted no distillation section, or masked_words",
        ),
    ],
)
def test_what_a_recipe_gets_wrong_is_one_sentence(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as found:
        plan_of(tmp_path, recipe_of(**changes))
    assert said in str(found.value) and len(str(found.value).splitlines()) == 1


def test_a_third_of_a_model_may_be_written_as_people_write_it() -> None:
    base = of_size(CONFIG, hidden_size=48, num_attention_heads=3, intermediate_size=96)
    for fraction in (0.333, 0.33333, 1 / 3):
        found = base.generator(fraction)
        assert (found.hidden_size, found.num_attention_heads, found.intermediate_size) == (16, 1, 32)
