"""Distillation: the loss terms against their formulas, the teacher outside of the model, runs at ZeRO stages."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from config_cases import write_json
from encoder_cases import encoder_inputs, packed_inputs, small_config, spread_weights
from test_pretrain import ROOT, make_workshop, pretrain_command, run

from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.families.distilbert import DistilBertConfig
from bert_ds.configuration.recipe.run_config import ConfigError, DistillationConfig
from bert_ds.configuration.run_plan import RunPlan, make_plan
from bert_ds.encoder.hf_folder import model_card_text, special_ids, write_hf_folder
from bert_ds.encoder.hf_mapping import hf_config, to_hf
from bert_ds.encoder.initial_weights import start_from_layers
from bert_ds.encoder.objectives.distillation import TaughtWords, angle_loss, soft_target_loss
from bert_ds.encoder.objectives.sentence_pair import SentencePair, pair_logits
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

SETTINGS = DistillationConfig(teacher="t", temperature=1.7, mlm_weight=0.5, soft_weight=3.0, hidden_weight=0.7)


def model_of(config: BertConfig, *, seed: int) -> PretrainingModel:
    model = PretrainingModel(config, kernels="torch")
    spread_weights(model, config, seed=seed)
    return model


def student_of(config: BertConfig, teacher: PretrainingModel) -> PretrainingModel:
    student = PretrainingModel(config, kernels="torch", objectives=(TaughtWords(teacher, SETTINGS), SentencePair()))
    spread_weights(student, config, seed=1)
    return student


def test_all_four_terms_and_their_gradients_are_those_of_the_formulas() -> None:
    config = small_config(num_hidden_layers=1)
    teacher = model_of(small_config(num_hidden_layers=3), seed=9)
    student = student_of(config, teacher)
    batch = packed_inputs(config, [37] * 40, masked=1100)  # more masked words than are worked on at a time
    assert [term.count for term in student.terms] == ["masked_words", "sentence_pair", "masked_words", "tokens"]
    sums, metrics = student(**batch)
    (sums * torch.tensor([1.0, 1.0, 0.3, 0.2])).sum().backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}

    plain = model_of(config, seed=1)
    hard, plain_metrics = plain(**batch)
    judged_sums, judged = student(**batch, kind_counts=(900, 150, 50))
    torch.testing.assert_close(judged_sums, sums)
    torch.testing.assert_close(judged, plain(**batch, kind_counts=(900, 150, 50))[1])
    hidden_TD, taught_TD = (model.bert(**encoder_inputs(batch)) for model in (plain, teacher))
    places, labels = batch["targets"]["masked_positions"], slice(0, config.vocab_size)

    def log_p(model: PretrainingModel, hidden: torch.Tensor) -> torch.Tensor:
        transformed = model.predictions.transform(hidden[places])
        scores = F.linear(transformed, model.bert.embeddings.word_weight[labels], model.predictions.bias[labels])
        return (scores / SETTINGS.temperature).log_softmax(-1)

    own, wanted = log_p(plain, hidden_TD), log_p(teacher, taught_TD).detach()
    soft = SETTINGS.temperature**2 * (wanted.exp() * (wanted - own)).sum()
    norms = hidden_TD.norm(dim=-1) * taught_TD.detach().norm(dim=-1)
    hidden = (1 - (hidden_TD * taught_TD.detach()).sum(-1) / norms).sum()
    torch.testing.assert_close(sums, torch.stack([*hard, soft, hidden]), rtol=2e-5, atol=1e-4)
    torch.testing.assert_close(metrics, plain_metrics)
    (hard.sum() + 0.3 * soft + 0.2 * hidden).backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-3), name


def test_the_gradients_are_to_the_bit_those_of_words_then_pairs_then_hidden_states() -> None:
    config = small_config()
    teacher = model_of(small_config(num_hidden_layers=3), seed=9)
    batch = packed_inputs(config, [37, 20, 11], masked=15)
    targets, stream = batch["targets"], encoder_inputs(batch)
    student, plain = student_of(config, teacher), student_of(config, teacher)
    sums, _ = student(**batch)
    hidden_TD = plain.bert(**stream)
    asked = plain.objectives[0].teacher
    taught_TD = asked.hidden_states(hidden_TD, **stream, dropout_seed=None)
    places, labels = targets["masked_positions"], targets["masked_labels"]
    also = partial(
        soft_target_loss,
        teacher=asked.decoder(taught_TD.index_select(0, places)),
        vocab_size=config.vocab_size,
        temperature=SETTINGS.temperature,
    )
    words = plain.bert.embeddings.word_weight
    mlm, _, soft = plain.predictions(hidden_TD.index_select(0, places), labels, words, also=also)
    logits_N2 = pair_logits(plain, hidden_TD, batch["cu_seqlens"])
    pair = F.cross_entropy(logits_N2, targets["pair_labels"], reduction="sum")
    wanted = torch.stack((mlm, pair, soft, angle_loss(hidden_TD, taught_TD)))
    assert torch.equal(sums, wanted)
    for losses in (sums, wanted):
        (losses * torch.tensor([0.03, 0.5, 0.2, 0.01])).sum().backward()
    for (name, one), other in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it() -> None:
    config = small_config()
    teacher = model_of(config, seed=1)
    sums, _ = student_of(config, teacher)(**packed_inputs(config, [9, 20]))
    mlm, _, soft, hidden = sums.tolist()
    assert mlm > 1.0 and abs(soft) < 1e-4 and abs(hidden) < 1e-4


def test_the_teacher_is_no_part_of_the_model() -> None:
    config = small_config(hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.4)
    teacher = model_of(config, seed=9)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = student_of(config, teacher)
    assert set(student.state_dict()) == set(PretrainingModel(config).state_dict())
    student.train()
    asked = student.objectives[0].teacher
    batch = packed_inputs(config, [9, 20])
    taught = asked.hidden_states(torch.zeros(1), **encoder_inputs(batch), dropout_seed=None)
    student(**batch, dropout_seed=torch.tensor([3]))[0].sum().backward()
    torch.testing.assert_close(asked.hidden_states(torch.zeros(1), **encoder_inputs(batch), dropout_seed=None), taught)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert asked.hidden_states(torch.zeros(1).bfloat16(), **encoder_inputs(batch)).dtype == torch.bfloat16


def test_layers_are_taken_from_the_teacher_in_the_order_that_is_asked_for() -> None:
    teacher = model_of(small_config(num_hidden_layers=4), seed=9)
    student = PretrainingModel(small_config(num_hidden_layers=2))
    start_from_layers(student, teacher, (3, 1))
    own, theirs = student.state_dict(), teacher.state_dict()
    for name, tensor in own.items():
        source = name.replace("bert.layer.1.", "bert.layer.x.").replace("bert.layer.0.", "bert.layer.3.")
        assert torch.equal(tensor, theirs[source.replace("bert.layer.x.", "bert.layer.1.")]), name


def test_a_student_without_segments_takes_all_it_has_from_layers_of_a_bert() -> None:
    teacher = model_of(small_config(num_hidden_layers=4), seed=9)
    names = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    sizes = {name: getattr(teacher.config, name) for name in names}
    student = PretrainingModel(DistilBertConfig(**sizes, num_hidden_layers=2), has_pair_head=False)
    start_from_layers(student, teacher, (3, 1))
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        source = name.replace("bert.layer.1.", "bert.layer.x.").replace("bert.layer.0.", "bert.layer.3.")
        assert torch.equal(tensor, theirs[source.replace("bert.layer.x.", "bert.layer.1.")]), name


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text with its tokenizer and shards, a teacher, and a recipe that is taught by it."""
    folder = make_workshop(tmp_path_factory.mktemp("distillation"))
    recipe = json.loads((folder / "recipe.json").read_text())
    config = BertConfig(**{**recipe["model"], "num_hidden_layers": 4})
    (folder / "teacher").mkdir()
    write_hf_folder(
        folder / "teacher",
        config=hf_config(config, sentence_pair="none", special_ids=special_ids(folder / "tokenizer")),
        tensors=to_hf(_without_pair_head(config).state_dict(), config),
        tokenizer=folder / "tokenizer",
        model_card=model_card_text("teacher", config, {}),
    )
    recipe["distillation"] = {"teacher": "teacher", "mlm_weight": 0.0}
    recipe["training"] |= {"total_steps": 5, "precision": "fp32"}
    recipe["model"] |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    return folder


def _without_pair_head(config: BertConfig) -> PretrainingModel:
    model = PretrainingModel(config, has_pair_head=False)
    spread_weights(model, config, seed=9, scale=0.1)
    return model


def test_a_run_is_taught_alike_whole_on_one_rank_and_sharded_on_two(workshop: Path) -> None:
    alone, sharded = workshop / "alone", workshop / "sharded"
    done = run(*pretrain_command(workshop, alone, stage=0))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "whole on every rank" in done.stdout
    script, *arguments = pretrain_command(workshop, sharded, stage=3)
    done = run(script, *arguments, world_size=2)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [list(read_metrics(folder / "metrics.jsonl")) for folder in (alone, sharded)]
    names = ("loss", "loss_mlm", "loss_pair", "loss_soft", "loss_hidden", "grad_norm")
    for one, other in zip(*rows, strict=True):
        assert [other[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)
    judged, same = (read_metrics(folder / "metrics.jsonl", "evaluation")[-1] for folder in (alone, sharded))
    kinds = ("masked", "random", "kept")
    targets = [judged[f"mlm_{kind}_targets"] for kind in kinds]
    assert targets == [same[f"mlm_{kind}_targets"] for kind in kinds] and targets[0] > 4 * max(targets[1:]) > 0
    names += tuple(f"loss_mlm_{kind}" for kind in kinds)
    assert [same[name] for name in names[:-4] + names[-3:]] == pytest.approx(
        [judged[name] for name in names[:-4] + names[-3:]], rel=1e-4
    )
    assert [same[f"mlm_{kind}_accuracy"] for kind in kinds] == [judged[f"mlm_{kind}_accuracy"] for kind in kinds]
    by_kind = sum(count * judged[f"loss_mlm_{kind}"] for kind, count in zip(kinds, targets, strict=True))
    assert judged["loss_mlm"] == pytest.approx(by_kind / sum(targets), rel=1e-6)
    first, last = rows[0][0], rows[0][-1]
    assert last["loss_soft"] < first["loss_soft"], "the student has moved towards the teacher"
    weighted = first["loss_pair"] + 5.0 * first["loss_soft"] + first["loss_hidden"]
    assert first["loss"] == pytest.approx(weighted, rel=1e-5)
    names_saved = set(load_fp32_state_dict(next((sharded / "checkpoints").glob("global_step*"))))
    assert not [name for name in names_saved if "teacher" in name or "layer.2" in name]
    exported = run(ROOT / "bert_ds/export_hf.py", "--run_dir", sharded)
    assert exported.returncode == 0, exported.stdout + exported.stderr


def test_a_student_starts_closer_to_its_teacher_with_layers_of_it(workshop: Path) -> None:
    losses = []
    for layers in ("null", "[0,1]"):
        done = run(
            *pretrain_command(workshop, workshop / "dry", "--dry_run", f"--set=distillation.init_layers={layers}")
        )
        assert done.returncode == 0, done.stdout + done.stderr
        losses.append(float(done.stdout.split("at its peak, loss ")[1].split(";")[0]))
    assert losses[1] < losses[0] - 0.5


def planned(workshop: Path, **changes: Any) -> RunPlan:
    """The plan of a recipe whose distillation section is changed."""
    recipe = json.loads((workshop / "recipe.json").read_text())
    recipe["model"] |= changes.pop("model", {})
    recipe |= changes.pop("recipe", {})
    recipe["distillation"] |= changes
    (workshop / "changed.json").write_text(json.dumps(recipe))
    return make_plan(*load_pair(workshop / "changed.json", ROOT / "ds_configs/zero2.json"), 1)


def problem_of(workshop: Path, **changes: Any) -> str:
    """What is said of such a recipe that is refused."""
    with pytest.raises(ConfigError) as caught:
        planned(workshop, **changes)
    return str(caught.value)


def test_a_teacher_that_does_not_fit_is_refused_with_both_numbers(workshop: Path) -> None:
    said = problem_of(workshop, init_layers=[1])
    assert "distillation.init_layers: names 1 layers of the teacher, model.num_hidden_layers is 2" in said
    said = problem_of(workshop, init_layers=[1, 4])
    assert "distillation.teacher: the teacher has 4 layers, init_layers names 4 (counted from 0)" in said
    said = problem_of(workshop, model={"hidden_size": 48}, init_layers=None)
    assert "distillation.teacher: the teacher has hidden_size 32 (here 48)" in said
    assert "init_from say where the weights start" in problem_of(
        workshop, recipe={"init_from": "teacher"}, init_layers=[1, 3]
    )
    said = problem_of(workshop, teacher="shards")
    assert "holds no config.json: wanted an exported model" in said
    assert "distillation.temperature: found 0, wanted > 0" in problem_of(workshop, temperature=0)
    said = problem_of(workshop, teachers="x")
    assert 'distillation.teachers: unknown setting; did you mean "teacher"?' in said


def test_layers_are_taken_from_another_family_where_they_are_alike(workshop: Path) -> None:
    recipe = json.loads((workshop / "recipe.json").read_text())
    without_pairs = {"sequences": {**recipe["sequences"], "sentence_pair": "none"}}
    alike = {name: size for name, size in recipe["model"].items() if not name.endswith("_prob")}
    student = {**without_pairs, "model": {**alike, "type": "distilbert"}}
    assert planned(workshop, recipe=student, init_layers=[1, 3]).run.model.family == "distilbert"
    electra = {**without_pairs, "model": {**alike, "type": "electra", "embedding_size": alike["hidden_size"]}}
    assert planned(workshop, recipe=electra, init_layers=[1, 3]).run.model.family == "electra"
    modern = {**without_pairs, "model": {**alike, "type": "modernbert"}}
    assert "init_layers takes layers of a teacher of another family than modernbert" in problem_of(
        workshop, recipe=modern, init_layers=[1, 3]
    )
    facts = json.loads((workshop / "teacher/config.json").read_text())
    sizes = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    distil = {name: facts[ours] for name, ours in sizes.items()} | {"hidden_dim": 7, "model_type": "distilbert"}
    kept = {name: facts[name] for name in ("vocab_size", "max_position_embeddings")}
    for teacher, wrong in (
        ({**facts, "model_type": "megatron-bert"}, 'the teacher has norm_position "pre" (here post)'),
        ({**distil, **kept}, f"the teacher has intermediate_size 7 (here {alike['intermediate_size']})"),
        ({**facts, "model_type": "electra", "embedding_size": 5}, "the teacher has embedding_width 5 (here 32)"),
        ({**distil, **kept, "hidden_dim": alike["intermediate_size"], "n_layers": 2}, "the teacher has 2 layers"),
    ):
        write_json(workshop / "teacher", "config.json", teacher)
        assert wrong in problem_of(workshop, recipe=student, init_layers=[1, 3])
    write_json(workshop / "teacher", "config.json", facts)


def test_a_teacher_of_another_tokenizer_is_refused(workshop: Path) -> None:
    facts = json.loads((workshop / "teacher/config.json").read_text())
    (workshop / "teacher/config.json").write_text(json.dumps({**facts, "tokenizer_fingerprint": "another"}))
    done: subprocess.CompletedProcess[str] = run(*pretrain_command(workshop, workshop / "mixed", stage=0))
    (workshop / "teacher/config.json").write_text(json.dumps(facts))
    assert done.returncode == 3
    assert "two tokenizers are mixed up" in done.stderr
