"""How time, bytes and memory are measured.

Time, seconds per step: after a barrier a variant does one step that does not count, in which the
ranks fall into step and pipelines fill (with lag 2 the exchange of a step ends in the next one),
then N that do. On a GPU between two events, on a CPU by the wall clock; each rank its own mean, of
which the slowest rank's counts.

Bytes, received per rank and step: what the kernel has counted on a network interface
(/proc/net/dev, with the headers of packets) over these N + 1 steps, until everything under way has
arrived, divided by the ranks of the host. Ranks are on one host when they share host
name and network namespace. Messages through shared memory, as MPI sends them on one host, are not
seen; then less than `LEAST_SEEN` of what must have travelled is counted, and nothing is reported.

Memory, bytes at the peak of some steps without emulated computation, for one variant at a time:
on a GPU what torch has allocated; on a CPU the largest resident set (VmHWM) less the resident set
before the variant was built, with glibc told to return large blocks at once. Each variant is built
twice and the second counts: what Horovod, Gloo or MPI take once and keep, such as the fusion
buffer, is not in it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LEAST_SEEN = 0.1  # of the bytes that an exchange takes, else the interface does not see it


def seconds_per_step(step: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Mean of ``steps`` steps, after one that does not count."""
    step()
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) / 1000 / steps
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


# ---------------------------------------------------------------------------- bytes

def interface(wanted: str | None) -> str:
    """The interface whose bytes count: the one asked for, Horovod's, else the loopback."""
    return wanted or os.environ.get("HOROVOD_GLOO_IFACE", "").split(",")[0] or "lo"


def received(text: str | None = None) -> dict[str, int]:
    """Bytes received so far by each network interface of this host.

    Args:
        text: of /proc/net/dev; default: read now. Where there is no such file, there is nothing.
    """
    if text is None:
        path = Path("/proc/net/dev")
        text = path.read_text() if path.exists() else ""
    counts = {}
    for line in text.splitlines():
        name, colon, numbers = line.partition(":")
        if colon:
            counts[name.strip()] = int(numbers.split()[0])
    return counts


def host(name: str) -> dict[str, Any]:
    """This rank's host: what tells it from others, and its address on interface ``name``."""
    namespace = Path("/proc/self/ns/net")
    return {"host": socket.gethostname(),
            "network": namespace.stat().st_ino if namespace.exists() else 0,
            "address": address(name)}


def address(name: str) -> str:
    """The IPv4 address of a network interface; this host's name where it has none."""
    import fcntl
    import struct
    ask = struct.pack("256s", name.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), 0x8915, ask)  # SIOCGIFADDR
        except OSError:
            return socket.gethostname()
    return socket.inet_ntoa(answer[20:24])


def first_ranks(hosts: list[dict[str, Any]]) -> list[int]:
    """The lowest rank of each host, from what `host` said on every rank."""
    first: dict[tuple[Any, Any], int] = {}
    for rank, each in enumerate(hosts):
        first.setdefault((each["host"], each["network"]), rank)
    return list(first.values())


# ---------------------------------------------------------------------------- memory

@contextmanager
def blocks_returned() -> Iterator[None]:
    """Inside, every block from 64 KiB on is mapped by itself, so that what is freed is gone.

    Afterwards glibc keeps freed blocks of up to 32 MiB again: where its own rule, which follows
    the sizes that a program frees, ends up with large tensors.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 64 * 2 ** 10)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 * 2 ** 20)
        mallopt(_TRIM_THRESHOLD, 64 * 2 ** 20)


def start_memory(device: torch.device) -> int | None:
    """Free what can be freed and begin to look for the peak; what is held now, in bytes.

    None where the kernel does not let the peak be reset.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _resident("VmRSS")
    except OSError:
        return None


def peak_memory(device: torch.device) -> int:
    """The most bytes held at any time since `start_memory`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    return _resident("VmHWM")


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"the kernel does not tell {key}")
