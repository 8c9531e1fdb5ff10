"""Watches the start of a launch: a rank that ends before all ranks have met ends the others at once, with its name.

    watch_start()     first thing in a verb, before torch is imported
    meet(limit_s)     everything is imported: wait for the others
    joined()          the process group stands; wait until all ranks have said so, which ends the watch

Without it the others wait half an hour for a rank that an import, a kill or a full memory has ended. A thread of each
rank holds a connection to the `start_hub` in rank 0. A rank that is slow is waited for, and named every half minute;
one that never comes ends the start after `limit_s`, because from here it looks like one that is still to be started.
So does one that dies before its first line here, which its launcher alone sees: srun as slurm/common.sh starts it, and
on one machine DeepSpeed's launcher and torchrun, end the others in seconds; over several machines theirs do not.
Standard library only: it has to stand before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from bert_ds.basics.exit_record import record_exit
from bert_ds.basics.ranks import (
    EXIT_CONFIG,
    EXIT_RUN_AGAIN,
    PERMANENT_EXITS,
    LauncherError,
    Ranks,
    node_name,
    read_ranks,
)
from bert_ds.launch.start_hub import ALL_JOINED, ALL_READY, PHASES, Hub, encode, keep_alive, read_messages

VARIABLE = "BERT_DS_START_WATCH"
"""Environment variable: 0 switches the watch off, for networks that let nothing but MASTER_PORT through."""
START_LIMIT_S = 600.0
NUM_PORTS = 8
FIRST_PORT, LAST_PORT = 10_000, 30_000
"""Below the ports that systems give to outgoing connections."""
FIRST_CONTACT_S = 60.0
"""How long a rank waits for rank 0, and rank 0 for all, before it goes on with its imports."""
WORD_PATIENCE_S = 15.0
"""How long a rank that ends stays to tell it to ranks that have not come yet."""
OWN_WORD_S = 2.0
"""How long the others may take to end by an error of their own, where one has ended by an error."""
SAID_EVERY_S = 30.0
_CONNECT_TIMEOUT_S = 5.0
_LAUNCH_FACTS = (
    *("MASTER_PORT", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NTASKS"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)

_watch: _Watch | None = None


def watch_start() -> None:
    """Begin to watch, where a launcher or a person has started several ranks that know where to meet.

    Waits for rank 0 for a while, and rank 0 for all: a rank that dies before it was seen looks like one that is
    still to come.
    """
    global _watch
    try:
        ranks = read_ranks()
    except LauncherError:
        return  # the verb says it
    if ranks.world_size == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    if os.environ.get(VARIABLE) == "0":
        return
    try:
        _watch = _Watch(ranks, os.environ["MASTER_ADDR"])
    except OSError as error:
        print(f"error: rank 0 cannot watch the start: {error}; {VARIABLE}=0 does without", file=sys.stderr)
        sys.exit(EXIT_CONFIG)
    sys.excepthook = _watch.note_error
    _watch.wait_for_contact(FIRST_CONTACT_S)


def meet(limit_s: float) -> None:
    """Wait until every rank has come here; without a watch return at once.

    Args:
        limit_s: after so long the process ends with exit code 75 and the names of who is missing; 0: never.
    """
    if _watch is not None:
        _watch.limit_s = limit_s
        _watch.enter("ready")
        _watch.all_ready.wait()


def joined() -> None:
    """Say that this rank is in the process group, and wait until every rank has said so."""
    if _watch is not None:
        _watch.enter("joined")
        _watch.all_joined.wait()


def say_ended(code: int, message: str = "") -> None:
    """Tell the others why this rank ends, if they still watch the start."""
    if _watch is not None:
        _watch.say_ended(code, message)


class _Watch:
    """The thread of one rank."""

    def __init__(self, ranks: Ranks, address: str) -> None:
        self._ranks, self._address = ranks, address
        self._launch = "\n".join(f"{name}={os.environ.get(name, '')}" for name in _LAUNCH_FACTS)
        seed = int.from_bytes(hashlib.sha256(self._launch.encode()).digest()[:8], "big")
        self._ports = [FIRST_PORT + (seed + 997 * turn) % (LAST_PORT - FIRST_PORT) for turn in range(NUM_PORTS)]
        self._hub = Hub(self._launch, ranks.world_size, ports=self._ports) if ranks.is_main else None
        if self._hub is not None:
            self._address, self._ports = "127.0.0.1", [self._hub.port]
        self._where = f"{node_name()} (process {os.getpid()})"
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self.connected, self._over = threading.Event(), threading.Event()
        self._phase, self._begun, self._said = PHASES[0], 0.0, 0.0
        self._missing = f"rank 0 does not answer at {address}"
        self.limit_s = START_LIMIT_S
        self.all_ready, self.all_joined = threading.Event(), threading.Event()
        os.register_at_fork(after_in_child=self._leave_to_parent)
        threading.Thread(target=self._follow, name="start-watch", daemon=True).start()

    def wait_for_contact(self, seconds: float) -> None:
        """Wait until this rank is known to rank 0; on rank 0, until all are."""
        self.connected.wait(seconds)
        if self._hub is not None:
            self._hub.all_came.wait(seconds)

    def enter(self, phase: str) -> None:
        """Note that this rank has come so far."""
        with self._lock:
            self._phase = phase
            if not self._begun:
                self._begun = self._said = time.monotonic()
            self._send({"phase": phase})

    def note_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Show an error that nothing caught, as Python does, and tell the others."""
        sys.__excepthook__(kind, error, trace)
        sys.stderr.flush()
        message = f"{kind.__name__}: {error}"
        record_exit(1, message)
        self.say_ended(1, message)

    def say_ended(self, code: int, message: str) -> None:
        """Tell the others that this rank ends; where they have not come yet it stays for a moment."""
        if self._over.is_set():
            return
        self._over.set()
        if not self.connected.wait(WORD_PATIENCE_S if code else 0):
            return
        with self._lock:
            self._send({"ended": code, "message": message[:2000]})
        if self._hub is not None and code:
            self._hub.all_told.wait(WORD_PATIENCE_S)

    def _follow(self) -> None:
        for said in self._connect():
            if said is None:
                self._tick()
            elif "missing" in said:
                self._missing = said["missing"]
                self._tick()
            elif said.get("all") == ALL_READY:
                self.all_ready.set()
            elif said.get("all") == ALL_JOINED:
                self._over.set()
                self.all_joined.set()
                return
            elif "refused" in said:
                self._end(EXIT_CONFIG, f"{said['refused']}: wanted one process per rank")
            elif "gone" in said:
                self._end_after(said)
        self._end(EXIT_RUN_AGAIN, f"rank 0 on {self._address} died before all ranks had met")

    def _connect(self) -> Iterator[dict[str, Any] | None]:
        """Try until the hub of this launch answers; rank 0 may be started much later."""
        while True:
            for port in self._ports:
                with contextlib.suppress(OSError, ValueError, KeyError, StopIteration):
                    return self._greet(socket.create_connection((self._address, port), _CONNECT_TIMEOUT_S))
            self._tick()
            time.sleep(0.5)

    def _greet(self, connection: socket.socket) -> Iterator[dict[str, Any] | None]:
        messages = read_messages(connection)
        try:
            keep_alive(connection)
            hello = {"launch": self._launch, "rank": self._ranks.rank, "where": self._where}
            connection.sendall(encode(hello))
            said = next(messages) or {}
            if "refused" in said:
                self._end(EXIT_CONFIG, f"{said['refused']}: wanted one process per rank")
            if said.get("welcome") != self._launch:
                raise ValueError("another launch")
        except BaseException:
            connection.close()
            raise
        connection.settimeout(1.0)
        with self._lock:
            self._connection, self._missing = connection, str(said["missing"])
            self._send({"phase": self._phase})
        self.connected.set()
        return messages

    def _tick(self) -> None:
        """Say who is waited for, and end when that takes too long."""
        waited_s = time.monotonic() - self._begun if self._begun else 0.0
        if self._over.is_set() or not waited_s:
            return
        if self.limit_s and waited_s >= self.limit_s:
            what = self._missing or "not all ranks have met"
            self._end(EXIT_RUN_AGAIN, f"gave up after --start_limit, {self.limit_s:.0f} s: {what}")
        is_speaker = self._ranks.is_main or self._connection is None
        if is_speaker and self._missing and time.monotonic() - self._said >= SAID_EVERY_S:
            self._said = time.monotonic()
            _say(f"waiting for {waited_s:.0f} s: {self._missing}")

    def _end_after(self, said: dict[str, Any]) -> None:
        """End because of another rank."""
        if said["gone"] == self._ranks.rank:
            return
        who, code = f"rank {said['gone']} on {said['where']}", said["code"]
        if code is None:
            self._end(EXIT_RUN_AGAIN, f"{who} died before all ranks had met")
        time.sleep(OWN_WORD_S)  # what is wrong on one is mostly wrong on all, and their own words are better
        reason = f": {said['message']}" if said["message"] else ""
        text = f"{who} ended with exit code {code} before all ranks had met{reason}"
        self._end(code if code in PERMANENT_EXITS else EXIT_RUN_AGAIN, text)

    def _end(self, code: int, message: str) -> None:
        if self._over.is_set():
            threading.Event().wait()  # this rank is ending by itself
        record_exit(code, message)
        with self._lock:
            self._send({"ended": code, "message": message})
        if self._hub is not None:
            self._hub.all_told.wait(1.0)
        _say(f"{message}; rank {self._ranks.rank} ends")
        os._exit(code)

    def _send(self, message: dict[str, Any]) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.sendall(encode(message))

    def _leave_to_parent(self) -> None:
        """A forked child must not keep a connection open that says that this rank lives."""
        for one in [self._connection, *(self._hub.sockets() if self._hub else [])]:
            if one is not None:
                one.close()


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is closed
        os.write(2, f"start: {text}\n".encode())
