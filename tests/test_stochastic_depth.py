"""Blocks that add nothing to some of the sequences: which, what comes out, and that nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from config_cases import RECIPE, changed
from family_cases import EVERY_FAMILY, FORMS, disturbed, ragged
from test_families import watching

from bert_ds.basics.micro_batch import BranchDraws
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.recipe.run_config import RunConfig
from bert_ds.configuration.run_checks import recipe_problems
from bert_ds.encoder import pretraining_model
from bert_ds.encoder.blocks import kept_branches
from bert_ds.encoder.objectives.table import make_objectives
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.training.loop.dropout_seeds import drops_of

SEED = torch.tensor([11])
DRAWS = BranchDraws(SEED, torch.tensor([[0, 0, 3], [0, 1, 3], [1, 0, 3], [0, 0, 9]]))
PARTS = ("attention", "feed_forward")


def deep(config: EncoderConfig, share: float = 0.6, *, recompute: bool = False) -> PretrainingModel:
    """A model of which blocks are left out, in fp64."""
    model = PretrainingModel(
        config, kernels="torch", has_pair_head=False, activation_checkpointing=recompute, stochastic_depth=share
    )
    return disturbed(model).double().train()  # type: ignore[return-value]


def scaled_by_hand(model: PretrainingModel, factors_L2: list[tuple[float, float]]) -> Any:
    """The encoder, each layer with parts of its own that write so many times as much."""
    encoder = copy.deepcopy(model.bert).eval()
    for layer, factors in zip(encoder.layer, factors_L2, strict=True):
        for part, factor in zip(PARTS, factors, strict=True):
            own = copy.deepcopy(getattr(layer, part))
            layer.__dict__.pop(part, None)
            setattr(layer, part, own)
            with torch.no_grad():
                own.output_weight *= factor
                if own.output_bias is not None:
                    own.output_bias *= factor
    return encoder


@EVERY_FAMILY
def test_a_sequence_passes_the_layers_with_what_was_drawn_for_it(config: EncoderConfig) -> None:
    """Beside the plain network whose blocks write nothing, or more; also where not every token is read."""
    model, (_, packed) = deep(config), ragged(config)
    bounds, total = packed["cu_seqlens"], len(packed["input_ids_T"])
    drawn = kept_branches(model.bert, DRAWS, bounds, num_tokens=total)
    assert drawn is not None
    found = model.bert(**packed, branches=DRAWS)
    read_R = torch.tensor([3, 24, 30, 70])
    few = model.bert(**packed, branches=DRAWS, read_R=read_R)
    assert torch.allclose(few[read_R], found[read_R], atol=1e-9)
    factors = set()
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        of_sequence = [(float(one[begin]), float(two[begin])) for one, two in drawn]
        wanted = scaled_by_hand(model, of_sequence)(**packed)
        assert torch.allclose(found[begin:end], wanted[begin:end], atol=1e-5)
        factors.update(factor for both in of_sequence for factor in both)
    shares = [0.6 * (layer + 1) / config.num_hidden_layers for layer in range(config.num_hidden_layers)]
    allowed = torch.tensor([0.0, *(1 / (1 - share) for share in shares)])
    assert 0.0 in factors and len(factors) > 2
    assert all((allowed - factor).abs().min() < 1e-5 for factor in factors)


@EVERY_FAMILY
def test_recomputed_layers_draw_the_same_and_an_evaluation_draws_nothing(config: EncoderConfig) -> None:
    _, packed = ragged(config)
    places = torch.arange(0, 60, 3)
    given = {**packed, "targets": {"masked_positions": places, "masked_labels": packed["input_ids_T"][places]}}
    found = []
    for recompute in (False, True):
        model = deep(config, recompute=recompute)
        loss = model(**given, branches=DRAWS)[0].sum()
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in model.parameters())])
    assert all(torch.equal(first, again) for first, again in zip(*found, strict=True))
    plain = deep(config, 0.0)
    assert not torch.equal(plain(**given)[0], found[0][0])
    assert torch.equal(plain.eval()(**given)[0], deep(config).eval()(**given)[0])


def drawn_for(ids: torch.Tensor, *, seed: torch.Tensor = SEED, fillings: int = 0) -> torch.Tensor:
    """What every layer and block keeps of each example, [L, 2, N], in sequences of two tokens."""
    bounds = torch.arange(len(ids) + fillings + 1) * 2
    kept = kept_branches(deep(FORMS["bert"]).bert, BranchDraws(seed, ids), bounds, num_tokens=int(bounds[-1]))
    assert kept is not None
    every = torch.stack([torch.stack(both) for both in kept])[..., 0]
    assert torch.equal(every[..., ::2], every[..., 1::2])
    return every[..., ::2]


def test_what_is_left_out_goes_by_seed_layer_block_and_example_and_grows_linearly_with_depth() -> None:
    ids = torch.stack([torch.arange(4000) % 2, torch.arange(4000) % 5, torch.arange(4000)], 1)
    drawn = drawn_for(ids)
    shares = (drawn == 0).float().mean(-1)
    assert torch.allclose(shares, torch.tensor([[0.2, 0.2], [0.4, 0.4], [0.6, 0.6]]), atol=0.035)
    assert torch.allclose(drawn.mean(-1), torch.ones(3, 2), atol=0.08)
    rows = (drawn == 0).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in rows}) == 6
    some = torch.tensor([7, 3999, 12])  # of another micro-batch, with fillings behind them
    elsewhere = drawn_for(ids[some], fillings=2)
    assert torch.equal(elsewhere[..., :3], drawn[..., some]) and (elsewhere[..., 3:] == 1).all()
    for other in (ids + torch.tensor([1, 0, 0]), ids + torch.tensor([0, 1, 0]), ids + torch.tensor([0, 0, 1])):
        assert not torch.equal(drawn_for(other), drawn)
    assert not torch.equal(drawn_for(ids, seed=SEED + 1), drawn)


def test_a_step_draws_by_seed_and_step_alone() -> None:
    model, ids = deep(FORMS["bert"]), torch.zeros(2, 3, dtype=torch.int64)

    def seed_of(seed: int, step: int, part: int) -> int:
        drops = drops_of(model, seed, step, part, device="cpu", example_ids=ids)
        assert torch.equal(drops["branches"].example_ids_N3, ids)
        return int(drops["branches"].seed)

    assert seed_of(1, 2, 0) == seed_of(1, 2, 3)
    assert len({seed_of(1, 2, 0), seed_of(2, 2, 0), seed_of(1, 3, 0)}) == 3
    assert "branches" not in drops_of(deep(FORMS["bert"], 0.0), 1, 2, 0, device="cpu", example_ids=ids)


def test_a_generator_leaves_out_blocks_too() -> None:
    config = FORMS["electra"]
    objectives = make_objectives({"masked_words": 1.0, "replaced_tokens": 1.0}, generator=config.generator(0.5))
    model = PretrainingModel(config, kernels="torch", objectives=objectives, stochastic_depth=0.3)
    assert [encoder.stochastic_depth for encoder in model.encoders()] == [0.3, 0.3]


def test_it_wants_draws_and_is_not_compiled() -> None:
    model, (_, packed) = deep(FORMS["bert"]), ragged(FORMS["bert"])
    with pytest.raises(ValueError, match="branches is None"):
        model.bert(**packed)
    recipe = changed(RECIPE, "training.stochastic_depth", 0.5)
    dry = {**recipe, "model": {**RECIPE["model"], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    assert RunConfig.model_validate(dry).draws
    (problem,) = recipe_problems(RunConfig.model_validate(changed(recipe, "training.compile", True)))
    assert problem.path == "training.compile" and "training.stochastic_depth is 0.5: wanted 0 there" in problem.text


BERT_PLACES = {
    "embedding_dropout_prob": [0],
    "attention_probs_dropout_prob": [1, 4, 7],
    "attention_output_dropout_prob": [2, 5, 8],
    "feed_forward_dropout_prob": [3, 6, 9],
}
PLACES: dict[str, dict[str, list[int]]] = {
    **dict.fromkeys(("albert", "bert", "bert, pre-norm", "electra", "roberta"), BERT_PLACES),
    "distilbert": {
        name.replace("attention_probs_dropout_prob", "attention_dropout"): s for name, s in BERT_PLACES.items()
    },
    "modernbert": {
        "embedding_dropout": [0],
        "attention_dropout": [1, 4, 7, 10],
        "attention_output_dropout": [2, 5, 8, 11],
        "mlp_dropout": [3, 6, 9, 12],
    },
}


@pytest.mark.parametrize(("form", "place"), [(form, place) for form, places in PLACES.items() for place in places])
def test_every_place_of_dropout_is_switched_alone(form: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On where all others are off, and off where all others are on."""
    dry, wet = FORMS[form].with_dropout(0.0), FORMS[form].with_dropout(0.2)
    rest = {"attention_output_dropout": 0.0} if form == "modernbert" else {}
    alone = dry.model_copy(update={**rest, place: 0.2})
    # What a null means is a number of its own, where that is what is switched off.
    null = {"attention_output_dropout": 0.2} if form == "modernbert" and place == "attention_dropout" else {}
    others = wet.model_copy(update={**null, place: 0.0})
    every = sorted(site for sites in PLACES[form].values() for site in sites)
    for config, wanted in (
        (alone, PLACES[form][place]),
        (others, [site for site in every if site not in PLACES[form][place]]),
    ):
        sites: list[int] = []
        monkeypatch.setattr(pretraining_model, "fused_ops", lambda kernels, sites=sites: watching(sites))
        model = PretrainingModel(config, kernels="torch", has_pair_head=False).train()
        model.bert(**ragged(config)[1], dropout_seed=SEED)
        assert sorted(sites) == wanted
        assert config.drops and model.bert.dropout_is_used
