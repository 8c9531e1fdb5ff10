"""bert_kernels by itself: a wheel of its own, for an environment with torch and triton only, beside bert-ds or not."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import bert_kernels
from bert_ds.reporting.environment import CARRIED_KERNELS, other_kernels

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel that is built from a copy of kernels/, without network."""
    source, output = tmp_path_factory.mktemp("source") / "kernels", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "kernels", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "results"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(output), str(source)], check=True)
    (wheel,) = output.iterdir()
    target = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_the_wheel_holds_the_package_alone_with_its_licence_and_wants_torch_and_triton_only(installed: Path) -> None:
    (info,) = installed.glob("bert_kernels-*.dist-info")
    assert sorted(path.name for path in installed.iterdir()) == ["bert_kernels", info.name]
    files = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels/bert_kernels").rglob("*.py")}
    assert {path.relative_to(installed) for path in (installed / "bert_kernels").rglob("*.py")} == files
    facts = message_from_string((info / "METADATA").read_text("utf-8"))
    assert facts["Name"] == "bert-kernels" and facts["Version"] == bert_kernels.__version__
    wanted = [each for each in facts.get_all("Requires-Dist") if "extra ==" not in each]
    assert sorted(each.partition("<")[0].partition(">")[0] for each in wanted) == ["torch", "triton"]
    assert (info / "licenses/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


USE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import bert_kernels
assert bert_kernels.__file__.startswith({site!r}), bert_kernels.__file__
{body}
"""


def run(installed: Path, body: str, *, refused: set[str]) -> None:
    """Run code with the wheel's content in front and some packages as if they were not installed."""
    code = USE.format(refused=refused, site=str(installed), body=body)
    environment = {**os.environ, "PYTHONPATH": str(installed), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=installed, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_operators_run_where_nothing_but_torch_and_triton_is_installed(installed: Path) -> None:
    refused = {"transformers", "deepspeed", "bert_ds", "pydantic", "tokenizers", "safetensors", "psutil", "rich"}
    body = """
import torch
from bert_kernels.layer_norm import layer_norm, layer_norm_reference
x, weight = torch.randn(3, 16), torch.ones(16)
torch.testing.assert_close(layer_norm(x, weight, weight, 1e-5), layer_norm_reference(x, weight, weight, 1e-5))
try:
    import bert_kernels.hf
except ModuleNotFoundError as error:
    assert error.name == "transformers" or "transformers" in str(error), error
else:
    raise SystemExit("bert_kernels.hf came without transformers")
"""
    run(installed, body, refused=refused)


def test_unpad_wants_neither_triton_nor_bert_ds_on_a_cpu(installed: Path) -> None:
    body = """
import torch, transformers
from bert_kernels.hf import unpad
config = transformers.BertConfig(
    vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
)
model = unpad(transformers.BertModel(config))
mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
assert not model(torch.ones(2, 3, dtype=torch.long), attention_mask=mask)[0][0, 2].any()
"""
    run(installed, body, refused={"triton", "bert_ds"})


def test_bert_ds_knows_the_version_that_it_carries() -> None:
    assert bert_kernels.__version__ == CARRIED_KERNELS


def test_another_version_beside_bert_ds_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert other_kernels() is None
    info = tmp_path / "bert_kernels-9.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bert-kernels\nVersion: 9.1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.metadata.version("bert-kernels") == "9.1.0"
    said = other_kernels()
    assert said is not None and said.startswith(
        f"bert-kernels 9.1.0 is installed beside bert-ds, which carries {CARRIED_KERNELS}"
    )
