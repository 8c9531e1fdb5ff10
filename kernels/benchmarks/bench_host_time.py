"""Time what the host does for each operator and for a layer, without a GPU; rows go to results/host_time.csv.

    python kernels/benchmarks/bench_host_time.py
    python kernels/benchmarks/bench_host_time.py --against COMMIT    the kernels of that commit too, in turns with these

Kernel launches are recorded as an H100 would get them and not run, so Triton's own launch, 24 to 48 us each, is not in
these times; their number is in the record. What torch itself computes runs on the CPU, at sizes at which it takes as
good as no time; `linear layers alone` says what of a layer is not ours. Forward and backward are calls of one loop,
timed apart on one thread.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import io
import itertools
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_harness import RESULTS, ROOT, append_rows, circumstances
from torch import Tensor

from bert_ds.configuration.families.bert import BertConfig
from bert_ds.configuration.families.modernbert import ModernBertConfig
from bert_ds.encoder.bert_layers import BertLayer
from bert_ds.encoder.families.modernbert import ModernBertLayer
from bert_ds.encoder.fused_ops import FusedOps, fused_ops

NUM_TOKENS, WIDTH, NUM_HEADS, INNER, WORDS = 16, 64, 1, 256, 64
# Longest sequence that a call is told: with 128 attention's backward is one launch, above two.
MAX_SEQLEN = 128
_CALLS = 20
_TURNS = 30
_SHAPE = {"hidden_size": WIDTH, "num_attention_heads": NUM_HEADS, "intermediate_size": INNER, "num_hidden_layers": 2}


class Kernels(NamedTuple):
    """A version of the kernels."""

    commit: str | None
    """None: the files that are here."""
    ops: FusedOps
    record: Any
    """Its `record_launches`."""


class Call(NamedTuple):
    """What is timed: a function and what its gradients are wanted of."""

    run: Callable[[], Any]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class HostRow:
    """One line of the record."""

    time: str
    gpu: str
    torch: str
    triton: str
    commit: str
    subject: str
    mode: str
    launches: int
    min_us: str
    p50_us: str


def grown(*shape: int) -> Tensor:
    """Return a bf16 leaf."""
    return torch.randn(shape).bfloat16().requires_grad_()


def subjects(ops: FusedOps) -> Iterator[tuple[str, Call]]:
    """Yield the name and the call of every operator and layer, in bf16 and with dropout where the model has it."""
    ids, places = torch.zeros(NUM_TOKENS, dtype=torch.int64), torch.arange(NUM_TOKENS)
    bounds = torch.tensor([0, NUM_TOKENS], dtype=torch.int32)
    dropout: dict[str, Any] = {"dropout_p": 0.1, "dropout_seed": torch.tensor([7]), "site": 3}
    x, residual = grown(NUM_TOKENS, WIDTH), grown(NUM_TOKENS, WIDTH)
    inner, both = grown(NUM_TOKENS, INNER), grown(NUM_TOKENS, 2 * INNER)
    weight, bias, x_bias, inner_bias = grown(WIDTH), grown(WIDTH), grown(WIDTH), grown(INNER)
    qkv, words, word_bias = grown(NUM_TOKENS, 3, NUM_HEADS, WIDTH), grown(WORDS, WIDTH), grown(WORDS)
    tables = (words, grown(NUM_TOKENS, WIDTH), grown(2, WIDTH))
    fused, biases = (x, residual, weight, bias), {"x_bias_D": x_bias, **dropout}
    calls = {
        "attention": (lambda: ops.attention(qkv, bounds, MAX_SEQLEN, **dropout), (qkv,)),
        "dropout_add_layer_norm": (lambda: ops.dropout_add_layer_norm(*fused, 1e-12, **biases), (*fused, x_bias)),
        "dropout_add_then_norm": (lambda: ops.dropout_add_then_norm(*fused, 1e-12, **biases), (*fused, x_bias)),
        "layer_norm": (lambda: ops.layer_norm(x, weight, bias, 1e-12), (x, weight, bias)),
        "bias_gelu": (lambda: ops.bias_gelu(inner, inner_bias), (inner, inner_bias)),
        "geglu": (lambda: ops.geglu(both), (both,)),
        "rotary": (lambda: ops.rotary(qkv, places, theta=1e4), (qkv,)),
        "mlm_cross_entropy": (
            lambda: ops.mlm_cross_entropy(x, words, word_bias, ids, vocab_size=WORDS)[0],
            (x, words, word_bias),
        ),
        "embedding": (
            lambda: ops.embedding(ids, ids, places, *tables, weight, bias, 1e-12, **dropout),
            (*tables, weight, bias),
        ),
    }
    yield from ((name, Call(*call)) for name, call in calls.items())
    yield from _layers(ops, bounds, places, dropout["dropout_seed"])


def _layers(ops: FusedOps, bounds: Tensor, places: Tensor, seed: Tensor) -> Iterator[tuple[str, Call]]:
    """Yield the second layer of each family, which has all that a layer can have, and the layers' products alone."""
    hidden, residual = grown(NUM_TOKENS, WIDTH), grown(NUM_TOKENS, WIDTH)
    layers = {
        "layer of bert": (BertLayer(BertConfig(**_SHAPE), ops, layer=1), (hidden,), ()),
        "layer of modernbert": (
            ModernBertLayer(ModernBertConfig(**_SHAPE, vocab_size=WORDS), ops, layer=1),
            (hidden, residual),
            (places,),
        ),
    }
    for name, (layer, stream, extra) in layers.items():
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=0.02)
        layer.bfloat16().train()
        inputs = (*stream, *extra, bounds, MAX_SEQLEN, seed)
        yield name, Call(lambda layer=layer, inputs=inputs: layer(*inputs), (*stream, *layer.parameters()))
    shapes = ((3 * WIDTH, WIDTH), (WIDTH, WIDTH), (INNER, WIDTH), (WIDTH, INNER))
    pairs = [(grown(NUM_TOKENS, columns), grown(rows, columns)) for rows, columns in shapes]
    leaves = tuple(itertools.chain.from_iterable(pairs))
    yield "linear layers alone", Call(lambda: tuple(torch.nn.functional.linear(*pair) for pair in pairs), leaves)


def time_in_turns(calls: list[tuple[Kernels, Call]], turns: int, each: int) -> list[dict[str, tuple[int, np.ndarray]]]:
    """Return for each call, by mode, the number of launches and the microseconds of each time, `each` in a turn."""
    found: list[dict[str, list[int]]] = [{"forward": [], "backward": []} for _ in calls]
    launches = [{"forward": 0, "backward": 0} for _ in calls]
    gc.collect()
    gc.disable()
    try:
        # The first turn warms up.
        for turn, (index, (kernels, call)) in itertools.product(range(turns + 1), enumerate(calls)):
            with kernels.record("sm_90") as recorded:
                for _ in range(each):
                    forward, backward = _time_once(call, recorded, launches[index])
                    if turn:
                        found[index]["forward"].append(forward)
                        found[index]["backward"].append(backward)
    finally:
        gc.enable()
    return [
        {mode: (counts[mode], np.array(times) / 1000) for mode, times in modes.items()}
        for modes, counts in zip(found, launches, strict=True)
    ]


def _time_once(call: Call, recorded: list[Any], launches: dict[str, int]) -> tuple[int, int]:
    """Return the nanoseconds of forward and backward, and put down how many kernels each launched."""
    recorded.clear()
    start = time.perf_counter_ns()
    out = call.run()
    forward = time.perf_counter_ns() - start
    launches["forward"] = len(recorded)
    outs = out if isinstance(out, tuple) else (out,)
    douts = [torch.ones_like(each) for each in outs]
    start = time.perf_counter_ns()
    torch.autograd.grad(outs, call.leaves, douts)
    backward = time.perf_counter_ns() - start
    launches["backward"] = len(recorded) - launches["forward"]
    return forward, backward


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"--against: git {' '.join(arguments)} failed: {done.stderr.decode().strip()}")
    return done.stdout


@contextmanager
def kernels_of(commit: str | None) -> Iterator[Kernels]:
    """Give the kernels that are here, or those of a commit under another name beside them."""
    table = {name: getattr(fused_ops("triton"), name) for name in FusedOps.__dataclass_fields__}
    if commit is None:
        yield Kernels(None, FusedOps(**table), importlib.import_module("bert_kernels._launch").record_launches)
        return
    commit = _git("rev-parse", "--short", f"{commit}^{{commit}}").decode().strip()
    archive = _git("archive", commit, "kernels/bert_kernels")
    package = f"bert_kernels_{commit}"
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        target = (Path(folder) / "kernels/bert_kernels").rename(Path(folder) / package)
        for file in target.glob("*.py"):
            # Operators are registered under the package's name, and two of one name there cannot be.
            file.write_text(file.read_text().replace("bert_kernels", package))
        sys.path.insert(0, folder)
        try:
            modules = {name: op.__module__.replace("bert_kernels", package) for name, op in table.items()}
            ops = FusedOps(
                **{name: getattr(importlib.import_module(modules[name]), op.__name__) for name, op in table.items()}
            )
            yield Kernels(commit, ops, importlib.import_module(f"{package}._launch").record_launches)
        finally:
            sys.path.remove(folder)


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="time the kernels of this commit too, in turns with these")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--commit", help="what the rows say in a copy of the files that git does not know")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="one turn, writes nothing")
    return parser.parse_args()


def main() -> int:
    """Parse, time, append."""
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    facts, rows = circumstances(torch.device("cpu"), args.commit), []
    with kernels_of(None) as here, kernels_of(args.against) as before:
        versions = [here] if args.against is None else [before, here]
        made = [list(subjects(version.ops)) for version in versions]
        for same in zip(*made, strict=True):
            calls = list(zip(versions, (call for _, call in same), strict=True))
            times = time_in_turns(calls, *((1, 1) if args.dry_run else (_TURNS, _CALLS)))
            for (version, _), modes in zip(calls, times, strict=True):
                for mode, (launches, each) in modes.items():
                    figures = {"min_us": f"{each.min():.1f}", "p50_us": f"{np.median(each):.1f}"}
                    commit = {"commit": version.commit or facts["commit"]}
                    row = HostRow(**facts | commit, subject=same[0][0], mode=mode, launches=launches, **figures)
                    print(
                        f"{row.subject:24} {mode:9} {row.commit:10} {launches} launches {row.min_us:>8} us", flush=True
                    )
                    rows.append(row)
    if not args.dry_run:
        append_rows(args.results / "host_time.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
