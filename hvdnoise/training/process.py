"""This process as one rank: its threads and device, and how it ends when something is wrong.

Exit codes: 0 done; 2 bad input; 75 preempted and saved; 1 anything else.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import sys
import time
import traceback
from typing import NoReturn

import torch

from hvdnoise import limits, watchdog
from hvdnoise.comm import World
from hvdnoise.ending import end_within
from hvdnoise.training import output
from hvdnoise.training.errors import ConfigError, DataError
from hvdnoise.training.progress import log
from hvdnoise.world import RanksLost

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
SPEAK_AFTER_SECONDS = 5.0
_LONGEST_CAUSE = 400  # characters
_LONGEST_END_SECONDS = 20.0  # of a rank that fails, whatever its terminal or file system does
MOST_THREADS = 1024
MOST_CHARACTERS = 1000  # of a line that says what is wrong: a value may be any long


def set_threads(threads: int | None, local_size: int) -> None:
    """Give this rank its share of the cores, unless OMP_NUM_THREADS or ``threads`` say.

    Raises:
        ConfigError: for a number of threads that no machine has.
    """
    if threads is None and os.environ.get("OMP_NUM_THREADS"):
        return
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ConfigError(f"threads={threads} is wrong: give 1 to {MOST_THREADS}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(1, (cores or 1) // local_size))


def pick_device(device: str, world: World) -> torch.device:
    """The GPU of the local rank, or the CPU; ranks share GPUs where there are fewer."""
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.local_size > count:
        log.warning("%d ranks share %d GPU%s on this host: it works, and is slower than one rank "
                    "with virtual_workers", world.local_size, count, "s" * (count > 1))
    chosen = torch.device("cuda", world.local_rank % count)
    torch.cuda.set_device(chosen)
    return chosen


def be_deterministic() -> None:
    """Same seed, ranks and build: the same bits; where torch has no such algorithm, it warns."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def check_limits() -> None:
    """See that the limits of the watchdog are limits, before ranks start.

    Raises:
        ConfigError: for one that is none.
    """
    try:
        limits.from_environment()
    except ValueError as error:
        raise ConfigError(str(error)) from error


def watch(launched: dict[str, int]) -> watchdog.Watchdog:
    """Begin this process's watchdog; the first thing that a command with ranks does.

    Raises:
        ConfigError: for a limit in the environment that is none.
    """
    if not faulthandler.is_enabled() and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # says where a process crashed
    check_limits()
    watched = watchdog.begin(launched["rank"], launched["size"])
    watched.enter("start")
    return watched


def refuse(message: str, launched: dict[str, int]) -> int:
    """Say on one line what is wrong with the input, before Horovod runs; the exit code.

    Every rank finds the same mistake by itself; rank 0 says it, and a launcher then ends the
    others. A rank that is still there after a while has a mistake of its own, and says it.
    """
    if launched["rank"] > 0:
        time.sleep(SPEAK_AFTER_SECONDS)
        message = f"{message} (rank {launched['rank']})"
    _say(message)
    return EXIT_BAD_INPUT


def fail_together(message: str, world: World, code: int) -> int:
    """Say on one line what is wrong on all ranks alike; the exit code. Collective."""
    if world.rank == 0:
        _say(message)
    world.barrier("failed")  # the launcher ends the others when the first one exits
    return code


def fail(message: str) -> int:
    """Say on one line why a command that runs alone has failed; the exit code."""
    _say(message)
    return EXIT_FAILED


def said_all() -> int:
    """The exit code of a command that only prints: 1, with a line, where that could not be written
    for another reason than that its reader had read enough."""
    sys.stdout.flush()
    if not output.lost:
        return 0
    _say(output.lost[0])
    return EXIT_FAILED


def _say(message: str) -> None:
    sys.stdout.flush()
    message = " ".join(message.split())
    if len(message) > MOST_CHARACTERS:  # its end has the remedy
        half = MOST_CHARACTERS // 2
        message = f"{message[:half]} ... {message[-half:]}"
    print(f"hvdnoise: error: {message}", file=sys.stderr, flush=True)


def crash(error: BaseException, rank: int) -> NoReturn:
    """End this process after an exception that the other ranks know nothing of.

    Its traceback appears, and then one line with the rank, where it was, and the cause. A rank that
    only noticed that another one is gone says that in one line, and which one if it can tell.
    Nothing is waited for: the launcher ends the rest of the job when it sees this rank's exit code.
    """
    end_within(_LONGEST_END_SECONDS)
    place = " " * bool(watchdog.place()) + watchdog.place()
    watched = watchdog.current()
    code = EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else EXIT_FAILED
    trace = ""
    if code == EXIT_INTERRUPTED:
        did = f"was interrupted{place}"
    elif _follows(error):
        did = f"ends{place}: another rank is gone, or a collective failed ({_cause(error)})"
    else:
        did = f"failed{place}: {_cause(error)}"
        if not isinstance(error, DataError):  # which names the file and the remedy
            trace = _traceback(error)
    if watched is not None and did.startswith("ends"):
        watched.peers.end()
        if others := _others(watched):
            did = f"ends{place}: {others}"
    elif watched is not None:
        watched.peers.end(did)
    log.error("rank %d %s\n%s", rank, did, _traceback(error), extra={"terminal": False})
    print(f"{trace}hvdnoise: rank {rank} {did}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():  # of a data loader
        child.kill()
    os._exit(code)


def _follows(error: BaseException) -> bool:
    """Whether it only says that the ranks do not go on together."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, RanksLost) or type(chain).__name__ == "HorovodInternalError":
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _others(watched: watchdog.Watchdog) -> str:
    """Which ranks are lost, as far as this one can see: a process that ends is seen for a while."""
    for _ in range(10):
        if found := watched.peers.account(lost=True):
            return found
        time.sleep(0.1)
    return ""


def _traceback(error: BaseException) -> str:
    """As Python prints it. That of a process that loads data stands in its message, under another
    heading, so that one fault is one traceback."""
    text = "".join(traceback.format_exception(error))
    return text.replace("Original Traceback (most recent call last)", "In the loading process")


def _cause(error: BaseException) -> str:
    """The exception in one line; of a process that loads data, what was raised there."""
    lines = traceback.format_exception_only(error)[-1].strip().splitlines() or [""]
    text = lines[-1] if any("Original Traceback" in line for line in lines) else " ".join(lines)
    text = re.sub(r"^[\w.]+\.(\w+:)", r"\1", " ".join(text.split()))  # without the module
    return text if len(text) <= _LONGEST_CAUSE else text[:_LONGEST_CAUSE] + "..."
