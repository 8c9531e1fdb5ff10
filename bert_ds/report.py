"""Say in a few lines how a run went, from its folder.

    python bert_ds/report.py --run_dir runs/default

--require_below_unigram NATS ends with exit code 5 unless the last validation loss is that far below the cross-entropy
of a model that knows only how frequent each piece is: a run above that line has not learned from context.
"""

from __future__ import annotations

from pathlib import Path

from bert_ds.command_line import make_parser, run_main
from bert_ds.ranks import DataError, DivergedError
from bert_ds.run_log import read_metrics


def main() -> None:
    parser = make_parser("Summarise a run folder.")
    parser.add_argument("--run_dir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--require_below_unigram", type=float, metavar="NATS", help="fail unless this far below")
    args = parser.parse_args()
    path = args.run_dir / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist: wanted the folder of a run")
    starts, steps = read_metrics(path, "start"), read_metrics(path, "train")
    evaluations = read_metrics(path, "evaluation")
    if not starts or not steps or not evaluations:
        raise DataError(f"{path} holds no evaluation yet: wanted a run that has come so far")

    last, unigram = evaluations[-1], starts[-1]["data"]["unigram_cross_entropy"]
    below = unigram - last["loss_mlm"]
    tokens_per_s = sorted(row["tokens_per_s"] for row in steps)[len(steps) // 2]
    print(f"step {steps[-1]['step']}: {tokens_per_s:,.0f} non-pad tokens/s (median of the logged intervals)")
    print(
        f"masked words of the validation text: loss {last['loss_mlm']:.3f} nats, accuracy {last['mlm_accuracy']:.3f}; "
        f"piece frequencies alone {unigram:.3f} nats, {below:.3f} above the model"
    )
    if args.require_below_unigram is not None and below < args.require_below_unigram:
        raise DivergedError(
            f"the validation loss is {below:.3f} nats below the unigram cross-entropy, wanted at least "
            f"{args.require_below_unigram}"
        )


if __name__ == "__main__":
    run_main(main)
