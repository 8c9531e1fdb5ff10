"""Copies planted in real text: how many `clean_text` finds, misses and takes for copies that are none; time and memory.

    python tests/campaign_duplicates.py --text FOLDER --work FOLDER

The documents of FOLDER, and behind them a copy of every tenth one: exact, or with 1, 3, 5, 10 or 20 % of its words
exchanged, in turn. What goes of the documents themselves counts as wrongly removed. A row in
tests/results/duplicates.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

from campaign_rows import add_row

from bert_ds.corpus.text.documents import read_documents

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/duplicates.jsonl"
SHARES = (0.0, 0.01, 0.03, 0.05, 0.1, 0.2)


def main() -> None:
    """Plant, clean, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    own = [document.text for document in read_documents([args.text])]
    planted = [(SHARES[n % len(SHARES)], copied(text, SHARES[n % len(SHARES)], n)) for n, text in enumerate(own[::10])]
    source = args.work / "planted.jsonl"
    rows = [*own, *(text for _, text in planted)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
    output = args.work / "clean"
    command = [sys.executable, str(ROOT / "bert_ds/clean_text.py"), "--input", str(source), "--output", str(output)]
    subprocess.run(command, check=True, cwd=ROOT)
    lines = [line.split("\t")[0] for line in (output / "removed.tsv").read_text(encoding="utf-8").splitlines()]
    removed = [int(line.rpartition(" ")[2]) - 1 for line in lines]
    found = Counter(planted[number - len(own)][0] for number in removed if number >= len(own))
    total = Counter(share for share, _ in planted)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {
        "documents": len(own),
        "bytes": source.stat().st_size,
        "found": {f"{share:.0%}": f"{found[share]} of {total[share]}" for share in SHARES},
        "wrongly_removed": sum(number < len(own) for number in removed),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1000),
    }
    add_row(RESULTS, row)


def copied(text: str, share: float, seed: int) -> str:
    """Return the text with a share of its words exchanged."""
    chosen, words = random.Random(seed), text.split(" ")
    for place in chosen.sample(range(len(words)), round(share * len(words))):
        words[place] = f"x{chosen.randrange(10**6)}"
    return " ".join(words)


if __name__ == "__main__":
    main()
