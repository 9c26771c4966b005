"""Bad input: one line, exit code 2, nothing created, no rank left behind, in little time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.running import HVDNOISE, error_lines, hvdnoise
from tests.launcher import ROOT, Ended, run_command

SECONDS = 60.0  # a refusal that waits for nobody; a busy machine needs 20 for two ranks
SYNTHETIC = ["--data.dataset", "synthetic", "--data.num_examples", "64", "--data.image_size", "8",
             "--data.batch_size", "8"]
GNC = ["--noise.kind", "gnc", "--noise.radius", "0.1"]
ALONE = {  # what is wrong with it -> (flags, what the line says)
    "flag": (["--optim.learning_rate", "1"], "unknown --optim.learning_rate"),
    "type": (["--epochs", "many"], "epochs=many is wrong: give a number"),
    "range": (["--optim.lr", "-1"], "optim.lr=-1.0 is wrong"),
    "key": (["--config", "{folder}/bad.yaml"], "unknown setting 'optim.larning_rate'"),
    "path": (["--config", "{folder}/nowhere.yaml"], "nowhere.yaml"),
    "W = 1 with GNC": (GNC, "virtual_workers=2 or more"),
    "contradiction": (["--resume", "auto", "--overwrite", "--run_dir", "x"], "contradicts"),
    "batch not divisible": (["--global_batch", "65", "--virtual_workers", "2"], "not divisible"),
    "too few examples": ([*SYNTHETIC, "--data.batch_size", "100"], "do not fill one step"),
    "run folder in use": (["--run_dir", "{folder}/used"], "holds a run already"),
    "no data set": (["--data.dataset", "imagefolder", "--data.root", "{folder}/none"],
                    "is not a folder"),
    "damaged data set": (["--data.dataset", "cifar10", "--data.root", "{folder}/damaged",
                          "--data.download", "false"], "wrong SHA-256"),
    "run folder in a file": ([*SYNTHETIC, "--run_dir", "{folder}/bad.yaml/run"], "bad.yaml"),
    "no checkpoint there": ([*SYNTHETIC, "--run_dir", "x", "--resume", "{folder}/used"],
                            "none of the 1 checkpoints"),
}
TOGETHER = {name: ALONE[name] for name in ("flag", "key", "no data set", "damaged data set",
                                           "run folder in a file")}
TOGETHER["batch not divisible"] = (["--global_batch", "65"], "not divisible by the 2 workers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bad.yaml").write_text("optim: {larning_rate: 1}\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.yaml").write_text("epochs: 1\n")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    (tmp_path / "cwd").mkdir()
    return tmp_path


def refused(ended: Ended, expected: str, folder: Path, before: list[str], *, code: int) -> None:
    assert ended.exit_code == code and not ended.leftovers, ended.report()
    (line,) = error_lines(ended.output)
    assert expected in line, line
    assert f"{ROOT}/hvdnoise/" not in ended.output, ended.output  # no traceback but horovodrun's
    assert contents(folder) == before
    assert ended.seconds < SECONDS, ended.seconds


def contents(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def fill(flags: list[str], folder: Path) -> list[str]:
    return [flag.replace("{folder}", str(folder)) for flag in flags]


@pytest.mark.parametrize("name", ALONE)
def test_one_rank(folder: Path, name: str) -> None:
    flags, expected = ALONE[name]
    before = contents(folder)
    ended = hvdnoise(1, "train", *fill(flags, folder), cwd=folder / "cwd")
    code = 1 if name == "no checkpoint there" else 2
    refused(ended, expected, folder, before, code=code)
    assert len(ended.output.splitlines()) == 1 or "warning" in ended.output, ended.output


@pytest.mark.parametrize("name, launcher", [  # found before Horovod starts, and after
    *((name, "gloo") for name in TOGETHER), ("flag", "mpirun"), ("no data set", "mpirun")])
def test_two_ranks(folder: Path, name: str, launcher: str) -> None:
    flags, expected = TOGETHER[name]
    before = contents(folder)
    ended = hvdnoise(2, "train", *fill(flags, folder), cwd=folder / "cwd", launcher=launcher)
    # horovodrun turns every code into 1, and says which one it was
    refused(ended, expected, folder, before, code=1 if launcher == "gloo" else 2)
    assert re.search(r"[Ee]xit (code|with status code):?\s+2\b", ended.output), ended.output


def test_ranks_with_other_settings_are_named(folder: Path) -> None:
    script = folder / "differ.sh"
    script.write_text("#!/bin/sh\nexec hvdnoise train " + " ".join(SYNTHETIC) +
                      " --data.batch_size 4 --seed ${HOROVOD_RANK:-$OMPI_COMM_WORLD_RANK}\n")
    script.chmod(0o755)
    before = contents(folder)
    ended = run_command(2, [str(script)], launcher="mpirun", cwd=folder / "cwd")
    refused(ended, "seed on rank 1", folder, before, code=2)


def test_a_rank_that_the_mpirun_of_another_mpi_started(folder: Path) -> None:
    """Horovod sees no launcher there: it would train as the only rank, and so would the others."""
    before = contents(folder)
    ended = run_command(1, ["env", "PMI_RANK=0", "PMI_SIZE=2", HVDNOISE, "train", *SYNTHETIC, *GNC,
                            "--model", "mlp", "--run_dir", "run"], launcher="none",
                        cwd=folder / "cwd")
    refused(ended, "started 2 ranks, and Horovod knows 1", folder, before, code=2)


@pytest.mark.parametrize("arguments, expected", [
    (["trian"], "unknown command 'trian'"),
    ([], "give train, launch, eval, measure, export, reproduce, study, report, plan, bench, "
         "quadratic or doctor"),
    (["measure"], "run"), (["measure", "nowhere"], "run=nowhere holds no config.yaml"),
    (["measure", "{folder}/used"], "there is no"),
    (["report"], "folders"), (["report", "nowhere"], "folders=nowhere is wrong: there is no"),
    (["report", "{folder}"], "neither a study"),
    (["eval", "nowhere"], "run=nowhere holds no config.yaml"),
    (["eval"], "run"), (["doctor", "--nonsense"], "unknown --nonsense"),
    (["eval", "{folder}/used"], "there is no"),
])
def test_other_commands(folder: Path, arguments: list[str], expected: str) -> None:
    before = contents(folder)
    ended = hvdnoise(1, *fill(arguments, folder), cwd=folder / "cwd")
    refused(ended, expected, folder, before, code=2)
