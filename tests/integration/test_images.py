"""The images: docker/smoke.sh with what this machine has, and what it leaves behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import Iterator

import pytest

from tests.launcher import MARKER, ROOT, Ended, processes_of, run_command

pytestmark = pytest.mark.containers
BUILD, SMOKE = str(ROOT / "docker" / "build.sh"), str(ROOT / "docker" / "smoke.sh")


def builder() -> str:
    """What can build and run images here, docker first; skips the test where nothing can."""
    if os.geteuid() != 0:
        pytest.skip("docker/smoke.sh runs as root only")
    for program, name in (("dockerd", "docker"), ("podman", "podman")):
        if shutil.which(program):
            return name
    pytest.skip("neither dockerd nor podman is on the PATH (Debian: apt-get install docker.io)")


def left_behind() -> list[str]:
    """Temporary folders and mounts of the two scripts."""
    folders = [str(each) for each in Path(tempfile.gettempdir()).glob("hvdnoise-[bs][um]*")]
    return folders + [line for line in Path("/proc/mounts").read_text().splitlines()
                      if "/hvdnoise-" in line]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = left_behind()
    yield
    assert left_behind() == before


def script(*command: str, timeout: float = 60, **env: str) -> Ended:
    return run_command(1, list(command), launcher="none", timeout=timeout, env=env)


@pytest.mark.slow
@pytest.mark.timeout(1500, method="signal")
def test_the_image_trains_as_this_machine_does() -> None:
    """Build, look inside, doctor, 2 ranks in one container, 2 and 3 containers, and outside."""
    ended = script(SMOKE, "--builder", builder(), timeout=1400)
    if ended.exit_code == 2:
        pytest.skip(ended.output.strip().splitlines()[-1])
    assert not ended.verdict(), ended.report()
    assert ended.output.splitlines()[-1].endswith("all is well"), ended.report()
    for said in ("ok: its user is not root", "ok: no keys, secrets and caches in it",
                 "ok: nor in its files", "ok: with the weights of inside",
                 "ok: a host with another key is refused",
                 "ok: 3 ranks train on 3 containers over mpi"):
        assert said in ended.output, ended.report()


@pytest.mark.skipif(not os.environ.get("HVDNOISE_TEST_BUILD_TWICE"),
                    reason="builds twice, minutes: set HVDNOISE_TEST_BUILD_TWICE=1")
@pytest.mark.parametrize("name", ["docker", "podman", "buildah"])
@pytest.mark.timeout(1500, method="signal")
def test_two_builds_are_one(name: str) -> None:
    """The same packages and files; under podman and buildah the same layers, too."""
    builder()
    ended = script(SMOKE, "--builder", name, "--twice", timeout=1400)
    if ended.exit_code == 2:
        pytest.skip(ended.output.strip().splitlines()[-1])
    assert not ended.verdict(), ended.report()
    for said in ("same packages", "same files"):
        assert f"ok: two builds have the {said}" in ended.output, ended.report()
    assert name == "docker" or "ok: two builds have the same layer digests" in ended.output


def test_a_smoke_test_that_is_ended_leaves_nothing() -> None:
    """SIGTERM while the base is made, under a daemon of its own."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [SMOKE, "--builder", builder(), "--base", "debootstrap"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, MARKER: mark})
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "a base by debootstrap" in line or process.poll() is not None:
                break
        time.sleep(2)
        if process.poll() == 2:
            pytest.skip("no base can be made here")
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 130 and "interrupted" in said
        assert not processes_of(f"{MARKER}={mark}")
    finally:
        process.kill()


def test_many_ssh_at_once_in_a_new_container(tmp_path: Path) -> None:
    """The first makes the key and the settings that all of them read."""
    if not os.access("/usr/bin/ssh", os.X_OK):
        pytest.skip("no ssh (Debian: apt-get install openssh-client)")
    for name in ("home", "keys"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "docker" / "ssh.sh", tmp_path / "ssh")
    (tmp_path / "ssh").chmod(0o755)
    env = {**os.environ, "HOME": str(tmp_path / "home"), "HVDNOISE_SSH": str(tmp_path / "keys")}
    all_of_them = [subprocess.Popen([str(tmp_path / "ssh"), "-G", f"node{number}"], env=env,
                                    text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                   for number in range(12)]
    for number, each in enumerate(all_of_them):
        said = each.communicate(timeout=60)[0]
        assert each.returncode == 0, said
        assert {f"hostname node{number}", "port 2222", "stricthostkeychecking true"} <= \
            set(said.splitlines())
    assert sorted(each.name for each in (tmp_path / "keys").iterdir()) == ["id_ed25519"]


@pytest.mark.parametrize("arguments, env, said", [
    (["--variant", "tpu"], {}, "--variant is 'tpu'; give cpu or gpu"),
    (["--tag", "Image"], {}, "--tag is 'Image'; give a name and a tag"),
    (["--fast"], {}, "unknown option '--fast'; see docker/build.sh --help"),
    (["--builder", "docker"], {"PATH": "/usr/sbin:/sbin"}, "no docker on the PATH"),
    (["--builder", "docker"], {"DOCKER_HOST": "unix:///nowhere"}, "daemon does not answer; start"),
    (["--builder", "podman"], {"PATH": "/usr/sbin:/sbin"}, "no podman on the PATH"),
])
def test_a_build_that_cannot_be_is_refused(tmp_path: Path, arguments: list[str],
                                           env: dict[str, str], said: str) -> None:
    if "DOCKER_HOST" in env and not shutil.which("docker"):
        pytest.skip("no docker on the PATH")
    if "PATH" in env:  # the script's own programs, and no engine
        for name in ("bash", "dirname", "env", "mktemp", "timeout", "rm", "awk", "sort", "tail"):
            (tmp_path / name).symlink_to(str(shutil.which(name)))
        env = {"PATH": str(tmp_path)}
    ended = subprocess.run([BUILD, *arguments], env={**os.environ, **env}, text=True,
                           capture_output=True, timeout=60)
    assert ended.returncode == 2, ended
    lines = ended.stderr.splitlines()
    assert len(lines) == 1 and said in lines[0], ended
