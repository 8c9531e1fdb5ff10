"""Layers that share weights: one tensor each, exported as ALBERT where it can say so and as BERT where it cannot."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from pathlib import Path

import pytest
import torch
from config_cases import RECIPE, changed
from downstream_cases import PIECES, review_task, write_tiny_export
from family_cases import FORMS, disturbed, of_size, ragged

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config
from bert_ds.configuration.families.albert import AlbertConfig
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.model_folder import has_pair_head
from bert_ds.configuration.reading.config_files import ConfigError
from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.configuration.run_size import activation_bytes, flops_per_token, memory_estimate, optimizer_flops
from bert_ds.configuration.task.task_checks import checked_split
from bert_ds.configuration.task.task_config import load_task, trained_task
from bert_ds.encoder.families.table import family_of
from bert_ds.encoder.hf_folder import load_hf_folder
from bert_ds.encoder.hf_mapping import from_hf, to_hf
from bert_ds.encoder.hf_verify import verify_export
from bert_ds.encoder.initial_weights import load_initial_weights, start_from_layers
from bert_ds.encoder.pretraining_model import PretrainingModel

ROOT = Path(__file__).resolve().parents[1]
SHARING = {name: config for name, config in FORMS.items() if config.shares_layers}
EVERY_SHARING = pytest.mark.parametrize("config", SHARING.values(), ids=SHARING)


@EVERY_SHARING
def test_what_layers_share_is_one_tensor_with_one_name(config: AlbertConfig) -> None:
    model = PretrainingModel(config, kernels="torch", has_pair_head=False)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert names == list(dict.fromkeys(names)) == list(model.state_dict())
    size = config.num_hidden_layers // config.num_hidden_groups
    for part in ("attention", "feed_forward"):
        is_shared = config.shared_parts in ("all", part)
        wanted = [number for number in range(config.num_hidden_layers) if not is_shared or number % size == 0]
        found = {int(name.split(".")[2]) for name in names if name.startswith("bert.layer.") and f".{part}." in name}
        assert sorted(found) == wanted
        for number, layer in enumerate(model.bert.layer):
            owner = number // size * size if is_shared else number
            assert getattr(layer, part) is getattr(model.bert.layer[owner], part)


@EVERY_SHARING
def test_an_export_with_a_head_for_pairs_has_the_scores_of_transformers(config: AlbertConfig, tmp_path: Path) -> None:
    config = of_size(config, vocab_size=len(PIECES))  # type: ignore[assignment]
    folder = write_tiny_export(tmp_path / "hf", encoder=config)
    state = from_hf(load_hf_folder(folder).tensors, config, has_pair_head=True)
    check = verify_export(folder, config, state_dict=state, tokenizer=tmp_path / "tokenizer")
    assert check.max_difference < 1e-5 * check.scale
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wanted = "Albert" if config.shared_parts == "all" else "Bert"
    assert content["architectures"] == [f"{wanted}ForPreTraining"]
    other = {**state, "bert.layer.0.attention.output_weight": state["bert.layer.0.attention.output_weight"] + 1.0}
    with pytest.raises(CheckpointError, match=r"transformers loads other values for bert\.layer\.0\.attention"):
        verify_export(folder, config, state_dict=other)


def test_an_unshared_export_is_the_bert_with_a_copy_in_every_layer() -> None:
    config = FORMS["albert, attention shared"]
    ours = disturbed(PretrainingModel(config, kernels="torch", has_pair_head=False)).eval()
    tensors = to_hf(ours.state_dict(), config)
    assert isinstance(config.exported(), BertConfig)
    unshared = PretrainingModel(config.exported(), kernels="torch", has_pair_head=False).eval()
    unshared.load_state_dict(from_hf(tensors, config.exported(), has_pair_head=False))
    packed = ragged(config)[1]
    places = torch.arange(len(packed["input_ids_T"]))
    assert torch.equal(
        ours.logits(**packed, masked_positions_P=places).mlm_PV,  # type: ignore[operator]
        unshared.logits(**packed, masked_positions_P=places).mlm_PV,
    )
    name = "bert.encoder.layer.{}.attention.output.dense.weight"
    tensors[name.format(2)][0, 0] += 1.0
    with pytest.raises(CheckpointError, match=f"{name.format(2)} differs from {name.format(0)}, but this model shares"):
        from_hf(tensors, config, has_pair_head=False)


def test_a_student_takes_the_weights_of_the_group_that_a_layer_of_the_teacher_is_of() -> None:
    config = FORMS["albert, groups, erf gelu"]
    teacher = disturbed(PretrainingModel(config, kernels="torch", has_pair_head=False))
    student = PretrainingModel(of_size(config, num_hidden_layers=2), kernels="torch", has_pair_head=False)
    start_from_layers(student, teacher, (1, 3))  # type: ignore[arg-type]
    theirs = teacher.state_dict()
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, theirs[name.replace("layer.1.", "layer.2.")]), name


@EVERY_SHARING
def test_a_run_of_pairs_starts_from_a_folder_with_their_head_and_from_no_other(
    config: AlbertConfig, tmp_path: Path
) -> None:
    config = of_size(config, vocab_size=len(PIECES))  # type: ignore[assignment]
    for has_head in (True, False):
        (tmp_path / str(has_head)).mkdir()
        folder = write_tiny_export(tmp_path / str(has_head) / "hf", has_pair_head=has_head, encoder=config)
        assert has_pair_head(folder) == has_head
        model = PretrainingModel(config, kernels="torch", has_pair_head=True)
        if config.exported() is not config:
            continue  # the folder is a BERT's, which no such run starts from
        if has_head:
            load_initial_weights(model, folder, read_run=load_nothing)
            wanted = load_hf_folder(folder).tensors["sop_classifier.classifier.weight"]
            assert torch.equal(model.state_dict()["seq_relationship.weight"], wanted)
        else:
            with pytest.raises(CheckpointError, match="has no head for sentence pairs"):
                load_initial_weights(model, folder, read_run=load_nothing)


def load_nothing(folder: Path) -> dict[str, torch.Tensor]:
    raise AssertionError("the folder is no run")


def test_rates_and_frozen_layers_want_layers_with_weights_of_their_own(tmp_path: Path) -> None:
    task = load_task(review_task(tmp_path, rows=8, freeze={"layers": 1}, layerwise_lr_decay=0.5))
    ds = load_ds_config(ROOT / "ds_configs/zero0.json")
    with pytest.raises(ConfigError) as found:
        checked_split(trained_task(task, FORMS["albert"], num_sequences=8), ds, 1)
    said = str(found.value).splitlines()
    assert len(said) == 2
    assert "freeze.layers: 1 of this model's layers cannot be frozen alone, they share weights: wanted 0" in said[0]
    assert "layerwise_lr_decay: 0.5 wants layers with weights of their own, this model's share them" in said[1]


def test_a_plan_counts_the_work_of_every_layer_and_each_weight_once() -> None:
    muon = {"type": "muon", "lr": 0.02, "adamw_lr": 0.005}
    recipe = changed(changed(RECIPE, "sequences.sentence_pair", "none"), "optimizer", muon)
    names = ("bert", "albert", "albert, attention shared")
    bert, albert, attention = (
        RunConfig.model_validate({**recipe, "model": FORMS[name].model_dump()}) for name in names
    )
    # Of embeddings 16 wide under 24: a dense layer more for every token, fewer weights behind a word.
    narrow = 6 * 24 * 16 + 6 * 0.15 * (16 - 24) * (24 + 64)
    assert flops_per_token(albert, 32.0) - flops_per_token(bert, 32.0) == pytest.approx(narrow)
    assert flops_per_token(attention, 32.0) == flops_per_token(bert, 32.0)
    assert activation_bytes(albert, 4, recompute=False) == activation_bytes(bert, 4, recompute=False)
    of_one = optimizer_flops(albert)
    assert optimizer_flops(bert) == 3 * of_one
    assert optimizer_flops(attention) == of_one + 2 * attention.optimizer.matrix_flops([(40, 24), (24, 40)])
    memory = [memory_estimate(run, stage=0, world_size=1, offload=False, activations=0) for run in (albert, bert)]
    numbers = [run.model.count_parameters(has_pair_head=False) for run in (albert, bert)]
    assert memory[0].optimizer * numbers[1] == memory[1].optimizer * numbers[0]


def test_what_layers_share_is_one_tensor_to_an_optimizer_s_table() -> None:
    for config in SHARING.values():
        rows = list(family_of(config).encoder_rows(config, has_front=True))
        assert len({row.name for row in rows}) == len(rows)
