"""Collectives that ranks ask for in different orders: started in one, or refused, or lost."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterator

import pytest

from hvdnoise.negotiation import Negotiator, connect
from hvdnoise.world import RanksLost

SIZE, SECONDS = 3, 5.0
ALL = range(SIZE)


class Asked:
    """A request that remembers what it was told, and when among all of its rank."""

    def __init__(self, name: str, started: list[str]) -> None:
        self.name, self.started = name, started
        self.sizes: list[int] | None = None
        self.error: Exception | None = None
        self.told = threading.Event()

    def begin(self, sizes: list[int]) -> None:
        self.started.append(self.name)
        self.sizes = sizes
        self.told.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.told.set()


class Rank:
    def __init__(self, negotiator: Negotiator) -> None:
        self.negotiator, self.started = negotiator, list[str]()

    def ask(self, name: str, facts: str = "sum", sizes: Any = (), ranks: range = ALL) -> Asked:
        request = Asked(name, self.started)
        self.negotiator.ask(ranks, name, facts, sizes, request)
        return request


@pytest.fixture
def ranks() -> Iterator[list[Rank]]:
    """All of them, in this process."""
    with ThreadPoolExecutor(SIZE) as pool:
        told: queue.Queue[Any] = queue.Queue()

        def tell_all(value: Any) -> Any:
            if value is None:
                return told.get(timeout=SECONDS)
            for _ in range(SIZE - 1):
                told.put(value)
            return value
        made = [each.result(SECONDS) for each in
                [pool.submit(connect, rank, SIZE, tell_all) for rank in ALL]]
        yield [Rank(each) for each in made]
        for each in made:
            each.leave(0.0)


def cut(rank: Rank) -> None:
    """The end of its process, as the others see it."""
    connection = rank.negotiator._connection
    connection.shutdown(socket.SHUT_RDWR)


def told(*requests: Asked) -> None:
    assert all(each.told.wait(SECONDS) for each in requests)


def test_all_start_in_one_order_whatever_they_ask_in(ranks: list[Rank]) -> None:
    names = [f"n{n}" for n in range(40)]
    asked = []
    for rank, each in enumerate(ranks):
        order = names if rank == 0 else names[::-1] if rank == 1 else names[20:] + names[:20]
        asked += [each.ask(name) for name in order]
    told(*asked)
    assert ranks[0].started == ranks[1].started == ranks[2].started
    assert sorted(ranks[0].started) == sorted(names)


def test_nothing_starts_before_the_last_has_asked(ranks: list[Rank]) -> None:
    first, second = ranks[0].ask("late"), ranks[2].ask("late")
    assert not first.told.wait(0.2) and not second.told.is_set()
    told(first, second, ranks[1].ask("late"))
    assert first.error is None


def test_each_is_told_what_the_others_send_to_it(ranks: list[Rank]) -> None:
    """One number for all, and one for each."""
    gathered = [each.ask("rows", sizes=[rank + 5]) for rank, each in enumerate(ranks)]
    parts = [each.ask("parts", sizes=[10 * rank + to for to in ALL])
             for rank, each in enumerate(ranks)]
    told(*gathered, *parts)
    assert [each.sizes for each in gathered] == [[5, 6, 7]] * SIZE
    assert [each.sizes for each in parts] == [[to, 10 + to, 20 + to] for to in ALL]


def test_different_facts_are_an_error_on_all(ranks: list[Rank]) -> None:
    asked = [each.ask("grads", facts=f"sum of {4 + (rank == 2)}")
             for rank, each in enumerate(ranks)]
    told(*asked)
    for each in asked:
        assert isinstance(each.error, RuntimeError) and not isinstance(each.error, RanksLost)
        assert "'grads'" in str(each.error) and "\n" not in str(each.error)
        assert "rank 0 for sum of 4" in str(each.error) and "rank 2 for sum of 5" in str(each.error)
    told(*(each.ask("grads") for each in ranks))  # and the world lives
    assert ranks[0].started == ["grads"]


def test_a_group_has_names_of_its_own(ranks: list[Rank]) -> None:
    pair = range(1, 3)
    told(*(each.ask("same", ranks=pair) for each in ranks[1:]))
    waiting = ranks[1].ask("same")
    assert not waiting.told.wait(0.1)
    told(ranks[0].ask("same"), ranks[2].ask("same"), waiting)


def test_a_name_under_way_is_refused(ranks: list[Rank]) -> None:
    ranks[0].ask("twice")
    with pytest.raises(ValueError, match="'twice' is still under way"):
        ranks[0].ask("twice")


@pytest.mark.parametrize("before", [True, False])
def test_a_rank_that_has_left_is_named(ranks: list[Rank], before: bool) -> None:
    """Whether it left before others asked or after; what needs it not, goes on."""
    asked = [] if before else [ranks[0].ask("lonely")]
    ranks[2].negotiator.leave(0.0)
    asked += [ranks[0].ask("alone"), ranks[1].ask("alone")]
    told(*asked)
    for each in asked:
        assert isinstance(each.error, RanksLost) and "rank 2 has left" in str(each.error)
    pair = range(2)
    told(ranks[0].ask("pair", ranks=pair), ranks[1].ask("pair", ranks=pair))
    assert ranks[0].started == ["pair"] and not ranks[0].negotiator.lost


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_rank_without_a_word_is_lost_to_all(ranks: list[Rank], gone: int) -> None:
    others = [each for rank, each in enumerate(ranks) if rank != gone]
    asked = [each.ask("never") for each in others]
    cut(ranks[gone])
    told(*asked)
    for each, other in zip(asked, others):
        assert isinstance(each.error, RanksLost) and f"rank {gone} is gone" in str(each.error)
        with pytest.raises(RanksLost, match=f"rank {gone} is gone"):
            other.ask("later")


def test_who_leaves_waits_for_the_others(ranks: list[Rank]) -> None:
    began = time.monotonic()
    first = threading.Thread(target=ranks[0].negotiator.leave, args=(SECONDS,))
    first.start()
    first.join(0.2)
    assert first.is_alive()
    for each in ranks[1:]:
        each.negotiator.leave(0.0)
    first.join(SECONDS)
    assert not first.is_alive() and time.monotonic() - began < SECONDS / 2


def test_strangers_are_not_let_in() -> None:
    """Neither without the secret, nor by a rank that there is not; and the right one is."""
    seen: list[bytes] = []

    def tell_all(value: Any) -> Any:
        for said in (b'["guess", 1]\n', b"GET / HTTP/1.0\n\n", b"[1,2,3]\n", b"5\n",
                     f'["{value["secret"]}", 2]\n'.encode()):
            stranger = socket.create_connection(("localhost", value["port"]), SECONDS)
            stranger.sendall(said)
            threading.Thread(target=lambda each: seen.append(each.recv(99)), daemon=True,
                             args=(stranger,)).start()
        pool.submit(lambda: arrived.put(connect(1, 2, lambda _: value)))
        return value
    arrived: queue.Queue[Negotiator] = queue.Queue()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(connect, 0, 2, tell_all).result(SECONDS)
        second = arrived.get(timeout=SECONDS)
    left = threading.Thread(target=first.leave, args=(SECONDS,))
    left.start()
    second.leave(SECONDS)
    left.join(SECONDS)
    assert not first.lost and not second.lost and b"welcome\n" not in seen


def test_a_forked_child_does_not_keep_a_rank_alive() -> None:
    """As the processes of a data loader, which may outlive it."""
    read, write = os.pipe()
    rank = os.fork()
    if rank == 0:
        os.setsid()
        connect(1, 2, lambda _: json.loads(os.read(read, 999)))
        if os.fork() > 0:
            os.write(write, b"-")  # the loader is there
        time.sleep(60)
        os._exit(0)

    def tell_all(value: Any) -> Any:
        os.write(write, json.dumps(value).encode())
        return value
    first = connect(0, 2, tell_all)
    request = Asked("never", [])
    first.ask(range(2), "never", "sum", (), request)
    time.sleep(0.5)
    assert os.read(read, 1) == b"-" and not request.told.is_set()
    try:
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
        told(request)
        assert "rank 1 is gone" in str(request.error)
    finally:
        os.killpg(rank, signal.SIGKILL)
