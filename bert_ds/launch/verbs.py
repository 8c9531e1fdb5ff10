"""The verbs in the order in which a person meets them: what each is for, and one example. Their parsers start here."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from bert_ds.launch.command_line import make_parser


class Verb(NamedTuple):
    """What `bert-ds --help` and `bert-ds VERB --help` say of a verb."""

    purpose: str
    """One line."""
    example: str
    """Words behind `bert-ds VERB`."""
    is_launched: bool = False
    """Runs on every rank, through the DeepSpeed launcher."""


VERBS = {
    "clean_text": Verb(
        "Remove from a text what it repeats, exactly or nearly, and what tasks are measured on.",
        "--input corpus/ --output clean/ --against sst2 --data DATA",
    ),
    "train_wordpiece": Verb(
        "Train a WordPiece tokenizer on text files; the same text always gives the same tokenizer.",
        "--input corpus/ --output tokenizer/ --vocab_size 30522",
    ),
    "train_tokenizer": Verb(
        "Train a byte-level BPE or a Unigram tokenizer on text files; the same text always gives the same tokenizer.",
        "--kind bpe --input corpus/ --output tokenizer/ --vocab_size 50265",
    ),
    "build_shards": Verb(
        "Turn text files into token shards; the same command continues a build that was interrupted.",
        "--input corpus/ --tokenizer tokenizer/ --output shards/",
    ),
    "init": Verb(
        "Write a recipe of one's own for a corpus, a machine and a time, and say why it is as it is.",
        "my_run.json --corpus shards/ --minutes 30",
    ),
    "check_run": Verb(
        "Check a recipe or a task with its DeepSpeed file, and print what follows from them.",
        "--run bert_base_phase1 --deepspeed_config zero2 --world_size 8 --gpu H100",
    ),
    "pretrain": Verb(
        "Pre-train an encoder under DeepSpeed.",
        "--num_gpus 2 --run my_run.json --deepspeed_config zero2 --run_dir runs/mine --resume auto",
        is_launched=True,
    ),
    "report": Verb("Say how a run went, or write it as a page with figures.", "--run_dir runs/mine --html"),
    "export_hf": Verb(
        "Export a checkpoint as a Hugging Face folder, such a folder as ONNX, or put it on the hub.",
        "--run_dir runs/mine",
    ),
    "show_masks": Verb(
        "Print the likeliest words for the [MASK] of some sentences.",
        '--model runs/mine/hf --text "The capital of France is [MASK]."',
    ),
    "finetune": Verb(
        "Fine-tune a pre-trained encoder on a task under DeepSpeed.",
        "--task sst2 --data DATA --model runs/mine/hf --seeds 1 2 3",
        is_launched=True,
    ),
    "score": Verb(
        "Score a fine-tuned or a pre-trained folder on a task.",
        "--task sst2 --data DATA --model runs/sst2/hf",
        is_launched=True,
    ),
    "predict": Verb(
        "Answer texts with a fine-tuned folder: labels, entities, answers or vectors.",
        "--model runs/sst2/hf --input reviews.csv --columns text=review --output labels.csv",
    ),
    "probe": Verb(
        "Ask every layer of a model what it knows of a task.", "--task ud_pos --data DATA --model runs/mine/hf"
    ),
    "submit": Verb(
        "Check a pre-training run and submit it to Slurm.",
        "--run my_run.json --run_dir runs/mine --nodes 8 --gpus_per_node 8 --time 24:00:00 --dry_run",
    ),
    "runs": Verb("Show every run of some folders: state, step, loss, speed, time left.", "runs --watch"),
    "judge_launch": Verb(
        "Decide what a Slurm job does after a launch; for the scripts in slurm/.",
        "--run_dir runs/mine --job 17 --world_size 16 --srun_code 137",
    ),
}


def verb_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a verb, which still wants its options."""
    verb = VERBS[name]
    return make_parser(verb.purpose, example=f"bert-ds {name} {verb.example}")
