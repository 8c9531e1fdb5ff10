"""The real pretrain.py on the Triton kernels, in the interpreter, beside the torch references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpus_fixtures import FIRST_TEXT_ID, tiny_tokenizer, write_shards
from forked_verbs import run_verb

from bert_ds.reporting.run_log import read_metrics

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 40
STEPS = 2
"""The second one's loss is that of the first one's gradients."""
DROPOUT = {"with_dropout": 0.1, "without_dropout": 0.0}

RECIPE = """{
  "name": "kernels", "seed": 3,
  "model": {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1,
            "intermediate_size": 64, "max_position_embeddings": 16},
  "corpus": {"type": "shards", "sources": [{"path": "shards"}], "tokenizer": "shards/tokenizer"},
  "sequences": {"max_seq_length": 16, "sentence_pair": "nsp"},
  "optimizer": {"type": "adamw", "lr": 0.003},
  "schedule": {"type": "constant", "warmup_steps": 0},
  "training": {"total_steps": 3, "train_batch_size": 4, "precision": "fp32", "log_every_steps": 1, "num_workers": 0},
  "evaluation": {"num_examples": 2, "batch_size": 1}
}"""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("kernels"))


def make_workshop(folder: Path) -> Path:
    """Put tiny shards and a recipe into a folder, and return it."""
    generator = torch.Generator().manual_seed(0)

    def document() -> list[list[int]]:
        drawn = torch.randint(FIRST_TEXT_ID, VOCAB_SIZE, (6, 5), generator=generator)
        return drawn.tolist()

    documents = [document() for _ in range(20)]
    write_shards(
        folder / "shards", documents[:15], documents[15:], tokenizer=tiny_tokenizer(VOCAB_SIZE - FIRST_TEXT_ID)
    )
    (folder / "recipe.json").write_text(RECIPE)
    return folder


def train(workshop: Path, kernels: str, dropout: float) -> list[float]:
    """Losses of two ranks under ZeRO-2."""
    run_dir = workshop / f"runs/{kernels}-{dropout}"
    recipe = {
        "training.kernels": kernels,
        "training.total_steps": STEPS,
        "model.hidden_dropout_prob": dropout,
        "model.attention_probs_dropout_prob": dropout,
    }
    overrides = [word for name, value in recipe.items() for word in ("--set", f"{name}={value}")]
    files = ["--run", workshop / "recipe.json", "--deepspeed_config", ROOT / "ds_configs/zero2.json"]
    done = run_verb(ROOT / "bert_ds/pretrain.py", *files, "--run_dir", run_dir, *overrides, world_size=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled, not interpreted")
@pytest.mark.parametrize("dropout", DROPOUT.values(), ids=DROPOUT)
def test_two_ranks_on_the_kernels_follow_the_torch_path_step_by_step(workshop: Path, dropout: float) -> None:
    on_kernels, on_torch = train(workshop, "triton", dropout), train(workshop, "torch", dropout)
    assert len(on_torch) == STEPS
    assert on_kernels == pytest.approx(on_torch, rel=3e-6)
