from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers
from encoder_cases import packed_inputs, spread_weights
from export_cases import CONFIG, export, spread_state_dict, write_tokenizer
from safetensors.torch import load_file, save_file
from tiny_training import ds_config, join_alone, tiny_services
from torch import Tensor

from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.configuration.recipe.run_config import (
    AdamWConfig,
    ConfigError,
    EmbeddedCorpus,
    RunConfig,
    ScheduleConfig,
    SequenceConfig,
    TrainingConfig,
    dump_run_config,
)
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.hf_folder import load_hf_folder, special_ids
from bert_ds.encoder.hf_mapping import to_hf
from bert_ds.encoder.hf_verify import verify_export
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.export_hf import _measured
from bert_ds.training.checkpoints.checkpoint_loader import CheckpointPolicy, save_checkpoint
from bert_ds.training.checkpoints.fp32_weights import load_fp32_state_dict
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.mark.parametrize("sentence_pair", ["nsp", "none"])
def test_a_right_export_passes_and_its_scores_are_those_of_the_model(
    tmp_path: Path, tokenizer: Path, sentence_pair: str
) -> None:
    state_dict = spread_state_dict(has_pair_head=sentence_pair != "none")
    export(tmp_path, tokenizer, state_dict, sentence_pair)
    check = verify_export(tmp_path, CONFIG, state_dict=state_dict, tokenizer=tokenizer)
    assert check.max_difference < 1e-5
    assert check.scale > 1.0


def _edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _edit_json(name: str, key: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**facts, key: value}))

    return edit


QUERY, KEY = (f"bert.encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key"))
WORDS = "bert.embeddings.word_embeddings.weight"


def _prefix_all(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def _drop_a_layer(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".layer.1." in name]:
        del tensors[name]


def _swap_pieces(path: Path) -> None:
    facts = json.loads(path.read_text())
    vocab = facts["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(facts))


BREAKAGES: dict[str, Callable[[Path], None]] = {
    "missing tensor": _edit_tensors(lambda t: t.pop("bert.encoder.layer.0.output.dense.bias")),
    "missing decoder bias": _edit_tensors(lambda t: t.pop("cls.predictions.bias")),
    "unknown tensor": _edit_tensors(lambda t: t.update({"extra": torch.zeros(3)})),
    "query and key swapped": _edit_tensors(lambda t: t.update({QUERY: t[KEY].clone(), KEY: t[QUERY].clone()})),
    "matrix transposed": _edit_tensors(lambda t: t.update({QUERY: t[QUERY].T.contiguous()})),
    "module. in front": _edit_tensors(_prefix_all),
    "one layer fewer": _edit_tensors(_drop_a_layer),
    "one layer fewer in both": lambda folder: (
        _edit_tensors(_drop_a_layer)(folder),
        _edit_json("config.json", "num_hidden_layers", 1)(folder),
    ),
    "decoder of its own": _edit_tensors(lambda t: t.update({"cls.predictions.decoder.weight": t[WORDS] + 0.01})),
    "NaN": _edit_tensors(lambda t: t[WORDS][3].fill_(float("nan"))),
    "padded vocabulary": _edit_tensors(lambda t: t.update({WORDS: torch.cat([t[WORDS], torch.zeros(1, 24)])})),
    "one value off": _edit_tensors(lambda t: t["cls.seq_relationship.weight"][0, 0].add_(1e-3)),
    "other activation": _edit_json("config.json", "hidden_act", "gelu_new"),
    "other epsilon": _edit_json("config.json", "layer_norm_eps", 1e-5),
    "other heads": _edit_json("config.json", "num_attention_heads", 2),
    "other architecture": _edit_json("config.json", "architectures", ["BertForMaskedLM"]),
    "cut file": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "no length limit": _edit_json("tokenizer_config.json", "model_max_length", 10**30),
    "cased tokenizer": _edit_json("tokenizer_config.json", "do_lower_case", False),
    "two pieces swapped": lambda folder: _swap_pieces(folder / "tokenizer.json"),
}


@pytest.fixture(scope="module")
def right_export(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("right")
    export(folder, tokenizer, spread_state_dict())
    return folder


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_wrong_export_is_caught(right_export: Path, tokenizer: Path, tmp_path: Path, breakage: str) -> None:
    for path in right_export.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    BREAKAGES[breakage](tmp_path)
    with pytest.raises((CheckpointError, ConfigError)):
        verify_export(tmp_path, CONFIG, state_dict=spread_state_dict(), tokenizer=tokenizer)


def test_the_weights_file_is_byte_for_byte_what_transformers_saves(right_export: Path, tmp_path: Path) -> None:
    transformers.BertForPreTraining.from_pretrained(right_export).save_pretrained(tmp_path)
    theirs, ours = (folder / "model.safetensors" for folder in (tmp_path, right_export))
    assert theirs.read_bytes() == ours.read_bytes()


def test_fill_mask_runs_on_an_export(right_export: Path) -> None:
    fill_mask = transformers.pipeline("fill-mask", model=str(right_export))
    answers = fill_mask("the [MASK].")
    assert len(answers) == 5
    assert all(answer["token"] < CONFIG.vocab_size for answer in answers)


def test_text_longer_than_the_model_is_cut_by_the_tokenizer(right_export: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(right_export)
    assert len(tokenizer("the " * 500, truncation=True)["input_ids"]) == 37


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_exported(tmp_path: Path, tokenizer: Path, value: float) -> None:
    state_dict = spread_state_dict()
    state_dict["bert.layer.0.feed_forward.output_bias"][0] = value
    with pytest.raises(CheckpointError, match=r"layer.0.output.dense.bias has 1 values that are not finite"):
        export(tmp_path / "out", tokenizer, state_dict)
    assert not list((tmp_path / "out").iterdir())


def test_a_tokenizer_folder_without_its_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocab.txt has no piece \[PAD\]"):
        special_ids(tmp_path)


def _saved_run(
    run_dir: Path, tokenizer: Path, *, stage: int, precision: str, sentence_pair: Literal["nsp", "none"] = "nsp"
) -> None:
    """A run folder as pretrain.py leaves it after one step."""
    join_alone()
    run = RunConfig(
        name="small",
        model=CONFIG,
        corpus=EmbeddedCorpus(vocab_size=CONFIG.vocab_size),
        sequences=SequenceConfig(sentence_pair=sentence_pair),
        optimizer=AdamWConfig(lr=1e-2),
        schedule=ScheduleConfig(type="constant", warmup_steps=0),
        training=TrainingConfig(total_steps=1, train_batch_size=2),
    )
    shutil.copytree(tokenizer, run_dir / "tokenizer")
    (run_dir / "run_config.json").write_text(dump_run_config(run))
    model = PretrainingModel(CONFIG, kernels="torch", has_pair_head=sentence_pair != "none")
    spread_weights(model, CONFIG)
    optimizer = make_optimizer(
        run.optimizer, model.named_parameters(), facts=TensorFacts(weight_patterns(model.config)[0])
    )
    engine = make_engine(model, optimizer, ds_config(stage, precision=precision))
    engine.backward(engine(**packed_inputs(CONFIG, [5, 9]))[0].sum())
    engine.step()
    log = tiny_services(run_dir, 0, 1).log
    saved = save_checkpoint(engine, run_dir, state=TrainState(step=1), policy=CheckpointPolicy(), log=log)
    log.close()
    assert saved is not None


def _run_verb(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the script as a command line would, in this process, and return its exit code."""
    script = Path(__file__).parents[1] / "bert_ds" / "export_hf.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    return int(end.value.code or 0)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "fp32")])
def test_a_checkpoint_of_any_stage_becomes_a_folder_with_its_fp32_weights(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, stage: int, precision: str
) -> None:
    _saved_run(tmp_path, tokenizer, stage=stage, precision=precision)
    assert _run_verb(monkeypatch, "--run_dir", str(tmp_path)) == 0
    names = ["README.md", "config.json", "export_manifest.json", "model.safetensors"]
    names += ["tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == names
    wanted = to_hf(load_fp32_state_dict(tmp_path / "checkpoints" / "global_step1"), CONFIG)
    found = load_hf_folder(tmp_path / "hf").tensors
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == torch.float32 for name in wanted)
    # One step of Adam has moved the weights by the learning rate.
    before = to_hf(spread_state_dict(), CONFIG)[QUERY]
    assert (found[QUERY] - before).abs().median().item() == pytest.approx(1e-2, rel=0.3)


def test_segments_that_were_never_trained_are_exported_equal_to_the_one_that_was(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "bert.embeddings.token_type_embeddings.weight"
    pairs: tuple[Literal["nsp", "none"], ...] = ("nsp", "none")
    for sentence_pair in pairs:
        _saved_run(tmp_path / sentence_pair, tokenizer, stage=0, precision="fp32", sentence_pair=sentence_pair)
        assert _run_verb(monkeypatch, "--run_dir", str(tmp_path / sentence_pair)) == 0
        checkpoint = load_fp32_state_dict(tmp_path / sentence_pair / "checkpoints/global_step1")
        trained = to_hf(checkpoint, CONFIG)[name]
        assert not torch.equal(trained[0], trained[1])
        wanted = trained if sentence_pair == "nsp" else trained[[0, 0]]
        assert torch.equal(load_hf_folder(tmp_path / sentence_pair / "hf").tensors[name], wanted)


def test_the_verb_ends_with_the_documented_exit_codes(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _saved_run(tmp_path, tokenizer, stage=0, precision="fp32")
    run_dir = ["--run_dir", str(tmp_path)]
    assert _run_verb(monkeypatch, *run_dir, "--checkpoint", "global_step7") == 4
    assert "global_step7" in capsys.readouterr().err
    assert _run_verb(monkeypatch, *run_dir, "--output", str(tmp_path / "tokenizer")) == 2
    assert "tokenizer holds 'tokenizer.json', which is not ours" in capsys.readouterr().err
    (tmp_path / "tokenizer" / "vocab.txt").unlink()
    assert _run_verb(monkeypatch, *run_dir) == 3
    shutil.rmtree(tmp_path / "checkpoints")
    assert _run_verb(monkeypatch, *run_dir) == 4
    assert "has no checkpoint yet" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_run_is_exported_with_its_onnx_file(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _saved_run(tmp_path, tokenizer, stage=0, precision="fp32")
    assert _run_verb(monkeypatch, "--run_dir", str(tmp_path), "--onnx") == 0
    assert f"wrote {tmp_path}/hf/onnx/model.onnx: onnxruntime's scores differ" in capsys.readouterr().out
    assert (tmp_path / "hf" / "onnx" / "model.onnx").is_file()
    assert _run_verb(monkeypatch, "--model", str(tmp_path / "hf")) == 2
    assert "--model is a finished folder: wanted --onnx or --push_to_hub beside it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scores", "factor", "is_refused"),
    [("prediction_logits", 1.00003, False), ("prediction_logits", 1.0003, True), ("seq_relationship_logits", 2, True)],
)
def test_scores_may_differ_by_a_ten_thousandth_of_the_largest(
    scores: str, factor: float, is_refused: bool, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = transformers.BertForPreTraining.forward

    def slightly_off(self: object, *args: object, **options: object) -> object:
        found = compute(self, *args, **options)
        found[scores] = found[scores] * factor
        return found

    state_dict = spread_state_dict(has_pair_head=True)
    export(tmp_path, tokenizer, state_dict, "nsp")
    monkeypatch.setattr(transformers.BertForPreTraining, "forward", slightly_off)
    if not is_refused:
        verify_export(tmp_path, CONFIG, state_dict=state_dict)
        return
    with pytest.raises(CheckpointError, match=r"wanted at most 0\.0001 of the largest score"):
        verify_export(tmp_path, CONFIG, state_dict=state_dict)


def test_the_card_has_the_figures_of_its_own_step(tmp_path: Path) -> None:
    rows = [
        {"kind": "evaluation", "step": step, "loss_mlm_masked": step / 10, "mlm_masked_accuracy": step / 100}
        for step in (10, 20)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = _measured(tmp_path / "metrics.jsonl", 10)
    assert found == {"held-out text at [MASK]": "loss 1.000 nats, accuracy 0.100"}
    assert _measured(tmp_path / "metrics.jsonl", 15) == {}
