from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import runpy
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
import transformers
from call_watch import Calls
from export_cases import export, spread_state_dict, write_tokenizer

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.encoder import hf_onnx
from bert_ds.encoder.hf_onnx import load_to_trace, verify_onnx, write_onnx
from bert_ds.folders.replaced_folders import replaced_export


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fine-tuned classifier of three classes, and its ONNX folder within, written by the verb."""
    folder = tmp_path_factory.mktemp("classifier")
    export(folder, write_tokenizer(tmp_path_factory.mktemp("tokenizer")), spread_state_dict())
    torch.manual_seed(0)
    transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    foreign = {"auto_map": {"AutoModel": "evil--x.Y"}, "_attn_implementation_internal": "evil/kernels"}
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **foreign}))
    script = Path(__file__).parents[1] / "bert_ds" / "export_hf.py"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [str(script), "--model", str(folder), "--onnx"])
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
    return folder


def test_onnxruntime_gives_the_scores_of_transformers_for_texts_of_any_number_and_length(classifier: Path) -> None:
    session = onnxruntime.InferenceSession(classifier / "onnx" / "model.onnx")
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier / "onnx")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    for texts in (["the cat."], ["", "a", "the 中文 naïve, reading.", "the " * 200]):
        inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
        (found,) = session.run(["logits"], dict(inputs))
        with torch.no_grad():
            wanted = model(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits
        assert found.shape == (len(texts), 3)
        assert (torch.from_numpy(found) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_folder_says_what_was_measured_and_its_axes_have_names(classifier: Path) -> None:
    folder = classifier / "onnx"
    assert {path.name for path in folder.iterdir()} >= {"model.onnx", "tokenizer.json", "tokenizer_config.json"}
    facts = json.loads((folder / "config.json").read_text())
    assert facts["architectures"] == ["BertForSequenceClassification"]
    assert 0 <= facts["onnx"]["max_difference"] < 1e-4
    inputs = onnxruntime.InferenceSession(folder / "model.onnx").get_inputs()
    assert [(one.name, one.shape) for one in inputs] == [
        (name, ["batch", "sequence"]) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]


def test_no_key_of_a_foreign_folder_that_names_code_is_in_it(classifier: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        found = json.loads((classifier / "onnx" / name).read_text())
        assert "evil" not in json.dumps(found)
        assert set(found) >= ({"model_type"} if name == "config.json" else {"do_lower_case", "model_max_length"})


def test_every_file_can_be_read_by_whom_the_umask_lets_read(classifier: Path) -> None:
    assert len({path.stat().st_mode for path in (classifier / "onnx").iterdir()}) == 1


def test_a_file_of_another_model_is_caught(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, hf_onnx, _random_inputs=Calls.THROUGH)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    with torch.no_grad():
        model.classifier.bias[0] += 0.1
    with pytest.raises(CheckpointError, match=r"onnxruntime's scores differ from transformers' by 1\.000e-01"):
        verify_onnx(model, classifier / "onnx" / "model.onnx", longest=37)
    assert [(one["batch_size"], one["length"]) for one in calls["_random_inputs"]] == [(1, 1), (1, 37), (3, 19)]


def test_a_folder_of_an_older_onnx_is_replaced(classifier: Path) -> None:
    copy = classifier.parent / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((classifier / "onnx" / "config.json").read_bytes())
    with replaced_export(copy) as folder:
        (folder / "new").touch()
    assert sorted(path.name for path in copy.iterdir()) == ["export_manifest.json", "new"]


def test_a_pooler_is_there_where_its_weights_are(tmp_path: Path) -> None:
    export(tmp_path / "hf", write_tokenizer(tmp_path / "tokenizer"), spread_state_dict())
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["BertModel"]}))
    model = load_to_trace(tmp_path / "hf")
    assert model.pooler is not None
    model.pooler = None
    model.save_pretrained(tmp_path / "bare")
    assert load_to_trace(tmp_path / "bare").pooler is None


@pytest.mark.parametrize(("architectures", "found"), [(["RobertaForMaskedLM"], "Roberta"), (None, "missing")])
def test_a_folder_of_another_architecture_is_refused(tmp_path: Path, architectures: object, found: str) -> None:
    facts = {"model_type": "bert", "architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=f"architectures is .*{found}.*, wanted one of BertForMaskedLM"):
        write_onnx(tmp_path, tmp_path)


def test_a_folder_without_a_head_that_its_architecture_needs_is_refused(tmp_path: Path) -> None:
    export(tmp_path / "hf", write_tokenizer(tmp_path / "tokenizer"), spread_state_dict())
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["BertForTokenClassification"]}))
    with pytest.raises(CheckpointError, match=r"transformers finds no weights for .*classifier.weight"):
        write_onnx(tmp_path / "hf", tmp_path)


def test_predict_answers_with_the_file_as_transformers_does_with_the_folder(classifier: Path) -> None:
    from bert_ds.downstream.tuning.predictor import Predictor

    texts = ["the cat.", "a", "the 中文 naïve, reading."]
    predict = Predictor(classifier / "onnx")
    *answers, empty = predict([*texts, ""], batch_size=2)
    assert predict.kind == "classification" and empty["error"] == "text is empty"
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier / "onnx")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier)
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            shares = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(0)
        assert list(answer["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-4)
        assert answer["label"] == f"LABEL_{int(shares.argmax())}"
