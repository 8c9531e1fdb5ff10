"""How many broken configurations are refused with the right field, and how long that takes.

    python tests/campaign_configs.py [PART ...]        (make campaign-configs)

Parts: recipes, deepspeed_files, tasks_and_job (every kind of mistake at every setting of every shipped file), each also
_in_full (with every default written out and broken), together (several mistakes at once),
hypothesis (values and bytes nobody thought of), classic (55 well-known mistakes, also given to DeepSpeed's own parser),
bombs, seconds (from starting a command to its message). Each appends one row to tests/results/configs.jsonl; a part
that has a row of this commit is not repeated. The exit code is 1 if one file was not treated as it should be.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from broken_deepspeed import BROKEN
from config_bombs import BOMBS
from config_damage import Damage, broken, every_damage, put
from config_oracle import Subject, ask, names_setting, verdict
from config_subjects import (
    DEEPSPEED,
    RECIPE,
    deepspeed_refuses,
    deepspeed_subject,
    deepspeed_subjects,
    other_subjects,
    recipe_subject,
    recipe_subjects,
    shipped_subjects,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests/results/configs.jsonl"
TOGETHER = 3_000
EXAMPLES = 3_000
SHOWN = 40


class Tally:
    """What came out of one part."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: list[float] = []
        self.failures: list[str] = []
        self.table: dict[str, Any] = {}
        """Figures of single cases, where the part has them."""

    def add(self, found: str, seconds: float, what: str) -> None:
        """Count a verdict: "refused", "accepted", or what is wrong."""
        right = found in ("refused", "accepted")
        self.counts[found if right else "wrong"] += 1
        self.seconds.append(seconds)
        if not right:
            self.failures.append(f"{what}: {found}")

    def row(self) -> dict[str, Any]:
        """The figures of the part."""
        return {
            "tried": sum(self.counts.values()),
            "refused_with_the_right_field": self.counts["refused"],
            "accepted_and_honoured": self.counts["accepted"],
            "wrong": self.counts["wrong"],
            "median_ms": round(1e3 * statistics.median(self.seconds), 2),
            "largest_ms": round(1e3 * max(self.seconds), 1),
        }


def systematic(file: Path, *, subjects: Callable[[], Iterable[Subject]], in_full: bool = False) -> Tally:
    """Break every setting of some files in every way."""
    tally = Tally()
    for subject in (one for one in subjects() if ("in full" in one.name) == in_full):
        for damage in every_damage(subject.data):
            try_damage(tally, subject, file, damage)
        print(f"{subject.name}: {dict(tally.counts)}", file=sys.stderr, flush=True)
    return tally


def together(file: Path) -> Tally:
    """Make two to six mistakes in one file: every one of them has to be named."""
    tally, choose = Tally(), random.Random(1)
    subjects = [subject for subject in shipped_subjects() if "in full" not in subject.name]
    damages = {subject.name: [one for one in every_damage(subject.data) if one.is_wrong] for subject in subjects}
    for _ in range(TOGETHER):
        subject = choose.choice(subjects)
        chosen = _apart(choose.sample(damages[subject.name], choose.randint(2, 6)))
        file.write_text(broken(subject.data, *chosen), encoding="utf-8")
        answer = ask(subject, file)
        missed = [one.path for one in chosen if not names_setting(answer, file, one.path)]
        found = answer.crash or (f"{', '.join(missed)} not named" if missed else "refused")
        tally.add(found, answer.seconds, f"{subject.name}: {[(one.kind, one.path) for one in chosen]}")
    return tally


def try_damage(tally: Tally, subject: Subject, file: Path, damage: Damage) -> None:
    """Write a broken file, have it read, and count what became of it."""
    file.write_text(broken(subject.data, damage), encoding="utf-8")
    answer = ask(subject, file)
    found = verdict(subject, file, answer, damage)
    tally.add(found, answer.seconds, f"{subject.name}: {damage.path} {damage.kind}")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["auto", "bf16", "cpu", "none", "", "true", "1e-4", "lamb", 0, 1, -1, 2**31, 2**53, 2**63, 1e-320]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def hypothesis(file: Path) -> Tally:
    """Set random values at random settings, and cut, repeat and overwrite random bytes."""
    tally = Tally()
    subjects = list(shipped_subjects())
    places = {
        subject.name: [damage.path for damage in every_damage(subject.data) if damage.kind == "null"]
        for subject in subjects
    }
    quiet = settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )

    @quiet
    @given(st.sampled_from(subjects), st.integers(0, 10**6), JSON)
    def values(subject: Subject, place: int, value: Any) -> None:
        path = places[subject.name][place % len(places[subject.name])]
        parts = [int(part) if part.isdigit() else part for part in path.split(".")]
        make = partial(put, path=tuple(parts), value=value)
        try_damage(tally, subject, file, Damage("random value", path, False, make))

    @quiet
    @given(st.sampled_from(subjects), st.integers(0, 10**6), st.integers(0, 12), st.binary(max_size=4))
    def bytes_(subject: Subject, place: int, cut: int, added: bytes) -> None:
        content = json.dumps(subject.data, indent=1).encode()
        place %= len(content)
        file.write_bytes(content[:place] + added + content[place + cut :])
        answer = ask(subject, file)
        found = "crashed: " + answer.crash if answer.crash else "refused" if answer.lines else ""
        if not found:
            ignored = subject.ignored(file)
            found = f"was accepted and ignored: {ignored[:3]}" if ignored else "accepted"
        tally.add(found, answer.seconds, f"{subject.name}: {cut} bytes at {place} replaced by {added!r}")

    values()
    bytes_()
    return tally


def classic(file: Path) -> Tally:
    """Give 55 classic mistakes to this project and to DeepSpeed."""
    tally = Tally()
    subject = deepspeed_subject("classic mistakes", {})
    for settings_, wanted in BROKEN:
        file.write_text(json.dumps(settings_), encoding="utf-8")
        answer = ask(subject, file)
        named = any(wanted in line for line in answer.lines)
        tally.add("refused" if named else f"{answer.lines}{answer.crash}", answer.seconds, str(settings_))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if not deepspeed_refuses({"train_batch_size": 48, **settings_}):
                tally.counts["deepspeed"] += 1
    return tally


def bombs(file: Path) -> Tally:
    """Read each bomb in a process of its own that measures its memory."""
    tally, largest = Tally(), 0
    for role in ("recipe", "DeepSpeed file"):
        subject = recipe_subject(role, {}) if role == "recipe" else deepspeed_subject(role, {})
        for name, make in BOMBS.items():
            bomb = file.with_name(f"bomb-{len(tally.seconds)}.json")
            make(bomb)
            answer, grown = _in_a_child(partial(ask, subject, bomb))
            largest = max(largest, grown)
            is_named = bool(answer.lines) and str(bomb) in answer.lines[0]
            is_short = sum(map(len, answer.lines)) < 50_000 and all(line.isprintable() for line in answer.lines)
            found = "refused" if is_named and is_short else f"{answer.lines[:1]} {answer.crash[-300:]}"
            found = found if grown < 64 << 20 else f"took {grown >> 20} MiB"
            tally.add(found, answer.seconds, f"{role}: {name}")
            if answer.seconds > 0.1:
                tally.failures.append(f"note: {role}: {name} took {answer.seconds:.2f} s")
    print(f"bombs: at most {largest / 2**20:.0f} MiB more memory", file=sys.stderr)
    return tally


def seconds(file: Path) -> Tally:
    """Measure the time from starting a command to the message about a mistake, the best of three.

    That `bert-ds` says what a rank says, no launcher is started and no run folder is made is tried on the way.
    """
    tally, work = Tally(), file.parent
    file.write_text(RECIPE.read_text(encoding="utf-8").replace("total_steps", "total_stesp"), encoding="utf-8")
    deepspeed = work / "deepspeed.json"
    deepspeed.write_text('{"zero_optimisation": {"stage": 2}}', encoding="utf-8")
    pair = ("--run", str(RECIPE), "--deepspeed_config", str(DEEPSPEED))
    tuned = ("--task", "sst2", "--model", str(work / "model"), "--deepspeed_config", str(DEEPSPEED))
    for name, wanted, verb, words in (
        ("DeepSpeed file: a typo", "zero_optimization", "pretrain", (*pair[:3], str(deepspeed))),
        ("DeepSpeed file: missing", "No such file", "pretrain", (*pair[:3], str(work / "none.json"))),
        ("recipe: a typo", "total_steps", "pretrain", ("--run", str(file), *pair[2:])),
        ("recipe: missing", "No such file", "pretrain", ("--run", str(work / "none.json"), *pair[2:])),
        ("--set: a typo", "total_steps", "pretrain", (*pair, "--set", "training.total_stesp=3")),
        ("option: a typo", "--dry_run", "pretrain", (*pair, "--dry_rum")),
        ("--init_from: missing", "does not exist", "pretrain", (*pair, "--init_from", str(work / "none"))),
        ("--task: a typo", '"sst2"', "finetune", ("--task", "sst3", *tuned[2:])),
        ("--model: missing", "has no config.json", "finetune", tuned),
        ("--data: a wrong folder", "--data names", "score", (*tuned[:4], "--data", str(work))),
    ):
        rank = _asked([sys.executable, str(ROOT / f"bert_ds/{verb}.py"), *words], wanted, work, tally, name)
        bert_ds = [sys.executable, "-m", "bert_ds.console", verb, *words]
        asked = min((_asked(bert_ds, wanted, work, tally, name) for _ in range(3)), key=lambda one: one["wall_s"])
        if rank.pop("said") != asked.pop("said"):
            tally.failures.append(f"{name}: a rank says something else")
        tally.table[name] = {"bert-ds": asked, "one rank": rank}
        print(f"{name}: {tally.table[name]}", file=sys.stderr, flush=True)
    # -o env: the environment is there; making it would be measured, and done to the one that others use.
    make = ["make", "-o", "env", "-C", str(ROOT), "--no-print-directory", "pretrain", f"RUN_DIR={work / 'run'}"]
    asked = _asked([*make, f"DEEPSPEED_CONFIG={deepspeed}"], "zero_optimization", work, tally, "make")
    asked.pop("said")
    tally.table["make pretrain, DeepSpeed file: a typo"] = {"make": asked}
    return tally


def _asked(command: list[str], wanted: str, work: Path, tally: Tally, name: str) -> dict[str, Any]:
    """Run a command that has a mistake and return what it said and the seconds that passed and were computed."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    spent, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    is_right = done.returncode == 2 and wanted in done.stderr and not (work / "run").exists()
    is_clean = "Traceback" not in done.stderr and "launcher" not in done.stdout + done.stderr
    tally.add("refused" if is_right and is_clean else f"exit {done.returncode}: {done.stderr}", spent, name)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"said": done.stderr, "wall_s": round(spent, 2), "cpu_s": round(cpu_s, 2)}


PARTS: dict[str, Callable[[Path], Tally]] = {
    "recipes": partial(systematic, subjects=recipe_subjects),
    "deepspeed_files": partial(systematic, subjects=deepspeed_subjects),
    "tasks_and_job": partial(systematic, subjects=other_subjects),
    "recipes_in_full": partial(systematic, subjects=recipe_subjects, in_full=True),
    "deepspeed_files_in_full": partial(systematic, subjects=deepspeed_subjects, in_full=True),
    "tasks_and_job_in_full": partial(systematic, subjects=other_subjects, in_full=True),
    "together": together,
    "hypothesis": hypothesis,
    "classic": classic,
    "bombs": bombs,
    "seconds": seconds,
}


def main() -> int:
    chosen = sys.argv[1:] or list(PARTS)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    done = {row["part"] for row in rows if row["commit"] == commit.strip()}
    num_failures = 0
    for part in chosen:
        if part in done and not sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            tally = PARTS[part](Path(folder) / "broken.json")
        row = {"part": part, "commit": commit.strip(), **tally.row()}
        if part == "classic":
            row |= {"tried": len(BROKEN), "accepted_by_deepspeed_itself": tally.counts["deepspeed"]}
        if tally.table:
            row["cases"] = tally.table
        num_failures += row["wrong"]
        print("\n".join(tally.failures[:SHOWN]), json.dumps(row), sep="\n", flush=True)
        with RESULTS.open("a", encoding="utf-8") as results:
            results.write(json.dumps(row) + "\n")
    return 1 if num_failures else 0


def _apart(damages: list[Damage]) -> list[Damage]:
    """Return those of the damages that can be made together: none inside what another has replaced or renamed."""
    kept: dict[tuple[str | int, ...], Damage] = {}
    for damage in damages:
        # What the settings of a section with a type mean is not known while the type is wrong.
        place = damage.place[:-1] if damage.place[-1] == "type" else damage.place
        if not any(_is_inside(place, other) or _is_inside(other, place) for other in kept):
            kept[place] = damage
    return list(kept.values())


def _is_inside(place: tuple[str | int, ...], outer: tuple[str | int, ...]) -> bool:
    return place[: len(outer)] == outer


def _in_a_child(action: Callable[[], Any]) -> tuple[Any, int]:
    """Run an action in a fork and return its value and by how many bytes the memory has grown at most."""
    from multiprocessing import get_context

    context = get_context("fork")
    ours, theirs = context.Pipe()

    def child() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        value = action()
        theirs.send((value, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))

    process = context.Process(target=child)
    process.start()
    found = ours.recv()
    process.join()
    return found


if __name__ == "__main__":
    sys.exit(main())
