"""Ten thousand damaged files for every reader: each is read or refused by a sentence, none hangs, none is a traceback.

    python tests/campaign_fuzz.py [--inputs 10000] [--one N]        (make campaign-fuzz)

Input N is a right file, damaged by a generator seeded with N alone: bytes flipped, cut, repeated or replaced by hostile
ones, JSON values exchanged for odd ones, another encoding, no regular file. Rows go to tests/results/fuzz.jsonl,
one for each thousand, with the numbers of the inputs that failed; what this commit has recorded is not repeated.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from campaign_rows import add_row, read_rows
from downstream_cases import review_task, write_tiny_export

from bert_ds.basics.exit_record import read_exits
from bert_ds.basics.input_gate import time_limit
from bert_ds.basics.ranks import CheckpointError, DataError
from bert_ds.configuration.deepspeed_file.ds_config import load_ds_config
from bert_ds.configuration.reading.config_files import shipped_file
from bert_ds.configuration.recipe.run_config import ConfigError, load_run_config
from bert_ds.configuration.task.task_config import load_task
from bert_ds.configuration.task.task_data_config import DataFile
from bert_ds.corpus.shards.shard_folder import read_manifest
from bert_ds.corpus.text.documents import read_documents
from bert_ds.corpus.text.sentences import split_sentences
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
from bert_ds.downstream.rows.records import read_records
from bert_ds.downstream.tuning.evaluation_history import read_history as read_evaluations
from bert_ds.encoder.hf_folder import load_hf_folder
from bert_ds.reporting.run_history import read_history, summary_lines
from bert_ds.reporting.run_overview import read_overview
from bert_ds.reporting.run_page import render_page
from bert_ds.training.checkpoints.checkpoint_folder import parse_manifest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/fuzz.jsonl"
REFUSED = (ConfigError, DataError, CheckpointError)
LIMIT_S = 60
PART = 1_000


class Hang(BaseException):
    """An input that took longer than LIMIT_S."""


class Case(NamedTuple):
    """A reader and the file that is damaged for it."""

    name: str
    file: str
    content: bytes
    read: Callable[[Path], object]
    """Takes the folder that the file is in."""
    beside: Path | None = None
    """A folder whose other files are there too."""


def cases(work: Path) -> list[Case]:
    """Return every reader with a right file."""
    model = write_tiny_export(work / "model")
    task = review_task(work / "task")
    found = [
        Case(
            "recipe",
            "a.json",
            shipped_file("recipes/bert_base_phase1.json").read_bytes(),
            _with("a.json", load_run_config),
        ),
        Case("DeepSpeed file", "a.json", shipped_file("zero2.json").read_bytes(), _with("a.json", load_ds_config)),
        Case("task", "a.json", task.read_bytes(), _with("a.json", load_task)),
        Case("config.json", "config.json", (model / "config.json").read_bytes(), load_hf_folder, model),
        Case("weights", "model.safetensors", (model / "model.safetensors").read_bytes(), load_hf_folder, model),
        Case("log", "metrics.jsonl", _log(), _report),
        Case("overview", "metrics.jsonl", _log(), lambda folder: read_overview(folder, queue=None, now=9.0)),
        Case(
            "recipe of a run", "run_config.json", b'{"name": "a", "training": {"total_steps": 9}}', _report_beside_log
        ),
        Case("exit record", "rank_0.json", b'{"code": 3, "message": "a"}', read_exits),
        Case("evaluations", "a.json", b'[{"step": 1, "value": 0.5}]', _with("a.json", _evaluations)),
        Case("shard manifest", "manifest.json", b'{"format": 1, "dtype": "<u2", "splits": {}}', read_manifest),
        Case("checkpoint manifest", "manifest.json", b'{"format": 1, "checksum": "0", "files": {}}', parse_manifest),
        Case("text", "a.txt", _TEXT, _corpus("a.txt")),
        Case("extracts", "a.txt", b'<doc id="1" title="A">\nA\n\nText. More of it.\n</doc>\n' * 9, _corpus("a.txt")),
        Case("JSON lines", "a.jsonl", b'{"text": "One. Two."}\n' * 9, _corpus("a.jsonl")),
        *(
            Case(f"{name} of a tokenizer", name, (model / name).read_bytes(), load_tokenizer, model)
            for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
        ),
    ]
    import torch

    torch.save({"a": torch.ones(3), "b": [torch.zeros(2, 2)]}, work / "a.bin")
    found.append(Case("pickled weights", "pytorch_model.bin", (work / "a.bin").read_bytes(), _pickled, model))
    for form, content, settings in _DATA:
        found.append(Case(form, "a", content.encode(), _records(form, settings)))
    return found


_TEXT = "One sentence. Another, by Mr. Smith, at 3.5 p.m.\nA third one!\n\n第一句。第二句！\n".encode()
_SQUAD = {
    "data": [
        {
            "paragraphs": [
                {"context": "a b", "qas": [{"id": "1", "question": "c", "answers": [{"text": "a", "answer_start": 0}]}]}
            ]
        }
    ]
}
_DATA: list[tuple[str, str, dict[str, Any]]] = [
    ("tsv", "text\tlabel\na\t1\nb\t0\n", {}),
    ("csv", 'text,label\n"a, b",1\nb,0\n', {}),
    ("jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', {}),
    ("lines", "A:b c\nD:e f\n", {"pattern": r"(?P<label>\w+):(?P<text>.*)"}),
    ("xml", '<c><p id="1"><t>a &amp; b</t></p><p id="2"><t>c</t></p></c>', {"record": "p"}),
    ("conll", "we\tO\nsaw\tO\n\nparis\tB-LOC\n", {}),
    ("conllu", "1\twe\t_\tPRON\t_\t_\t_\t_\t_\t_\n2\tsaw\t_\tVERB\t_\t_\t_\t_\t_\t_\n\n", {}),
    ("squad", json.dumps(_SQUAD), {}),
]


def _with(name: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: read(folder / name)


def _corpus(name: str) -> Callable[[Path], object]:
    return lambda folder: [split_sentences(document.text) for document in read_documents([folder / name])]


def _records(form: str, settings: dict[str, Any]) -> Callable[[Path], object]:
    return lambda folder: read_records(DataFile(path=str(folder / "a"), format=form, **settings))  # type: ignore[arg-type]


def _evaluations(path: Path) -> object:
    return read_evaluations(path, until_step=9)


def _pickled(folder: Path) -> object:
    (folder / "model.safetensors").unlink()
    return load_hf_folder(folder)


def _log() -> bytes:
    rows = [{"kind": "start", "step": 0, "attempt": 1, "time": 0.0, "plan": {}, "data": {"unigram_cross_entropy": 7.0}}]
    trust = {"dense.weight": {"trust_ratio": {"min": 0.1, "median": 0.2, "max": 0.3}}}
    rows += [
        {"kind": "train", "step": n, "time": 1.0, "loss": 2.0, "tokens_per_s": 9.0, "trust": trust} for n in (1, 2)
    ]
    rows += [{"kind": "evaluation", "step": 2, "time": 3.0, "loss_mlm_masked": 2.5, "mlm_masked_targets": 7}]
    rows += [{"kind": "checkpoint", "step": 2, "time": 3.0, "bytes": 7, "seconds": 0.1}]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _report(folder: Path) -> object:
    history = read_history(folder)
    history.trust("trust_ratio")
    return summary_lines(history), render_page(history, [])


def _report_beside_log(folder: Path) -> object:
    (folder / "metrics.jsonl").write_bytes(_log())
    read_overview(folder, queue=None, now=9.0)
    return _report(folder)


# Damage: each takes the bytes and a generator, and returns other bytes.

ODD_VALUES = (
    *(None, True, "", "²", "--1", "auto", "$a$_{", "a\tb", "\ud800", "\0", "x" * 5000, "../../etc/passwd", "\u2028"),
    *(0, -1, 10**30, 2**63, 0.5, -0.0, 1e300, float("inf"), float("nan"), [], {}, [[]], {"a": {"b": []}}, [None] * 100),
)
HOSTILE = (
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"<a>" * 3000,
    b"\r",
    b"\n\n",
    b"\t",
    b'"',
)
HOSTILE += (
    b"NaN",
    b"Infinity",
    b"1e999",
    b"9" * 5000,
    b"<!ENTITY a 'b'>",
    b"&a;",
    b"\\ud800",
    b"\xc2\x85",
    b".",
    b"a" * 9000,
)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Return a file that has been damaged once to four times."""
    for _ in range(draw.randint(1, 4)):
        content = draw.choice((_flipped, _cut, _repeated, _replaced, _replaced, _value, _value, _value, _encoded))(
            content, draw
        )
    return content


def _flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content or b"a")
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(content: bytes, draw: random.Random) -> bytes:
    first, last = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:first] + content[last:] if draw.random() < 0.5 else content[:first]


def _repeated(content: bytes, draw: random.Random) -> bytes:
    first, last = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:last] + content[first:last][:2000] * draw.randint(1, 20) + content[last:]


def _replaced(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    return content[:place] + draw.choice(HOSTILE) + content[place + draw.randint(0, 9) :]


def _encoded(content: bytes, draw: random.Random) -> bytes:
    return content.decode("utf-8", "replace").encode(
        draw.choice(("gb18030", "utf-16", "utf-16-be", "utf-32")), "replace"
    )


def _value(content: bytes, draw: random.Random) -> bytes:
    """Exchange a value of a JSON file, or of one line of it; other files lose or gain bytes instead."""
    lines = content.split(b"\n")
    index = draw.randrange(len(lines))
    try:
        value = json.loads(content)
        lines, index = [content], 0
    except (ValueError, RecursionError):
        try:
            value = json.loads(lines[index])
        except (ValueError, RecursionError):
            return _replaced(content, draw)
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        holder = pending.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        places += [(holder, key) for key in keys]
        pending += [holder[key] for key in keys]
    if not places:
        return _replaced(content, draw)
    holder, key = draw.choice(places)
    holder[key] = draw.choice(ODD_VALUES)
    lines[index] = json.dumps(value).encode()
    return b"\n".join(lines)


def try_input(number: int, found: list[Case], work: Path) -> str:
    """Damage and read input `number`; "read", "refused", or what is wrong."""
    draw = random.Random(number)
    case = draw.choice(found)
    folder = work / "input"
    shutil.rmtree(folder, ignore_errors=True)
    if case.beside is None:
        folder.mkdir()
    else:
        shutil.copytree(case.beside, folder)
        (folder / case.file).unlink(missing_ok=True)
    path = folder / case.file
    if draw.random() < 0.02:
        _no_file(path, draw)
    else:
        path.write_bytes(damaged(case.content, draw))
    try:
        with time_limit(LIMIT_S, "hang", error=Hang):  # type: ignore[arg-type]
            case.read(folder)
    except REFUSED as error:
        # A sentence that names the file; of a configuration, one for each mistake.
        is_right = case.file in str(error) or str(folder) in str(error)
        return "refused" if is_right and len(str(error)) < 20_000 else f"{case.name}: says {str(error)[:200]!r}"
    except Hang:
        return f"{case.name}: hangs"
    except BaseException as error:
        return f"{case.name}: {''.join(traceback.format_exception(error)[-3:])}"
    return "read"


def _no_file(path: Path, draw: random.Random) -> None:
    kind = draw.randrange(4)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to("/dev/zero")
    elif kind == 2:
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(1 << 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10 * PART)
    parser.add_argument("--one", type=int, metavar="N", help="show what becomes of one input")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    done = {row["first"] for row in read_rows(RESULTS) if row["commit"] == commit}
    with tempfile.TemporaryDirectory() as name:
        found = cases(Path(name))
        if args.one is not None:
            print(try_input(args.one, found, Path(name)))
            return
        num_failed = 0
        for first in (first for first in range(0, args.inputs, PART) if first not in done):
            counts: collections.Counter[str] = collections.Counter()
            failed, slowest, start = [], 0.0, time.process_time()
            for number in range(first, first + PART):
                before = time.process_time()
                answer = try_input(number, found, Path(name))
                slowest = max(slowest, time.process_time() - before)
                counts[answer if answer in ("read", "refused") else "failed"] += 1
                if answer not in ("read", "refused"):
                    failed.append(number)
                    print(number, answer, file=sys.stderr, flush=True)
            num_failed += len(failed)
            facts = {
                "commit": commit,
                "machine": platform.machine(),
                "cpus": os.cpu_count(),
                "python": platform.python_version(),
            }
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            row = {"first": first, "tried": PART, **{name: counts[name] for name in ("read", "refused", "failed")}}
            seconds = {"cpu_s": round(time.process_time() - start, 1), "slowest_s": round(slowest, 2), "peak_mib": peak}
            add_row(RESULTS, {**row, "numbers": failed, **seconds, **facts})
    sys.exit(bool(num_failed))


if __name__ == "__main__":
    main()
