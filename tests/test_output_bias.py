"""A bias of the word scores that starts at the frequencies of the pieces, against counts of the shards' files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from config_cases import RECIPE as PLAIN
from config_cases import changed
from family_cases import FORMS
from recipe_workshop import RECIPE, Workshop, must, plain_workshop
from test_pretrain_wiring import batch_of, data_of, recipe_of
from test_run_plan import problems_of

from bert_ds.encoder.initial_weights import start_at_unigram
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict

ROOT = Path(__file__).resolve().parents[1]
MODERN = {"sequences.sentence_pair": "none", "model": {**RECIPE["model"], "type": "modernbert", "local_attention": 8}}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return plain_workshop(tmp_path_factory.getbasetemp())


def frequencies(shards: Path) -> np.ndarray:
    """Log probability of each of 64 pieces in the training files themselves, one added to each count."""
    pieces = np.concatenate([np.fromfile(path, dtype=np.uint16) for path in sorted(shards.glob("train-*.tokens"))])
    counts = np.array([np.count_nonzero(pieces == piece) + 1.0 for piece in range(64)])
    return np.log(counts / counts.sum())


@pytest.mark.parametrize("family", [{}, MODERN], ids=["bert", "modernbert"])
def test_the_first_loss_is_that_of_the_frequencies(family: dict[str, Any], workshop: Workshop) -> None:
    run_dir = workshop.run({**family, "output_bias": "log_unigram", "model.initializer_range": 1e-3})
    batch, logs = batch_of(data_of(recipe_of(run_dir)), 1), frequencies(workshop.folder / "shards")
    unigram = -logs[batch.targets["masked_labels"].numpy()].mean()
    first = read_metrics(run_dir / "metrics.jsonl")[0]
    assert first["loss_mlm"] == pytest.approx(unigram, rel=1e-3) and unigram < 0.9 * np.log(64)


def test_a_resumed_run_keeps_what_its_bias_has_become(workshop: Workshop) -> None:
    changes = {"output_bias": "log_unigram", "checkpoints.every_steps": 2}
    whole = workshop.run(changes)
    run_dir = whole.with_name("biased")
    shutil.copytree(whole, run_dir)
    (run_dir / "DONE").unlink()
    shutil.rmtree(run_dir / "checkpoints/global_step4")
    files = ("--run", run_dir / "run_config.json", "--deepspeed_config", ROOT / "ds_configs/zero0.json")
    must(ROOT / "bert_ds/pretrain.py", *files, "--run_dir", run_dir, "--resume", "auto")
    ends = [load_fp32_state_dict(one / "checkpoints/global_step4")["predictions.bias"] for one in (whole, run_dir)]
    assert torch.equal(*ends)
    start = torch.from_numpy(frequencies(workshop.folder / "shards")).float()
    assert 1e-3 < (ends[0][:64] - start).abs().max() < 0.1


@pytest.mark.parametrize("form", [form for form, config in FORMS.items() if config.has_output_bias])
def test_every_family_with_a_bias_starts_it_and_leaves_the_padding_alone(form: str) -> None:
    config = FORMS[form].model_copy(update={"pad_vocab_size_to_multiple_of": 64})
    model = PretrainingModel(config, kernels="torch", has_pair_head=False)
    assert config.padded_vocab_size > config.vocab_size
    start_at_unigram(model, np.arange(config.vocab_size))
    bias = model.predictions.bias
    assert bias is not None
    seen = torch.arange(1, config.vocab_size + 1)
    assert torch.allclose(bias[: config.vocab_size].detach().exp() * seen.sum(), seen.float(), rtol=1e-5)
    assert not bias[config.vocab_size :].any()


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("init_from", "nowhere", '"log_unigram" and init_from both say where the bias starts'),
        (
            "distillation",
            {"teacher": "t", "init_layers": [0, 1]},
            '"log_unigram" and distillation.init_layers, which takes',
        ),
        (
            "model",
            {**PLAIN["model"], "type": "modernbert", "decoder_bias": False},
            '"log_unigram" wants a bias of the word scores: model.decoder_bias true',
        ),
    ],
)
def test_a_bias_that_cannot_start_there_is_refused(tmp_path: Path, path: str, value: Any, wanted: str) -> None:
    recipe = changed({**PLAIN, "output_bias": "log_unigram", "sequences": {"sentence_pair": "none"}}, path, value)
    assert f"output_bias: {wanted}" in problems_of(tmp_path, recipe)
