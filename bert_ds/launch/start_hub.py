"""Where the ranks of a start report to, a thread in rank 0: who has come, who has gone, who is waited for.

Every message is one JSON object on a line. A rank says hello, then its phases, then why it ends; the hub says when all
have come so far, and at once when one is gone: the kernel closes the connection of a process whatever ended it, and
misses a machine that is gone by TCP's keep-alive, without a beat that an import could hold up. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

PHASES = ("started", "ready", "joined")
"""What a rank has reached: its first line, the rendezvous with everything imported, the process group."""
ALL_READY, ALL_JOINED = "all_ready", "all_joined"
_NAMED = 8
_LONGEST_LINE = 1 << 16


class _Peer:
    """One connection; a rank once it has said hello."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.buffer = connection, b""
        self.rank, self.where, self.phase, self.has_left = -1, "", 0, False


class Hub:
    """Listens from the construction on.

    Args:
        launch: what the ranks of this launch have in common; others are turned away.
        world_size: number of ranks.
        ports: the first free one is taken.

    Raises:
        OSError: none of the ports is free.
    """

    def __init__(self, launch: str, world_size: int, *, ports: Sequence[int]) -> None:
        self._launch, self._world_size = launch, world_size
        self._listener = _listen(ports)
        self.port = int(self._listener.getsockname()[1])
        self._ranks: dict[int, _Peer] = {}
        self._end: dict[str, Any] | None = None
        self._reached = 0
        self.all_came = threading.Event()
        """Set once every rank has said hello."""
        self.all_told = threading.Event()
        """Set once every rank has come and has been told that one is gone."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        threading.Thread(target=self._serve, name="start-hub", daemon=True).start()

    def sockets(self) -> list[socket.socket]:
        """Every open socket; a forked child must not hold one."""
        return [self._listener, *(peer.connection for peer in self._ranks.values())]

    def _serve(self) -> None:
        told, looked = "", time.monotonic()
        while self._reached < 2:
            for key, _ in self._selector.select(timeout=1.0):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            if time.monotonic() - looked >= 1.0:
                looked, missing = time.monotonic(), self._missing()
                if missing != told:
                    told = missing
                    self._broadcast({"missing": missing})
        for one in self.sockets():
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection = self._listener.accept()[0]
            keep_alive(connection)
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, _Peer(connection))

    def _read(self, peer: _Peer) -> None:
        try:
            received = peer.connection.recv(_LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        *lines, peer.buffer = (peer.buffer + received).split(b"\n")
        try:
            for line in lines:
                self._hear(peer, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            received = b""  # no rank of ours
        if not received or len(peer.buffer) > _LONGEST_LINE:
            self._selector.unregister(peer.connection)
            peer.connection.close()
            if peer.rank >= 0 and not peer.has_left:
                self._tell_end(peer, code=None, message="")

    def _hear(self, peer: _Peer, said: dict[str, Any]) -> None:
        if peer.rank < 0:
            self._welcome(peer, said)
        elif "phase" in said:
            peer.phase = PHASES.index(said["phase"])
            self._tell_progress()
        elif "ended" in said:
            peer.has_left = True
            self._tell_end(peer, code=int(said["ended"]), message=str(said["message"]))

    def _welcome(self, peer: _Peer, said: dict[str, Any]) -> None:
        rank = int(said["rank"])
        if said["launch"] != self._launch or not 0 <= rank < self._world_size:
            raise ValueError
        if rank in self._ranks:
            _send(peer, {"refused": f"rank {rank} has already come from {self._ranks[rank].where}"})
            return
        peer.rank, peer.where, self._ranks[rank] = rank, str(said["where"]), peer
        _send(peer, {"welcome": self._launch, "missing": self._missing()})
        if len(self._ranks) == self._world_size:
            self.all_came.set()  # after the last welcome: from here on rank 0 may die at any moment
        if self._end is not None:
            _send(peer, self._end)
            self._note_all_told()

    def _tell_progress(self) -> None:
        reached = min(peer.phase for peer in self._ranks.values()) if len(self._ranks) == self._world_size else 0
        if reached > self._reached and self._end is None:
            self._broadcast({"all": ALL_READY})
            if reached == 2:
                self._broadcast({"all": ALL_JOINED})
            self._reached = reached

    def _tell_end(self, peer: _Peer, *, code: int | None, message: str) -> None:
        if self._end is None:
            self._end = {"gone": peer.rank, "where": peer.where, "code": code, "message": message}
            self._broadcast(self._end)
            self._note_all_told()

    def _note_all_told(self) -> None:
        if len(self._ranks) == self._world_size:
            self.all_told.set()

    def _missing(self) -> str:
        """One clause about the ranks that are behind the furthest."""
        wanted = max((peer.phase for peer in self._ranks.values()), default=0)
        absent = [str(rank) for rank in range(self._world_size) if rank not in self._ranks]
        parts = [f"rank {_short(absent)} not seen yet"] if absent else []
        for phase, what in ((0, "importing"), (1, "joining the others")):
            behind = [peer for _, peer in sorted(self._ranks.items()) if peer.phase == phase < wanted]
            if behind:
                parts.append(f"rank {_short([f'{peer.rank} on {peer.where}' for peer in behind])} still {what}")
        return "; ".join(parts)

    def _broadcast(self, message: dict[str, Any]) -> None:
        for peer in self._ranks.values():
            _send(peer, message)


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel find within 20 s that the other machine is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 20_000)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def encode(message: dict[str, Any]) -> bytes:
    """Return a message as it goes over the wire."""
    return json.dumps(message).encode() + b"\n"


def read_messages(connection: socket.socket) -> Iterator[dict[str, Any] | None]:
    """Yield what the hub says, None whenever the connection's timeout has passed; ends with the connection."""
    buffer = b""
    while True:
        try:
            received = connection.recv(_LONGEST_LINE)
        except TimeoutError as error:
            if error.errno is not None:  # of the network: the other machine is gone
                return
            yield None
            continue
        except OSError:
            return
        if not received:
            return
        *lines, buffer = (buffer + received).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _send(peer: _Peer, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # it is gone: reading from it says so
        peer.connection.send(encode(message))


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _listen(ports: Sequence[int]) -> socket.socket:
    for port in ports:
        with contextlib.suppress(OSError):
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
            return socket.create_server(("", port), backlog=4096)
    raise OSError(f"none of the ports {', '.join(map(str, ports))} is free")
