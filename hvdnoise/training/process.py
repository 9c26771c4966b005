"""This process as one rank: its threads and device, and how it ends when something is wrong.

Exit codes: 0 done; 2 bad input; 75 preempted and saved; 1 anything else.
"""

from __future__ import annotations

import os
import sys
import time
import traceback

import torch

from hvdnoise.comm import World
from hvdnoise.training.errors import ConfigError
from hvdnoise.training.progress import log

EXIT_BAD_INPUT = 2
EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
SPEAK_AFTER_SECONDS = 5.0
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


def _say(message: str) -> None:
    sys.stdout.flush()
    message = " ".join(message.split())
    if len(message) > MOST_CHARACTERS:  # its end has the remedy
        half = MOST_CHARACTERS // 2
        message = f"{message[:half]} ... {message[-half:]}"
    print(f"hvdnoise: error: {message}", file=sys.stderr, flush=True)


def crash(error: BaseException, rank: int) -> None:
    """End this process after an exception that the other ranks know nothing of.

    Its traceback appears with its rank. A rank that only noticed that another one is gone says
    that in one line. Nothing is waited for: the launcher ends the rest of the job when it sees
    this rank's exit code.
    """
    sys.stdout.flush()
    if isinstance(error, KeyboardInterrupt):
        print(f"hvdnoise: rank {rank} was interrupted", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)
    text = "".join(traceback.format_exception(error))
    log.error("rank %d ends after an exception\n%s", rank, text, extra={"terminal": False})
    if type(error).__name__ == "HorovodInternalError":
        first = str(error).splitlines()[0] if str(error) else "no cause given"
        text = f"another rank is gone, or a collective failed ({first})\n"
    print(f"hvdnoise: rank {rank} failed: {text}", file=sys.stderr, end="", flush=True)
    os._exit(EXIT_FAILED)
