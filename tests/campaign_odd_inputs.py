"""The table of odd inputs: what each is answered, in how many seconds and how much memory.

    python tests/campaign_odd_inputs.py        (make campaign-fuzz)

Each input is read in a process of its own, as a verb would read it. Rows go to tests/results/odd_inputs.jsonl; an input
that this commit has recorded is not repeated. Memory is the largest of the process, of which the libraries take the
most: see the first row.
"""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from campaign_rows import add_row, read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/odd_inputs.jsonl"
MILLION = 1_000_000
TIMEOUT_S = 3_600

RECORDS = """
from bert_ds.configuration.task.task_data_config import DataFile
from bert_ds.downstream.rows.records import read_records
print(len(read_records(DataFile(path=sys.argv[1], {}))), "rows")
"""
MODEL = """
from bert_ds.encoder.hf_folder import load_hf_folder
print(len(load_hf_folder(Path(sys.argv[1])).tensors), "tensors")
"""
TOKENIZER = """
from bert_ds.corpus.tokenizer.tokenizer_folder import load_tokenizer
print(load_tokenizer(sys.argv[1]).vocab_size, "pieces")
"""
CONFIG = """
from bert_ds.configuration.recipe.run_config import load_run_config
load_run_config(sys.argv[1])
"""


def write_model(path: Path) -> None:
    """Write a tiny model folder, in a process of its own: a fork counts the memory of the one that measures."""
    code = "import pathlib, sys, downstream_cases as cases; cases.write_tiny_export(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, env=_environment(), cwd=ROOT)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{ROOT / 'tests'}"}


def million_rows(path: Path) -> None:
    """A run of LAMB with two evaluations in a thousand steps: 3.5 GB."""
    path.mkdir()
    kinds = [f"bert.encoder.layer.part_{index}.weight" for index in range(20)]
    spread = {"min": 0.1, "median": 0.2, "max": 0.3}
    trust = json.dumps({kind: {"trust_ratio": spread, "update_norm": spread} for kind in kinds})
    draw = random.Random(1)
    with (path / "metrics.jsonl").open("w") as file:
        file.write('{"kind": "start", "step": 0, "attempt": 1, "time": 0.0, "plan": {}, "data": {}}\n')
        for step in range(1, MILLION + 1):
            loss = draw.random()
            facts = f'"step": {step}, "attempt": 1, "time": {step}.0, "loss_mlm": {loss}'
            rest = '"loss_nsp": 0.5, "mlm_accuracy": 0.5, "lr": 0.001, "grad_norm": 1.5, "mfu": 0.4, '
            rest += f'"tokens_per_s": 12345.0, "data_wait_share": 0.01, "loss": {loss}, "trust": {trust}'
            file.write(f'{{"kind": "train", {facts}, {rest}}}\n')
            if step % 500 == 0:
                file.write(f'{{"kind": "evaluation", {facts}, "loss_mlm_masked": {loss}}}\n')
    (path / "run_config.json").write_bytes((ROOT / "ds_configs/recipes/embedded_default.json").read_bytes())


def tensors(expression: str) -> Callable[[Path], None]:
    """A model folder whose pytorch_model.bin holds one tensor."""

    def write(path: Path) -> None:
        write_model(path)
        (path / "model.safetensors").unlink()
        code = f"import sys, torch\ntorch.save({{'a': {expression}}}, sys.argv[1])"
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path / "pytorch_model.bin")], check=True)

    return write


def changed(name: str, old: str, new: str) -> Callable[[Path], None]:
    """A model folder in one file of which a text has been replaced."""

    def write(path: Path) -> None:
        write_model(path)
        (path / name).write_text((path / name).read_text().replace(old, new, 1))

    return write


def linked(path: Path) -> None:
    write_model(path)
    (path / "tokenizer_config.json").rename(path.parent / "elsewhere.json")
    (path / "tokenizer_config.json").symlink_to(path.parent / "elsewhere.json")


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


INPUTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing but the libraries": (lambda path: path.write_text("a\n"), RECORDS.format('format="lines"')),
    "a FIFO as a task's rows": (lambda path: os.mkfifo(path), RECORDS.format('format="tsv"')),
    "/dev/zero as a task's rows": (lambda path: path.symlink_to("/dev/zero"), RECORDS.format('format="tsv"')),
    "a sparse file of 1 TiB as a task's rows": (sparse, RECORDS.format('format="tsv"')),
    "a sparse file of 1 TiB as a recipe": (sparse, CONFIG),
    "a row of JSON 100,000 deep": (lambda path: path.write_text("[" * 100_000), RECORDS.format('format="jsonl"')),
    "XML with a million levels": (
        lambda path: path.write_text("<a>" * MILLION),
        RECORDS.format('format="xml", record="p"'),
    ),
    "the pattern (a+)+$ on a line of 60": (
        lambda path: path.write_text("a" * 59 + "b"),
        RECORDS.format('format="lines", pattern="(a+)+$"'),
    ),
    "GB18030 that is not named": (
        lambda path: path.write_bytes("中文\n".encode("gb18030")),
        RECORDS.format('format="lines"'),
    ),
    "GB18030 that is named": (
        lambda path: path.write_bytes("中文\n".encode("gb18030")),
        RECORDS.format('format="lines", encoding="gb18030"'),
    ),
    "UTF-16 that is not named": (
        lambda path: path.write_bytes("中文\n".encode("utf-16")),
        RECORDS.format('format="lines"'),
    ),
    "UTF-16 that is named": (
        lambda path: path.write_bytes("中文\n".encode("utf-16")),
        RECORDS.format('format="lines", encoding="utf-16"'),
    ),
    "a tensor of stride 0 and 10^12 values": (tensors("torch.zeros(1).expand(10**12)"), MODEL),
    "a tensor on the meta device": (tensors("torch.empty(9, device='meta')"), MODEL),
    "a sparse tensor": (tensors("torch.eye(3).to_sparse()"), MODEL),
    "a tokenizer id of Infinity": (changed("tokenizer.json", ": 7", ": Infinity"), TOKENIZER),
    "tokenizer_config.json is a link out of the folder": (linked, TOKENIZER),
    "report.py --html over a million rows": (million_rows, ""),
}


def measure(name: str, work: Path) -> dict[str, object]:
    """Make an input, have it read, and return the answer and what it cost."""
    make, code = INPUTS[name]
    path = work / "input"
    make(path)
    command = [sys.executable, "-c", f"import sys\nfrom pathlib import Path\n{code}", str(path)]
    if not code:
        command = [sys.executable, str(ROOT / "bert_ds/report.py"), "--run_dir", str(path), "--html"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = (done.stderr if done.returncode and code else done.stdout or done.stderr).strip().splitlines() or [""]
    answer = said[-1].replace(str(path), "FILE").rpartition("Error: ")[2][:200]
    seconds = {
        "cpu_s": round(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime, 1),
        "wall_s": round(time.monotonic() - start, 1),
    }
    return {"input": name, "answer": answer, **seconds, "peak_mib": used.ru_maxrss // 1024}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:  # so that the memory of one input is not that of another
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(sys.argv[2], Path(folder))))
        return
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    done = {row["input"] for row in read_rows(RESULTS) if row["commit"] == commit.strip()}
    for name in INPUTS:
        if name not in done:
            command = [sys.executable, __file__, "--child", name]
            row = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
            add_row(RESULTS, {**row, "commit": commit.strip(), "machine": platform.machine(), "cpus": os.cpu_count()})


if __name__ == "__main__":
    main()
