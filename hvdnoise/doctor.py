"""`hvdnoise doctor`: what works on this machine, one line a check, with the remedy.

    ok      works
    note    not there, and not always needed
    BROKEN  must be mended; the exit code is then 1
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hvdnoise import comm, extras, mpis
from hvdnoise.training.datasets import DATASETS
from hvdnoise.training.fetch import SHARED
from hvdnoise.training.records import versions

OK, NOTE, BROKEN = "ok", "note", "BROKEN"
Finding = tuple[str, str]  # verdict, text
_BIN = Path(sys.executable).parent


def examine(launched: dict[str, int], *, data_root: str, launch: bool, seconds: int) -> int:
    """Print the findings (rank 0 does); 0 when nothing is broken, else 1.

    Args:
        launch: when started alone, also start two ranks with each launcher, for at most
            ``seconds`` each.
    """
    broken = False
    for verdict, text in _findings(launched, data_root, launch, seconds):
        broken |= verdict == BROKEN
        if launched["rank"] == 0:
            print(f"{verdict:7} {text}", flush=True)
    return int(broken)


def version_line() -> str:
    """What must be equal on all hosts of a run, as ``versions name=value ...``, without spaces in
    a value: the launch scripts compare it between hosts."""
    found = {**versions(), "mpi": "none", **_mpi_names()}
    return " ".join(["versions", *(f"{name}={value.replace(' ', '-')}"
                                   for name, value in sorted(found.items()))])


def _mpi_names() -> dict[str, str]:
    """The one MPI of all, or that of each part."""
    found = mpis.parts(_path())
    names = set(found.values())
    return {"mpi": names.pop()} if len(names) == 1 else \
        {f"mpi-of-{part}": name for part, name in found.items()}


def _findings(launched: dict[str, int], data_root: str, launch: bool, seconds: int
              ) -> Iterator[Finding]:
    yield _python()
    yield from _packages()
    has_horovod, found = importlib.util.find_spec("horovod") is not None, dict[str, str]()
    if has_horovod:  # else torchrun starts the ranks
        yield from _horovod()
        found = mpis.parts(_users_path())
        yield from _mpi(found)
    yield from _gpus()
    yield _collective()
    if has_horovod and launched["size"] == 1 and launch:
        yield from _launches(seconds, found.get("mpirun", ""))
    yield from _data(Path(data_root).expanduser())


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info < (3, 10):
        return BROKEN, f"Python {found}: hvdnoise needs 3.10 or newer"
    return OK, f"Python {found}, {os.cpu_count()} cores, {platform.platform()}"


def _packages() -> Iterator[Finding]:
    for name in ("torch", "numpy", "horovod"):
        try:
            yield OK, f"{name} {version(name)}"
        except PackageNotFoundError:
            if name == "horovod":
                yield NOTE, "horovod is not installed: run launch/setup.sh, or start with torchrun"
            else:
                yield BROKEN, f"{name} is not installed: pip install {name}"
    for extra, modules in extras.by_extra().items():
        lacking = [extras.PACKAGES[each][0] for each in extras.missing(*modules)]
        there = [extras.PACKAGES[each][0] for each in modules]
        if lacking:
            yield NOTE, (f"extra {extra}: without {', '.join(lacking)}; "
                         f"pip install 'hvdnoise[{extra}]'")
        else:
            yield OK, f"extra {extra}: {', '.join(f'{each} {version(each)}' for each in there)}"
    for name, found, least in extras.too_old():
        yield BROKEN, (f"{name} {found} is older than {least}, the oldest that hvdnoise was tested "
                       f"with: pip install --upgrade {name}")


def _horovod() -> Iterator[Finding]:
    try:
        build = comm.build_report()
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        yield BROKEN, f"Horovod does not load ({first}): build it anew with launch/setup.sh"
        return
    parts = [part for part in ("mpi", "gloo", "nccl", "cuda") if build.get(f"{part}_built")]
    if "mpi" in parts or "gloo" in parts:
        yield OK, f"Horovod is built with {', '.join(parts)}"
    else:
        yield BROKEN, "Horovod is built with neither MPI nor Gloo: run launch/setup.sh"
    for part in ("mpi", "gloo"):
        if part not in parts:
            yield NOTE, f"Horovod is built without {part}: that launcher cannot be used"
    if torch.cuda.is_available() and "nccl" not in parts:
        yield BROKEN, ("GPUs, but Horovod is built without NCCL: gradients go through the host; "
                       "run launch/setup.sh --gpu")


def _mpi(found: dict[str, str]) -> Iterator[Finding]:
    if "mpirun" not in found:
        yield NOTE, "no mpirun on the PATH: horovodrun --gloo works without; else launch/setup.sh"
    elif "Open MPI 5" in found["mpirun"]:
        yield NOTE, f"{found['mpirun']}: horovodrun --mpi needs 4.1; start with mpirun itself"
    if wrong := mpis.mixture(found):
        yield BROKEN, wrong
    elif found:
        where = shutil.which("mpirun", path=_users_path())
        yield OK, (f"{' and '.join(dict.fromkeys(found.values()))}, of {', '.join(found)}"
                   + f" ({where})" * (where is not None))


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "torch sees none"
        yield NOTE, f"no GPU ({reason}): training runs on the CPU"
        return
    for index in range(torch.cuda.device_count()):
        try:
            value = torch.ones(2, device=f"cuda:{index}").sum().item()
            name = torch.cuda.get_device_name(index)
            yield (OK if value == 2 else BROKEN), f"GPU {index}: {name}"
        except RuntimeError as error:
            yield BROKEN, f"GPU {index} does not compute ({str(error).splitlines()[0]})"


def _collective() -> Finding:
    try:
        world = comm.init()
        total = world.allreduce_(torch.tensor([world.rank + 1.0]), name="doctor", op="sum").wait()
        size = world.size
        comm.shutdown()
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        return BROKEN, f"the collective smoke test failed ({first})"
    if total.item() != size * (size + 1) / 2:
        return BROKEN, f"an allreduce over {size} ranks gave {total.item():g}, a wrong sum"
    return OK, f"an allreduce over {size} rank{'s' * (size > 1)} gave the right sum"


def _launches(seconds: int, mpi: str) -> Iterator[Finding]:
    again = [sys.executable, "-m", "hvdnoise", "doctor", "--launch", "false"]
    build = comm.build_report()
    more = ["--oversubscribe"] if mpi.startswith("Open MPI") else []
    for built, launcher in (("gloo_built", ["horovodrun", "--gloo", "-np", "2"]),
                            ("mpi_built", ["mpirun", *more, "-np", "2"])):
        program = shutil.which(launcher[0], path=_path())
        if not build[built] or program is None:
            yield NOTE, f"two ranks under {launcher[0]}: not tried, it is not there"
            continue
        code, said = _bounded([program, *launcher[1:], *again], seconds)
        name = " ".join(launcher)
        if code == 0 and "over 2 ranks" in said:
            yield OK, f"two ranks under {name}"
        elif code is None:
            yield BROKEN, (f"two ranks under {name} were not done after {seconds} s: a firewall "
                           "or a wrong network interface? (HOROVOD_GLOO_IFACE)")
        else:
            last = said.strip().splitlines()[-1][:200] if said.strip() else "nothing said"
            yield BROKEN, f"two ranks under {name} ended with exit code {code}: {last}"


def _bounded(command: list[str], seconds: int) -> tuple[int | None, str]:
    """Exit code (None: ended at the limit) and output of a command in a session of its own."""
    env = {name: value for name, value in os.environ.items()
           if name not in comm.ALONE}  # which are of this one rank
    env.update(PATH=_path(), OMP_NUM_THREADS="1")
    if os.geteuid() == 0:  # Open MPI asks root twice
        env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=seconds)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher takes its ranks along
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        return None, ""


def _path() -> str:
    """As the launch scripts have it: the programs beside this Python come first."""
    return f"{_BIN}{os.pathsep}{os.environ.get('PATH', '')}"


def _users_path() -> str:
    """Where the user's own mpirun is found."""
    return f"{os.environ.get('PATH', '')}{os.pathsep}{_BIN}"


def _data(root: Path) -> Iterator[Finding]:
    for name, record in DATASETS.items():
        if record.folder is None:
            continue
        place, shared = root / record.folder, Path(SHARED)
        if place.is_dir():
            yield OK, f"{name} in {place}"
        elif record.package and (shared / name).is_dir():
            yield OK, f"{name} in {shared} (Debian's package; unpacked when first used)"
        else:
            yield NOTE, f"{name} is not in {root}: it is downloaded when first used"
