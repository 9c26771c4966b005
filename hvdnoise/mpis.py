"""Which MPI Horovod, mpi4py and mpirun are. They must be one and the same: ranks that the mpirun of
another MPI starts see no launcher, and each trains alone.

Each is asked in a process of its own, as an MPI library may end the process that loads it, and two
of them go badly together.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

_SECONDS = 20
_ASK_LIBRARY = """
import ctypes, sys
text, length = ctypes.create_string_buffer(1 << 14), ctypes.c_int()
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL).MPI_Get_library_version(text, ctypes.byref(length))
print(text.value.decode(errors="replace"))
"""
_ASK_MPI4PY = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version())
"""
_NAMES = ((r"Open MPI\)? v?([\d.]+)", "Open MPI"), (r"MPICH Version:\s*([\d.]+)", "MPICH"),
          (r"HYDRA[^$]*?Version:\s*([\d.]+)", "MPICH"),
          (r"Intel\(R\) MPI Library[^$]*?([\d.]+)", "Intel MPI"))


def parts(path: str | None = None) -> dict[str, str]:
    """The MPI of each of "Horovod", "mpi4py" and "mpirun" that has one, as "Open MPI 4.1.8".

    A library that does not load is "unknown (why)".

    Args:
        path: where mpirun is looked for; default: PATH.
    """
    found = {"Horovod": of_horovod(), "mpi4py": of_mpi4py(), "mpirun": of_mpirun(path)}
    return {part: name for part, name in found.items() if name is not None}


def mixture(found: dict[str, str]) -> str | None:
    """What is wrong when these `parts` are not one MPI, with the cure; None when they are.

    An mpirun alone is nobody's fault: nothing here was built with an MPI.
    """
    if len(set(found.values())) < 2 or not {"Horovod", "mpi4py"} & set(found):
        return None
    told = ", ".join(f"{part} {'is of' if part == 'mpirun' else 'has'} {name}"
                     for part, name in found.items())
    return (f"a mixture of MPIs: {told}; put the mpirun of Horovod's MPI first on the PATH, or "
            "build all for the one that is there: launch/setup.sh --mpi system")


def of_horovod() -> str | None:
    """That of Horovod's extension for torch; None where there is none, or it has no MPI."""
    place = _folder("horovod")
    for library in sorted((place / "torch").glob("mpi_lib*.so")) if place is not None else []:
        linked = re.search(r"^\s*(libmpi(?:ch)?\.so\S*) => (.*?)(?: \(0x|$)",
                           _said("ldd", str(library)), re.MULTILINE)
        if linked is None:
            return None
        if not linked[2].startswith("/"):
            return f"unknown ({linked[1]} is not found)"
        return named(_said(sys.executable, "-c", _ASK_LIBRARY, linked[2]))
    return None


def of_mpi4py() -> str | None:
    """That of mpi4py; None where there is none."""
    if _folder("mpi4py") is None:
        return None
    return named(_said(sys.executable, "-c", _ASK_MPI4PY))


def of_mpirun(path: str | None = None) -> str | None:
    """That of mpirun; None where there is none."""
    program = shutil.which("mpirun", path=path)
    return None if program is None else named(_said(program, "--version"))


def named(said: str) -> str:
    """The MPI that says this of itself, as "Open MPI 4.1.8"; or "unknown (what it says)"."""
    for pattern, name in _NAMES:
        if match := re.search(pattern, said):
            return f"{name} {match[1]}"
    lines = said.strip().splitlines() or ["says nothing"]
    return f"unknown ({lines[-1][:120]})"


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def _said(*command: str) -> str:
    """What a program prints on both outputs."""
    alone = {name: value for name, value in os.environ.items()
             if not name.startswith(("OMPI_COMM", "PMI", "PMIX"))}
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", timeout=_SECONDS, env=alone).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
