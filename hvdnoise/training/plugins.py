"""Plugins: Python files and modules that register noises before the settings are read."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Iterable

from hvdnoise.training.errors import ConfigError

_digests: dict[str, str] = {}  # of the plugins loaded


def load(plugins: Iterable[str]) -> None:
    """Import them, each once.

    A file (``.py``, relative to the current folder) becomes a module whose name comes from its
    path as given. Anything else is the name of a module that Python finds.

    Raises:
        ConfigError: for one that is not there, or that raises.
    """
    for plugin in plugins:
        try:
            module = _file(Path(plugin)) if plugin.endswith(".py") else \
                importlib.import_module(plugin)
        except ConfigError:
            raise
        except (Exception, SystemExit) as error:
            text = " ".join(str(error).split())
            if isinstance(error, ModuleNotFoundError) and error.name == plugin:
                text += "; a file's name ends with .py"
            raise ConfigError(f"plugins: {plugin} cannot be imported: {type(error).__name__}: "
                              f"{text}{_place(error, plugin)}") from error
        source = Path(getattr(module, "__file__", None) or "")  # built in: none
        if source.is_file():
            _digests[plugin] = hashlib.sha256(source.read_bytes()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """SHA-256 (16 digits) of each plugin loaded: what must be equal on all ranks."""
    return {f"plugin {plugin}": digest for plugin, digest in _digests.items()}


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"plugins: there is no file {path} in {Path.cwd()}")
    name = "hvdnoise_plugin_" + re.sub(r"\W+", "_", str(path.with_suffix("")))
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _place(error: BaseException, plugin: str) -> str:
    """The line of the plugin where it raised."""
    lines, at = [], error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename.endswith(Path(plugin).name):
            lines.append(at.tb_lineno)
        at = at.tb_next
    return f" (line {lines[-1]})" if lines else ""
