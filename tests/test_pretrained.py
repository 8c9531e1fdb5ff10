"""Folders of the BERT family as a start for a task: every form they come in gives the same encoder, or is refused."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from downstream_cases import CONFIG
from safetensors.torch import load_file, save_file
from torch import Tensor

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.tuning.task_folder import make_task_model
from bert_ds.encoder.pretrained import load_masked_lm, load_pretrained, start_from

Tensors = dict[str, Tensor]


def rewrite(source: Path, folder: Path, change: Callable[[Tensors], Tensors], *, as_bin: bool = False) -> Path:
    """Write the weights of a folder in another form."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = change(load_file(source / "model.safetensors"))
    if as_bin:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def old_names(tensors: Tensors) -> Tensors:
    """As the first conversions from TensorFlow wrote them, with the decoder and the buffer of positions."""
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    renamed["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    renamed["bert.embeddings.position_ids"] = torch.arange(CONFIG.max_position_embeddings)[None]
    return renamed


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items() if name.startswith("bert.")}


def saved_by_transformers(source: Path, folder: Path, architecture: str) -> Path:
    """The folder that another fine-tuning left behind, in several files."""
    model = getattr(transformers, architecture).from_pretrained(source)
    model.save_pretrained(folder, max_shard_size="50KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


FORMS: dict[str, Callable[[Path, Path], Path]] = {
    "gamma and beta in a .bin": lambda source, folder: rewrite(source, folder, old_names, as_bin=True),
    "no bert. in front": lambda source, folder: rewrite(source, folder, without_prefix),
    **{
        name: lambda source, folder, name=name: saved_by_transformers(source, folder, name)  # type: ignore[misc]
        for name in ("BertModel", "BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering")
    },
}
WITHOUT_POOLER = ("BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_folder_gives_the_same_encoder(tiny_export: Path, tmp_path: Path, form: str) -> None:
    wanted = load_pretrained(tiny_export)
    found = load_pretrained(FORMS[form](tiny_export, tmp_path / "hf"))
    assert found.config == wanted.config
    names = {name for name in wanted.tensors if form not in WITHOUT_POOLER or ".pooler." not in name}
    assert set(found.tensors) == names
    assert [name for name in names if not torch.equal(found.tensors[name], wanted.tensors[name])] == []
    heads = {"gamma and beta in a .bin": "cls.", "BertForMaskedLM": "cls.", "BertForTokenClassification": "classifier."}
    prefix = heads.get(form, "qa_outputs." if form == "BertForQuestionAnswering" else "")
    assert bool(found.unused) == bool(prefix)
    assert all(name.startswith(prefix) for name in found.unused)


def test_a_missing_pooler_is_initialised_and_named(tiny_export: Path, tmp_path: Path) -> None:
    found = load_pretrained(saved_by_transformers(tiny_export, tmp_path / "hf", "BertForMaskedLM"))
    labels = {"label": ("a", "b")}
    model = make_task_model(KINDS["classification"], CONFIG, labels, kernels="torch")
    assert sorted(start_from(model, found.tensors)) == [
        "bert.pooler.dense_bias",
        "bert.pooler.dense_weight",
        "head.classifier.bias",
        "head.classifier.weight",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "bert.encoder.layer.0.adapter.weight": torch.ones(2)}, "unknown bert.encoder.layer.0.adapter"),
        (lambda t: {**t, "crf.transitions": torch.ones(2)}, "unknown crf.transitions"),
        (
            lambda t: {k: v for k, v in t.items() if "layer.1.output.dense" not in k},
            "2 wrong tensors: missing bert.enc",
        ),
        (lambda t: {**t, "bert.pooler.dense.bias": torch.ones(3)}, r"pooler.dense.bias has shape \[3\], wanted \[32\]"),
    ],
)
def test_tensors_that_are_no_head_are_listed_and_refused(
    tiny_export: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(rewrite(tiny_export, tmp_path / "hf", change))


@pytest.mark.parametrize("name", ["xlnet", "deberta"])
def test_another_family_is_refused_by_name(tiny_export: Path, tmp_path: Path, name: str) -> None:
    folder = rewrite(tiny_export, tmp_path / "hf", lambda tensors: tensors)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "model_type": name}))
    with pytest.raises(ConfigError, match=f'model_type is \'{name}\', wanted "albert" or "bert"'):
        load_pretrained(folder)


def test_the_masked_word_head_is_loaded_from_old_names_and_missed_in_a_fine_tuned_folder(
    tiny_export: Path, tmp_path: Path
) -> None:
    wanted = load_masked_lm(tiny_export, kernels="torch").state_dict()
    old = rewrite(tiny_export, tmp_path / "old", old_names, as_bin=True)
    found = load_masked_lm(old, kernels="torch").state_dict()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    alone = saved_by_transformers(tiny_export, tmp_path / "mlm", "BertForMaskedLM")
    assert load_masked_lm(alone, kernels="torch").has_pair_head is False
    fine_tuned = saved_by_transformers(tiny_export, tmp_path / "ner", "BertForTokenClassification")
    with pytest.raises(CheckpointError, match="has no masked-word head: wanted a pre-trained model"):
        load_masked_lm(fine_tuned)
