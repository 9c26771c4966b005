"""`pip install` into environments that are not launch/setup.sh's: from a clean clone, without it.

The environments are virtual ones that see some of the packages of this one, and no others.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Iterable

import pytest

from hvdnoise import extras
from hvdnoise.cli import _USAGE
from tests.launcher import ROOT, Ended, run_command

LIBRARY = ("torch", "numpy", "horovod")
BARE_TRAINER = (*LIBRARY, "jsonargparse", "pyyaml", "tqdm")
BUILD = """
import sys
from setuptools import build_meta
print("built", build_meta.build_sdist(sys.argv[1]))
"""
SETTINGS = {"HOROVOD_GLOO_IFACE": "lo", "OMP_NUM_THREADS": "1"}


def done(command: list[str], cwd: Path) -> str:
    ended = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, timeout=120)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def build_wheel(source: Path, into: Path) -> Path:
    done([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
          "--no-index", "-w", str(into), str(source)], into.parent)
    (wheel,) = into.glob("hvdnoise-*.whl")
    return wheel


def clone(folder: Path) -> Path:
    """What a clean clone has, and this working tree."""
    listed = done(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in listed.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Wheels of a clean clone and of the sdist that was built in another; nothing else stays."""
    work = tmp_path_factory.mktemp("build")
    clone(work / "clone")
    clone(work / "other")
    done([sys.executable, "-c", BUILD, str(work / "sdist")], work / "other")
    (archive,) = (work / "sdist").glob("hvdnoise-*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(work / "unpacked", filter="data")
    shutil.rmtree(work / "other")
    (source,) = (work / "unpacked").iterdir()
    found = build_wheel(work / "clone", work / "wheel"), build_wheel(source, work / "of-sdist")
    shutil.rmtree(work / "clone")
    shutil.rmtree(work / "unpacked")
    return found


def needed(names: Iterable[str]) -> set[str]:
    """These distributions and all that they need without extras, of what is installed here."""
    found, left = set[str](), [*names]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:  # for another platform or Python
            continue
        if name not in found:
            found.add(name)
            left += [re.split(r"[^\w.-]", line)[0] for line in lines
                     if "extra ==" not in line or name == "jsonargparse" and "signatures" in line]
    return found


def environment(folder: Path, names: Iterable[str], wheel: Path | None) -> Path:
    """The folder of the programs of a virtual environment with these packages and hvdnoise."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in needed(names):
        here = distribution(name)
        tops = {each.parts[0] for each in here.files or () if each.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(here.locate_file(top))))
    if wheel is not None:
        done([sys.executable, "-m", "pip", "-q", "--python", str(folder / "bin" / "python"),
              "install", "--no-deps", "--no-index", str(wheel)], folder)
    horovodrun = Path(sys.executable).with_name("horovodrun").read_text()
    mine = folder / "bin" / "horovodrun"
    mine.write_text(horovodrun.replace(sys.executable, str(folder / "bin" / "python")))
    mine.chmod(0o755)
    return folder / "bin"


def started(program: Path, arguments: list[str], cwd: Path, **env: str) -> Ended:
    """Of an environment's own, with nothing of the repository."""
    return run_command(1, [str(program), *arguments], launcher="none", cwd=cwd, env={
        **SETTINGS, "PYTHONPATH": "", "PATH": f"{program.parent}:/usr/bin:/bin", **env})


@pytest.fixture(scope="module")
def library(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("library"), LIBRARY, wheels[1])


@pytest.fixture(scope="module")
def bare_trainer(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("trainer"), BARE_TRAINER, wheels[0])


def test_wheel_and_sdist_hold_the_same(wheels: tuple[Path, Path]) -> None:
    contents = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as file:
            contents.append({name: file.read(name) for name in file.namelist()
                             if not name.endswith("RECORD")})
    assert contents[0] == contents[1]
    names = {name.partition(".data/data/")[2] or name for name in contents[0]}
    in_package = {str(path.relative_to(ROOT)) for path in (ROOT / "hvdnoise").rglob("*")
                  if path.is_file() and "__pycache__" not in path.parts}
    scripts = {f"share/hvdnoise/launch/{name}" for name in
               ("horovodrun.sh", "mpirun.sh", "hosts.sh", "bin/ssh")}
    assert in_package | scripts <= names
    assert not [name for name in names if name.startswith(("tests", "docs"))]


LOOP = """
import sys, time
import torch
begun = time.process_time()
import hvdnoise
spent = time.process_time() - begun
import horovod.torch as hvd
hvd.init()
torch.manual_seed(1)
model = torch.nn.Linear(4, 2)
optimizer = hvdnoise.DistributedOptimizer(
    torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters(),
    noise=hvdnoise.GNC(radius=0.05))
for step in range(3):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
extra = {"jsonargparse", "yaml", "tqdm", "scipy", "matplotlib", "torchvision", "mpi4py"}
print("LOOP", hvd.rank(), hvd.size(), hvdnoise.__file__, "spent", spent,
      "extra", sorted(extra & set(sys.modules)))
"""


@pytest.mark.parallel
def test_the_library_alone(library: Path, tmp_path: Path) -> None:
    """Two ranks, with torch, numpy and Horovod and nothing else; it is imported quickly."""
    (tmp_path / "loop.py").write_text(LOOP)
    ended = started(library / "horovodrun", ["--gloo", "-np", "2", "--network-interface", "lo",
                                             str(library / "python"), "loop.py"], tmp_path)
    assert not ended.verdict(), ended.report()
    said = re.findall(r"LOOP (\d) 2 (\S+) spent (\S+) extra (\[.*\])", ended.output)
    assert sorted(rank for rank, *_ in said) == ["0", "1"], ended.report()
    for _, file, spent, extra in said:
        # Horovod brings PyYAML by itself, and only its own launcher needs it.
        assert str(library.parent) in file and extra in ("[]", "['yaml']")
        assert float(spent) < 0.4  # 0.1 s alone; this is the time of the processor on a busy one


def errors(program: Path, calls: Iterable[list[str]], cwd: Path) -> tuple[list[str], Ended]:
    """The one error line of each command; all in one process, as to import torch takes seconds."""
    script = (f"import sys, hvdnoise.cli\nfor call in {[*calls]}:\n"
              "    print('CODE', hvdnoise.cli.main(call), file=sys.stderr)\n")
    ended = started(program, ["-c", script], cwd)
    assert "Traceback" not in ended.output and not list(cwd.iterdir()), ended.report()
    return re.findall(r"^hvdnoise: error: (.*)\nCODE 2$", ended.output, re.MULTILINE), ended


def test_commands_without_their_packages_say_which_extra(library: Path, tmp_path: Path) -> None:
    commands = {*re.findall(r"hvdnoise (\w+)[ \[]", _USAGE)} - {"doctor"}
    assert len(commands) >= 10
    plain = [["doctor", "--versions"], ["--help"]]
    found, ended = errors(library / "python", [*([each] for each in commands), *plain], tmp_path)
    assert {text.split()[1] for text in found} == commands, ended.report()
    for text in found:
        report = text.split()[1] in ("measure", "report", "study", "quadratic")
        extra = "trainer,report" if report else "trainer"
        assert "jsonargparse" in text and text.endswith(f"pip install 'hvdnoise[{extra}]'"), text
    assert re.search("^versions .*torchvision=not-installed", ended.output, re.MULTILINE)
    assert ended.output.count("CODE 0") == len(plain), ended.report()


def test_the_doctor_of_the_library_alone(library: Path, tmp_path: Path) -> None:
    """It names what is missing, and finds nothing broken in that."""
    ended = started(library / "hvdnoise", ["doctor"], tmp_path)
    assert not ended.verdict(), ended.report()
    for said in (r"ok +horovod 0\.28\.1", r"note +extra trainer: without jsonargparse, .*tqdm",
                 r"note +extra report: without matplotlib, scipy; pip install",
                 r"note +extra mpi: without mpi4py", r"ok +Open MPI [\d.]+, of Horovod$",
                 r"ok +two ranks under horovodrun --gloo"):
        assert re.search(f"^{said}", ended.output, re.MULTILINE), (said, ended.report())


SMALL = ["train", "--data.dataset", "synthetic", "--data.num_examples", "32", "--data.image_size",
         "8", "--data.batch_size", "8", "--model", "mlp", "--epochs", "1", "--device", "cpu",
         "--noise.kind", "gnc", "--noise.radius", "0.05", "--run_dir", "run"]


def test_settings_without_their_packages(bare_trainer: Path, tmp_path: Path) -> None:
    settings = {"tensorboard=true (false does without) needs tensorboard": [],
                "optim.name=lars needs pytorch_optimizer": ["--optim.name", "lars"],
                "data.dataset=cifar10 needs torchvision": ["--data.dataset", "cifar10"],
                "data.dataset=imagefolder needs torchvision": ["--data.dataset", "imagefolder"],
                "none of hvdnoise's own needs torchvision": ["--model", "alexnet"]}
    found, ended = errors(bare_trainer / "python", [
        ["train", "--tensorboard", str(not flags).lower(), *flags] for flags in settings.values()
    ] + [["bench", "--out", "x"]], tmp_path)
    assert len(found) == len(settings) + 1, ended.report()
    for text, expected in zip(found, settings):
        assert f"{expected}, which is not installed: pip install 'hvdnoise[trainer]'" in text
    assert found[-1] == ("--out needs matplotlib, which is not installed: "
                         "pip install 'hvdnoise[report]'")


@pytest.mark.parallel
def test_two_ranks_train_from_a_wheel(bare_trainer: Path, tmp_path: Path) -> None:
    """By horovodrun, and by `hvdnoise launch`, which needs the scripts that the wheel brings."""
    train = [*SMALL, "--tensorboard", "false"]
    ended = started(bare_trainer / "horovodrun", [
        "--gloo", "-np", "2", "--network-interface", "lo", "hvdnoise", *train], tmp_path)
    assert not ended.verdict(), ended.report()
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2
    again = started(bare_trainer / "hvdnoise", [
        "launch", "--gloo", "-np", "2", "--interface", "lo", "--", *train[:-4], "--run_dir",
        "again", "--tensorboard", "false"], tmp_path)
    assert not again.verdict(), again.report()
    other = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert found["weights_sha256"] == other["weights_sha256"]


@pytest.mark.parallel
def test_setup_keeps_the_horovod_that_is_installed(tmp_path: Path) -> None:
    """It adds hvdnoise to that environment, and starts two ranks there; no index is needed."""
    names = {package for package, extra in extras.PACKAGES.values() if extra != "mpi"}
    names |= {*LIBRARY, "pip", "setuptools", "wheel"}
    theirs = environment(tmp_path / "theirs", names, None)
    tree = clone(tmp_path / "tree")
    ended = run_command(1, [str(tree / "launch" / "setup.sh"), "--horovod", "installed"],
                        launcher="none", cwd=tmp_path, timeout=300, env={
                            **SETTINGS, "PYTHONPATH": "", "PATH": "/usr/bin:/bin",
                            "PYTHON": str(theirs / "python"), "PIP_NO_INDEX": "1"})
    assert not ended.verdict(), ended.report()
    for said in (rf"kept: .*horovod=={version('horovod')} .*torch=={re.escape(version('torch'))}",
                 r"ok +two ranks under horovodrun --gloo", rf"ready: put {theirs} first"):
        assert re.search(said, ended.output), (said, ended.report())
    assert (theirs / "hvdnoise").is_file() and not (tree / ".venv").exists()
