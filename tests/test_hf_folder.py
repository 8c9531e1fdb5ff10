from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from export_cases import CONFIG, export, spread_state_dict, write_tokenizer
from safetensors.torch import load_file

from bert_ds.basics.ranks import CheckpointError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.encoder.hf_folder import load_hf_folder
from bert_ds.encoder.hf_mapping import from_hf
from bert_ds.encoder.hf_verify import probe_sequences


@pytest.fixture(scope="module")
def right_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("right")
    tokenizer = write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")
    export(folder, tokenizer, spread_state_dict())
    return folder


def test_an_export_is_read_back_as_it_was_written(right_export: Path) -> None:
    state_dict = spread_state_dict()
    config, tensors = load_hf_folder(right_export)
    assert config == CONFIG
    back = from_hf(tensors, config, has_pair_head=True)
    assert all(torch.equal(back[name], state_dict[name]) for name in state_dict)


def test_the_weights_can_be_read_by_whom_the_umask_lets_read(right_export: Path) -> None:
    assert len({path.stat().st_mode for path in right_export.iterdir()}) == 1


def test_scores_are_compared_on_sequences_of_many_lengths_with_padding() -> None:
    probe = probe_sequences(CONFIG)
    assert probe.padded["attention_mask"].sum(1).tolist() == [37, 1, 19, 13]
    assert probe.packed["cu_seqlens"].tolist() == [0, 37, 38, 57, 70]


def test_sharded_safetensors_are_read(right_export: Path, tmp_path: Path) -> None:
    model = transformers.BertForPreTraining.from_pretrained(right_export)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert set(load_hf_folder(tmp_path).tensors) == set(load_hf_folder(right_export).tensors)


def test_a_pytorch_bin_is_read_where_there_is_nothing_safer(right_export: Path, tmp_path: Path) -> None:
    tensors = load_file(right_export / "model.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((right_export / "config.json").read_bytes())
    found = load_hf_folder(tmp_path).tensors
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").write_bytes((right_export / "model.safetensors").read_bytes())
    found = load_hf_folder(tmp_path).tensors
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


class _Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_a_pickle_that_runs_code_is_refused_and_not_run(right_export: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((right_export / "config.json").read_bytes())
    canary = tmp_path / "canary"
    for payload in (pickle.dumps(_Payload(canary), protocol=2), b""):
        (tmp_path / "pytorch_model.bin").write_bytes(payload)
        with pytest.raises(CheckpointError, match="damaged or holds more than tensors"):
            load_hf_folder(tmp_path)
    torch.save({"x": _Payload(canary)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="damaged or holds more than tensors"):
        load_hf_folder(tmp_path)
    assert not canary.exists()


def test_an_index_that_leaves_its_folder_is_refused(right_export: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((right_export / "config.json").read_bytes())
    index = {"weight_map": {"x": str(right_export / "model.safetensors")}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which is not in its folder"):
        load_hf_folder(tmp_path)


def test_a_folder_without_weights_or_config_is_refused(right_export: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config.json"):
        load_hf_folder(tmp_path)
    (tmp_path / "config.json").write_bytes((right_export / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="has no weights"):
        load_hf_folder(tmp_path)
