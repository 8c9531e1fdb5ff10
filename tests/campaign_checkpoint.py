"""Measure what a checkpoint costs the training at BERT-base size: saves that block and saves behind the training.

    python tests/campaign_checkpoint.py [--rounds 5]

One rank, ZeRO-2, bf16 weights, fp32 masters and both moments of AdamW. Both ways take turns, so that the ratio holds on
a machine that does other work too; between two saves the disk is left alone. `stall` is the time on the step path,
`whole` until the checkpoint stands under its name. The best round counts for each: what else the machine does can only
add to it. Appends one row to tests/results/checkpoint.jsonl.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from campaign_rows import add_row
from tiny_training import ds_config, join_alone

from bert_ds.basics.ranks import Ranks
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.recipe.optimizer_config import AdamWConfig
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.pretraining_model import PretrainingModel
from bert_ds.reporting.run_log import RunLog
from bert_ds.training.checkpoints.checkpoint_folder import find_checkpoint
from bert_ds.training.checkpoints.checkpoint_saver import CheckpointPolicy, CheckpointSaver
from bert_ds.training.checkpoints.train_state import TrainState
from bert_ds.training.engine import make_engine
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts

RESULTS = Path(__file__).parent / "results/checkpoint.jsonl"


def base_engine() -> Any:
    """An engine over BERT-base whose optimizer has taken a step, so that all of its state exists."""
    model = PretrainingModel(BertConfig(), kernels="torch", has_pair_head=True, init_seed=1)
    optimizer = make_optimizer(
        AdamWConfig(lr=1e-4), model.named_parameters(), facts=TensorFacts(weight_patterns(model.config)[0])
    )
    engine = make_engine(model, optimizer, ds_config(2, precision="bf16"))
    for parameter in engine.optimizer.single_partition_of_fp32_groups:
        parameter.grad = torch.full_like(parameter, 1e-3)
    engine.basic_optimizer.step()
    return engine


def timed_save(saver: CheckpointSaver, step: int) -> tuple[float, float]:
    """Save and return the seconds on the step path and in all."""
    begun = time.perf_counter()
    assert saver.save(TrainState(step=step)), "the save failed"
    stall = time.perf_counter() - begun
    assert saver.settle(True), "the save failed"
    return stall, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/campaign-checkpoint"))
    args = parser.parse_args()
    shutil.rmtree(args.work, ignore_errors=True)
    join_alone()
    engine, blocking = base_engine(), CheckpointPolicy(keep_last=1)
    log = RunLog(args.work, Ranks(0, 0, 1), total_steps=1)
    savers = {
        how: CheckpointSaver(engine, args.work, policy=policy, log=log)
        for how, policy in (("blocking", blocking), ("behind", replace(blocking, asynchronous=True)))
    }
    times: dict[str, list[tuple[float, float]]] = {how: [] for how in savers}
    for number in range(args.rounds):
        for place, how in enumerate(savers):
            times[how].append(timed_save(savers[how], 1 + 2 * number + place))
            os.sync()
    path = find_checkpoint(args.work)
    assert path is not None
    stalls, wholes = ({how: [one[k] for one in found] for how, found in times.items()} for k in (0, 1))
    pairs = zip(stalls["blocking"], stalls["behind"], strict=True)
    row = {
        "bytes": sum(file.stat().st_size for file in path.iterdir()),
        "rounds": args.rounds,
        "stall_s": {how: round(min(found), 2) for how, found in stalls.items()},
        "whole_s": {how: round(min(found), 2) for how, found in wholes.items()},
        "stall_ratio_median": round(statistics.median(behind / blocked for blocked, behind in pairs), 3),
        "share_at_one_save_in_30_minutes": {how: round(min(found) / 1800, 5) for how, found in stalls.items()},
        "processor": platform.processor() or platform.machine(),
        "load": psutil.getloadavg()[0],
    }
    add_row(RESULTS, row)


if __name__ == "__main__":
    main()
