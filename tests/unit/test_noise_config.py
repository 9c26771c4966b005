"""The settings of the noise: what a registered noise declares is a flag, a key and an attribute."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any, Iterator

import pytest
import torch
import yaml
from torch import Tensor

from hvdnoise import GNC, register_covariance, register_noise
from hvdnoise.noise.base import Schedule, StepContext, WorkerNoise
from hvdnoise.noise.full_workers import FullWorkerCovariance
from hvdnoise.training.config import ConfigError, NoiseConfig, TrainConfig, flatten, nested
from hvdnoise.training.options import parse
from hvdnoise.training.validation import validate
from tests.noises import forgotten_afterwards

OLD_KEYS = {f"noise.{name}" for name in ("kind", "source", "radius", "lr", "relative", "final",
                                         "lag", "structure", "emulated_batch")}


class Made(WorkerNoise):
    """Some noise.

    Args:
        height: how high; 100% is usual.
        source: where it comes from.
        sharp: whether it is.
        parts: some numbers.
    """

    def __init__(self, height: Schedule, source: int = 3, *, sharp: bool = False,
                 parts: list[int] | None = None, seed: int = 0, batch_size: int = 0) -> None:
        super().__init__(seed=seed)
        self.told = {"height": height, "source": source, "sharp": sharp, "parts": parts,
                     "batch_size": batch_size}

    def worker_weights(self, context: StepContext) -> Tensor:
        return torch.ones(context.num_workers, dtype=torch.float64)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with forgotten_afterwards():
        register_noise("made", Made)
        yield


def settings(*flags: str) -> NoiseConfig:
    return parse(TrainConfig, flags, program="hvdnoise train").noise


def told(config: NoiseConfig, **options: Any) -> Any:
    noise = config.build(**{"seed": 5, "batch_size": 4, "total_steps": 10, **options})
    assert isinstance(noise, Made) and noise.seed == 5
    return noise.told


def test_flags_and_files_reach_the_constructor(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("noise: {kind: made, height: 2, source: 7, parts: [1, 2]}\n")
    config = settings("--config", str(path), "--noise.sharp", "--noise.source", "8")
    assert config == NoiseConfig("made", height=2.0, source=8, sharp=True, parts=[1, 2])
    assert told(config) == {"height": 2.0, "source": 8, "sharp": True, "parts": (1, 2),
                            "batch_size": 4}
    assert told(settings("--noise.kind", "made", "--noise.height", "1"))["source"] == 3


def test_a_schedule_reaches_its_final_value() -> None:
    config = settings("--noise.kind", "made", "--noise.height", "1", "--noise.final", "0")
    assert [told(config)["height"](step) for step in (0, 5, 10, 20)] == [1, 0.5, 0, 0]
    assert told(NoiseConfig("made", height=2.0))["height"] == 2.0


@pytest.mark.parametrize("flags, says", [
    ("--noise.kind mad", "noise.kind=mad is wrong: give one of none, gnc, covariance, sam, "),
    ("--noise.hight 1", "unknown --noise.hight 1: did you mean noise.height"),
    ("--noise.height high", "noise.height=high is wrong: give a number or null"),
    ("--noise.source 1.5 --noise.kind made --noise.height 1", "noise.source=1.5 is wrong: give a "
                                                              "whole number"),
    ("--noise.height 1", "noise.height=1.0 does not go with noise.kind=none, which takes no "
                         "options"),
    ("--noise.kind gnc --noise.height 1", "noise.height=1.0 does not go with noise.kind=gnc, which "
                                          "takes radius, lr, relative, share, source, lag, "
                                          "scope, per, echo, final"),
    ("--noise.kind made --noise.radius 1", "noise.radius=1.0 does not go with noise.kind=made, "
                                           "which takes height, source, sharp, parts, final"),
    ("--noise.kind made --noise.height 1 --noise.final -1", "noise.final=-1.0 must be a finite"),
    ("--noise.kind made", "noise.kind=made needs noise.height"),
])
def test_mistakes_are_one_line(flags: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(*flags.split()).build(seed=0, batch_size=1, total_steps=1)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_help_explains_every_option_and_who_takes_it(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        settings("--help")
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    for text in ("gnc: Displace each worker's weights by gradient noise", "made: Some noise.",
                 "--noise.height HEIGHT of made: how high; 100% is usual. (type: float",
                 "of made: where it comes from; default: 3. (type: ",
                 "--noise.final FINAL of gnc: the value of radius/lr/relative/share at the end of "
                 "the run, reached linearly; default: it stays the same; of sam and stale-sam and ",
                 "of made: the value of height",
                 "of covariance: M, the batch whose noise"):
        assert text in said, text


def test_options_are_attributes_and_only_options_are() -> None:
    config = NoiseConfig("made", height=1.0)
    assert config.height == 1.0 and config.sharp is None and config.radius is None
    assert config.final is None and config.emulated_batch is None
    for name in ("hight", "_given", "__len__"):
        with pytest.raises(AttributeError, match=name):
            getattr(config, name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.height = 2.0  # type: ignore[misc]


def test_it_is_a_value() -> None:
    config = NoiseConfig("made", height=1.0, parts=[1, 2])
    assert config == NoiseConfig("made", {"parts": (1, 2)}, height=1.0, sharp=None)
    assert hash(config) == hash(NoiseConfig("made", parts=[1, 2], height=1.0))
    assert config != NoiseConfig("made", height=1.0) and config != NoiseConfig()
    assert eval(repr(config)) == config and repr(NoiseConfig()) == "NoiseConfig(kind='none')"
    for again in (pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config),
                  dataclasses.replace(config)):
        assert again == config and again is not config
    assert dataclasses.replace(config, height=3.0) == NoiseConfig("made", height=3.0, parts=[1, 2])
    assert dataclasses.replace(config, parts=None) == NoiseConfig("made", height=1.0)
    run = dataclasses.replace(TrainConfig(), noise=config)
    assert run.noise is config and pickle.loads(pickle.dumps(run)) == run
    with pytest.raises(ConfigError, match="noise.kind=other is wrong"):
        NoiseConfig("other")


def test_flat_settings_have_the_keys_that_checkpoints_have() -> None:
    def keys(config: NoiseConfig) -> set[str]:
        flat = flatten(dataclasses.replace(TrainConfig(), noise=config))
        return {key for key in flat if key.startswith("noise.")}
    assert keys(NoiseConfig()) == OLD_KEYS
    assert keys(NoiseConfig("gnc", radius=1.0)) - OLD_KEYS == {
        f"noise.{name}" for name in ("share", "scope", "per", "echo")}
    assert keys(NoiseConfig("covariance", emulated_batch=3)) >= OLD_KEYS
    assert keys(NoiseConfig("made", height=1.0)) - OLD_KEYS == {
        "noise.height", "noise.sharp", "noise.parts"}


def test_what_a_run_writes_is_what_it_reads(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for config in (NoiseConfig(), NoiseConfig("made", height=1.0, parts=[1], sharp=True),
                   NoiseConfig("gnc", lr=2.0, lag=2, final=1.0)):
        path.write_text(yaml.safe_dump(nested(dataclasses.replace(TrainConfig(), noise=config))))
        assert settings("--config", str(path)) == config


def test_options_of_a_covariance_are_flags() -> None:
    @register_covariance("low-rank", "workers")
    class LowRank(FullWorkerCovariance):
        """Args of its own.

        Args:
            rank: how many directions.
        """

        def __init__(self, emulated_batch: int, *, rank: int = 3, **options: Any) -> None:
            super().__init__(emulated_batch, **options)
            self.rank = rank
    flags = ["--noise.kind", "covariance", "--noise.emulated_batch", "2", "--noise.rank", "5"]
    noise = settings(*flags, "--noise.structure", "low-rank").build(seed=1, batch_size=4,
                                                                    total_steps=1)
    assert isinstance(noise, LowRank) and (noise.rank, noise.batch_size) == (5, 4)
    with pytest.raises(ValueError, match="rank=5 does not go with structure='full'"):
        settings(*flags).build(seed=1, batch_size=4, total_steps=1)


def test_gnc_as_ever() -> None:
    noise = settings("--noise.kind", "gnc", "--noise.lr", "2", "--noise.source", "gathered",
                     "--noise.lag", "2").build(seed=9, batch_size=4, total_steps=1)
    assert isinstance(noise, GNC)
    assert (noise.scale, noise.size, noise.source, noise.lag, noise.seed) == (
        "lr", 2.0, "gathered", 2, 9)


@pytest.mark.parametrize("flags, scale, size", [
    ("--noise.kind gnc", "share", 0.02), ("--noise.kind gnc --noise.share 0.01", "share", 0.01),
    ("--noise.kind sam --noise.share 0.03", "share", 0.03)])
def test_a_share_is_a_setting(flags: str, scale: str, size: float) -> None:
    noise: Any = settings(*flags.split()).build(seed=0, batch_size=4, total_steps=1)
    assert (noise.scale, noise.size) == (scale, size)


@pytest.mark.parametrize("flags, says", [
    ("gnc --noise.echo", "noise.echo=True is wrong: it acts in the second pass over a batch"),
    ("sam --noise.share 0.01 --noise.echo", "set data.repeat=2"),
    ("gnc --noise.final 0.03", "noise.final=0.03 is the end of what is not given"),
    ("sam", "SAM got no scale: give exactly one of radius= and share="),
    ("gnc --noise.echo --noise.lag 2", "lag=2: it takes own deviations")])
def test_scales_and_echo_that_are_wrong(flags: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        validate(parse(TrainConfig, ["--virtual_workers", "2", "--noise.kind", *flags.split()],
                       program="hvdnoise train"), 1)
    assert "\n" not in str(caught.value)


TWO = """
noise:
- {kind: gnc, radius: 0.1}
- {kind: covariance, structure: diagonal, emulated_batch: 8, every: 3}
virtual_workers: 2
"""


def test_a_list_is_several_noises(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(TWO)
    for config in (settings("--config", str(path)), settings(f"--config={path}")):
        assert config == NoiseConfig("gnc", radius=0.1, also=[
            {"kind": "covariance", "structure": "diagonal", "emulated_batch": 8, "every": 3}])
    noise: Any = config.build(seed=4, batch_size=8, total_steps=1)
    assert [type(each).__name__ for each in noise.parts] == ["GNC", "DiagonalCovariance"]
    assert [each.seed for each in noise.parts] == [4, 4] and noise.parts[1].batch_size == 8
    path.write_text(yaml.safe_dump(nested(dataclasses.replace(TrainConfig(), noise=config))))
    assert settings("--config", str(path)) == config  # what a run writes
    path.write_text("noise: [{kind: gnc, radius: 0.1}]")
    assert settings("--config", str(path)) == NoiseConfig("gnc", radius=0.1)
    assert settings("--config", str(path), "--noise.radius", "0.3") == NoiseConfig(
        "gnc", radius=0.3)


@pytest.mark.parametrize("text, says", [
    ("[{kind: gnc, radius: 0.1}, 3]", "give a list of groups"),
    ("[{kind: gnc, radius: 0.1}, {kind: gcn}]", "noise.kind=gcn is wrong"),
    ("[{kind: gnc, radius: 0.1}, {kind: none}]", "one of several noises is none"),
    ("[{kind: gnc, radius: 0.1}, {kind: covariance, radius: 2}]", "noise.radius=2 does not go"),
    ("[{kind: gnc, radius: 0.1}, {kind: sam, radius: 2}]", "both act on the weights"),
    ("[{kind: gnc, radius: 0.1}, {kind: covariance, emulated_batch: 999999}]",
     "changes the mean that the second takes"),
    ("[{kind: gnc, radius: 0.1}, {kind: covariance, structure: layerwise, emulated_batch: 9999}]",
     "noise.emulated_batch=9999")])
def test_noises_that_are_wrong_together(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(f"noise: {text}\nvirtual_workers: 2\n")
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        validate(parse(TrainConfig, ["--config", str(path)], program="hvdnoise train"), 1)
    assert "\n" not in str(caught.value)
