"""A plugin of hvdnoise that does one fault on one rank at one moment.

The environment variable HVDNOISE_FAULT says which, as JSON:

    rank    the rank that has it
    moment  start, step, backward, checkpoint, evaluation or finish
    step    for "step" and "backward": the step (from 0) that it happens in; for "checkpoint" the
            fault waits until that step is done
    part    for "checkpoint": the number of the fsync in it, from 0
    action  a name of `ACTIONS`
    once    a file: where it exists, the fault has happened already

Without the variable the plugin does nothing.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Callable

from hvdnoise.launched import environment

FAULT = json.loads(os.environ.get("HVDNOISE_FAULT", "{}"))
PAUSE_SECONDS = 6.0
_now = {"step": 0, "fsyncs": 0, "saving": False}


def _signal(number: signal.Signals) -> Callable[[], None]:
    def act() -> None:
        os.kill(os.getpid(), number)
        time.sleep(0.2)  # SIGSTOP and the like reach the process meanwhile
    return act


def _raise(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error
    return act


def _kill_launcher() -> None:
    """SIGKILL to the topmost process of the launch: the one that the campaign started."""
    mark, found, process = os.environ["HVDNOISE_TEST_LAUNCH"], 0, os.getppid()
    while process > 1:
        try:
            if mark.encode() in Path(f"/proc/{process}/environ").read_bytes():
                found = process
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    os.kill(found, signal.SIGKILL)


def _full_disk() -> None:
    """No file of this process can grow beyond 4 KiB from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))


def _vanish() -> None:
    gone = os.path.normpath(FAULT["folder"]) + ".gone"  # at once: other ranks write to it
    os.rename(FAULT["folder"], gone)
    shutil.rmtree(gone, ignore_errors=True)


ACTIONS: dict[str, Callable[[], None]] = {
    "sigkill": _signal(signal.SIGKILL), "sigstop": _signal(signal.SIGSTOP),
    "sigterm": _signal(signal.SIGTERM), "segfault": _signal(signal.SIGSEGV),
    "abort": _signal(signal.SIGABRT), "interrupt": _signal(signal.SIGINT),
    "exception": _raise(RuntimeError("injected fault")),
    "memory": _raise(MemoryError("injected fault")),
    "exit-0": _raise(SystemExit(0)), "exit-7": _raise(SystemExit(7)),
    "os-exit-0": lambda: os._exit(0), "os-exit-3": lambda: os._exit(3),
    "pause": lambda: time.sleep(PAUSE_SECONDS), "launcher": _kill_launcher,
    "full-disk": _full_disk, "vanish": _vanish, "nan": lambda: None}


def _due(moment: str) -> bool:
    if FAULT["moment"] != moment or environment()["rank"] != FAULT["rank"]:
        return False
    if moment in ("step", "backward") and _now["step"] != FAULT["step"] or \
            moment in ("checkpoint", "evaluation") and _now["step"] < FAULT["step"]:
        return False
    try:
        os.close(os.open(FAULT["once"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _before(moment: str, owner: Any, name: str) -> None:
    real = getattr(owner, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        if _due(moment):
            ACTIONS[FAULT["action"]]()
        return real(*args, **options)
    setattr(owner, name, wrapped)


def _install() -> None:
    from hvdnoise.training import loop, steps
    real_step, real_passes = loop.take_step, steps._forward_and_backward
    real_save, real_fsync = loop.save, os.fsync

    def take_step(job: Any, *args: Any) -> Any:
        _now["step"] = job.counters.step
        if _due("step"):
            ACTIONS[FAULT["action"]]()
        return real_step(job, *args)

    def passes(job: Any, parts: Any) -> Any:
        sums = real_passes(job, parts)  # gradients are on their way to the other ranks
        if _due("backward"):
            ACTIONS[FAULT["action"]]()
        return sums

    def nan(job: Any, parts: Any) -> Any:
        if _due("backward"):
            images, labels = parts[-1]
            parts = [*parts[:-1], (images * float("nan"), labels)]
        return real_passes(job, parts)

    def save(*args: Any) -> Any:
        _now.update(fsyncs=0, saving=True)  # a thread writes, and the training goes on
        return real_save(*args)

    def fsync(handle: Any) -> None:
        if _now["saving"]:
            _now["fsyncs"] += 1
            if _now["fsyncs"] > FAULT.get("part", 0) and _due("checkpoint"):
                ACTIONS[FAULT["action"]]()
        real_fsync(handle)

    loop.take_step, loop.save, os.fsync = take_step, save, fsync
    steps._forward_and_backward = nan if FAULT["action"] == "nan" else passes
    _before("evaluation", loop, "score")
    _before("finish", loop, "finish")


if FAULT:
    if _due("start"):
        ACTIONS[FAULT["action"]]()
    _install()
