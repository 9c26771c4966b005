"""One trial: a run with a fault, what must be seen of it, and the run that goes on after it."""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.faults import damage
from tests.integration.running import HVDNOISE, at_step
from tests.launcher import ROOT, Ended, run_command

PLUGIN = str(Path(__file__).with_name("plugin.py"))
STEPS = {2: 24, 3: 16}  # of a run, by its ranks
EVERY = 5  # steps between two checkpoints
# Seconds of the watchdog.
LIMITS = {"": 15, "_START": 60, "_EVALUATION": 20, "_CHECKPOINT": 20}
GONE_WITHIN = 30.0  # seconds, after the launcher has ended
TRIAL_LIMIT = 240.0
LAST_LINES = 40  # horovodrun ends with a traceback of its own
LAUNCHERS = ("gloo", "mpirun", "horovodrun.sh", "mpirun.sh")
NOISES = {
    "none": "{kind: none}", "own": "{kind: gnc, radius: 0.05}",
    "gathered": "{kind: gnc, radius: 0.05, source: gathered, lag: 2}",
    "covariance": "{kind: covariance, emulated_batch: 8}", "sam": "{kind: sam, radius: 0.05}",
    "white": "{kind: gnc, radius: 0.05, source: isotropic}"}

# What must be seen of a fault.
FAILS, SAVES, SURVIVES, SKIPS, REFUSED = "fails", "saves", "survives", "skips", "refused"


@dataclass(frozen=True)
class Kind:
    """A kind of fault: the moments it may happen at, what must be seen, and words of its cause."""

    moments: tuple[str, ...]
    expect: str
    cause: str = ""  # a regular expression
    launchers: tuple[str, ...] = LAUNCHERS


_ANY = ("start", "step", "backward", "checkpoint", "evaluation", "finish")
_RUNNING = _ANY[1:]
KINDS: dict[str, Kind] = {
    "sigkill": Kind(_ANY, FAILS, r"signal|137|-9|Killed|gone"),
    "segfault": Kind(_ANY, FAILS, r"signal|139|-11|[Ss]egmentation|gone"),
    "abort": Kind(_ANY, FAILS, r"signal|134|-6|[Aa]bort|gone"),
    "sigstop": Kind(_ANY, FAILS, r"waited|limit|stopped|missing|progress"),
    "exception": Kind(_RUNNING, FAILS, "injected fault"),
    "memory": Kind(_RUNNING, FAILS, "MemoryError"),
    "exit-0": Kind(_RUNNING, FAILS, "SystemExit|exit"),
    "exit-7": Kind(_RUNNING, FAILS, "SystemExit|exit"),
    "os-exit-0": Kind(_RUNNING, FAILS, "gone|exit"),
    "os-exit-3": Kind(_ANY, FAILS, "gone|exit|3"),
    "interrupt": Kind(_RUNNING, FAILS, "interrupt|KeyboardInterrupt"),
    "sigterm": Kind(_RUNNING, SAVES),
    "launcher": Kind(_RUNNING, FAILS),
    "pause": Kind(_ANY, SURVIVES),
    "nan": Kind(("backward",), SKIPS),
    "full-disk": Kind(("step", "checkpoint"), FAILS, "File too large|could not write"),
    "vanish": Kind(("step", "evaluation"), FAILS, "folder|No such file|could not write|gone"),
    "damage": Kind(("step", "checkpoint"), FAILS, r"signal|137|-9|Killed|gone"),
    "second-job": Kind(("step",), REFUSED),
    "other-setting": Kind(("start",), REFUSED, "differ", ("gloo", "mpirun")),
}


@dataclass(frozen=True)
class Trial:
    """What is done in a trial; drawn by `draw`."""

    number: int
    launcher: str
    ranks: int
    noise: str
    kind: str
    moment: str
    rank: int
    step: int
    part: int
    damage: str = ""
    setting: str = ""

    def __str__(self) -> str:
        how = f" {self.damage or self.setting}" if self.damage or self.setting else ""
        return (f"{self.number:3d}  {self.launcher:13s} {self.ranks} ranks  {self.noise:10s} "
                f"{self.kind}{how} on rank {self.rank}, {self.moment} {self.step}")


@dataclass
class Outcome:
    """How a trial ended: ``faults`` is what was wrong, empty when nothing was."""

    trial: Trial
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    output: str = ""


_SETTINGS = ("--epochs 3", "--eval_every 2", "--log_every 5", "--checkpoint.every_steps 4",
             "--checkpoint.keep 3", "--max_bad_steps 7", "--optim.lr 0.06", "--seed 5",
             "--tensorboard true", "--score_train true", "--run_dir {folder}-other")


def draw(seed: int, number: int) -> Trial:
    """The trial of that number in the campaign of that seed."""
    dice = random.Random(f"{seed}/{number}")
    kind = list(KINDS)[number % len(KINDS)] if number < len(KINDS) else dice.choice(list(KINDS))
    spec = KINDS[kind]
    launcher = dice.choice(spec.launchers)
    ranks = dice.choice((2, 2, 3))
    rank = dice.randrange(ranks)
    return Trial(number, launcher, ranks, dice.choice(list(NOISES)), kind,
                 dice.choice(spec.moments), rank, dice.randrange(1, STEPS[ranks] - 1),
                 0 if rank else dice.randrange(4),
                 dice.choice(list(damage.WAYS)) if kind == "damage" else "",
                 dice.choice(_SETTINGS) if kind == "other-setting" else "")


class Campaign:
    """Runs trials; keeps the results of undisturbed runs, which many trials need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: dict[Any, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def run(self, trial: Trial) -> Outcome:
        """Do a trial from its beginning to its end."""
        started, outcome = time.monotonic(), Outcome(trial)
        folder = self.folder / f"trial-{trial.number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            self._run(trial, folder, outcome)
        except Exception as error:  # the trial itself could not be done
            outcome.faults.append(f"{type(error).__name__}: {error}")
        outcome.seconds = time.monotonic() - started
        if not outcome.faults:
            shutil.rmtree(folder)
        return outcome

    def _run(self, trial: Trial, folder: Path, outcome: Outcome) -> None:
        run = folder / "run"
        fault = {"rank": trial.rank, "moment": trial.moment, "step": trial.step,
                 "part": trial.part, "action": "sigkill" if trial.kind == "damage" else trial.kind,
                 "once": str(folder / "done"), "folder": str(run)}
        env = {} if trial.kind in ("second-job", "other-setting") else \
            {"HVDNOISE_FAULT": json.dumps(fault)}
        second: list[Ended] = []
        if trial.kind == "second-job":
            other = at_step(run, trial.step, lambda: second.append(self._start(trial, run)),
                            limit=TRIAL_LIMIT)
        ended = self._start(trial, run, env=env, wrong=trial.setting)
        if trial.kind == "second-job":
            other.join()
            if not second:
                outcome.faults.append("there was no second job")
        outcome.output = ended.output
        if env and not (folder / "done").exists():
            outcome.faults.append("the fault did not happen")
        check = {FAILS: _fails, SAVES: _saves, SURVIVES: _survives, SKIPS: _skips,
                 REFUSED: _refused}[KINDS[trial.kind].expect]
        outcome.faults += check(trial, ended, run)
        if ended.leftovers:
            outcome.faults.append(f"processes left: {ended.leftovers}")
        outcome.faults += [f"the second job: {text}" for each in second
                           for text in _refused(trial, each, run)]
        if not outcome.faults:
            self._goes_on(trial, run, outcome)

    def _goes_on(self, trial: Trial, run: Path, outcome: Outcome) -> None:
        """The newest checkpoint is whole, and a restart ends in the bits of the whole run."""
        if trial.kind == "damage":
            damage.do(trial.damage, run / "checkpoints")
        elif trial.kind != "vanish":
            outcome.faults += _not_finite(run / "checkpoints")
        expected = self.whole(trial)["weights_sha256"]
        if trial.kind == "other-setting" or (trial.kind == "second-job" and
                                             (run / "summary.json").exists()):
            found = run if trial.kind == "second-job" else None
        else:
            again = self._start(trial, run, env={})
            outcome.output += "\n----- again\n" + again.output
            if again.exit_code != 0:
                outcome.faults.append(f"the restart ended with {again.exit_code}")
                return
            found = run
        if found is not None and trial.kind != "nan":
            summary = json.loads((found / "summary.json").read_text())
            if summary["weights_sha256"] != expected:
                outcome.faults.append("the restart ended in other weights")

    def whole(self, trial: Trial) -> dict[str, Any]:
        """The summary of the run that nothing happens to."""
        transport = "mpi" if "mpi" in trial.launcher else "gloo"
        key = transport, trial.ranks, trial.noise
        with self._lock:
            if key not in self._whole:
                run = self.folder / f"whole-{transport}-{trial.ranks}-{trial.noise}"
                if not (run / "summary.json").exists():
                    ended = self._start(trial, run)
                    assert ended.exit_code == 0, ended.output
                self._whole[key] = json.loads((run / "summary.json").read_text())
        return self._whole[key]

    def _start(self, trial: Trial, run: Path, *, env: dict[str, str] | None = None,
               wrong: str = "") -> Ended:
        config = self.folder / f"{trial.noise}.yaml"
        if not config.exists():
            config.write_text(settings(trial.noise))
        arguments = ["--config", str(config), "--run_dir", str(run), "--resume", "auto"]
        limits = {f"HVDNOISE_TIMEOUT{phase}": str(limit) for phase, limit in LIMITS.items()}
        command, launcher = [HVDNOISE, "train", *arguments], trial.launcher
        if wrong:
            rank = "${HOROVOD_RANK:-$OMPI_COMM_WORLD_RANK}"
            command = ["sh", "-c", f'if [ "{rank}" = {trial.rank} ]; then set -- "$@" '
                       f'{wrong.format(folder=run)}; fi; exec "$@"', "sh", *command]
        if launcher.endswith(".sh"):
            command = [str(ROOT / "launch" / launcher), "-np", str(trial.ranks), "--interface",
                       "lo", "--", *arguments]
        np, launcher = (1, "none") if launcher.endswith(".sh") else (trial.ranks, launcher)
        env = {**limits, "PYTHONPATH": str(ROOT), **(env or {})}
        return run_command(np, command, launcher=launcher, timeout=TRIAL_LIMIT, env=env,
                           grace=GONE_WITHIN)


def settings(noise: str) -> str:
    """The file of settings of the runs of a campaign: 4 epochs, 24 steps on 2 ranks and 16 on 3."""
    return f"""
data: {{dataset: synthetic, num_examples: 128, image_size: 8, batch_size: 4, validation: 32}}
model: small-cnn
norm: batch
epochs: 4
virtual_workers: 2
noise: {NOISES[noise]}
plugins: [{PLUGIN}]
optim: {{lr: 0.05}}
ema: 0.9
log_every: 1
checkpoint: {{every_steps: {EVERY}, every_epochs: 1}}
tensorboard: false
progress: none
"""


# ---------------------------------------------------------------------- what must be seen

def _fails(trial: Trial, ended: Ended, run: Path) -> list[str]:
    wrong = []
    if ended.exit_code is None:
        return [f"it hung: killed after {ended.seconds:.0f} s"]
    if ended.exit_code == 0:
        wrong.append("it ended with status 0")
    if trial.kind == "launcher":  # nobody is left to say it
        return wrong
    last = ended.output.strip().splitlines()[-LAST_LINES:]
    if trial.launcher.endswith(".sh"):
        last = [line for line in last if line.startswith(("hvdnoise", trial.launcher))][-2:]
    text = "\n".join(last)
    everyone = trial.kind in ("full-disk", "vanish")  # any rank may be the first to see it
    if not re.search(rf"rank {'[0-9]' if everyone else trial.rank}\b|"
                     rf"Process name: {trial.rank}$", text, re.MULTILINE):
        wrong.append(f"the last lines do not name rank {trial.rank}")
    if not re.search(KINDS[trial.kind].cause, text):
        wrong.append(f"the last lines do not name the cause ({KINDS[trial.kind].cause})")
    return wrong + _tracebacks(trial, ended)


def _tracebacks(trial: Trial, ended: Ended) -> list[str]:
    ours = [each for each in re.findall(r"Traceback(?:.*\n)+?.*\w+(?:Error|Exit|Interrupt)\b.*",
                                        ended.output) if "horovod/runner" not in each]
    limit = 1 if trial.kind in ("exception", "memory", "exit-0", "exit-7", "interrupt") else 0
    return [f"{len(ours)} tracebacks"] if len(ours) > limit else []


def _saves(trial: Trial, ended: Ended, run: Path) -> list[str]:
    if ended.exit_code == 0 and (run / "summary.json").exists():
        return []  # it was as good as done
    codes = (75,) if trial.launcher != "gloo" else (1, 75)
    wrong = [] if ended.exit_code in codes else [f"exit code {ended.exit_code}"]
    return wrong if (run / "preempted.json").exists() else [*wrong, "no preempted.json"]


def _survives(trial: Trial, ended: Ended, run: Path) -> list[str]:
    return [] if ended.exit_code == 0 else [f"exit code {ended.exit_code}"]


def _skips(trial: Trial, ended: Ended, run: Path) -> list[str]:
    if ended.exit_code != 0:
        return [f"exit code {ended.exit_code}"]
    summary = json.loads((run / "summary.json").read_text())
    wrong = [] if summary["bad_steps"] == 1 else [f"{summary['bad_steps']} bad steps"]
    if not re.search(rf"rank {trial.rank}\b", ended.output):
        wrong.append(f"rank {trial.rank} is not named")
    for file in run.glob("weights*.pt"):
        wrong += [f"{file.name}: {name} is not finite" for name, value
                  in torch.load(file, weights_only=True).items() if not _finite(value)]
    return wrong


def _refused(trial: Trial, ended: Ended, run: Path) -> list[str]:
    if trial.kind == "second-job" and ended.exit_code == 0:
        return []  # the first job, or a second one that came after its end
    wrong = [] if ended.exit_code in (1, 2) else [f"exit code {ended.exit_code}"]
    if trial.kind == "other-setting":
        key = trial.setting.split()[0].removeprefix("--")
        if not re.search(rf"error: .*differ.*{re.escape(key)} on .*rank {trial.rank}|"
                         rf"error: .*differ.*{re.escape(key)} on", ended.output):
            wrong.append(f"{key} is not named")
        if ended.seconds > 60:
            wrong.append(f"it took {ended.seconds:.0f} s")
        if run.exists():
            wrong.append("the run folder was made")
    elif "error: " not in ended.output:
        wrong.append("it does not say why")
    return wrong + _tracebacks(trial, ended)


def _not_finite(checkpoints: Path) -> list[str]:
    from hvdnoise.training import checkpoint
    for path in checkpoint.found(checkpoints)[:1]:
        try:
            checkpoint.check(path)
            for file in path.glob("*.pt"):
                if not _finite(checkpoint.read(file)):
                    return [f"{file} is not finite"]
        except ValueError as error:
            return [f"the newest checkpoint: {error}"]
    return []


def _finite(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    return True
