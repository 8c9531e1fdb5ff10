"""Seconds of whole steps of fine-tuning on a CPU: one rank under ZeRO-1 beside transformers' model in a plain loop.

    python tests/campaign_cpu_fine_tuning.py --text FOLDER --work FOLDER [--minutes M]

Two classes in fp32, on batches of 32 sentences or of a few rows of 128 pieces without padding, packed and padded before
they are measured. Theirs is sdpa with gradients cut to norm 1 and torch's fused AdamW, as Trainer has it, from the same
weights; without dropout the losses of both are compared. How they take turns and what is recorded is said in
`campaign_cpu_speed`. Rows: tests/results/cpu_fine_tuning.jsonl; what is there for this kind of machine stays.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from campaign_cpu_speed import ROOT, Batch, backward, compared, made_batches, record
from campaign_rows import read_rows
from family_cases import SPECIAL_IDS
from tiny_training import ds_config, join_alone
from torch import Tensor

from bert_ds.basics.micro_batch import MicroBatch
from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.recipe.optimizer_config import AdamWConfig
from bert_ds.downstream.kinds.table import KINDS
from bert_ds.downstream.rows.features import Feature
from bert_ds.downstream.rows.task_batch import pack
from bert_ds.downstream.tuning.task_folder import make_task_model
from bert_ds.encoder.families.table import weight_patterns
from bert_ds.encoder.hf_mapping import hf_config
from bert_ds.encoder.pretrained import load_pretrained, start_from
from bert_ds.training.engine import make_engine
from bert_ds.training.loop.train_step import agree_on_totals, forward_backward, take_step
from bert_ds.training.optimizers.factory import make_optimizer
from bert_ds.training.optimizers.param_groups import TensorFacts

RESULTS = ROOT / "tests/results/cpu_fine_tuning.jsonl"
SIZES = {
    "2 x 128": BertConfig(
        vocab_size=8192, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    ),
    "base": BertConfig(),
}
BATCHES = {
    "2 x 128": (("running text", 2), ("sentences", 32), *(("running text", rows) for rows in (1, 4, 8))),
    "base": tuple(("running text", rows) for rows in (1, 2, 8)),
}
"""Size -> mix and sequences of a batch."""


def main() -> None:
    """Measure what has no row yet, the small size first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no row after that")
    args = parser.parse_args()
    torch.set_num_threads(2)
    begun = time.monotonic()
    done = [row for row in read_rows(RESULTS) if row["amx"] == bool(torch.cpu._is_amx_tile_supported())]
    for size, config in SIZES.items():
        for (mix, rows), dropout in itertools.product(BATCHES[size], (0.0, 0.1)):
            row = {"size": size, "mix": mix, "rows": rows, "dropout": dropout}
            is_done = any(row.items() <= other.items() for other in done)
            if is_done or time.monotonic() - begun > 60 * args.minutes:
                continue
            number = 24 if size == "2 x 128" else 4
            batches = list(made_batches(args.text, args.work, mix=mix, number=number, rows=rows))
            record({**row, **tuned(config.with_dropout(dropout), batches, folder=args.work / "tuned")}, RESULTS)


def tuned(config: BertConfig, batches: list[Batch], *, folder: Path) -> dict[str, Any]:
    """Return a row of whole steps of fine-tuning, ours from the weights of theirs."""
    content = hf_config(config, sentence_pair="none", special_ids=SPECIAL_IDS)
    theirs = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(**content))
    theirs.save_pretrained(folder)
    ours = make_task_model(KINDS["classification"], config, {"label": ("0", "1")}, kernels="torch")
    start_from(ours, load_pretrained(folder).tensors)
    for name, parameter in theirs.classifier.named_parameters():
        getattr(ours.head.classifier, name).data.copy_(parameter)
    join_alone()
    rows = len(batches[0].padded["input_ids"])
    adamw = AdamWConfig(type="adamw", lr=1e-4, weight_decay=0.0)
    facts = TensorFacts(*weight_patterns(config))
    made = make_optimizer(adamw, ours.named_parameters(), facts=facts, kernels="torch")
    engine = make_engine(ours, made, {**ds_config(1), "train_batch_size": rows, "train_micro_batch_size_per_gpu": rows})
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-4, adamw.betas, adamw.eps, 0.0, fused=True)
    seed, steps = 1 if config.drops else None, itertools.count(1)

    packed = {id(batch): micro_batch_of(batch) for batch in batches}

    def step_ours(batch: Batch) -> Tensor:
        (micro,) = parts = [packed[id(batch)]]
        totals = agree_on_totals(parts, data_wait_s=0.0, stop=False)
        sums = forward_backward(engine, parts, counts=totals.counts, seed=seed, step=next(steps))
        take_step(engine)
        return sums[0] / len(micro.sequences)

    def step_theirs(batch: Batch) -> Tensor:
        loss = backward(theirs, theirs(**{**batch.padded, "labels": classes_of(batch)}).loss)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        return loss

    return compared({"ours": step_ours, "padded": step_theirs}, batches, is_exact=not config.drops)


def classes_of(batch: Batch) -> Tensor:
    """Return a class for every sequence, int64 [N]."""
    return batch.padded["input_ids"].sum(1) % 2


def micro_batch_of(batch: Batch) -> MicroBatch:
    """Return the sequences and their classes as fine-tuning packs them."""
    rows = zip(batch.padded["input_ids"].numpy(), batch.padded["attention_mask"].sum(1).tolist(), strict=True)
    features = [
        Feature(number, row[:length], np.zeros(length, np.int8), {"label": np.array([label])})
        for number, ((row, length), label) in enumerate(zip(rows, classes_of(batch).tolist(), strict=True))
    ]
    return pack(features, counts={"label": float(len(features))})


if __name__ == "__main__":
    main()
