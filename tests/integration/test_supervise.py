"""`hvdnoise launch` with real ranks: whatever is killed, the run ends in the bits of the one that
nobody touched; and on another number of ranks it goes on with the same workers.

HVDNOISE_TEST_KILLS=20 kills as often as that in a run of 1,000 steps, under Gloo and MPI (many
minutes). Without it two kills in 400 steps, under Gloo.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any, Callable

import psutil
import pytest
import torch
import yaml

from tests.cluster import run_on_hosts, why_not
from tests.integration.running import HVDNOISE, TINY, finished, hvdnoise
from tests.launcher import Ended, oldest_process, run_command

pytestmark = pytest.mark.parallel
KILLS = int(os.environ.get("HVDNOISE_TEST_KILLS", "2"))
EPOCHS = 10 if KILLS > 2 else 4
STEPS = 100 * EPOCHS
SETTINGS = f"""
data: {{dataset: synthetic, num_examples: 1600, image_size: 8, batch_size: 8}}
model: mlp
epochs: {EPOCHS}
noise: {{kind: gnc, radius: 0.05, source: own}}
optim: {{lr: 0.05}}
eval_every: 0
log_every: 50
checkpoint: {{every_steps: 25, every_epochs: 0}}
tensorboard: false
"""
LAUNCH = [HVDNOISE, "launch", "-np", "2", "--backoff", "0.1", "--max-restarts", "100"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text(SETTINGS)
    return path


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, settings: Path) -> str:
    """The digest of the weights of the uninterrupted run, the same under Gloo and MPI."""
    folder = tmp_path_factory.mktemp("untouched") / "run"
    ended = hvdnoise(2, "train", "--config", str(settings), "--run_dir", str(folder),
                     "--checkpoint.every_steps", "0")
    return str(finished(ended, folder)["weights_sha256"])


def launch(folder: Path, settings: Path, *options: str, timeout: float = 600) -> Ended:
    return run_command(1, [*LAUNCH, *options, "--", "train", "--config", str(settings), "--run_dir",
                           str(folder)], launcher="none", timeout=timeout)


# ---------------------------------------------------------------------- who is killed

def supervisor(folder: Path) -> psutil.Process | None:
    return oldest_process(lambda words: words[1:3] == [HVDNOISE, "launch"] and str(folder) in words)


def below(folder: Path) -> dict[str, list[psutil.Process]]:
    """The processes of the attempt under way, by what they are."""
    found: dict[str, list[psutil.Process]] = {}
    above = supervisor(folder)
    for process in above.children(recursive=True) if above is not None else []:
        try:
            words = process.cmdline()
            if any(word.endswith("guard.py") for word in words):
                kind = "guard"
            elif words[1:] and words[0].endswith("bash") and words[1].endswith("run.sh"):
                kind = "script"
            elif words[1:] and words[1].endswith("/horovodrun") or words[0].endswith("mpirun"):
                kind = "launcher"
            elif words[1:3] == [HVDNOISE, "train"]:
                kind = "rank"
            else:
                continue
            found.setdefault(kind, []).append(process)
        except (psutil.Error, IndexError):  # it has ended
            continue
    return found


def step_of(folder: Path) -> int:
    try:
        return int((folder / "step").read_text())
    except (OSError, ValueError):
        return 0


class Killer:
    """Kills ranks and launchers of a supervised run, at steps and in starts that a seed chooses."""

    KINDS = ("rank", "rank", "launcher", "script", "guard")

    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self.folder, self.count, self._random = folder, count, random.Random(seed)
        self.killed: list[str] = []
        self.sizes: list[tuple[int, int, int]] = []  # of the supervisor: bytes, files, threads
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        steps = sorted(self._random.sample(range(20, STEPS - 50), self.count))
        while len(self.killed) < self.count:
            step = steps[len(self.killed)]
            self._wait(lambda: "rank" in below(self.folder) and step_of(self.folder) >= step)
            time.sleep(self._random.uniform(0, 0.2))
            self._kill()
            if self._random.random() < 0.3 and len(self.killed) < self.count:  # in the next start
                time.sleep(self._random.uniform(0, 10))
                self._kill()

    def _wait(self, condition: Callable[[], bool]) -> None:
        until = time.monotonic() + 300
        while not condition() and time.monotonic() < until:
            time.sleep(0.02)

    def _kill(self) -> None:
        found = below(self.folder)
        kind = self._random.choice([each for each in self.KINDS if each in found] or [""])
        if kind:
            victim = self._random.choice(found[kind])
            self.killed.append(f"{kind} after step {step_of(self.folder)}")
            above = supervisor(self.folder)
            if above is not None:
                self.sizes.append((above.memory_info().rss, above.num_fds(), above.num_threads()))
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                pass

    def assert_flat(self) -> None:
        """The supervisor has not grown between the first and the last kill."""
        first, last = self.sizes[0], self.sizes[-1]
        assert last[0] - first[0] < 16 << 20 and last[1:] == first[1:], self.sizes


@pytest.mark.timeout(4000, method="signal")
@pytest.mark.parametrize("launcher", ["--gloo", "--mpirun"] if KILLS > 2 else ["--gloo"])
def test_a_run_survives_random_kills(tmp_path: Path, settings: Path, untouched: str, launcher: str
                                     ) -> None:
    folder = tmp_path / "run"
    killer = Killer(folder, KILLS, seed=12 + len(launcher))
    ended = launch(folder, settings, launcher, timeout=3900)
    print("killed:", *killer.killed, sep="\n  ")
    print("supervisor (bytes, files, threads):", killer.sizes, f"in {ended.seconds:.0f} s")
    assert finished(ended, folder)["weights_sha256"] == untouched
    assert len(killer.killed) == KILLS
    assert len([line for line in ended.output.splitlines() if "restart" in line]) >= 1
    killer.assert_flat()


def test_sigterm_sigkill_and_the_same_command_again(tmp_path: Path, settings: Path, untouched: str
                                                    ) -> None:
    """Under MPI. SIGTERM: saved, 75. SIGKILL: nothing is left. Each time the command goes on."""
    folder = tmp_path / "run"

    def at(step: int, number: signal.Signals) -> None:
        def wait() -> None:
            until = time.monotonic() + 200
            while step_of(folder) < step and time.monotonic() < until:
                time.sleep(0.02)
            above = supervisor(folder)
            if above is not None:
                above.send_signal(number)
        threading.Thread(target=wait, daemon=True).start()

    at(100, signal.SIGTERM)
    ended = launch(folder, settings, "--mpirun")
    assert ended.exit_code == 75 and not ended.leftovers, ended.report()
    assert json.loads((folder / "preempted.json").read_text())["step"] >= 100
    assert "the same command goes on" in ended.output.splitlines()[-1]
    at(250, signal.SIGKILL)
    ended = launch(folder, settings, "--mpirun")
    assert ended.exit_code == -9 and not ended.leftovers, ended.report()
    ended = launch(folder, settings, "--mpirun")
    assert finished(ended, folder)["weights_sha256"] == untouched


FAILS = """
import torch
from hvdnoise import register_noise
from hvdnoise.noise.base import MeanNoise

@register_noise("fails")
class Fails(MeanNoise):
    def mean_noise(self, bucket, observation, context):
        if context.step == 7 and context.workers[0] == 1:
            raise RuntimeError("this step cannot be done")
        return torch.zeros(bucket.size)
"""


def test_a_step_that_always_fails_is_given_up(tmp_path: Path, settings: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    text = SETTINGS.replace("noise: {kind: gnc, radius: 0.05, source: own}",
                            f"noise: {{kind: fails}}\nplugins: [{tmp_path}/fails.py]")
    (tmp_path / "settings.yaml").write_text(text.replace("every_steps: 25", "every_steps: 5"))
    ended = launch(tmp_path / "run", tmp_path / "settings.yaml")
    assert ended.exit_code == 1 and not ended.leftovers, ended.report()
    assert re.fullmatch("hvdnoise: error: gave up, the same failure came twice: rank 1: "
                        "RuntimeError: this step cannot be done, at step [78]; newest checkpoint: "
                        "step 5, in "
                        f"{tmp_path}/run", ended.output.splitlines()[-1]), ended.report()
    assert ended.output.count("restart 1 of at most 100") == 1


# ---------------------------------------------------------------------- hosts

LOSE = """
(
    until [[ -s "$1/step" ]] && (($(cat "$1/step") >= 8)); do sleep 0.1; done
    rank=$(grep -oP 'rank 2, process \\K\\d+' "$1/logs/rank-2.log" | tail -n 1)
    kill -KILL $(cat /run/cluster-sim/node3.pid) $rank
) &
"${@:2}"
"""


@pytest.mark.namespaces
def test_a_host_that_is_lost_is_left_out(tmp_path: Path) -> None:
    """Its workers move to the others, W stays; where it never was, nothing is started."""
    if reason := why_not():
        pytest.skip(reason)
    settings, folder = tmp_path / "settings.yaml", tmp_path / "run"
    text = TINY.replace("epochs: 2", "epochs: 60").replace("small-cnn", "mlp")
    settings.write_text(text + "eval_every: 0\n")
    command = [HVDNOISE, "launch", "--hosts", "node1,node2,node3", "--min-np", "2", "--interface",
               "eth0", "--", "train", "--config", str(settings), "--run_dir", str(folder)]
    ended = run_on_hosts(3, ["bash", "-c", LOSE, "bash", str(folder), *command], timeout=400)
    summary = finished(ended, folder)
    assert (summary["ranks"], summary["workers"]) == (2, 6), ended.report()
    assert "node3 cannot be reached and is left out; ranks: 2" in ended.output
    assert "killed by SIGKILL, at step" in ended.output, ended.report()
    ended = run_on_hosts(2, [*command[:-1], str(tmp_path / "other")], timeout=200)
    assert ended.exit_code == 1 and not (tmp_path / "other").exists(), ended.report()
    assert "gave up, nothing was started: node3 " in ended.output.splitlines()[-1]


# ---------------------------------------------------------------------- another number of ranks

def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "weights.pt", weights_only=True)
    return found


def test_the_same_workers_on_other_ranks(tmp_path: Path) -> None:
    """2 ranks, then 1, then 2 again: to rounding the weights of the run on 2 ranks."""
    settings = tmp_path / "settings.yaml"
    text = TINY.replace("small-cnn", "mlp").replace("virtual_workers: 2", "eval_every: 0")
    text = text.replace("source: gathered", "source: own")
    settings.write_text(re.sub(
        "checkpoint: .*", "checkpoint: {every_steps: 5, every_epochs: 0, keep: 9}", text))

    def train(ranks: int, name: str, *flags: str, **options: Any) -> dict[str, Any]:
        ended = hvdnoise(ranks, "train", "--config", str(settings), "--run_dir",
                         str(tmp_path / name), *flags, **options)
        return {**finished(ended, tmp_path / name), "said": ended.output}
    train(2, "whole")
    one = train(1, "one", "--resume", f"{tmp_path}/whole/checkpoints/step-00000005",
                "--resume_resize")
    two = train(2, "two", "--resume", f"{tmp_path}/one/checkpoints/step-00000010",
                "--resume_resize", launcher="mpirun")
    assert (one["ranks"], one["workers"], two["ranks"], two["workers"]) == (1, 2, 2, 2)
    assert "the same workers, data and noise" in one["said"] and \
        "starts anew" not in one["said"] + two["said"]
    assert yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["virtual_workers"] == 2
    assert yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())["virtual_workers"] == 1
    whole = weights(tmp_path / "whole")
    for name in ("one", "two"):
        for key, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, whole[key], rtol=1e-4, atol=1e-6)
