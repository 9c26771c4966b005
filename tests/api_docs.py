"""The API reference, made from the docstrings by pdoc: ``python -m tests.api_docs [FOLDER]``.

Without a folder it only checks. It ends with 1 and a line for each fault:

- a warning of pdoc, for instance of an annotation that cannot be read, or a module that cannot be
  imported;
- a reference in single backticks that names nothing. A docstring may name what its class, its
  function, its module, the top of any module of hvdnoise or Python itself has. Anything
  else (shell, file names, code) goes in double backticks.
"""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import inspect
import pkgutil
import re
import sys
import tempfile
import typing
import warnings
from pathlib import Path
from typing import Any, Iterator

import pdoc
from pdoc import doc

import hvdnoise

REFERENCE = re.compile(r"(?<!`)`([A-Za-z_]\w*(?:\.\w+)*)(?:\(\))?`(?!`)")


def module_names() -> list[str]:
    """hvdnoise and all its modules but private ones and those that run when they are imported."""
    found = [each.name for each in pkgutil.walk_packages(hvdnoise.__path__, "hvdnoise.")]
    return ["hvdnoise", *(name for name in sorted(found) if "._" not in name)]


def page_roots(names: list[str]) -> list[str]:
    """Those that pdoc has to be told: it finds the modules of a package without ``__all__``."""
    return [name for name in names if (package := name.rpartition(".")[0]) not in names
            or hasattr(sys.modules[package], "__all__")]


def own_classes(module: Any) -> list[type]:
    """Those that the module defines."""
    return [each for each in vars(module).values()
            if inspect.isclass(each) and each.__module__ == module.__name__]


def resolve_fields(module: Any) -> None:
    """Tell pdoc the types of the fields of dataclasses and named tuples.

    It looks for their names where the class, or collections, stands; those of inherited fields
    are known in the parent's module alone.
    """
    for each in own_classes(module):
        maker = each.__init__ if dataclasses.is_dataclass(each) else each.__new__
        if dataclasses.is_dataclass(each) or hasattr(each, "_fields"):
            maker.__annotations__.update(typing.get_type_hints(each))  # type: ignore[misc]


def documented(what: doc.Doc[Any]) -> Iterator[tuple[doc.Doc[Any], str]]:
    """What a page shows of an object of this module and of its members, and their docstrings."""
    inherited = not isinstance(what, doc.Variable) and not getattr(what.obj, "__doc__", None)
    yield what, "" if inherited else what.docstring
    members = what.own_members if isinstance(what, doc.Class) else \
        what.members.values() if isinstance(what, doc.Module) else ()
    for each in members:
        shown = each.name == "__init__" or not each.name.startswith("_")
        if shown and each.taken_from[0] == each.modulename and not isinstance(each, doc.Module):
            yield from documented(each)


def names_of(what: Any) -> set[str]:
    """Attributes of an object, those that its instances get, and its functions' arguments."""
    names = set(dir(what)) | set(getattr(what, "__annotations__", ()))
    for base in what.__mro__[:-1] if inspect.isclass(what) else ():
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        names |= set(re.findall(r"\bself\.(\w+)", source)) | set(
            re.findall(r"^    (\w+)\s*:", source, re.M))
    for function in (what, getattr(what, "__init__", None)):
        if callable(function):
            try:
                names |= set(inspect.signature(function).parameters)
            except (TypeError, ValueError):
                continue
    return names


def is_there(reference: str, scopes: list[Any]) -> bool:
    """Whether one of the scopes or Python has what is named, or it is a whole name."""
    first, *rest = reference.split(".")
    for scope in scopes:
        if first in names_of(scope):
            found = getattr(scope, first, None)
            if found is None or not rest or rest[0] in names_of(found):
                return True
    try:
        return pkgutil.resolve_name(reference) is not None
    except (ImportError, AttributeError, ValueError):
        return hasattr(builtins, first)


def broken_references(name: str, everything: list[Any]) -> list[str]:
    """A line for each reference of the module's docstrings that names nothing."""
    module, lines = sys.modules[name], []
    for each, text in documented(doc.Module(module)):
        scopes = [module]
        for part in each.qualname.split(".") if each.qualname else ():
            if (inner := getattr(scopes[-1], part, None)) is not None:
                scopes.append(inner)
        lines += [f"{each.fullname}: `{found}` names nothing"
                  for found in dict.fromkeys(REFERENCE.findall(text))
                  if not is_there(found, [*scopes[::-1], *own_classes(module), *everything])]
    return lines


def main(folder: Path) -> list[str]:
    """Write the pages, and give back the faults."""
    names = module_names()
    modules = [importlib.import_module(name) for name in names]
    for module in modules:
        resolve_fields(module)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pdoc.render.configure(docformat="google", search=False)
        pdoc.pdoc(*page_roots(names), output_directory=folder)
    faults = [str(each.message) for each in caught]
    faults += [f"{name}: no page was made" for name in names
               if not (folder / (name.replace(".", "/") + ".html")).exists()]
    for name in names:
        faults += broken_references(name, modules)
    return faults


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        told = main(Path(*sys.argv[1:] or [temporary]))
    print(*(told or ["the API reference has no fault"]), sep="\n")
    sys.exit(bool(told))
