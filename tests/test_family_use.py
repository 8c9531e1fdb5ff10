"""What is done with a pre-trained folder without training it, for every family, beside transformers."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from config_cases import DEEPSPEED, RECIPE, changed, write_json
from downstream_cases import PIECES, task_of, write_lines, write_tiny_export
from family_cases import EVERY_FAMILY, FORMS, WIRED, disturbed, of_size, settings_of
from test_probing import encoder_of, read, tag_task

from bert_ds import check_run, show_masks, submit
from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.families.marks import BERT_MARKS
from bert_ds.configuration.model_folder import folder_model
from bert_ds.configuration.run_plan import make_plan
from bert_ds.configuration.task.task_config import load_task
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.untrained.masked_lm import open_masked_lm, open_with_transformers
from bert_ds.downstream.untrained.masked_scores import pseudo_log_likelihoods
from bert_ds.downstream.untrained.masked_words import masked_word_figures
from bert_ds.downstream.untrained.minimal_pairs import MinimalPair, judge_pairs
from bert_ds.downstream.untrained.probing import layer_vectors
from bert_ds.encoder.hf_mapping import to_hf
from bert_ds.encoder.hf_onnx import write_onnx
from bert_ds.encoder.pretrained import load_masked_lm, load_pretrained
from bert_ds.encoder.pretraining_model import PretrainingModel

TEXTS = ("the film is very dull.", "we saw it in london and paris", "中文")
ONNX_FORMS = {"modernbert": "words", "roberta": "classes"}
"""What is written as ONNX beside the forms of BERT in test_export_hf and test_hf_onnx, with other inputs and positions;
both forms of each family in make campaign-families."""


@pytest.fixture(scope="module", params=WIRED)
def pretrained(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pre-trained model."""
    config = of_size(WIRED[request.param], vocab_size=len(PIECES), num_hidden_layers=2)
    return write_tiny_export(tmp_path_factory.mktemp("pretrained") / "hf", has_pair_head=False, encoder=config)


def theirs_of(folder: Path) -> tuple[Any, Any]:
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_the_layers_that_are_probed_are_the_hidden_states_of_transformers(pretrained: Path, tmp_path: Path) -> None:
    task = task_of(tmp_path, json.loads(tag_task(tmp_path, rows=6).read_text()))
    features = read(task, pretrained).train.features
    model, _ = theirs_of(pretrained)
    for feature in features[:3]:
        found = layer_vectors(encoder_of(pretrained), [feature], kind=task.kind, batch_size=4, limit=10**6, seed=3)
        with torch.no_grad():
            ids_1S = torch.from_numpy(feature.input_ids[None]).long()
            states = model.base_model(ids_1S, output_hidden_states=True).hidden_states
        places = np.flatnonzero(feature.targets["tag"] >= 0)
        wanted = torch.stack(states)[:, 0, places].numpy()
        assert len(wanted) == model.config.num_hidden_layers + 1
        np.testing.assert_allclose(found.vectors_LnD, wanted, rtol=1e-4, atol=1e-5)


def test_masked_words_are_scored_by_our_model_as_by_transformers(pretrained: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "text.txt", [f"{text}\n" for text in TEXTS * 8])
    ours = open_masked_lm(pretrained, kernels="torch", device="cpu")
    theirs = open_with_transformers(pretrained, device="cpu")
    assert ours.name.startswith("this project's") and theirs.name.startswith("transformers'")
    assert (theirs.before, theirs.after, theirs.max_length) == (ours.before, ours.after, ours.max_length)
    data = {"validation": [{"path": str(tmp_path / "text.txt"), "format": "text"}]}
    task = load_task("masked_words").model_copy(
        update={"data": task_of(tmp_path, {"kind": "masked_words", "data": data}).data, "max_seq_length": 64}
    )
    found, wanted = (masked_word_figures(model, task, lambda text: None) for model in (theirs, ours))
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_sentence_is_as_likely_as_transformers_says(pretrained: Path) -> None:
    ours, tokenizer = load_masked_lm(pretrained, kernels="torch"), load_tokenizer(pretrained)
    model, theirs = theirs_of(pretrained)
    wanted = []
    for text in TEXTS:
        ids = theirs(text, return_tensors="pt")["input_ids"]
        total = 0.0
        for place in range(1, ids.shape[1] - 1):
            masked = ids.clone()
            masked[0, place] = theirs.mask_token_id
            with torch.no_grad():
                total += model(masked).logits[0, place].log_softmax(-1)[ids[0, place]].item()
        wanted.append(total)
    assert pseudo_log_likelihoods(ours, tokenizer, TEXTS) == pytest.approx(wanted, rel=1e-4)
    (judged,) = judge_pairs(ours, tokenizer, [MinimalPair(TEXTS[0], TEXTS[1], "any")])
    assert [judged.good_score, judged.bad_score] == pytest.approx(wanted[:2], rel=1e-4)


def test_masks_are_shown(pretrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    text = "the [MASK] is dull."
    model, tokenizer = theirs_of(pretrained)
    monkeypatch.setattr(sys, "argv", ["show_masks.py", "--model", str(pretrained), "--text", text, "--top_k", "1"])
    show_masks.main()
    with torch.no_grad():
        asked = tokenizer(text.replace("[MASK]", tokenizer.mask_token), return_tensors="pt")
        best = int(model(**asked).logits[0, 2].argmax())
    assert capsys.readouterr().out.splitlines()[1].split()[0] == tokenizer.decode([best]).strip()


@pytest.mark.parametrize(
    ("pretrained", "form"),
    [
        pytest.param(name, form, marks=() if form == ONNX_FORMS.get(name) else pytest.mark.campaign)
        for name in WIRED
        for form in ("words", "classes")
    ],
    indirect=["pretrained"],
)
def test_an_onnx_file_gives_the_scores_of_masked_words_or_of_classes(
    pretrained: Path, form: str, tmp_path: Path
) -> None:
    folder, (theirs, tokenizer) = pretrained, theirs_of(pretrained)
    if form == "classes":
        kind = type(theirs).__name__.replace("MaskedLM", "SequenceClassification")
        torch.manual_seed(0)
        theirs = getattr(transformers, kind).from_pretrained(pretrained, num_labels=3).eval()
        folder = tmp_path / "classifier"
        theirs.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (tmp_path / "onnx").mkdir()
    write_onnx(folder, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "onnx")(
        [*TEXTS, "the " * 60], padding=True, truncation=True, return_tensors="np"
    )
    (found,) = session.run(["logits"], dict(inputs))
    with torch.no_grad():
        wanted = theirs(**{key: torch.from_numpy(array) for key, array in inputs.items()}).logits.numpy()
    kept = slice(None) if found.ndim == 2 else inputs["attention_mask"].astype(bool)
    assert abs(found - wanted)[kept].max() < 1e-4 * abs(wanted).max()


def test_a_folder_that_transformers_wrote_is_opened_by_its_name(pretrained: Path, tmp_path: Path) -> None:
    model, tokenizer = theirs_of(pretrained)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert folder_model(tmp_path) == folder_model(pretrained)
    found, wanted = (load_masked_lm(folder, kernels="torch").state_dict() for folder in (tmp_path, pretrained))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(pretrained).fingerprint
    begun, wanted = (load_pretrained(folder).tensors for folder in (tmp_path, pretrained))
    assert begun.keys() == wanted.keys()


def test_a_discriminator_is_a_start_for_tasks_and_predicts_no_words(tmp_path: Path) -> None:
    ours = disturbed(PretrainingModel(FORMS["electra"], kernels="torch", has_pair_head=False))
    model = transformers.ElectraForPreTraining(settings_of(FORMS["electra"]))
    names = model.load_state_dict(to_hf(ours.state_dict(), FORMS["electra"]), strict=False)
    assert all(name.startswith("discriminator_predictions.") for name in names.missing_keys)
    model.save_pretrained(tmp_path)
    begun = load_pretrained(tmp_path)
    assert len(begun.unused) == 4 and all(
        torch.equal(begun.tensors[f"bert.{name}"], weight) for name, weight in ours.bert.state_dict().items()
    )
    with pytest.raises(CheckpointError, match=r"has no masked-word head: .* no fine-tuned one and no discriminator"):
        load_masked_lm(tmp_path)


@EVERY_FAMILY
def test_a_plan_counts_what_is_trained(
    config: EncoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = changed(RECIPE, "model", of_size(config, vocab_size=RECIPE["model"]["vocab_size"]).model_dump(mode="json"))
    recipe = changed(changed(recipe, "sequences.sentence_pair", "none"), "sequences.max_seq_length", 64)
    if config.MARKS != BERT_MARKS:
        recipe = changed(changed(recipe, "corpus.tokenizer_kind", "bpe"), "corpus.lowercase", False)
    run, ds = load_pair(write_json(tmp_path, "run.json", recipe), write_json(tmp_path, "ds.json", DEEPSPEED))
    plan = make_plan(run, ds, 1)
    model = PretrainingModel(run.model, has_pair_head=False)
    assert plan.num_parameters == sum(weight.numel() for weight in model.parameters())
    files = ["--run", str(tmp_path / "run.json"), "--deepspeed_config", str(tmp_path / "ds.json")]
    monkeypatch.setattr(sys, "argv", ["check_run.py", *files])
    check_run.main()
    assert f"{plan.num_parameters:,}" in capsys.readouterr().out
    job = ["--run_dir", str(tmp_path / "run"), "--nodes", "1", "--gpus_per_node", "1", "--time", "1:00:00", "--dry_run"]
    monkeypatch.setattr(sys, "argv", ["submit.py", *files, *job])
    assert submit.main() == 0
    said = capsys.readouterr().out
    assert f"{plan.num_parameters:,}" in said and "sbatch" in said


def test_a_plan_knows_the_whole_model_of_a_folder(pretrained: Path) -> None:
    found = folder_model(pretrained)
    model = load_masked_lm(pretrained, kernels="torch")
    assert found is not None
    assert found.count_parameters(has_pair_head=False) == sum(weight.numel() for weight in model.parameters())
    assert found.attended_tokens(40.0) == model.config.attended_tokens(40.0)
