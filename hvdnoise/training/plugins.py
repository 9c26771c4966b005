"""Code of the user's own: plugins, which register noises, and functions that settings name.

A function is named as ``FILE.py:NAME`` or ``MODULE:NAME``: ``data.dataset`` may be one, and
``model``. Code is imported where the user names it, in the settings of his own command, and nowhere
else: `function` knows what `load_functions` was given, and whoever reads a run folder, which may
come from anybody, asks before he calls that.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hvdnoise.training.errors import ConfigError

_NAME = re.compile(r"(?!torchvision:)(?P<code>[^:]+):(?P<function>[^\W\d]\w*)")
_digests: dict[str, str] = {}  # of the files loaded
_functions: dict[str, Callable[..., Any]] = {}


def load(plugins: Iterable[str]) -> None:
    """Import them, each once.

    A file (``.py``, relative to the current folder) becomes a module whose name comes from its
    path as given. Anything else is the name of a module that Python finds.

    Raises:
        ConfigError: for one that is not there, or that raises.
    """
    for plugin in plugins:
        import_code(plugin, "plugins: ")


def names_function(name: object) -> bool:
    """Whether a setting's value is the name of a function of the user's own."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def code_of(name: str) -> str:
    """The file or module of a function's name."""
    return name.rpartition(":")[0]


def function_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """The functions that settings name, by flag.

    Args:
        settings: as a file nests them, or any object's attributes.
    """
    data = settings.get("data")
    inside = data if isinstance(data, Mapping) else getattr(data, "__dict__", {})
    found = {"data.dataset": inside.get("dataset"), "model": settings.get("model")}
    return {flag: str(name) for flag, name in found.items() if names_function(name)}


def load_functions(config: Any) -> None:
    """Import the functions that settings (a dataclass) name, so that `function` knows them.

    Raises:
        ConfigError: one line that names the function and what is wrong with it.
    """
    for flag, name in function_names(vars(config)).items():
        code, _, wanted = name.rpartition(":")
        module = import_code(code, f"{flag}={name} is wrong: ", function=wanted)
        found = getattr(module, wanted, None)
        if not callable(found):
            near = difflib.get_close_matches(wanted, [
                key for key, each in vars(module).items() if inspect.isroutine(each)], n=2)
            raise ConfigError(f"{flag}={name} is wrong: {code} has no function {wanted}" + (
                f"; did you mean {' or '.join(near)}?" if near else ""))
        _functions[name] = found


def function(name: str) -> Callable[..., Any]:
    """The function of that name.

    Raises:
        ConfigError: when the user has not named it: a name in a file from others runs nothing.
    """
    if name not in _functions:
        raise ConfigError(f"{name} is code that this command was not told to run: add "
                          "--trust_plugins where a run folder names it")
    return _functions[name]


def import_code(code: str, where: str, function: str | None = None) -> ModuleType:
    """The module of a file or of a module's name; its digest is kept for `versions`.

    Args:
        where: how the message of an error begins.
        function: what is wanted of it, for the remedy.
    """
    try:
        module = _file(Path(code), where) if code.endswith(".py") else importlib.import_module(code)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError) and error.name == code.partition(".")[0]:
            text += f"; a file is named {code.rpartition('/')[2]}.py:{function}" if function \
                else "; a file's name ends with .py"
        raise ConfigError(f"{where}{code} cannot be imported: {type(error).__name__}: "
                          f"{text}{place(error, Path(code).name)}") from error
    source = Path(getattr(module, "__file__", None) or "")  # built in: none
    if source.is_file():
        _digests[code] = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    return module


def versions() -> dict[str, str]:
    """SHA-256 (16 digits) of each file loaded: what must be equal on all ranks."""
    return {f"plugin {code}": digest for code, digest in _digests.items()}


def blame(error: BaseException, called: Callable[..., Any]) -> str:
    """What a function of the user's raised, in words, with the last line of its file."""
    module = sys.modules.get(getattr(called, "__module__", None) or "")
    text = " ".join(str(error).split())
    return (f"{type(error).__name__}{': ' if text else ''}{text}"
            f"{place(error, getattr(module, '__file__', None) or '/')}")


def place(error: BaseException, file: str) -> str:
    """The line of the file where it was raised, in brackets; nothing where that is not known."""
    lines, at = [], error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename.endswith(file):
            lines.append(at.tb_lineno)
        at = at.tb_next
    return f" (line {lines[-1]})" if lines else ""


def _file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{where}there is no file {path} in {Path.cwd()}")
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
