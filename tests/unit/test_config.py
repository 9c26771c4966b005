"""Settings: from flags and files to dataclasses, what is refused, and how it is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from hvdnoise.training import config as configs
from hvdnoise.training.config import ConfigError, NoiseConfig, TrainConfig
from hvdnoise.training.options import parse
from hvdnoise.training.validation import validate


def settings(*flags: str, size: int = 1) -> TrainConfig:
    found = parse(TrainConfig, flags, program="hvdnoise train")
    validate(found, size)
    return found


def test_flags_override_the_file_and_reach_the_groups(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {dataset: cifar10, batch_size: 32}\noptim: {lr: 0.3}\nepochs: 4\n"
                    "noise: {kind: gnc, radius: 0.1}\n")
    found = settings("--config", str(path), "--optim.lr", "0.2", "--noise.radius", "5e-2",
                     "--noise.source", "gathered", "--virtual_workers", "4")
    assert found.data.dataset == "cifar10" and found.data.batch_size == 32
    assert found.optim.lr == 0.2 and found.epochs == 4.0
    assert found.noise == NoiseConfig(kind="gnc", radius=0.05, source="gathered")
    assert found.workers(2) == 8


def test_a_bool_flag_needs_no_value() -> None:
    assert settings("--overwrite", "--epochs", "1").overwrite is True
    assert settings("--overwrite", "false").overwrite is False
    assert settings("--optim.nesterov").optim.nesterov is True


@pytest.mark.parametrize("flags, expected", [
    (["--optim.lr", "x"], "optim.lr=x is wrong: give a number"),
    (["--virtual_workers", "2.5"], "virtual_workers=2.5 is wrong: give a whole number"),
    (["--data.dataset", "mnist"], "data.dataset=mnist is wrong: give one of fashion-mnist, "),
    (["--noise.radius", "big"], "noise.radius=big is wrong: give a number or null"),
    (["--noise.radus", "1"], "unknown --noise.radus 1: did you mean noise.radius"),
    (["stray"], "unknown stray"),
    (["--epochs"], "--epochs: expected one argument"),
    (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
    (["--data.batch_size", "0"], "data.batch_size=0 is too small: give 1 or more"),
    (["--epochs", "0"], "epochs=0.0 is wrong: give a number above 0"),
    (["--epochs", ".inf"], "epochs=inf is wrong"),
    (["--global_batch", "33", "--virtual_workers", "2"], "give 32 or 34"),
    (["--accumulate", "3"], "does not divide a worker's batch of 64"),
    (["--ema", "1"], "ema=1.0 is wrong"),
    (["--model", "resnet21"], "did you mean resnet"),
    (["--device", "cuda"], "device=cuda is wrong"),
    (["--lr.warmup_epochs", "20"], "lr.warmup_epochs=20.0"),
    (["--data.dataset", "synthetic", "--data.num_examples", "63"], "63 training examples"),
    (["--data.limit", "10"], "10 training examples"),
    (["--name", "a/b"], "name='a/b'"),
    (["--resume", "auto"], "add --run_dir"),
    (["--resume", "/nowhere"], "resume=/nowhere"),
    (["--resume_resize"], "add --resume auto"),
    (["--checkpoint.keep", "0"], "checkpoint.keep=0"),
    (["--noise.radius", "0.1"], "does not go with noise.kind=none, which takes no options"),
    (["--noise.kind", "gnc", "--noise.radius", "0.1"], "virtual_workers=2 or more"),
    (["--noise.kind", "gnc", "--noise.radius", "1", "--noise.share", "0.1",
      "--virtual_workers", "2"], "exactly one of"),
    (["--noise.kind", "gnc", "--noise.radius", "-1", "--virtual_workers", "2"], "radius=-1"),
    (["--noise.kind", "gnc", "--noise.emulated_batch", "8"],
     "noise.emulated_batch=8 does not go with noise.kind=gnc"),
    (["--noise.kind", "covariance", "--noise.emulated_batch", "512", "--virtual_workers", "4"],
     "the batch of all workers is 256"),
    (["--noise.kind", "gnc", "--noise.radius", "1", "--noise.lag", "0", "--precision", "fp16",
      "--virtual_workers", "2"], "noise.lag=0"),
    (["--noise.kind", "covariance", "--noise.emulated_batch", "8", "--noise.structure", "diagonal",
      "--noise.source", "examples", "--model", "resnet20"], "statistics over the batch"),
    (["--noise.kind", "covariance", "--noise.emulated_batch", "8", "--noise.structure", "layerwise",
      "--virtual_workers", "2", "--noise.trace", "matched:diagonal"], "trace='matched:diagonal'"),
    (["--noise.kind", "covariance", "--noise.emulated_batch", "8", "--noise.trace", "own"],
     "trace='own' does not go with structure='full'"),
])
def test_a_mistake_is_one_line_with_value_and_remedy(flags: list[str], expected: str) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError) as caught:
        settings(*flags)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text, expected", [
    ("optim: {larning_rate: 1}", "unknown setting 'optim.larning_rate'"),
    ("epoch: 3", "unknown setting 'epoch': did you mean epochs"),
    ("optim: {lr: fast}", "optim.lr"),
    ("- 1", "holds no settings"),
    ("epochs: [", "is no YAML"),
])
def test_a_mistake_in_the_file(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings("--config", str(path))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_what_depends_on_the_number_of_ranks() -> None:
    flags = ["--noise.kind", "gnc", "--noise.radius", "0.1"]
    assert settings(*flags, size=2).workers(2) == 2
    assert settings("--global_batch", "96", "--virtual_workers", "3", size=2).worker_batch(2) == 16
    with pytest.raises(ConfigError, match="not divisible by the 4 workers"):
        settings("--global_batch", "66", size=4)


def test_a_run_folder_is_protected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no run"):
        settings("--run_dir", str(tmp_path), "--overwrite")
    (tmp_path / "config.yaml").write_text("epochs: 1\n")
    with pytest.raises(ConfigError, match="--overwrite"):
        settings("--run_dir", str(tmp_path))
    settings("--run_dir", str(tmp_path), "--overwrite")
    settings("--run_dir", str(tmp_path), "--resume", "auto")
    with pytest.raises(ConfigError, match="contradicts"):
        settings("--run_dir", str(tmp_path), "--resume", "auto", "--overwrite")


def test_print_config_comes_back_as_the_same_settings(tmp_path: Path, capsys: Any) -> None:
    flags = ["--optim.betas", "[0.8, 0.9]", "--noise.kind", "gnc", "--noise.lr", "2", "--ema",
             "0.99", "--lr.milestones", "[2, 3]"]
    with pytest.raises(SystemExit) as done:
        settings(*flags, "--print_config")
    assert not done.value.code
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert settings("--config", str(path), size=2) == settings(*flags, size=2)


def test_changes_that_a_resumed_run_may_make() -> None:
    before = configs.flatten(settings())
    free = configs.flatten(settings("--epochs", "20", "--log_every", "1", "--data.root", "/x",
                                    "--checkpoint.keep", "5"))
    assert configs.changes(before, free, resize=False) == []
    other = configs.flatten(settings("--optim.lr", "0.3", "--global_batch", "128", "--seed", "1"))
    assert configs.changes(before, other, resize=False) == ["global_batch", "optim.lr", "seed"]
    assert configs.changes(before, other, resize=True) == ["optim.lr", "seed"]


def test_flat_settings_of_a_file_are_those_of_the_config() -> None:
    found = settings("--optim.lr", "0.3")
    assert configs.flat(yaml.safe_load(yaml.safe_dump(configs.nested(found)))) \
        == configs.flatten(found)


def test_every_setting_is_explained_in_the_help(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        settings("--help")
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    options = said[said.index("options:"):]
    for key in configs.flatten(TrainConfig()):
        explained = re.search(rf"--{re.escape(key)} \S+ ((?!--).)*\((type|default)", options)
        assert explained and len(explained[0]) > len(key) + 30, key


def test_the_scale_of_noise_reaches_its_final_value() -> None:
    noise = NoiseConfig(kind="gnc", radius=0.2, final=0.1).build(seed=0, batch_size=8,
                                                                 total_steps=10)
    scale = noise.size  # type: ignore[union-attr]
    assert [round(scale(step), 6) for step in (0, 5, 10, 11)] == [0.2, 0.15, 0.1, 0.1]
