"""Next, previous or of another document: pairs and labels, the objective of three classes, a run and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_cases import RECIPE, changed
from corpus_fixtures import counting_documents
from family_cases import FORMS, ragged
from recipe_workshop import ROOT, Workshop, must, plain_workshop
from test_examples import all_examples, segments, table_of

from bert_ds.basics.loss_term import metric_names
from bert_ds.basics.ranks import DataError
from bert_ds.configuration.model_folder import weights_problem
from bert_ds.configuration.recipe.run_config import RunConfig, SequenceConfig
from bert_ds.configuration.run_checks import recipe_problems
from bert_ds.configuration.run_size import flops_per_token, num_parameters
from bert_ds.corpus.batches.examples import choose_spans, make_example
from bert_ds.encoder.hf_folder import load_hf_folder, read_json
from bert_ds.encoder.initial_weights import load_initial_weights, start_from_layers
from bert_ds.encoder.objectives.table import make_objectives
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

STRUCTURE = {"sequences.sentence_pair": "structure"}
CONFIG = SequenceConfig(sentence_pair="structure", short_seq_prob=0.0)


def model_of(form: str = "bert", pair: str = "sentence_structure", *, seed: int = 0) -> PretrainingModel:
    objectives = make_objectives({"masked_words": 1.0, pair: 1.0})
    return PretrainingModel(FORMS[form], kernels="torch", objectives=objectives, init_seed=seed)


def test_a_third_is_next_a_third_previous_and_a_third_of_another_document(tmp_path: Path) -> None:
    table = table_of(tmp_path, counting_documents([[2, 3], [2, 2]]), CONFIG)
    epochs = np.arange(1500)
    chosen = choose_spans(table, np.zeros_like(epochs), epochs=epochs, source=0, seed=0)
    examples = [make_example(chosen, row) for row in range(1500)]
    found = {(example.pair_label, *map(tuple, segments(example))) for example in examples}
    assert {row for row in found if row[0] < 2} == {(0, (5, 6), (7, 8, 9)), (1, (7, 8, 9), (5, 6))}
    others = {row[1:] for row in found if row[0] == 2}
    # As near to the three that it displaces as whole sentences come, more than they are among that.
    assert {first for first, _ in others} == {(5, 6)} and {text for _, text in others} == {(10, 11, 12, 13), (12, 13)}
    counts = np.bincount([example.pair_label for example in examples])
    assert len(counts) == 3 and abs(counts - 500).max() < 75  # 4 standard deviations
    assert {example.token_type_ids[-1] for example in examples} == {1}


def test_a_run_of_one_sentence_gets_one_of_another_document_and_one_document_is_too_few(tmp_path: Path) -> None:
    table = table_of(tmp_path / "two", counting_documents([[4], [5]]), CONFIG)
    assert {example.pair_label for epoch in range(9) for example in all_examples(table, epoch=epoch)} == {2}
    with pytest.raises(DataError, match='sentence_pair "structure" wants at least 2 documents, found 1'):
        table_of(tmp_path / "one", counting_documents([[4, 5]]), CONFIG)


@pytest.mark.parametrize("form", ["albert", "bert", "bert, pre-norm"])
def test_the_objective_is_a_cross_entropy_of_three_classes(form: str) -> None:
    model, (_, packed) = model_of(form).eval(), ragged(FORMS[form])
    labels = torch.tensor([2, 0, 1, 2])
    places = torch.arange(0, 60, 3)
    targets = {"masked_positions": places, "masked_labels": packed["input_ids_T"][places], "pair_labels": labels}
    losses, metrics = model(**packed, targets=targets)
    scores = model.logits(masked_positions_P=places, **packed).pair_N2
    assert scores is not None and scores.shape == (4, 3)
    by_name = dict(zip([term.name for term in model.terms], losses.tolist(), strict=True))
    wanted = -scores.log_softmax(-1)[torch.arange(4), labels].sum()
    assert by_name["pair"] == pytest.approx(float(wanted.detach()), rel=1e-5)
    right = dict(zip(metric_names(model.terms), metrics.tolist(), strict=True))["pair_correct"]
    assert right == int((scores.argmax(-1) == labels).sum())


def test_the_plan_counts_the_third_class() -> None:
    structure, order = (
        RunConfig.model_validate(changed(RECIPE, "sequences", {"max_seq_length": 32, "sentence_pair": pair}))
        for pair in ("structure", "sop")
    )
    width = order.model.hidden_size
    assert num_parameters(structure) - num_parameters(order) == width + 1
    model = PretrainingModel(structure.model, kernels="torch", objectives=make_objectives(structure.objective_weights))
    assert num_parameters(structure) == sum(weight.numel() for weight in model.parameters())
    assert flops_per_token(structure, 32.0) - flops_per_token(order, 32.0) == pytest.approx(6 * width / 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"objectives": [{"type": "masked_words"}, {"type": "sentence_pair"}]},
            [
                'objectives.1.type: "sentence_pair" has no pairs to learn: sequences.sentence_pair is "structure", '
                'wanted "nsp" or "sop"',
                'objectives: "sentence_structure" is missing and sequences.sentence_pair "structure" makes pairs: '
                'list it, or wanted sequences.sentence_pair "none"',
            ],
        ),
        ({"objectives": [{"type": "masked_words"}, {"type": "sentence_structure", "weight": 0.5}]}, []),
        (
            {"model": {**RECIPE["model"], "type": "electra"}},
            ['sequences.sentence_pair: "structure" wants a head for pairs, which electra has not: wanted "none"'],
        ),
        (
            {"model": {**RECIPE["model"], "type": "roberta"}},
            ['sequences.sentence_pair: "structure" wants segments, which roberta does not tell apart: wanted "none"'],
        ),
    ],
)
def test_what_cannot_be_learned_is_told(changes: dict[str, Any], said: list[str]) -> None:
    recipe = changed(RECIPE, "sequences", {"max_seq_length": 32, "sentence_pair": "structure"}) | changes
    recipe["model"] = {name: value for name, value in recipe["model"].items() if name != "type_vocab_size"}
    recipe["corpus"] = {**RECIPE["corpus"], "type": "shards", "sources": [{"path": "s"}], "tokenizer": "t"}
    recipe["corpus"] = {name: recipe["corpus"][name] for name in ("type", "sources", "tokenizer")}
    lines = [problem.line("r.json") for problem in recipe_problems(RunConfig.model_validate(recipe, strict=False))]
    assert [line for line in lines if "pair" in line] == [f"r.json: {text}" for text in said]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return plain_workshop(tmp_path_factory.getbasetemp())


def test_a_run_learns_is_evaluated_and_exported_as_the_order_of_sentences(workshop: Workshop, tmp_path: Path) -> None:
    run_dir = workshop.run(STRUCTURE)
    for kind in ("train", "evaluation"):
        rows = read_metrics(run_dir / "metrics.jsonl", kind)
        assert rows and all(abs(row["loss_pair"] - np.log(3)) < 0.1 for row in rows)
    assert 0 <= read_metrics(run_dir / "metrics.jsonl", "evaluation")[-1]["pair_accuracy"] <= 1
    said = must(ROOT / "bert_ds/export_hf.py", "--run_dir", run_dir, "--output", tmp_path / "hf")
    sentence = "of the three classes of pairs next and previous are exported: transformers' head has two"
    assert said.rstrip().endswith(f"tokenizer equal; {sentence}")
    content, card = read_json(tmp_path / "hf/config.json"), (tmp_path / "hf/README.md").read_text(encoding="utf-8")
    assert (content["architectures"], content["sentence_pair_objective"]) == (["BertForPreTraining"], "sop")
    assert "| sentence pair objective | structure |" in card and f"| pair classifier | {sentence} |" in card
    weights = load_fp32_state_dict(run_dir / "checkpoints/global_step4")
    tensors = load_hf_folder(tmp_path / "hf").tensors
    assert weights["seq_relationship.weight"].shape[0] == 3
    assert torch.equal(tensors["cls.seq_relationship.weight"], weights["seq_relationship.weight"][:2])
    assert torch.equal(tensors["cls.seq_relationship.bias"], weights["seq_relationship.bias"][:2])
    # A run that learns the same starts from the run, and from the export one of two classes.
    run = RunConfig.model_validate_json((run_dir / "run_config.json").read_text())
    assert weights_problem(run_dir, run) is None
    text = 'tells 2 kinds of pairs apart, sequences.sentence_pair "structure" wants another'
    assert str(weights_problem(tmp_path / "hf", run)).endswith(text)
    order = run.model_copy(update={"sequences": run.sequences.model_copy(update={"sentence_pair": "sop"})})
    assert weights_problem(tmp_path / "hf", order) is None
    assert 'tells 3 kinds of pairs apart, sequences.sentence_pair "sop"' in str(weights_problem(run_dir, order))
    again = PretrainingModel(run.model, kernels="torch", objectives=make_objectives(run.objective_weights))
    load_initial_weights(again, run_dir, read_run=lambda folder: weights)
    assert torch.equal(again.state_dict()["seq_relationship.weight"], weights["seq_relationship.weight"])


def test_a_student_of_a_teacher_with_another_head_keeps_its_own() -> None:
    student, teacher = model_of(seed=1), model_of(pair="sentence_pair", seed=2)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    start_from_layers(student, teacher, range(3))
    for name, tensor in student.state_dict().items():
        kept = name.startswith("seq_relationship")
        assert torch.equal(tensor, before[name] if kept else teacher.state_dict()[name]), name
