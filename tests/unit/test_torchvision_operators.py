"""torchvision can be imported first thing, in any Python of the environment, without hvdnoise.

The first tests start the environment's Python as a user does. The others load
launch/torchvision_operators.py beside a small torch and torchvision of their own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher import ROOT

pytestmark = pytest.mark.slow  # every test starts Python
FILE = ROOT / "launch" / "torchvision_operators.py"


def python(*arguments: str, cwd: Path | None = None) -> str:
    """What a fresh Python prints; it must end well."""
    ended = subprocess.run([sys.executable, *arguments], cwd=cwd, timeout=100, text=True,
                           capture_output=True, check=False)
    assert ended.returncode == 0 and "Error" not in ended.stderr, ended.stderr
    return ended.stdout


# ---- the environment

@pytest.mark.parametrize("line,options", [
    ("from torchvision import models; models.resnet18", []),
    ("import torchvision.transforms.v2 as v2; v2.Compose", ["-I"])])
def test_imports_first_thing(line: str, options: list[str], tmp_path: Path) -> None:
    last = "; import sys; print([each for each in sys.modules if each.startswith('hvdnoise')])"
    assert python(*options, "-c", line + last, cwd=tmp_path) == "[]\n"


LOADER = """
import sys
from torch.utils.data import DataLoader, Dataset

class Images(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        assert "torchvision" not in sys.modules or index
        from torchvision import transforms
        assert "hvdnoise" not in sys.modules
        return transforms.Resize(index + 1).size

if __name__ == "__main__":
    loader = DataLoader(Images(), num_workers=1, multiprocessing_context="spawn")
    print([int(size) for size in loader])
    assert "torchvision" not in sys.modules
"""


def test_worker_that_is_spawned(tmp_path: Path) -> None:
    (tmp_path / "loader.py").write_text(LOADER)
    assert python("loader.py", cwd=tmp_path) == "[1, 2]\n"


def test_a_start_imports_nothing_and_neither_does_looking(tmp_path: Path) -> None:
    program = ("import importlib.util, sys; found = importlib.util.find_spec('torchvision');"
               "print(type(found.loader).__name__, sorted({'torch', 'torchvision', 'numpy',"
               "'hvdnoise'} & set(sys.modules)))")
    assert python("-c", program, cwd=tmp_path) == "SourceFileLoader []\n"


def test_threads_that_import_at_once(tmp_path: Path) -> None:
    program = ("from concurrent.futures import ThreadPoolExecutor; import importlib;"
               "pool = ThreadPoolExecutor(4); names = ['torchvision'] * 4;"
               "print(len(set(pool.map(importlib.import_module, names))))")
    assert python("-c", program, cwd=tmp_path) == "1\n"


# ---- with a torch and a torchvision that are made up

TORCH = """
import types

class Library:
    def __init__(self, namespace, kind):
        assert (namespace, kind) == ("torchvision", "FRAGMENT")

    def define(self, schema):
        print("declares", schema.partition("(")[0])
        setattr(ops.torchvision, schema.partition("(")[0], None)

ops = types.SimpleNamespace(torchvision=types.SimpleNamespace())
library = types.SimpleNamespace(Library=Library)
"""
TORCHVISION = """
import torch
from . import extension
assert hasattr(torch.ops.torchvision, "nms")
"""
AFTER = """
import sys
assert not any(isinstance(each, torchvision_operators.Finder) for each in sys.meta_path)
from torchvision import extension
assert type(extension.__loader__).__name__ == "SourceFileLoader"
assert extension.__spec__.loader is extension.__loader__
"""


def made_up(folder: Path, program: str, *, torch: str | None = TORCH,
            torchvision: str | None = TORCHVISION, extension: str = "") -> str:
    """What a program prints that starts after `install`, without site-packages."""
    for name, text in {"torch.py": torch, "torchvision/__init__.py": torchvision,
                       "torchvision/extension.py": torchvision and extension}.items():
        if text is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
    start = (f"import sys; sys.path[:0] = [{str(folder)!r}, {str(FILE.parent)!r}];"
             "import torchvision_operators; torchvision_operators.install()\n")
    return python("-S", "-c", start + program, cwd=folder)


def test_declares_what_is_missing_once(tmp_path: Path) -> None:
    both = "declares nms\ndeclares qnms\n"
    again = ("torchvision_operators.install(); import torchvision" + AFTER
             + "torchvision_operators.install()" + AFTER
             + "import importlib; importlib.reload(extension); importlib.reload(torchvision)")
    assert made_up(tmp_path, again) == both
    own = "import torch; torch.ops.torchvision.nms = None; import torchvision" + AFTER
    assert made_up(tmp_path, own) == "declares qnms\n"


def test_extension_that_loads(tmp_path: Path) -> None:
    loads = "import torch\ntorch.ops.torchvision.nms = torch.ops.torchvision.qnms = print"
    assert made_up(tmp_path, "import torchvision" + AFTER, extension=loads) == ""


def test_without_torch_or_torchvision(tmp_path: Path) -> None:
    """The error is the usual one, and once the packages are there the import works."""
    program = ("try:\n    import torchvision\n"
               "except ModuleNotFoundError as error:\n    print(error.name)\n")
    assert made_up(tmp_path, program, torch=None, torchvision=None) == "torchvision\n"
    later = (f"open('torch.py', 'w').write({TORCH!r})\n"
             "import importlib; importlib.invalidate_caches(); import torchvision" + AFTER)
    assert made_up(tmp_path, program + later, torch=None) == \
        "torch\ndeclares nms\ndeclares qnms\n"


def test_import_that_fails_can_be_tried_again(tmp_path: Path) -> None:
    fails_once = "import sys\nsys.tries = getattr(sys, 'tries', 0) + 1\nassert sys.tries > 1"
    program = ("try:\n    import torchvision\nexcept AssertionError:\n    print('failed')\n"
               "import torchvision" + AFTER)
    assert made_up(tmp_path, program, extension=fails_once) == \
        "failed\ndeclares nms\ndeclares qnms\n"


def test_threads_that_look_meanwhile_miss_no_finder(tmp_path: Path) -> None:
    """The list that another thread goes through stays as it is."""
    program = "before = sys.meta_path; copy = [*before]; import torchvision; assert before == copy"
    assert made_up(tmp_path, program + AFTER) == "declares nms\ndeclares qnms\n"
