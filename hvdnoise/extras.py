"""Packages that only parts of hvdnoise need: which extra brings each, and what a command says
where one is missing.

The library itself needs torch and numpy, and Horovod or torchrun to start ranks with.
"""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError, requires, version

from hvdnoise.training.errors import ConfigError

PACKAGES = {  # module -> its package and the extra that brings it, as in setup.cfg
    "jsonargparse": ("jsonargparse", "trainer"),
    "yaml": ("pyyaml", "trainer"),
    "tqdm": ("tqdm", "trainer"),
    "tensorboard": ("tensorboard", "trainer"),
    "torchvision": ("torchvision", "trainer"),
    "pytorch_optimizer": ("pytorch_optimizer", "trainer"),
    "matplotlib": ("matplotlib", "report"),
    "scipy": ("scipy", "report"),
    "jinja2": ("jinja2", "report"),
    "mpi4py": ("mpi4py", "mpi"),
    "onnx": ("onnx", "export"),
    "onnxruntime": ("onnxruntime", "export"),
    "onnxscript": ("onnxscript", "export"),
    "safetensors": ("safetensors", "export"),
}
EVERY_COMMAND = ("jsonargparse", "yaml", "tqdm")
COMMANDS = {  # what a command needs beside these, whatever it is asked for
    "measure": ("scipy", "matplotlib"),
    "study": ("scipy",),
    "report": ("matplotlib", "jinja2", "scipy"),
    "quadratic": ("scipy",),
}


def missing(*modules: str) -> list[str]:
    """Those that are not installed; nothing is imported."""
    return [each for each in modules if importlib.util.find_spec(each) is None]


def require(what: str, *modules: str) -> None:
    """See that modules of `PACKAGES` are installed.

    Args:
        what: needs them, in the words of the command line.

    Raises:
        ConfigError: one line with the packages that are missing and the extra to install.
    """
    lacking = missing(*modules)
    if not lacking:
        return
    names = " and ".join(", ".join(PACKAGES[each][0] for each in lacking).rsplit(", ", 1))
    extras = ",".join(dict.fromkeys(PACKAGES[each][1] for each in lacking))
    raise ConfigError(f"{what} needs {names}, which "
                      f"{'is' if len(lacking) == 1 else 'are'} not installed: "
                      f"pip install 'hvdnoise[{extras}]'")


def by_extra() -> dict[str, list[str]]:
    """The modules of each extra."""
    found: dict[str, list[str]] = {}
    for module, (_, extra) in PACKAGES.items():
        found.setdefault(extra, []).append(module)
    return found


def too_old() -> list[tuple[str, str, str]]:
    """Installed packages that are older than any that hvdnoise was tested with: name, version, and
    the oldest that was."""
    found = []
    try:
        wanted = requires("hvdnoise") or []
    except PackageNotFoundError:  # it runs from a folder
        return []
    for line in wanted:
        match = re.match(r"([\w.-]+)(?:\[[^]]*\])? *>= *([\w.]+)", line)
        if match is None:
            continue
        name, least = match.groups()
        try:
            here = version(name)
        except PackageNotFoundError:
            continue
        if _numbers(here) < _numbers(least):
            found.append((name, here, least))
    return found


def _numbers(release: str) -> tuple[int, ...]:
    """Of a version, without what may follow: 2.6.0+cpu is (2, 6, 0)."""
    match = re.match(r"\d+(\.\d+)*", release)
    return tuple(map(int, match[0].split("."))) if match else ()
