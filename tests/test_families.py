"""Every family beside transformers: scores, gradients, names, settings, number of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from config_cases import RECIPE, changed
from family_cases import FORMS, SPECIAL_IDS, disturbed, of_size, ragged, settings_of

from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.families.modernbert import ModernBertConfig
from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.configuration.run_size import flops_per_token, memory_estimate
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.tuning import task_folder
from bert_ds.encoder.families import table as family_table
from bert_ds.encoder.families.bert import BERT
from bert_ds.encoder.families.table import family_of, weight_patterns
from bert_ds.encoder.fused_ops import FusedOps, fused_ops
from bert_ds.encoder.hf_mapping import encoder_from_hf, from_hf, hf_config, model_config_from_hf, modern_names, to_hf
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.encoder.tensor_rows import TensorRow, rows_to_hf
from bert_ds.training.optimizers.param_groups import without_decay

EVERY_FORM = pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())


def ours_of(config: EncoderConfig) -> PretrainingModel:
    model = PretrainingModel(config, kernels="torch", has_pair_head=False)
    return disturbed(model).double().eval()  # type: ignore[return-value]


def theirs_of(ours: PretrainingModel) -> Any:
    """Transformers' model of masked words with the same weights, all of them named by our table."""
    config = ours.config
    model = getattr(transformers, family_of(config).roles(config)["masked words"].architecture)(settings_of(config))
    model = model.double().eval()
    missing, unexpected = model.load_state_dict(to_hf(ours.state_dict(), config), strict=False)
    assert unexpected == []
    assert set(missing) <= set(model._tied_weights_keys)
    model.tie_weights()
    return model


@EVERY_FORM
def test_scores_and_every_gradient_are_those_of_transformers(config: EncoderConfig) -> None:
    ours = ours_of(config)
    theirs = theirs_of(ours)
    padded, packed = ragged(config)
    mask_NS = padded["attention_mask"].bool()
    places_P = torch.arange(1, int(mask_NS.sum()), 2)
    labels_P = packed["input_ids_T"].flip(0)[places_P]
    scores = theirs(**padded).logits[mask_NS]
    F.cross_entropy(scores[places_P], labels_P, reduction="sum").backward()
    targets = {"masked_positions": places_P, "masked_labels": labels_P}
    loss_sums_L, _ = ours(**packed, targets=targets)
    loss_sums_L[0].backward()
    found = ours.logits(**packed, masked_positions_P=torch.arange(len(scores))).mlm_PV
    assert (found - scores).abs().max() <= 1e-6 * scores.abs().max()
    gradients = to_hf({name: weight.grad for name, weight in ours.named_parameters()}, config)
    wanted = modern_names({name: weight.grad for name, weight in theirs.named_parameters()}, config)
    assert gradients.keys() == wanted.keys()
    fixed = family_of(config).fixed_tensors(config)
    for row in family_of(config).encoder_rows(config, has_front=False):
        for names in zip(row.hf_names, *row.copies, strict=True):  # of a weight that layers share the sum of all
            wanted |= dict.fromkeys(names, sum(wanted[name] for name in names))
        if row.name in fixed:
            del gradients[row.hf_names[0]]
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-12, name


@EVERY_FORM
def test_a_sequence_does_not_depend_on_its_neighbours_nor_on_padding(config: EncoderConfig) -> None:
    ours = ours_of(config)
    _, packed = ragged(config)
    together = ours.bert(**packed)
    for index, (begin, end) in enumerate(zip(packed["cu_seqlens"], packed["cu_seqlens"][1:], strict=False)):
        alone = {name: tensor[begin:end] for name, tensor in packed.items() if name.endswith("_T")}
        lengths = {"cu_seqlens": torch.tensor([0, end - begin]).int(), "max_seqlen": int(end - begin)}
        assert torch.allclose(ours.bert(**alone, **lengths), together[begin:end], atol=1e-9), index


@EVERY_FORM
def test_names_and_settings_are_the_same_both_ways(config: EncoderConfig) -> None:
    ours = ours_of(config)
    back = from_hf(theirs_of(ours).state_dict(), config, has_pair_head=False)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], weight) for name, weight in ours.state_dict().items())
    content = hf_config(config, sentence_pair="none", special_ids=SPECIAL_IDS)
    again = model_config_from_hf(content)
    theirs = model_config_from_hf(settings_of(config).to_dict() | {"model_type": content["model_type"]})
    for found in (again, theirs):
        assert found.spelled_out() == config.exported()


def test_a_front_of_any_name_is_left_out_where_no_pairs_are_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(config: EncoderConfig, *, has_front: bool) -> Iterator[TensorRow]:
        for row in BERT.encoder_rows(config, has_front=has_front):
            yield row._replace(hf_names=tuple(name.replace("bert.", "other.") for name in row.hf_names))

    row = BERT._replace(encoder_rows=renamed, modern_names=lambda tensors: dict(tensors))
    monkeypatch.setitem(family_table.FAMILIES, "bert", row)
    with_pairs = PretrainingModel(FORMS["bert"], kernels="torch")
    tensors = to_hf(with_pairs.state_dict(), FORMS["bert"])
    assert "other.pooler.dense.weight" in tensors
    found = from_hf(tensors, FORMS["bert"], has_pair_head=False)
    assert set(with_pairs.state_dict()) - set(found) == {
        *("bert.pooler.dense_weight", "bert.pooler.dense_bias"),
        *("seq_relationship.weight", "seq_relationship.bias"),
    }


@EVERY_FORM
def test_the_number_of_parameters_is_known_without_the_model(config: EncoderConfig) -> None:
    model = PretrainingModel(config, kernels="torch", has_pair_head=False)
    assert config.count_parameters(has_pair_head=False) == sum(weight.numel() for weight in model.parameters())


@EVERY_FORM
def test_an_optimizer_is_told_of_every_weight(config: EncoderConfig) -> None:
    """Every pattern matches; what is not decayed is a vector; a layer's matrices are those that are counted."""
    model = PretrainingModel(config, kernels="torch", has_pair_head=False)
    no_decay, equal_parts, matrices = weight_patterns(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert {name for name, shape in shapes.items() if len(shape) == 1} == without_decay(list(shapes), no_decay)
    found = []
    for pattern in matrices:
        name = pattern.replace("*", "bert.layer.0")
        parts = next((parts for key, parts in equal_parts.items() if name.endswith(key[1:])), ("",))
        found += [(shapes[name][0] // len(parts), shapes[name][1])] * len(parts)
    assert sorted(found) == sorted(config.layer_matrices())


@EVERY_FORM
def test_recomputed_layers_give_the_same_bits_with_dropout(config: EncoderConfig) -> None:
    gradients = []
    for recompute in (False, True):
        model = PretrainingModel(
            config.with_dropout(0.2), kernels="torch", has_pair_head=False, activation_checkpointing=recompute
        )
        _, packed = ragged(config)
        places = torch.arange(0, 60, 3)
        targets = {"masked_positions": places, "masked_labels": packed["input_ids_T"][places]}
        seed = torch.tensor([7])
        loss_sums_L, _ = model.train()(**packed, targets=targets, dropout_seed=seed)
        loss_sums_L.sum().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        with pytest.raises(ValueError, match="dropout_seed is None"):
            model(**packed, targets=targets)
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


@EVERY_FORM
def test_a_task_starts_from_all_that_transformers_would_take_from_a_pre_trained_folder(
    config: EncoderConfig, tmp_path: Path
) -> None:
    ours = ours_of(config).float()
    theirs_of(ours).float().save_pretrained(tmp_path)
    role = family_of(config).roles(config)["sequence classification"]
    task = getattr(transformers, role.architecture).from_pretrained(tmp_path)
    pretrained = {**to_hf(ours.state_dict(), config)}
    taken = {name: tensor for name, tensor in task.state_dict().items() if name in pretrained}
    started, _ = encoder_from_hf(pretrained, config)
    has_front = started.keys() > {row.name for row in family_of(config).encoder_rows(config, has_front=False)}
    found = rows_to_hf(started, list(family_of(config).encoder_rows(config, has_front=has_front)))
    assert found.keys() == taken.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in taken.items())


def watching(sites: list[int]) -> FusedOps:
    """Operators that note the places that drop."""

    def watched(operation: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dropout_p"):
                sites.append(kwargs["site"])
            return operation(*args, **kwargs)

        return call

    plain = fused_ops("torch")
    return FusedOps(**{field.name: watched(getattr(plain, field.name)) for field in fields(plain)})


@EVERY_FORM
@pytest.mark.parametrize("kind", ["classification", "multiple_choice"])
def test_every_place_that_drops_has_masks_of_its_own(
    kind: str, config: EncoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an encoder, of a front that drops in the classes of transformers, and of the head behind it."""
    sites: list[int] = []
    monkeypatch.setattr(task_folder, "fused_ops", lambda kernels: watching(sites))
    dropping = config.with_dropout(0.2)
    model = task_folder.make_task_model(KINDS[kind], dropping, {"label": ("a", "b")}, kernels="torch")
    model.train()(**ragged(config)[1], targets={}, dropout_seed=torch.tensor([7]))
    head = family_of(config).first_free_site(dropping)
    has_still_front = config.family in ("electra", "roberta") and kind == "multiple_choice"
    assert sorted(sites) == [site for site in range(head + 1) if not (has_still_front and site == head - 1)]


@EVERY_FORM
@pytest.mark.parametrize("recompute", [False, True])
def test_layers_are_computed_again_where_that_is_asked_for(config: EncoderConfig, recompute: bool) -> None:
    model = PretrainingModel(config, kernels="torch", has_pair_head=False, activation_checkpointing=recompute).train()
    passes = []
    for layer in model.bert.layer:
        layer.register_forward_pre_hook(lambda module, inputs: passes.append(module))
    places = torch.arange(0, 60, 3)
    packed = ragged(config)[1]
    loss_sums_L, _ = model(
        **packed, targets={"masked_positions": places, "masked_labels": packed["input_ids_T"][places]}
    )
    loss_sums_L.sum().backward()
    assert len(passes) == config.num_hidden_layers * (2 if recompute else 1)


def test_a_window_is_counted_as_what_it_sees() -> None:
    config = FORMS["modernbert"]  # layers 0 and 3 see everything, 1 and 2 four positions to each side
    assert config.attended_tokens(23) == 2 * 23 + 2 * 9
    assert config.attended_tokens(5) == 4 * 5
    assert FORMS["bert"].attended_tokens(23) == 3 * 23


def test_embeddings_of_another_width_are_counted_as_what_they_are() -> None:
    """16 wide under 24: a dense layer more for every token, fewer weights behind a word, less to gather."""
    recipe = changed(changed(RECIPE, "sequences.sentence_pair", "none"), "training.precision", "fp32")
    narrow, same = (
        RunConfig.model_validate({**recipe, "model": of_size(FORMS["electra"], embedding_size=width).model_dump()})
        for width in (16, 24)
    )
    predictions_per_token = 0.15
    wanted = 6 * 24 * 16 + 6 * predictions_per_token * (16 - 24) * (24 + 64)
    assert flops_per_token(narrow, 32.0) - flops_per_token(same, 32.0) == pytest.approx(wanted)
    number = narrow.model.count_parameters(has_pair_head=False)
    found = memory_estimate(narrow, stage=3, world_size=1, offload=False, activations=0)
    assert found.weights == 4 * (number + 2 * 64 * 16)


def test_a_modernbert_begins_with_the_deviations_that_transformers_draws() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 96}
    layer = PretrainingModel(ModernBertConfig(vocab_size=64, **sizes), kernels="torch", has_pair_head=False).bert.layer[
        0
    ]
    cut_off = 0.8796  # deviation of a normal that ends at two deviations
    assert layer.attention.qkv_weight.std().item() == pytest.approx(cut_off * 0.02, rel=0.03)
    for writes in (layer.attention.output_weight, layer.feed_forward.output_weight):
        assert writes.std().item() == pytest.approx(cut_off * 0.02 / (2 * 8) ** 0.5, rel=0.03)
