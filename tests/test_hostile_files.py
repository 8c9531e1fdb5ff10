"""Files made to run a command, escape a folder or fill the memory: none does, and each is refused with its name.

The command is `touch CANARY`; after each attempt the canary must not be there.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from export_cases import export, spread_state_dict, write_tokenizer

from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.corpus.batches.sequences import _read_cache
from bert_ds.corpus.shards.shard_folder import read_manifest as read_shard_manifest
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.encoder.hf_folder import load_hf_folder
from bert_ds.training.checkpoints.checkpoint_engine import VerifiedCheckpointEngine
from bert_ds.training.checkpoints.checkpoint_loader import checkpoint_folder
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict
from bert_ds.training.checkpoints.universal_checkpoint import weights_only_forced

ROOT = Path(__file__).resolve().parents[1]
REFUSED = (ConfigError, DataError, CheckpointError)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model, as export_hf.py leaves it."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    export(folder, write_tokenizer(folder.parent / "tokenizer"), spread_state_dict())
    return folder


def copied(folder: Path, target: Path, *, without: str = "") -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.name != without:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_the_payload_would_run(canary: Path, tmp_path: Path) -> None:
    torch.save({"weight": Payload(canary)}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("value", ["payload", "payload in a state dict", "payload among tensors"])
def test_a_pytorch_model_that_runs_a_command_is_refused(
    tmp_path: Path, canary: Path, model_folder: Path, zipped: bool, value: str
) -> None:
    folder = copied(model_folder, tmp_path / "m", without="model.safetensors")
    payload: Any = Payload(canary)
    content = {"payload": payload, "payload in a state dict": {"bert.pooler.dense.bias": payload}}.get(
        value, {"a": torch.ones(2), "b": [payload]}
    )
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged or holds more than tensors"):
        load_hf_folder(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pytorch_model.bin", b"cos\nsystem\n(S'touch CANARY'\ntR."),
        ("pytorch_model.bin", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."),
        ("pytorch_model.bin", os.urandom(3000)),
        ("pytorch_model.bin", b""),
        ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../../etc/passwd"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}'),
        ("model.safetensors.index.json", b'{"weight_map": [1]}'),
        ("pytorch_model.bin.index.json", b"{}"),
    ],
    ids=range(10),
)
def test_a_crafted_weight_file_is_refused_by_name(
    tmp_path: Path, canary: Path, model_folder: Path, name: str, content: bytes
) -> None:
    folder = copied(model_folder, tmp_path / "m", without="model.safetensors")
    (folder / name).write_bytes(content.replace(b"CANARY", str(canary).encode()))
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_hf_folder(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "facts",
    [
        {"_attn_implementation_internal": "evil/kernels"},
        {"_attn_implementation": "evil/kernels"},
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil--configuration.Evil"}},
        {"hidden_size": 10**12},
        {"hidden_size": "os.system"},
        {"num_hidden_layers": 10**9},
    ],
    ids=lambda facts: next(iter(facts)),
)
def test_a_model_configuration_that_brings_code_or_absurd_sizes_is_refused(
    tmp_path: Path, model_folder: Path, facts: dict[str, Any]
) -> None:
    folder = copied(model_folder, tmp_path / "m")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **facts}))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_hf_folder(folder)


def checkpoint(run_dir: Path, contents: dict[str, Any], **facts: Any) -> Path:
    """A checkpoint whose manifest is right, as somebody would make it who can write to the folder."""
    folder = run_dir / "checkpoints/global_step4"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        torch.save(content, folder / name)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": checkpoint_folder.file_sha256(folder / name)}
        for name in contents
    }
    manifest = {"format": 1, "step": 4, "world_size": 1, "zero_stage": 2, "precision": "bfloat16", "state": {}}
    checkpoint_folder.write_manifest(folder, {**manifest, "files": files, **facts})
    return folder


MODEL, OPTIMIZER = "mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL_STATE: dict[str, Any] = {
    "module": {"w": torch.ones(2)},
    "buffer_names": [],
    "param_shapes": [{"w": [2]}],
    "shared_params": {},
}


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER])
def test_a_checkpoint_of_deepspeed_that_runs_a_command_is_refused(tmp_path: Path, canary: Path, name: str) -> None:
    contents = {MODEL: MODEL_STATE, OPTIMIZER: {"optimizer_state_dict": {}}, name: {"client_state": Payload(canary)}}
    folder = checkpoint(tmp_path, contents)
    with pytest.raises(CheckpointError, match=name):
        load_fp32_state_dict(folder)
    with pytest.raises(CheckpointError, match=name):
        VerifiedCheckpointEngine(parameter_names=[]).load(str(folder / name))
    assert not canary.exists()


def test_deepspeeds_own_loading_is_closed_while_a_universal_checkpoint_is_made(tmp_path: Path, canary: Path) -> None:
    torch.save(Payload(canary), tmp_path / "x.pt")
    with weights_only_forced(), pytest.raises(Exception, match=r"[Ww]eights_?[Oo]nly|[Ww]eights.?only"):
        torch.load(tmp_path / "x.pt", weights_only=False)
    assert not canary.exists()


@pytest.mark.parametrize("content", [{}, [], {"module": 3}, {**MODEL_STATE, "param_shapes": 7}])
def test_a_checkpoint_of_plain_but_wrong_content_is_refused(tmp_path: Path, content: Any) -> None:
    folder = checkpoint(tmp_path, {MODEL: content, OPTIMIZER: {"optimizer_state_dict": {}}})
    with pytest.raises(CheckpointError, match="global_step4"):
        load_fp32_state_dict(folder)


@pytest.mark.parametrize("pointer", ["../../elsewhere", "/etc", "global_step4/../../x", "", "\0", "x" * 100_000])
def test_the_pointer_is_never_followed(tmp_path: Path, pointer: str) -> None:
    folder = checkpoint(tmp_path, {MODEL: MODEL_STATE})
    (folder.parent / "latest").write_text(pointer)
    assert checkpoint_folder.find_checkpoint(tmp_path) == folder


@pytest.mark.parametrize("name", ["../global_step4", "/etc", "global_step4/..", "latest", "global_step4\n", ".tmp-x"])
def test_a_checkpoint_is_named_by_its_step_alone(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path, {MODEL: MODEL_STATE})
    with pytest.raises(CheckpointError, match="not the name of a checkpoint"):
        checkpoint_folder.find_checkpoint(tmp_path, name)


RECORD = {"bytes": 5, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "files",
    [
        {"../outside.pt": RECORD},
        {"/etc/passwd": RECORD},
        {"sub/x.pt": RECORD},
        {"..": RECORD},
        {MODEL: "x"},
        {MODEL: {"bytes": 1}},
        [MODEL],
        None,
    ],
    ids=range(8),
)
def test_a_manifest_speaks_of_its_own_folder_only(tmp_path: Path, files: Any) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/outside.pt").write_text("12345")
    folder = checkpoint(tmp_path, {MODEL: MODEL_STATE}, files=files)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint_folder.verify_checkpoint(folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{}", b"[]", b"\xff", b'{"checksum": 3, "files": {}}'])
def test_a_manifest_that_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = checkpoint(tmp_path, {MODEL: MODEL_STATE})
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint_folder.verify_checkpoint(folder)


def test_a_link_out_of_the_checkpoint_is_no_part_of_it(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {MODEL: MODEL_STATE})
    (folder / MODEL).rename(tmp_path / "outside.pt")
    (folder / MODEL).symlink_to(tmp_path / "outside.pt")
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoint_folder.verify_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"[" * 200_000),
        ("tokenizer.json", b'{"model": {"type": "WordPiece"}}'),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": [1, 2]}}'),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {"a": "x"}}}'),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}, "added_tokens": [3]}'),
        ("tokenizer.json", b'{"model": {"type": "WordPiece", "vocab": {"a": 99999999999999}}}'),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}'),
        ("tokenizer.json", b"\xff\xfe"),
        ("vocab.txt", b"\n" * 100_000),
    ],
    ids=range(9),
)
def test_a_crafted_tokenizer_is_refused_by_name(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_tokenizer_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(DataError, match="wanted at most"):
        load_tokenizer(tmp_path)


def test_a_table_of_examples_with_objects_in_it_is_not_unpickled(tmp_path: Path, canary: Path) -> None:
    np.save(tmp_path / "cache.npy", np.array([Payload(canary)], dtype=object), allow_pickle=True)
    assert _read_cache(tmp_path / "cache.npy") is None
    assert not canary.exists()


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format": 1}', b"{}", b"[]", b"\xff"])
def test_a_crafted_shard_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_shard_manifest(tmp_path)


# Bombs: in a process of its own, whose memory is measured.


def gzip_bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(1 << 8):
            file.write(b"x" * (1 << 20))


def zstd_bomb(path: Path) -> None:
    compressor = zstandard.ZstdCompressor(level=3).compressobj()
    parts = [compressor.compress(b"x" * (1 << 24)) for _ in range(1 << 6)]
    path.write_bytes(b"".join(parts) + compressor.flush())


def line_bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(10):
            file.write(b"ab\n" * (1 << 20))


def parquet_bomb(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.array(["x" * (8 << 20)])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100, pyarrow.int32()), text)
    parquet.write_table(pyarrow.table({"text": column}), path, compression="zstd", store_schema=False)


def parquet_in_gzip_bomb(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=9) as file:
        for _ in range(1 << 7):
            file.write(bytes(1 << 20))


@pytest.mark.parametrize(
    ("name", "make", "limit_mb"),
    [
        ("a.txt.gz", gzip_bomb, 350),
        ("a.txt.zst", zstd_bomb, 350),
        ("a.jsonl.zst", zstd_bomb, 350),
        ("b.txt.gz", line_bomb, 350),
        ("a.parquet", parquet_bomb, 400),
        ("a.parquet.gz", parquet_in_gzip_bomb, 350),
    ],
)
def test_a_text_bomb_takes_bounded_memory(
    tmp_path: Path, name: str, make: Callable[[Path], None], limit_mb: int
) -> None:
    make(tmp_path / name)
    code = (
        "import re, sys\n"
        "from bert_ds.corpus.text.documents import read_documents\n"
        "from bert_ds.basics.ranks import DataError\n"
        "try:\n"
        "    print(sum(len(document.text) for document in read_documents([sys.argv[1]])), 'characters')\n"
        "except DataError as error:\n"
        "    print(error)\n"
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / name], cwd=ROOT, capture_output=True, text=True)
    said, memory = done.stdout.splitlines()
    assert name in said or said == f"{100 * (8 << 20)} characters"
    assert int(memory) / 1024 < limit_mb, done.stdout
