"""Pre-training of small encoders of any family, many runs in one launch; `ranks_harness` starts the worker below."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from corpus_fixtures import FIRST_TEXT_ID, random_documents, tiny_tokenizer, tiny_unigram, write_shards

from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.families.encoder_config import EncoderConfig
from bert_ds.configuration.run_plan import make_plan
from bert_ds.launch.launch_checks import checked_run, pretrain_arguments
from bert_ds.pretrain import pretrain
from bert_ds.reporting.run_log import read_metrics
from bert_ds.training.agreement import on_main_rank
from bert_ds.training.launch.restart import StopRequest

STEPS, SAVED = 4, 2
TOKENIZER = tiny_tokenizer()


class Run(NamedTuple):
    """One run of a launch."""

    name: str
    stage: int = 0
    optimizer: str = "lamb"
    dropout: float = 0.0
    recompute: bool = False
    resumes: str | None = None
    """Name of a run of which this one takes everything up to step SAVED."""
    settings: tuple[str, ...] = ()
    """Further `--set`."""


def write_inputs(folder: Path, config: EncoderConfig) -> None:
    """Write shards, recipes and DeepSpeed files of a family's runs."""
    # Few words, so that four steps are enough to learn which.
    train, held = (
        [[[FIRST_TEXT_ID + piece % 20 for piece in sentence] for sentence in document] for document in documents]
        for documents in (random_documents(60), random_documents(20, seed=1))
    )
    tokenizer = TOKENIZER if TOKENIZER.marks == config.MARKS else tiny_unigram()
    write_shards(folder / "shards", train, held, tokenizer=tokenizer)
    for dropout in (0.0, 0.1):
        recipe = {
            "name": "tiny",
            "seed": 5,
            "model": config.with_dropout(dropout).model_dump(mode="json"),
            "corpus": {"type": "shards", "sources": [{"path": "shards"}], "tokenizer": "shards/tokenizer"},
            "sequences": {"max_seq_length": 32, "sentence_pair": "none"},
            "optimizer": {"type": "lamb", "lr": 0.02},
            "schedule": {"type": "linear", "warmup_steps": 1},
            "training": {
                "total_steps": STEPS,
                "train_batch_size": 8,
                "precision": "fp32",
                "log_every_steps": 1,
                "num_workers": 0,
                "kernels": "torch",
            },
            "evaluation": {"num_examples": 8, "batch_size": 4},
            "checkpoints": {"every_steps": SAVED, "keep_last": 2},
        }
        (folder / f"recipe{dropout}.json").write_text(json.dumps(recipe), encoding="utf-8")
    for stage in range(4):
        zero = {"stage": stage, "reduce_bucket_size": 1_000_000}
        if stage == 3:
            zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 100_000}
        spread: dict[str, Any] = {"zero_optimization": zero}
        (folder / f"zero{stage}.json").write_text(json.dumps(spread))
        spread["activation_checkpointing"] = {"number_checkpoints": config.num_hidden_layers}
        (folder / f"zero{stage}_recompute.json").write_text(json.dumps(spread))


def train_all(rank: int, world_size: int, folder: Path, runs: list[Run]) -> None:
    """Worker: make all of these runs, one after the other; each ends well."""
    ranks = Ranks(rank, rank, world_size)
    for run in runs:
        run_dir = run_folder(folder, world_size, run)
        if run.resumes is not None:
            source = folder / f"runs{world_size}" / run.resumes
            on_main_rank(lambda source=source, run_dir=run_dir: _copy_half(source, run_dir))
        spread = folder / f"zero{run.stage}{'_recompute' if run.recompute else ''}.json"
        words = ["--run", folder / f"recipe{run.dropout}.json", "--deepspeed_config", spread, "--run_dir", run_dir]
        settings = (f"optimizer.type={run.optimizer}", *run.settings)
        words += [f"--set={setting}" for setting in settings]
        words += ["--resume", "must" if run.resumes else "never", "--preflight", "off"]
        args = pretrain_arguments([str(word) for word in words])
        plan = make_plan(*checked_run(args), world_size)
        assert pretrain(plan, ranks, args=args, stop=StopRequest()) == 0
        dist.barrier()


def run_folder(folder: Path, world_size: int, run: Run) -> Path:
    """Return where a run is."""
    return folder / f"runs{world_size}" / run.name


def losses(run_dir: Path) -> list[float]:
    """Return the loss of every step, the newest attempt's where a step was taken twice."""
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl")]


def _copy_half(source: Path, run_dir: Path) -> None:
    shutil.copytree(source, run_dir)
    shutil.rmtree(run_dir / f"checkpoints/global_step{STEPS}")
    (run_dir / "DONE").unlink()
