"""What runs on every rank of a launch: one function, or many checks one after the other.

Started by `tests.launcher` as ``python rank_main.py FOLDER``; the folder holds ``call.json`` and
receives this rank's output (``rank-0.log``), its result (``.json``, or ``.pt`` for tensors) or its
traceback (``.error``). Ranks of a launch are on one machine, so they can agree through files
even when the world of ranks is the thing that is broken.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

ROOT = Path(__file__).resolve().parents[1]
AFTER_FAILURE_SECONDS = 3.0  # what a rank that failed gives the others to fail too


def own_rank() -> int:
    return int(os.environ.get("HOROVOD_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
               or os.environ.get("RANK") or 0)


def own_size() -> int:
    return int(os.environ.get("HOROVOD_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE")
               or os.environ.get("WORLD_SIZE") or 1)


def load(module: str) -> ModuleType:
    """A module by its dotted name, or by its path, inside the repository or not."""
    if not module.endswith(".py"):
        return importlib.import_module(module)
    path = Path(module).resolve()
    if path.is_relative_to(ROOT):
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def write(path: Path, text: str) -> None:
    """Write so that a reader sees all of it or nothing."""
    part = path.with_name(path.name + f".part{own_rank()}")
    part.write_text(text)
    part.rename(path)


def write_result(stem: Path, value: Any) -> None:
    try:
        write(stem.with_suffix(".json"), json.dumps(value))
    except TypeError:
        import torch
        torch.save(value, stem.with_suffix(".pt"))


def describe(error: BaseException) -> str:
    """The traceback, with the local variables of the frames."""
    lines = traceback.TracebackException.from_exception(error, capture_locals=True).format()
    return "\n".join(line if len(line) < 300 else line[:300] + "..."
                     for block in lines for line in block.rstrip("\n").split("\n"))


def main(folder: Path) -> int:
    stem = folder / f"rank-{own_rank()}"
    log = os.open(f"{stem}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    call = json.loads((folder / "call.json").read_text())
    faulthandler.enable()
    left = call["deadline"] - time.time()
    faulthandler.dump_traceback_later(max(0.5, left - 1.0))
    signal.alarm(max(1, int(left)) + 30)  # ends this rank even if the launching test was killed
    try:
        function = getattr(load(call["module"]), call["function"])
        write_result(stem, function(*call["args"]))
    except Exception as error:
        text = describe(error)
        print(text, file=sys.stderr, flush=True)
        write(stem.with_suffix(".error"), text)
        return 1
    return 0


def run_checks(folder: str, module: str, names: list[str], limit: float) -> None:
    """Run checks until the world may be broken: the launcher starts a new one for the rest.

    ``<name>.<rank>.check`` in ``folder`` holds each check's state on each rank: running, passed
    or failed.
    """
    from hvdnoise import comm
    checks = load(module)
    world = comm.init()
    for name in names:
        print(f"=== {name}", flush=True)
        write_state(folder, name, "running")
        faulthandler.dump_traceback_later(limit, exit=True)
        error = try_check(getattr(checks, name), world)
        faulthandler.cancel_dump_traceback_later()
        write_state(folder, name, "failed" if error else "passed", error)
        states = wait_for_all(folder, name, AFTER_FAILURE_SECONDS if error else limit + 5)
        broken = Path(folder) / "broken"
        if len(set(states)) > 1 or broken.exists():  # not all left it in the same way
            broken.touch()  # this rank's exit makes the others fail too: they must not go on
            os._exit(3)


def try_check(check: Callable[[Any], None], world: Any) -> str:
    import torch
    torch.manual_seed(1)  # whatever the checks before it have drawn
    try:
        check(world)
    except BaseException as error:  # a check that ends in SystemExit has failed too
        text = describe(error)
        print(text, file=sys.stderr, flush=True)
        return text
    return ""


def write_state(folder: str, name: str, state: str, error: str = "") -> None:
    content = {"state": state, "error": error, "time": time.time()}
    write(Path(folder) / f"{name}.{own_rank()}.check", json.dumps(content))


def wait_for_all(folder: str, name: str, seconds: float) -> list[str]:
    """Every rank's state, when none runs the check any more or the seconds have passed."""
    until = time.monotonic() + seconds
    paths = [Path(folder) / f"{name}.{rank}.check" for rank in range(own_size())]
    while True:
        states = [json.loads(path.read_text())["state"] if path.exists() else "running"
                  for path in paths]
        if "running" not in states or time.monotonic() > until:
            return states
        time.sleep(0.005)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    from tests import rank_main  # the one copy, also for targets named tests.rank_main
    sys.exit(rank_main.main(Path(sys.argv[1])))
