"""Model folders that hold more than a model: odd tensors, odd ids, keys that bring code, links to elsewhere."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.basics.tensor_files import load_tensor_file
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.encoder.hf_folder import copy_member, load_hf_folder, write_hf_folder


@pytest.fixture
def folder(tiny_export: Path, tmp_path: Path) -> Path:
    """A model folder of its own."""
    return Path(shutil.copytree(tiny_export, tmp_path / "m"))


TENSORS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "stride 0": (lambda: torch.zeros(1).expand(10**12), "has 1000000000000 values that share 4 bytes"),
    "stride 0 in a row": (lambda: torch.zeros(3, 1).expand(3, 5), "has 15 values that share 12 bytes"),
    "overlapping": (lambda: torch.zeros(9).as_strided((5, 5), (1, 1)), "has 25 values that share 36 bytes"),
    "meta": (lambda: torch.empty(4, 4, device="meta"), "is on the meta device and has no values"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "is stored as sparse_coo"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "is stored as sparse_csr"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "is quantised"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_more_than_its_bytes_is_refused(folder: Path, name: str, zipped: bool) -> None:
    make, wanted = TENSORS[name]
    (folder / "model.safetensors").unlink()
    content = {"bert.pooler.dense.bias": torch.zeros(2), "inside": [{"deep": make()}]}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.bin: inside\.0\.deep {wanted}, wanted a dense tensor"):
        load_hf_folder(folder)
    assert time.monotonic() - start < 5


def test_plain_tensors_and_views_pass(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    content = {"whole": whole, "view": whole.t(), "part": whole[1:], "list": [1, "a", None], "scalar": torch.tensor(1)}
    torch.save(content, tmp_path / "a.pt")
    assert load_tensor_file(tmp_path / "a.pt")["view"].shape == (4, 3)


def test_containers_without_end_are_walked(tmp_path: Path) -> None:
    content: Any = [torch.zeros(1).expand(100)]
    for _ in range(300):
        content = [content]
    endless: dict[str, Any] = {"a": content}
    endless["self"] = endless
    torch.save(endless, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="has 100 values that share 4 bytes"):
        load_tensor_file(tmp_path / "a.pt")


def test_a_compressed_part_of_a_tensor_file_is_a_bomb(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(5_000_000)}, tmp_path / "a.pt")
    bomb = zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert (tmp_path / "b.pt").stat().st_size < 50_000
    with pytest.raises(CheckpointError, match=r"b\.pt: '.*' is compressed, wanted a file that PyTorch wrote"):
        load_tensor_file(tmp_path / "b.pt")


@pytest.mark.parametrize("spelling", ["Infinity", "1e999", "NaN", '"3"', "3.0", "true", "null", "[]"])
@pytest.mark.parametrize("place", ["vocab", "added"])
def test_an_id_that_is_no_whole_number_is_named(folder: Path, spelling: str, place: str) -> None:
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    if place == "vocab":
        whole["model"]["vocab"]["film"] = "ID"
    else:
        whole["added_tokens"].append({"content": "film2", "id": "ID"})
    path.write_text(json.dumps(whole).replace('"ID"', spelling))
    with pytest.raises(DataError, match=r"tokenizer\.json: the id of 'film2?' is .*, wanted a whole number"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "change", "wanted"),
    [
        ("tokenizer.json", {"normalizer": [1]}, "normalizer is"),
        ("tokenizer_config.json", {"strip_accents": "yes"}, "strip_accents is 'yes', wanted true or false"),
        ("tokenizer_config.json", {"do_lower_case": float("inf")}, "do_lower_case is 'inf', wanted true or false"),
    ],
)
def test_an_odd_rule_of_a_tokenizer_is_named(folder: Path, name: str, change: dict[str, Any], wanted: str) -> None:
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **change}))
    with pytest.raises(DataError, match=wanted):
        load_tokenizer(folder)


def test_half_a_character_in_a_vocabulary_is_named(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"film"', '"\\ud800"'))
    (folder / "vocab.txt").unlink()
    with pytest.raises(DataError, match=r"holds half a character at id \d+"):
        load_tokenizer(folder)


def exported(tokenizer: Path, target: Path) -> dict[str, Any]:
    """What an export says of a tokenizer."""
    target.mkdir()
    tensors = {"w": torch.ones(1)}
    config = {"model_type": "bert", "max_position_embeddings": 48}
    write_hf_folder(target, config=config, tensors=tensors, tokenizer=tokenizer, model_card="")
    return json.loads((target / "tokenizer_config.json").read_text())


def test_a_key_that_would_run_code_does_not_reach_an_export(folder: Path, tmp_path: Path) -> None:
    path = folder / "tokenizer_config.json"
    before = json.loads(path.read_text())
    foreign = {"auto_map": {"AutoTokenizer": ["evil--x.Y", None]}, "custom": 1, "tokenizer_class": "EvilTokenizer"}
    path.write_text(json.dumps({**before, **foreign}))
    ours = {"model_max_length": 48, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    assert exported(folder, tmp_path / "out") == {**before, **ours}


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "vocab.txt"])
def test_a_link_out_of_the_folder_is_not_followed_into_an_export(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises((ConfigError, DataError), match="is a link out of its folder"):
        exported(folder, tmp_path / "out")
    with pytest.raises(DataError, match=rf"{name} is a link out of its folder, to .*secret: wanted the file itself"):
        load_tokenizer(folder)
    with pytest.raises(ConfigError, match="is a link out of its folder"):
        copy_member(folder / name, tmp_path / "copy")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_model_of_the_hub_cache_is_read_through_its_links_and_no_other(
    folder: Path, tmp_path: Path, name: str
) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/01"
    shutil.copytree(folder, snapshot)
    (tmp_path / "models--a--b/blobs").mkdir()
    for path in snapshot.iterdir():
        blob = tmp_path / "models--a--b/blobs" / path.name
        path.rename(blob)
        path.symlink_to(f"../../blobs/{path.name}")
    assert load_hf_folder(snapshot).tensors and load_tokenizer(snapshot).vocab_size
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(folder / name)
    with pytest.raises((ConfigError, CheckpointError), match=rf"{name} is a link out of its folder"):
        load_hf_folder(snapshot)
