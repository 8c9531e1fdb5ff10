"""Replaced tokens: both halves beside transformers, how pieces are drawn, runs at every ZeRO stage, and the exports."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from dataclasses import fields
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from family_cases import FORMS, disturbed, of_size, ragged, settings_of

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.optimizer_config import LambConfig
from bert_ds.corpus.batches.few_shapes import filled
from bert_ds.encoder import pretraining_model
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.fused_ops import FusedOps, fused_ops
from bert_ds.encoder.hf_mapping import modern_names, to_hf
from bert_ds.encoder.objectives.replaced_tokens import drawn_pieces, halves
from bert_ds.encoder.objectives.table import make_objectives
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.encoder.word_head import Decoder
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts, without_decay

WEIGHTS = {"masked_words": 1.0, "replaced_tokens": 50.0}
HALVED = {
    "both narrower": FORMS["electra"],
    "one width, tanh gelu": FORMS["electra, one width, tanh gelu"],
    "generator as wide as the embeddings": of_size(FORMS["electra"], embedding_size=12),
}
EVERY_FORM = pytest.mark.parametrize("config", HALVED.values(), ids=HALVED.keys())
ELECTRA = FORMS["electra"]


def model_of(config: EncoderConfig, **options: Any) -> PretrainingModel:
    objectives = make_objectives(WEIGHTS, generator=config.generator(0.5))
    return PretrainingModel(config, kernels="torch", objectives=objectives, **options)


def spread_model(config: EncoderConfig) -> PretrainingModel:
    return disturbed(model_of(config))  # type: ignore[return-value]


def batch_of(config: EncoderConfig, lengths: tuple[int, ...] = (23, 1, 40, 7)) -> dict[str, Any]:
    """Arguments of the model: every third token is to be predicted, and is what it was, [MASK] or another piece."""
    packed = ragged(config, lengths)[1]
    ids_T, places_P = packed["input_ids_T"], torch.arange(1, sum(lengths), 3)
    shown_T = ids_T.clone()
    shown_T[places_P[::2]] = 4
    targets = {"masked_positions": places_P, "masked_labels": ids_T[places_P]}
    return {**packed, "input_ids_T": shown_T, "targets": targets}


def seen_by_the_discriminator(model: PretrainingModel, batch: dict[str, Any], **others: Any) -> torch.Tensor:
    """The pieces of one forward pass."""
    seen: list[torch.Tensor] = []
    hook = model.bert.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids_T"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch, **others)
    hook.remove()
    return seen[0]


@EVERY_FORM
def test_losses_and_every_gradient_of_both_halves_are_those_of_transformers(config: EncoderConfig) -> None:
    ours, generator = spread_model(config).double().eval(), config.generator(0.5)
    batch, both = batch_of(config), halves(ours.state_dict())
    labels_P, places_P = batch["targets"]["masked_labels"], batch["targets"]["masked_positions"]
    ids_T = seen_by_the_discriminator(ours, batch)
    real_T = batch["input_ids_T"].index_copy(0, places_P, labels_P)
    replaced_T = (ids_T != real_T).double()
    assert 0.5 * len(places_P) < replaced_T.sum() <= len(places_P) and not replaced_T[places_P - 1].any()
    words = transformers.ElectraForMaskedLM(settings_of(generator)).double().eval()
    detector = transformers.ElectraForPreTraining(settings_of(config)).double().eval()
    words.load_state_dict(to_hf(both.generator, generator), strict=False)
    words.tie_weights()
    assert detector.load_state_dict(to_hf(both.discriminator, config), strict=False).unexpected_keys == []
    padded = ragged(config)[0]
    mask_NS = padded["attention_mask"].bool()

    def shown(pieces_T: torch.Tensor) -> dict[str, Any]:
        return {**padded, "input_ids": padded["input_ids"].masked_scatter(mask_NS, pieces_T)}

    logits_PV = words(**shown(batch["input_ids_T"])).logits[mask_NS][places_P]
    scores_T = detector(**shown(ids_T)).logits[mask_NS]
    wanted = (
        F.cross_entropy(logits_PV, labels_P, reduction="sum"),
        F.binary_cross_entropy_with_logits(scores_T, replaced_T, reduction="sum"),
    )
    loss_sums_L, metrics = ours(**batch)
    assert loss_sums_L.tolist() == pytest.approx([loss.item() for loss in wanted], rel=1e-9)
    right_T, is_replaced_T = (scores_T > 0) == replaced_T.bool(), replaced_T.bool()
    assert metrics[1:].tolist() == [right_T.sum(), right_T[is_replaced_T].sum(), replaced_T.sum()]
    (wanted[0] + 50.0 * wanted[1]).backward()
    (loss_sums_L[0] + 50.0 * loss_sums_L[1]).backward()
    found = halves({name: weight.grad for name, weight in ours.named_parameters()})
    theirs = [
        modern_names({name: weight.grad for name, weight in model.named_parameters()}, config)
        for model in (words, detector)
    ]
    mine_of = (to_hf(found.generator, generator), to_hf(found.discriminator, config))
    for mine, half, other in zip(mine_of, theirs, theirs[::-1], strict=True):
        assert mine.keys() == half.keys()
        for name, gradient in mine.items():
            is_shared = "embeddings." in name
            total = half[name] + other[name] if is_shared else half[name]
            assert (gradient - total).norm() <= 1e-5 * total.norm() + 1e-12, name


def test_pieces_are_drawn_as_likely_as_the_generator_takes_them_to_be() -> None:
    torch.manual_seed(1)
    weight_VD, row_1D, number = torch.randn(11, 4), torch.randn(1, 4), 4000
    bias_V = torch.tensor([0.0] * 8 + [-200.0, 500.0, 500.0])  # one that has no chance, and two rows of padding
    draws_P = (torch.arange(number) + 0.5) / number
    found_P = drawn_pieces(Decoder(row_1D.expand(number, 4), weight_VD, bias_V), draws_P, vocab_size=9)
    wanted_V = F.linear(row_1D, weight_VD, bias_V)[0, :9].softmax(-1)
    assert (found_P.bincount(minlength=11)[:9] / number - wanted_V).abs().max() <= 1.5 / number
    assert int(found_P.max()) < 8
    broken = Decoder(torch.full((2, 4), float("nan")), weight_VD, bias_V)
    assert drawn_pieces(broken, draws_P[:2], vocab_size=9).tolist() == [8, 8]
    assert drawn_pieces(Decoder(torch.zeros(0, 4), weight_VD, bias_V), draws_P[:0], vocab_size=9).tolist() == []


def test_pieces_are_a_function_of_the_seed_and_of_the_row_in_training() -> None:
    model, batch = spread_model(ELECTRA).train(), batch_of(ELECTRA)
    seeds = [torch.tensor([number]) for number in (7, 7, 8)]
    first, again, other = (seen_by_the_discriminator(model, batch, dropout_seed=seed) for seed in seeds)
    assert torch.equal(first, again) and (first != other).sum() > 5
    with pytest.raises(ValueError, match="dropout_seed is None, but in training tokens are replaced by it"):
        model(**batch)
    with torch.no_grad():  # one piece as likely as the other: rows draw for themselves
        model.predictions.transform_weight.zero_()
        model.predictions.layer_norm_bias.zero_()
        model.predictions.layer_norm_weight.zero_()
        model.predictions.bias.zero_()
    pieces_P = seen_by_the_discriminator(model, batch, dropout_seed=seeds[0])[batch["targets"]["masked_positions"]]
    assert len(set(pieces_P.tolist())) > 12


def test_an_evaluation_replaces_the_same_tokens_whatever_else_is_in_the_batch() -> None:
    model = spread_model(ELECTRA).eval()
    batch = batch_of(ELECTRA)
    together = seen_by_the_discriminator(model, batch)
    for begin, end in zip(batch["cu_seqlens"], batch["cu_seqlens"][1:], strict=False):
        alone = {name: tensor[begin:end] for name, tensor in batch.items() if name.endswith("_T")}
        places_P = batch["targets"]["masked_positions"]
        inside = (places_P >= begin) & (places_P < end)
        labels_P = batch["targets"]["masked_labels"][inside]
        targets = {"masked_positions": places_P[inside] - begin, "masked_labels": labels_P}
        lengths = {"cu_seqlens": torch.tensor([0, end - begin]).int(), "max_seqlen": int(end - begin)}
        found = seen_by_the_discriminator(model, {**alone, **lengths, "targets": targets})
        assert torch.equal(found, together[begin:end])
    again = {**batch, "input_ids_T": batch["input_ids_T"].clone()}
    again["input_ids_T"][0] += 1
    assert not torch.equal(seen_by_the_discriminator(model, again)[1:23], together[1:23])


@pytest.mark.parametrize("seed", [None, 3])
def test_what_fills_up_a_batch_is_neither_replaced_nor_looked_at(seed: int | None) -> None:
    model = spread_model(ELECTRA).train(seed is not None)
    plain = batch_of(ELECTRA, (25, 1, 40, 9))
    targets = {**plain["targets"], "pair_labels": torch.full((4,), -100)}
    batch = MicroBatch(**{**plain, "targets": targets}, counts={})
    full = filled(batch)
    assert full.fillings.tokens > 0 and full.fillings.words > 0
    sums = [
        model(**one.model_inputs(), dropout_seed=None if seed is None else torch.tensor([seed]))
        for one in (batch, full)
    ]
    for whole, wanted in zip(sums[1], sums[0], strict=True):
        torch.testing.assert_close(whole, wanted, rtol=1e-5, atol=0.0)


def test_recomputed_layers_of_both_halves_give_the_same_bits() -> None:
    config, gradients = ELECTRA.with_dropout(0.2), []
    passes: list[Any] = []
    for recompute in (False, True):
        model: Any = model_of(config, activation_checkpointing=recompute).train()
        for layer in (*model.bert.layer, *model.generator.layer):
            layer.register_forward_pre_hook(lambda module, inputs: passes.append(module))
        loss_sums_L, _ = model(**batch_of(config), dropout_seed=torch.tensor([7]))
        loss_sums_L.sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    assert len(passes) == (1 + 2) * 2 * config.num_hidden_layers
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


def test_no_mask_of_the_generator_is_one_of_the_discriminator(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, int]] = []

    def noted(operation: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dropout_p"):
                drawn.append((int(kwargs["dropout_seed"]), kwargs["site"]))
            return operation(*args, **kwargs)

        return call

    plain = fused_ops("torch")
    ops = FusedOps(**{field.name: noted(getattr(plain, field.name)) for field in fields(plain)})
    monkeypatch.setattr(pretraining_model, "fused_ops", lambda kernels: ops)
    config = ELECTRA.with_dropout(0.2)
    model_of(config).train()(**batch_of(config), dropout_seed=torch.tensor([7]))
    assert len(drawn) == len(set(drawn)) == 2 * (1 + 3 * config.num_hidden_layers)


def test_lamb_and_muon_take_the_weights_of_both_halves_for_what_they_are() -> None:
    """Every weight has a trust ratio of its own, query, key and value each; matrices are those of both stacks."""
    model: Any = model_of(ELECTRA)
    no_decay, equal_parts, matrices = weight_patterns(ELECTRA)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert {name for name, shape in shapes.items() if len(shape) == 1} == without_decay(list(shapes), no_decay)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    facts = TensorFacts(no_decay, equal_parts, matrices)
    lamb: Any = make_optimizer(LambConfig(lr=0.01), model.named_parameters(), facts=facts)
    lamb.step()
    assert len(lamb.trust_statistics()) == sum(3 if "qkv" in name else 1 for name in shapes)
    found = [shape for name, shape in shapes.items() if any(fnmatch(name, pattern) for pattern in matrices)]
    wanted = 2 * ELECTRA.num_hidden_layers * 4
    assert (
        len(found) == wanted and len([name for name in shapes if ".layer." in name and len(shapes[name]) > 1]) == wanted
    )


def test_a_layer_that_a_step_leaves_out_is_left_out_of_both_halves() -> None:
    model: Any = spread_model(ELECTRA)
    rows: list[int] = []
    for layer in (*model.generator.layer, *model.bert.layer):
        layer.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    model(**batch_of(ELECTRA), dropout_seed=torch.tensor([7]), passed_over=frozenset({1}))
    assert rows == [71, 0, 71] * 2
