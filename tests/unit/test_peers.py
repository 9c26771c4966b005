"""What a rank can tell of the others: states in a shared folder, and processes of its host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvdnoise import peers
from hvdnoise.peers import Peers, local_ranks

HERE = "in step 7, waiting for 'x'"


class Ranks:
    """Ranks of one launch that are on hosts of their own, as far as they can tell."""

    def __init__(self, folder: Path, size: int) -> None:
        self.at = [HERE] * size
        self.all = [Peers(rank, size, lambda rank=rank: self.at[rank], 1.0)  # type: ignore[misc]
                    for rank in range(size)]
        for each in self.all:
            each.share(folder)
        until = time.monotonic() + 20
        while len(list(folder.glob("*.state"))) < size and time.monotonic() < until:
            time.sleep(0.01)

    def close(self) -> None:
        for each in self.all:
            each.close()


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setattr(peers, "local_ranks", dict)
    return Ranks(tmp_path, 4)


def test_ranks_at_the_same_place_are_not_named(ranks: Ranks) -> None:
    assert ranks.all[0].account() == ""
    ranks.close()


def test_ranks_elsewhere_stopped_and_ended(ranks: Ranks, tmp_path: Path) -> None:
    ranks.all[3].close()  # as one that was stopped before it wrote anything
    ranks.at[1] = "in step 6, in no collective"
    ranks.all[1].account()  # it writes
    ranks.all[2].end("failed in step 7: MemoryError")
    assert ranks.all[0].account() == (
        "rank 1 is in step 6, in no collective; rank 2 failed in step 7: MemoryError; "
        "rank 3 gave no sign of life")
    assert ranks.all[0].account(lost=True) == "rank 2 failed in step 7: MemoryError"
    ranks.close()
    assert not list(tmp_path.iterdir())


def test_a_state_that_is_old_is_no_sign_of_life(ranks: Ranks, tmp_path: Path) -> None:
    ranks.all[2]._closed.set()  # its thread ends, as that of a stopped process stands still
    time.sleep(0.3)
    path = tmp_path / "rank-2.state"
    os.utime(path, (time.time() - 100, time.time() - 100))
    assert ranks.all[0].account().startswith("rank 2 gave no sign of life for 100 s (process ")
    ranks.close()


def test_a_rank_that_ends_after_another_is_no_cause(ranks: Ranks) -> None:
    ranks.all[1].end()
    ranks.all[2].end("failed in step 7: MemoryError")
    ranks.all[2].end("ends for another cause")
    assert ranks.all[0].account() == "rank 2 failed in step 7: MemoryError"
    ranks.close()


def test_states_of_an_earlier_launch_and_damaged_ones(ranks: Ranks, tmp_path: Path) -> None:
    ranks.close()
    alone = Peers(0, 4, lambda: HERE, 1.0)
    alone.share(tmp_path)
    old = {"launch": {"PMIX_NAMESPACE": "another"}, "ended": "failed", "position": HERE}
    (tmp_path / "rank-1.state").write_text(json.dumps(old))
    (tmp_path / "rank-2.state").write_text("{")
    (tmp_path / "rank-3.state").write_bytes(b"[1, \xff")
    assert alone.account() == "; ".join(f"rank {n} gave no sign of life" for n in (1, 2, 3))
    alone.close()


def test_many_ranks_and_a_folder_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    alone = Peers(0, 100, lambda: HERE, 1.0)
    alone.share(folder)
    time.sleep(0.2)
    assert alone.account().endswith("rank 8 gave no sign of life; and 91 more")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert alone.account() == "" and not folder.exists()
    alone.close()


PROCESS = """
import os, sys, time
os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"],
          {"HOROVOD_RANK": sys.argv[1], "HOROVOD_SIZE": "3", "HOROVOD_LOCAL_SIZE": "3",
           "HOROVOD_GLOO_RENDEZVOUS_PORT": sys.argv[2]})
"""


def test_processes_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    port = f"test-{os.getpid()}"
    for name, value in (("HOROVOD_RANK", "0"), ("HOROVOD_SIZE", "3"), ("HOROVOD_LOCAL_SIZE", "3"),
                        ("HOROVOD_GLOO_RENDEZVOUS_PORT", port)):
        monkeypatch.setenv(name, value)
    others = [subprocess.Popen([sys.executable, "-c", PROCESS, rank, launch])
              for rank, launch in (("1", port), ("2", port), ("2", "another launch"))]
    alone = Peers(0, 3, lambda: HERE, 1.0)
    try:
        until = time.monotonic() + 30
        while set(local_ranks()) != {1, 2} and time.monotonic() < until:
            time.sleep(0.05)
        assert alone.account() == ""
        others[0].send_signal(signal.SIGSTOP)
        others[1].kill()
        while local_ranks().get(1) != "T" or 2 in local_ranks():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert alone.account() == ("rank 1 is stopped; rank 2 is gone: it was killed, crashed, or "
                                   "left without a word")
    finally:
        for each in others:
            each.kill()
            each.wait()
