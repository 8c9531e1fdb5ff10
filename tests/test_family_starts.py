"""Runs of every family that begin with something: a run, a folder, a teacher, another context; and what is refused."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from config_cases import DEEPSPEED, RECIPE, changed, write_json
from family_cases import WIRED, of_size
from family_runs import STEPS, TOKENIZER, Run, losses, run_folder, train_all, write_inputs
from tiny_training import join_alone

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.families.marks import BERT_MARKS
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.run_plan import make_plan
from bert_ds.encoder.hf_mapping import model_config_from_hf
from bert_ds.export_hf import export
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

STILL = ("optimizer.lr=1e-12", "optimizer.weight_decay=0")
FIRST = Run("first", optimizer="adamw")


class Begun(NamedTuple):
    """A finished run of a family and its export."""

    config: EncoderConfig
    folder: Path
    run_dir: Path
    exported: Path

    def go(self, name: str, *settings: str) -> Path:
        """Make one more run and return its folder."""
        run = Run(name, optimizer="adamw", settings=settings)
        train_all(0, 1, self.folder, [run])
        return run_folder(self.folder, 1, run)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_fp32_state_dict(run_dir / f"checkpoints/global_step{STEPS}")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.fixture(scope="module", params=WIRED)
def begun(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    join_alone()
    folder = tmp_path_factory.mktemp("begun")
    config = of_size(WIRED[request.param], vocab_size=TOKENIZER.vocab_size)
    write_inputs(folder, config)
    train_all(0, 1, folder, [FIRST])
    run_dir, exported = run_folder(folder, 1, FIRST), folder / "hf"
    exported.mkdir()
    export(run_dir, None, exported, shown=exported)
    return Begun(config, folder, run_dir, exported)


def test_a_run_starts_from_the_weights_of_a_run_and_of_a_folder(begun: Begun) -> None:
    of_run, of_folder = (begun.go(f"of_{at.name}", f"init_from={at}") for at in (begun.run_dir, begun.exported))
    assert losses(of_run) == losses(of_folder) != losses(begun.run_dir)
    still = begun.go("still", f"init_from={begun.run_dir}", *STILL)
    assert same(weights(still), weights(begun.run_dir))


def test_the_card_names_the_family(begun: Begun) -> None:
    card = (begun.exported / "README.md").read_text(encoding="utf-8")
    title = begun.config.TITLE
    assert f"\nA {title} encoder pre-trained" in card and f"tags: [{begun.config.family}, fill-mask]" in card


def test_a_student_of_its_own_family_learns_from_a_teacher(begun: Begun) -> None:
    layers = list(range(begun.config.num_hidden_layers))
    teacher = f"distillation.teacher={begun.exported}"
    equal = begun.go("equal", teacher, f"distillation.init_layers={layers}", *STILL)
    smaller = begun.go("smaller", teacher, "model.num_hidden_layers=2")
    first, taught = (read_metrics(run_dir / "metrics.jsonl")[0] for run_dir in (equal, smaller))
    assert abs(first["loss_soft"]) < 1e-4 and abs(first["loss_hidden"]) < 1e-4
    assert taught["loss_soft"] > 1e-3 and taught["loss_hidden"] > 1e-3
    assert losses(smaller)[-1] < losses(smaller)[0]


def test_a_longer_context_is_a_second_run_where_no_weight_knows_of_positions(begun: Begun) -> None:
    longer = ("model.max_position_embeddings=128", "sequences.max_seq_length=128", f"init_from={begun.run_dir}")
    if "max_position_embeddings" in begun.config.SIZES:
        with pytest.raises(ConfigError, match=r"init_from: the weights have max_position_embeddings 64 \(here 128\)"):
            begun.go("longer", *longer)
        return
    second = begun.go("longer", *longer, *STILL)
    turned = begun.go("turned", *longer, "model.global_rope_theta=20", *STILL)
    assert same(weights(second), weights(begun.run_dir)) and same(weights(turned), weights(begun.run_dir))
    assert losses(second)[0] != losses(turned)[0]
    said = json.loads((second / "run_config.json").read_text())
    assert said["model"]["max_position_embeddings"] == said["sequences"]["max_seq_length"] == 128
    rows = [read_metrics(run_dir / "metrics.jsonl")[0]["num_tokens"] for run_dir in (second, begun.run_dir)]
    assert rows[0] > 1.5 * rows[1]


def test_weights_of_another_family_are_refused(begun: Begun) -> None:
    name = begun.config.family
    other = "bert" if name == "modernbert" else "modernbert"
    recipe = json.loads((begun.folder / "recipe0.0.json").read_text())
    kept = {key: recipe["model"][key] for key in (*EncoderConfig.SIZES, "max_position_embeddings")}
    changed_family = begun.folder / "other"
    changed_family.mkdir(exist_ok=True)
    path = write_json(changed_family, "recipe.json", {**recipe, "model": {"type": other, **kept}})
    for at in (begun.run_dir, begun.exported):
        with pytest.raises(ConfigError, match=rf'init_from: the weights are of the family "{name}", .* is "{other}"'):
            run, ds = load_pair(path, begun.folder / "zero0.json", overrides=[f"init_from={at}"])
            make_plan(run, ds, 1)
    if begun.config.MARKS != BERT_MARKS:
        return  # no other family takes its tokenizer
    (begun.folder / "recipe0.2.json").write_text(
        json.dumps({**recipe, "corpus": recipe["corpus"], "model": {"type": other, **kept}})
    )
    with pytest.raises(CheckpointError, match=f"saved with family {name}, this run has family {other}"):
        train_all(0, 1, begun.folder, [Run("crossed", optimizer="adamw", dropout=0.2, resumes="first")])


def test_a_checkpoint_of_another_form_is_refused_with_the_field_and_both_values(begun: Begun) -> None:
    names = {"bert": "norm_position", "distilbert": "max_position_embeddings", "modernbert": "mlp_bias"}
    names |= dict.fromkeys(("albert", "electra"), "embedding_size")
    names["roberta"] = "max_position_embeddings"
    name = names[begun.config.family]
    found = getattr(begun.config, name)
    other: Any = {"post": "pre", "pre": "post", True: False, False: True, 64: 48, 16: 24}[found]
    recipe = json.loads((begun.folder / "recipe0.0.json").read_text())
    (begun.folder / "recipe0.3.json").write_text(json.dumps({**recipe, "model": {**recipe["model"], name: other}}))
    said = f"saved with model.{name} {found}, this run has model.{name} {other}"
    with pytest.raises(CheckpointError, match=re.escape(said)):
        train_all(0, 1, begun.folder, [Run("formed", optimizer="adamw", dropout=0.3, resumes="first")])
    with pytest.raises(ConfigError, match=f"init_from: the weights have {name} .* \\(here {other}\\)"):
        begun.go("formed", f"model.{name}={json.dumps(other)}", f"init_from={begun.run_dir}")


MODERN = {**RECIPE["model"], "type": "modernbert"}
ALBERT = {**RECIPE["model"], "type": "albert"}
KNOWN = '"albert", "bert", "distilbert", "electra", "modernbert", "roberta"'


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("model.layer_norm_eps", 1e-5, 'model.layer_norm_eps: unknown setting; did you mean "norm_eps"?'),
        ("model.hidden_act", "gelu", 'model.hidden_act: unknown setting; did you mean "hidden_activation"?'),
        (
            "model",
            {**RECIPE["model"], "norm_eps": 1e-5},
            'model.norm_eps: unknown setting; did you mean "layer_norm_eps',
        ),
        (
            "model",
            {**RECIPE["model"], "local_attention": 8},
            'model.local_attention: unknown setting; it belongs to type "modernbert"',
        ),
        (
            "model.type",
            "modernbrt",
            f'model.type: found "modernbrt", wanted one of {KNOWN}; did you mean',
        ),
        ("model.type", 3, f"model.type: found 3, wanted one of {KNOWN}"),
        ("model", {**ALBERT, "num_hidden_groups": 3}, "model: num_hidden_groups 3 does not divide num_hidden_layers 2"),
        (
            "model",
            {**ALBERT, "embedding_size": 129},
            "model: embedding_size 129 is more than hidden_size 128",
        ),
        (
            "model",
            {**ALBERT, "shared_parts": "attention", "embedding_size": 64},
            'model: shared_parts "attention" wants embedding_size 128, the hidden_size, and not 64: no class of transf',
        ),
        (
            "model",
            {**RECIPE["model"], "type": "distilbert", "dim": 8},
            "model.dim: unknown setting; known here: vocab_size, pad_vocab_size_to_multiple_of, hidden_size",
        ),
        ("model", {**RECIPE["model"], "type": "distilbert", "dropout": 1.0}, "model.dropout: found 1.0, wanted < 1.0"),
        ("training.layer_drop", 1.0, "training.layer_drop: found 1.0, wanted < 1.0"),
        ("training.stochastic_depth", 1.0, "training.stochastic_depth: found 1.0, wanted < 1.0"),
        ("model.local_attention", 0, "model.local_attention: found 0, wanted >= 2"),
        ("model.local_attention", 1, "model.local_attention: found 1, wanted >= 2"),
        ("model.num_attention_heads", 128, "model: heads are 1 wide (hidden_size 128 over num_attention_heads 128)"),
        ("model.layer_types", ["full_attention"], "model: layer_types names 1 layers, num_hidden_layers is 2"),
        ("model.layer_types", ["full_attention", "wide"], 'model.layer_types.1: found "wide", wanted one of "full_'),
        ("model.vocab_size", 300, "corpus.vocab_size: 4096 differs from model.vocab_size 300"),
    ],
)
def test_what_a_recipe_gets_wrong_is_one_sentence(path: str, value: object, wanted: str, tmp_path: Path) -> None:
    recipe = changed(changed(changed(RECIPE, "model", MODERN), "sequences.sentence_pair", "none"), path, value)
    assert wanted in refused(recipe, tmp_path)


@pytest.mark.parametrize("family", ["distilbert", "modernbert", "roberta"])
@pytest.mark.parametrize("pair", ["nsp", "sop"])
def test_pairs_are_refused_where_no_segments_are_told_apart(family: str, pair: str, tmp_path: Path) -> None:
    recipe = changed(changed(RECIPE, "model.type", family), "sequences.sentence_pair", pair)
    if family == "roberta":
        recipe = changed(changed(recipe, "corpus.tokenizer_kind", "bpe"), "corpus.lowercase", False)
    wanted = f'"{pair}" wants segments, which {family} does not tell apart: wanted "none"'
    assert wanted in refused(recipe, tmp_path)


@pytest.mark.parametrize(
    ("family", "pair", "wanted"),
    [
        ("electra", "sop", '"sop" wants a head for pairs, which electra has not: wanted "none"'),
        (
            "albert",
            "nsp",
            '"nsp" wants a head that learns it, which albert has not: wanted "sop" or "structure" or "none"',
        ),
    ],
)
def test_pairs_are_refused_where_no_head_learns_them(family: str, pair: str, wanted: str, tmp_path: Path) -> None:
    recipe = changed(changed(RECIPE, "model.type", family), "sequences.sentence_pair", pair)
    assert wanted in refused(recipe, tmp_path)


def refused(recipe: dict[str, Any], folder: Path) -> str:
    """The one sentence that is said of a recipe."""
    with pytest.raises(ConfigError) as found:
        run, ds = load_pair(write_json(folder, "run.json", recipe), write_json(folder, "ds.json", DEEPSPEED))
        make_plan(run, ds, 1)
    assert len(str(found.value).splitlines()) == 1
    return str(found.value)


FOLDER = {
    **{"model_type": "modernbert", "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "intermediate_size": 40},
}
DISTIL_FOLDER = {"model_type": "distilbert", "dim": 24, "n_layers": 2, "n_heads": 2, "hidden_dim": 40}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "full_attention.rope_type is 'yarn', wanted \"d",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"type": "linear"}}},
            "sliding_attention.rope_type is 'linear', wan",
        ),
        ({"rope_parameters": {"full_attention": {"factor": 2}}}, "full_attention has factor, wanted rope_theta"),
        (
            {"rope_parameters": {"rope_theta": 5.0}},
            "rope_parameters is {'rope_theta': 5.0}, wanted an object of objects",
        ),
        ({"rope_parameters": {"chunked_attention": {}}}, "rope_parameters.chunked_attention is no type of layer"),
        ({"rope_parameters": [1]}, "rope_parameters is [1], wanted an object of objects"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is set, wanted none"),
        ({"sliding_window": 64}, "sliding_window is set, wanted local_attention, twice as much"),
        ({"head_dim": 16}, "head_dim is set, wanted hidden_size over num_attention_heads"),
        ({"layer_types": 5}, "layer_types is 5: "),
        ({"layer_types": ["full_attention"]}, "config.json: layer_types names 1 layers, num_hidden_layers is 2"),
        ({"local_attention": 1}, "local_attention is 1: "),
        ({**DISTIL_FOLDER, "n_layers": 0}, "config.json: n_layers is 0: Input should be greater than"),
        ({**DISTIL_FOLDER, "n_heads": 7}, "hidden_size 24 is not a multiple of num_attention_heads 7"),
        ({**DISTIL_FOLDER, "activation": "tanh"}, "activation is 'tanh': Input should be 'gelu', 'gelu_new', 'relu'"),
        ({**DISTIL_FOLDER, "tie_word_embeddings": False}, "tie_word_embeddings is False, wanted True"),
        ({"model_type": "electra", "summary_type": "mean"}, "summary_type is 'mean', wanted 'first'"),
        ({"model_type": "electra", "embedding_size": 0}, "embedding_size is 0: Input should be greater than"),
        ({"model_type": "albert", "inner_group_num": 2}, "inner_group_num is 2, wanted 1"),
        ({"model_type": "albert", "num_hidden_groups": 5}, "num_hidden_groups 5 does not divide num_hidden_layers 2"),
        ({"model_type": "albert", "embedding_size": 25}, "embedding_size 25 is more than hidden_size 24"),
        ({"model_type": "albert", "classifier_dropout_prob": 1}, "classifier_dropout_prob is 1: Input should be less"),
        ({"model_type": "roberta", "type_vocab_size": 2}, "type_vocab_size is 2, wanted 1"),
        ({"model_type": "roberta", "pad_token_id": 61}, "pad_token_id 61 is no piece of a vocabulary of 61"),
        ({"model_type": "roberta", "max_position_embeddings": "x"}, "max_position_embeddings is 'x': "),
        ({"num_attention_heads": 8}, "config.json: heads are 3 wide"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu': Input should be 'gelu' or 'gelu_pytorch_tanh'"),
        ({"model_type": "modernbart"}, "model_type is 'modernbart', wanted \"albert\" or"),
    ],
)
def test_what_a_folder_is_and_this_project_cannot_be_is_named(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as found:
        model_config_from_hf({**FOLDER, **settings})
    assert wanted in str(found.value) and len(str(found.value).splitlines()) == 1
