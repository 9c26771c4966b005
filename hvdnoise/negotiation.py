"""Ranks that ask for collectives in different orders start them in the same one.

torch.distributed needs each rank to start the same collectives in the same order. But a rank starts
a bucket as soon as backward has filled it, and what comes after a bucket as soon as that has
arrived; so the order is another on each rank. Horovod negotiates by name, and so does this: each
rank tells rank 0 the name, the facts that must be equal, and its sizes. Once all ranks of a group
have asked for a name, rank 0 tells them to start it, and all start what they are told, in the order
in which they are told. Where facts differ, all get an error that shows them.

The connections also tell who is gone. A rank that leaves says so. One whose connection ends without
a word is lost, and then no rank waits any longer: all get `RanksLost`. A host that is cut off is
noticed after `SILENCE_SECONDS`.

Messages are lines of JSON. Rank 0 listens, on a port that the system chooses, until all ranks have
come, each with a secret that it has from rank 0 over the process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
from typing import Any, Callable, Iterator, Protocol, Sequence

from hvdnoise.world import RanksLost

SILENCE_SECONDS = 25  # of a host that does not answer any more
_CONNECT_SECONDS = 30.0
_HELLO_SECONDS = 5.0
_MOST_BYTES = 65536
_WELCOME = b"welcome\n"


class Request(Protocol):
    """What a rank has asked for."""

    def begin(self, sizes: list[int]) -> None:
        """All ranks have asked: start. ``sizes``: see `Negotiator.ask`."""

    def fail(self, error: Exception) -> None:
        """It will never be."""


class Negotiator:
    """This rank's end of the negotiation.

    Args:
        connection: to rank 0.

    Attributes:
        lost: which rank is lost, in words; empty while none is.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.lost = ""
        self._connection = connection
        # two locks, for a thread that sends may wait for the one that hears
        self._sending, self._knowing = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._waiting: dict[tuple[int, int, str], Request] = {}
        self._leaving = False
        _not_in_children(connection)
        threading.Thread(target=self._listen, name="hvdnoise-negotiation", daemon=True).start()

    def ask(self, ranks: range, name: str, facts: str, sizes: Sequence[int], request: Request
            ) -> None:
        """Ask for a collective of these ranks; another thread begins the request, or fails it.

        Args:
            facts: what must be equal on all ranks.
            sizes: how much goes to each of the ranks; one number, or none, for all of them. The
                request is told how much each of the ranks sends to this one.

        Raises:
            RanksLost: when a rank is lost. ValueError: for a name that is asked for already.
        """
        key = ranks.start, len(ranks), name
        with self._knowing:
            if self.lost or self._leaving:
                raise RanksLost(f"{name!r}: {self.lost or 'this rank has left'}")
            if key in self._waiting:
                raise ValueError(f"{name!r} is still under way on this rank: wait for it before "
                                 "its name is used again")
            self._waiting[key] = request
        self._say([*key, facts, list(sizes)])

    def leave(self, seconds: float) -> None:
        """Say that this rank takes part in nothing more, and wait until all have said so.

        A rank that goes takes data along that others may still be reading; so it stays for a while.
        """
        with self._knowing:
            self._leaving = True
        self._say(["bye"])
        if not self.lost:
            self._ended.wait(seconds)

    def _say(self, message: list[Any]) -> None:
        with self._sending, contextlib.suppress(OSError):  # which the other thread finds, too
            self._connection.sendall(_line(message))

    # ------------------------------------------------------------------ the thread

    def _listen(self) -> None:
        for message in _messages(self._connection):
            self._hear(*message)
        self._lose("rank 0 is gone, or cannot be reached")
        self._connection.close()

    def _hear(self, word: str, *rest: Any) -> None:
        if word == "lost":
            self._lose(f"rank {rest[0]} is gone: it was killed, crashed, or cannot be reached")
        elif word == "end":
            self._ended.set()
        else:
            *key, answer = rest
            with self._knowing:
                request = self._waiting.pop((key[0], key[1], key[2]), None)
            if request is None:  # failed meanwhile
                return
            if word == "start":
                request.begin(answer)
            else:
                kind = RanksLost if word == "left" else RuntimeError
                request.fail(kind(f"{key[2]!r}: {answer}"))

    def _lose(self, text: str) -> None:
        with self._knowing:
            if not self._ended.is_set():
                self.lost = self.lost or text
            waiting, self._waiting = self._waiting, {}
        self._ended.set()
        for (_, _, name), request in waiting.items():
            request.fail(RanksLost(f"{name!r}: {text}"))


class _Coordinator:
    """Rank 0's other end of all connections.

    Args:
        connections: by rank.
    """

    def __init__(self, connections: Sequence[socket.socket]) -> None:
        self._connections = connections
        self._asked: dict[tuple[int, int, str], dict[int, tuple[str, list[int]]]] = {}
        self._left: set[int] = set()  # with a word or without
        for connection in connections:
            _not_in_children(connection)
        threading.Thread(target=self._serve, name="hvdnoise-coordinator", daemon=True).start()

    def _serve(self) -> None:
        begun = [b""] * len(self._connections)  # lines, by rank
        with selectors.DefaultSelector() as selector:
            for rank, connection in enumerate(self._connections):
                selector.register(connection, selectors.EVENT_READ, rank)
            while len(self._left) < len(self._connections):
                for key, _ in selector.select():
                    *lines, begun[key.data] = (begun[key.data] + (
                        received := _receive(self._connections[key.data]))).split(b"\n")
                    for line in lines:
                        self._hear(key.data, json.loads(line))
                    if not received:
                        selector.unregister(key.fileobj)
                        self._end_of(key.data)
        self._tell(range(len(self._connections)), ["end"])
        for connection in self._connections:
            connection.close()

    def _hear(self, rank: int, message: list[Any]) -> None:
        if message == ["bye"]:
            self._left.add(rank)
            for key in list(self._asked):
                self._look_for_missing(*key)
            return
        first, size, name, facts, sizes = message
        asked = self._asked.setdefault((first, size, name), {})
        asked[rank] = facts, sizes
        if len(asked) < size:
            self._look_for_missing(first, size, name)
            return
        del self._asked[first, size, name]
        if len({facts for facts, _ in asked.values()}) > 1:
            said = "; ".join(f"rank {each} for {asked[each][0]}" for each in _unlike(asked))
            self._tell(asked, ["differ", first, size, name,
                               f"the ranks ask for different things: {said}"])
            return
        for place, each in enumerate(sorted(asked)):
            to_it = [sent[place % len(sent)] for _, (_, sent) in sorted(asked.items()) if sent]
            self._tell([each], ["start", first, size, name, to_it])

    def _look_for_missing(self, first: int, size: int, name: str) -> None:
        """Tell those who wait for a rank that has left."""
        asked = self._asked[first, size, name]
        for rank in sorted(self._left.intersection(range(first, first + size)) - set(asked)):
            del self._asked[first, size, name]
            self._tell(asked, ["left", first, size, name, f"rank {rank} has left"])
            return

    def _end_of(self, rank: int) -> None:
        if rank not in self._left:
            self._left.add(rank)
            self._tell(range(len(self._connections)), ["lost", rank])

    def _tell(self, ranks: Any, message: list[Any]) -> None:
        for rank in ranks:
            with contextlib.suppress(OSError):  # gone, which its connection tells
                self._connections[rank].sendall(_line(message))


def _unlike(asked: dict[int, tuple[str, list[int]]]) -> list[int]:
    """The first rank, and the first whose facts are others."""
    first = min(asked)
    return [first, min(rank for rank in asked if asked[rank][0] != asked[first][0])]


def connect(rank: int, size: int, tell_all: Callable[[Any], Any]) -> Negotiator:
    """The negotiation of all ranks. Collective.

    Args:
        tell_all: rank 0's JSON value, on every rank.

    Raises:
        RanksLost: when rank 0 cannot be reached.
    """
    if rank > 0:
        return Negotiator(_connection(rank, tell_all(None)))
    secret = secrets.token_hex(16)
    both = socket.has_dualstack_ipv6()
    with socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET,
                              backlog=max(128, size), dualstack_ipv6=both) as server:
        tell_all({"port": server.getsockname()[1], "secret": secret,
                  "host": socket.gethostname()})
        found: dict[int, socket.socket] = {}
        while len(found) < size - 1:
            connection, _ = server.accept()
            if (other := _greeted_by(connection, secret, size)) is None or other in found:
                connection.close()
            else:
                found[other] = connection
    own, other_end = socket.socketpair()
    _Coordinator([other_end, *(found[each] for each in range(1, size))])
    return Negotiator(own)


def _greeted_by(connection: socket.socket, secret: str, size: int) -> int | None:
    """The rank that has come; None for a stranger."""
    connection.settimeout(_HELLO_SECONDS)
    try:
        said, rank = map(str, next(_messages(connection), ["", ""]))
        if not secrets.compare_digest(said, secret) or not 0 < int(rank) < size:
            return None
        connection.sendall(_WELCOME)
    except (OSError, ValueError, TypeError):
        return None
    _set_up(connection)
    return int(rank)


def _connection(rank: int, told: dict[str, Any]) -> socket.socket:
    """To rank 0, which is where the launcher says, or has this name."""
    failures = []
    for host in dict.fromkeys(filter(None, (os.environ.get("MASTER_ADDR"), told["host"],
                                            _here(told["host"])))):
        try:
            connection = socket.create_connection((host, told["port"]), _CONNECT_SECONDS)
            connection.sendall(_line([told["secret"], rank]))
            if connection.recv(len(_WELCOME), socket.MSG_WAITALL) == _WELCOME:
                _set_up(connection)
                return connection
            failures.append(f"{host} is another program's")
        except OSError as error:
            failures.append(f"{host}: {error}")
    raise RanksLost(f"rank 0 cannot be reached at port {told['port']}: {'; '.join(failures)}")


def _here(host: str) -> str | None:
    return "localhost" if host == socket.gethostname() else None


def _set_up(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", SILENCE_SECONDS - 15), ("TCP_KEEPINTVL", 5),
                        ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", SILENCE_SECONDS * 1000)):
        if hasattr(socket, name):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _not_in_children(connection: socket.socket) -> None:
    """A child that is forked must not keep the connection of a rank that is gone."""
    def close() -> None:
        if connection.fileno() >= 0:
            os.close(connection.detach())
    os.register_at_fork(after_in_child=close)


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _receive(connection: socket.socket) -> bytes:
    """What has come; nothing at the end of the connection."""
    try:
        return connection.recv(_MOST_BYTES)
    except OSError:
        return b""


def _messages(connection: socket.socket) -> Iterator[list[Any]]:
    """What comes, until the connection ends."""
    begun = b""
    while received := _receive(connection):
        *lines, begun = (begun + received).split(b"\n")
        yield from map(json.loads, lines)
