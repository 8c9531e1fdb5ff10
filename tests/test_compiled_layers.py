"""Compiled layers beside eager ones, on the kernels in Triton's interpreter: losses, gradients, compilations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from family_cases import WIRED, of_size, ragged
from forked_verbs import run_verb
from test_kernels_in_training import make_workshop
from torch import Tensor
from torch._dynamo.utils import counters

from bert_ds.configuration.deepspeed_file.ds_config import load_pair
from bert_ds.configuration.recipe.run_config import ConfigError
from bert_ds.configuration.run_plan import require_files
from bert_ds.encoder.compiled_layers import MOST_COMPILATIONS, compile_layers
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU wants g++")
SHAPES = ((6, 2), (9, 7), (8, 3))
"""Lengths of sequences. After the first there is one more compilation for any number of tokens."""
MORE_SHAPES = ((6, 2), (9, 7), (5, 3, 4), (8, 7, 6, 3))
"""Other numbers of sequences too."""


def results(model: PretrainingModel, lengths: tuple[int, ...]) -> list[Tensor]:
    """Return the loss and, in training, all gradients."""
    model.zero_grad()
    _, stream = ragged(model.config, lengths)
    targets = {"masked_positions": torch.arange(0, 8, 2), "masked_labels": torch.arange(5, 9)}
    losses, _ = model(**stream, targets=targets, dropout_seed=torch.tensor([5]))
    if model.training:
        losses.sum().backward()
    return [losses.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "shapes", "recompute"),
    [
        ("bert", SHAPES, False),
        *(pytest.param(name, MORE_SHAPES, True, marks=pytest.mark.campaign) for name in WIRED),
    ],
)
def test_layers_compile_a_bounded_number_of_times_and_compute_the_same(
    name: str, shapes: tuple[tuple[int, ...], ...], recompute: bool
) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 24}
    config = of_size(WIRED[name], **sizes).with_dropout(0.1)
    torch._dynamo.reset()
    counters.clear()
    model = PretrainingModel(config, kernels="triton", has_pair_head=False, activation_checkpointing=recompute).train()
    wanted = [results(model, lengths) for lengths in shapes]
    compile_layers(model.bert.layer, kernels="triton")
    found = []
    for lengths in shapes:
        before, found = graphs(), [*found, results(model, lengths)]
    assert graphs() == before, "the last shape was compiled anew"
    assert 2 <= graphs() <= MOST_COMPILATIONS // 4
    for compiled, eager in zip(found, wanted, strict=True):
        assert len(compiled) == len(eager) > 10
        for one, other in zip(compiled, eager, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_layers_on_the_torch_references_are_refused_at_the_launch_and_before() -> None:
    model = PretrainingModel(of_size(WIRED["bert"]), kernels="torch")
    with pytest.raises(ConfigError, match=r"training\.compile: found true, wanted false: without a GPU"):
        compile_layers(model.bert.layer, kernels="torch")
    zero1, zero3 = (ROOT / f"ds_configs/zero{stage}.json" for stage in (1, 3))
    for ds, setting, said in (
        (zero1, "training.kernels=torch", 'wants the Triton kernels, but training.kernels is "torch"'),
        (zero3, "training.kernels=auto", "true at stage 3, whose hooks gather the weights"),
    ):
        with pytest.raises(ConfigError, match=f"training.compile: .*{said}"):
            require_files(*load_pair(None, ds, overrides=["training.compile=true", setting]))
    require_files(*load_pair(None, zero1, overrides=["training.compile=true"]))


@pytest.mark.campaign
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_compiled_run_has_the_losses_of_an_eager_one_and_resumes_to_the_same_bits(tmp_path: Path, stage: int) -> None:
    folder = make_workshop(tmp_path)
    spread = {"zero_optimization": {"stage": stage}, "activation_checkpointing": {"number_checkpoints": 2}}
    (folder / "ds.json").write_text(json.dumps(spread))

    def train(name: str, *words: object, compiled: bool, kernels: str = "triton") -> list[float]:
        settings = (
            f"training.kernels={kernels}",
            f"training.compile={str(compiled).lower()}",
            "checkpoints.every_steps=2",
        )
        overrides = [word for one in (*settings, "training.few_shapes=true") for word in ("--set", one)]
        files = ("--run", folder / "recipe.json", "--deepspeed_config", folder / "ds.json")
        done = run_verb(
            ROOT / "bert_ds/pretrain.py", *files, "--run_dir", folder / name, *overrides, *words, world_size=2
        )
        assert done.returncode == 0, done.stdout + done.stderr
        rows = read_metrics(folder / name / "metrics.jsonl")
        return [row["loss"] for row in (*rows, *read_metrics(folder / name / "metrics.jsonl", "evaluation"))]

    whole = train("whole", compiled=True)
    assert whole == pytest.approx(train("eager", compiled=False), rel=1e-6)
    assert whole == pytest.approx(train("plain", compiled=False, kernels="torch"), rel=3e-6)
    shutil.copytree(folder / "whole", folder / "resumed")
    shutil.rmtree(folder / "resumed/checkpoints/global_step3")
    (folder / "resumed/DONE").unlink()
    assert train("resumed", "--resume", "must", compiled=True) == whole
