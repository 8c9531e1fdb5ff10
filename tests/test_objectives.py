"""What a recipe may list as objectives, how their weights reach the loss, and that one more objective is one class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from config_cases import write_json
from encoder_cases import packed_inputs, small_config
from recipe_workshop import RECIPE
from torch import Tensor, nn

from bert_ds.basics.loss_term import LossTerm
from bert_ds.configuration.recipe.run_config import ConfigError, RunConfig, load_run_config
from bert_ds.configuration.run_checks import recipe_problems
from bert_ds.encoder.objectives.objective import Seen, Sums, ordered_terms
from bert_ds.encoder.objectives.table import make_objectives
from bert_ds.encoder.pretraining_model import PretrainingModel

WORDS, PAIR = {"type": "masked_words"}, {"type": "sentence_pair"}
TAUGHT = {"distillation": {"teacher": "t"}}


def run_of(objectives: Any, pair: str = "sop", **changes: Any) -> RunConfig:
    sequences = {"max_seq_length": 32, "sentence_pair": pair}
    content = {**RECIPE, "sequences": sequences, "objectives": objectives, **changes}
    return RunConfig.model_validate(content, strict=False)


@pytest.mark.parametrize(
    ("objectives", "pair", "changes", "said"),
    [
        ([WORDS, PAIR, WORDS], "sop", {}, 'objectives.2.type: "masked_words" is listed twice, wanted once'),
        (
            [WORDS, PAIR],
            "none",
            {},
            'objectives.1.type: "sentence_pair" has no pairs to learn: sequences.sentence_pair',
        ),
        ([WORDS], "nsp", {}, 'objectives: "sentence_pair" is missing and sequences.sentence_pair "nsp" makes pairs'),
        ([PAIR], "nsp", {}, 'objectives: found sentence_pair, wanted "masked_words" among them'),
        ([], "none", {}, 'objectives: found none, wanted "masked_words" among them'),
        (
            [{**WORDS, "weight": 3.0}],
            "none",
            TAUGHT,
            "objectives.0.weight: 3 is a second weight of masked words: beside",
        ),
    ],
)
def test_a_list_that_cannot_be_trained_is_one_sentence(objectives: Any, pair: str, changes: Any, said: str) -> None:
    problems = recipe_problems(run_of(objectives, pair, **changes))
    assert len(problems) == 1
    assert said in problems[0].line("recipe.json")


def test_a_weight_of_nothing_is_refused(tmp_path: Path) -> None:
    path = write_json(tmp_path, "run.json", {**RECIPE, "objectives": [{**WORDS, "weight": 0.0}, PAIR]})
    with pytest.raises(ConfigError, match=r"objectives.0.weight: found 0.0, wanted > 0.0$"):
        load_run_config(path)


@pytest.mark.parametrize(("pair", "names"), [("none", ["mlm"]), ("nsp", ["mlm", "pair"]), ("sop", ["mlm", "pair"])])
def test_without_a_list_the_words_and_the_pairs_that_are_made_weigh_one(pair: str, names: list[str]) -> None:
    run = run_of(None, pair)
    terms = ordered_terms(make_objectives(run.objective_weights))
    assert [(term.name, term.weight) for term in terms] == [(name, 1.0) for name in names]
    assert recipe_problems(run) == []


def test_the_order_of_a_list_changes_nothing_and_its_weights_are_those_of_the_terms() -> None:
    lists = [{**PAIR, "weight": 2.0}, {**WORDS, "weight": 0.5}]
    for objectives in (lists, lists[::-1]):
        run = run_of(objectives)
        assert recipe_problems(run) == []
        terms = ordered_terms(make_objectives(run.objective_weights))
        assert [(term.name, term.weight) for term in terms] == [("mlm", 0.5), ("pair", 2.0)]
    assert recipe_problems(run_of([WORDS, {**PAIR, "weight": 2.0}], **TAUGHT)) == []


class Reversed:
    """Tells pieces from their places: the encoder sees each stream turned round, beside what others show it."""

    needs_front = False
    terms = (LossTerm("first", count="tokens"), LossTerm("turned", count="tokens", metric="seen", weight=50.0))

    def heads(self, config: Any, ops: Any) -> dict[str, nn.Module]:
        return {"turner": nn.Linear(config.hidden_size, 1, bias=False)}

    def tokens_read(self, model: Any, seen: Seen) -> Tensor:
        return torch.zeros(0, dtype=torch.int64)

    def sums(self, model: Any, seen: Seen) -> Sums:
        hidden_TD = model.bert(**{**seen.stream, "input_ids_T": seen.stream["input_ids_T"].flip(0)})
        score = model.turner(hidden_TD).square().sum()
        return Sums({"turned": score, "first": 2 * score}, {"seen": score.detach()})


def test_one_more_objective_is_one_class_and_leaves_the_others_alone() -> None:
    config = small_config()
    plain = PretrainingModel(config, kernels="torch")
    objectives = (Reversed(), *make_objectives({"masked_words": 1.0, "sentence_pair": 1.0}))
    model = PretrainingModel(config, kernels="torch", objectives=objectives)
    assert set(model.state_dict()) == {*plain.state_dict(), "turner.weight"}
    model.load_state_dict({**plain.state_dict(), "turner.weight": torch.ones(1, config.hidden_size)})
    assert [term.name for term in model.terms] == ["first", "mlm", "pair", "turned"]
    batch = packed_inputs(config, [9, 20])
    (first, mlm, pair, turned), metrics = model(**batch)
    torch.testing.assert_close(torch.stack((mlm, pair)), plain(**batch)[0], rtol=0.0, atol=0.0)
    assert first == 2 * turned
    torch.testing.assert_close(metrics, torch.cat((plain(**batch)[1], turned.detach()[None])))
