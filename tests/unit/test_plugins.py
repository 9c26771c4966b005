"""Plugins: imported before the settings are read, once, and never by `hvdnoise eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

from hvdnoise import cli
from hvdnoise.planning.config import PlanConfig, read
from hvdnoise.training import config as configs
from hvdnoise.training import records, rerun
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.options import parse
from tests.launcher import ROOT
from tests.noises import forgotten_afterwards

SCALED = "tests/noises/scaled.py"
PLUGIN = """
from pathlib import Path
from hvdnoise import GNC, register_noise
Path({mark!r}).open("a").write("imported ")

@register_noise({kind!r})
class Mine(GNC):
    pass
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    with forgotten_afterwards():
        yield


def plugin(folder: Path, kind: str = "mine") -> Path:
    path = folder / f"{kind}.py"
    path.write_text(PLUGIN.format(kind=kind, mark=str(folder / "mark")))
    return path


def settings(*flags: str) -> TrainConfig:
    return parse(TrainConfig, flags, program="hvdnoise train")


def test_a_file_of_settings_names_its_plugin(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"noise: {{kind: scaled, radius: 0.1, factor: 3}}\nplugins: [{SCALED}]\n")
    config = settings("--config", str(path))
    assert config.plugins == (SCALED,) and config.noise.factor == 3.0
    noise = config.noise.build(seed=1, batch_size=2, total_steps=3)
    assert getattr(noise, "factor") == 3.0
    assert type(noise).__module__ == "hvdnoise_plugin_tests_noises_scaled"
    assert settings("--config", str(path), "--noise.factor", "4").noise.factor == 4.0


@pytest.mark.parametrize("flags", [
    ["--plugins", "{}"], ["--plugins={}"], ["--plugins", "[{}]"], ["--plugins", '["{}"]'],
    ["--plugins", "json,{}"]])
def test_flags_name_plugins(tmp_path: Path, flags: list[str]) -> None:
    path = plugin(tmp_path)
    config = settings(*(flag.format(path) for flag in flags), "--noise.kind", "mine")
    assert config.plugins[-1] == str(path) and config.noise.kind == "mine"
    settings(*(flag.format(path) for flag in flags))
    assert (tmp_path / "mark").read_text() == "imported "  # once


def test_flags_override_the_file_and_modules_go_by_name(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    other = plugin(tmp_path, "other")
    (tmp_path / "run.yaml").write_text(f"plugins: [{other}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugin(tmp_path, "by_name")
    monkeypatch.setitem(sys.modules, "by_name", None)  # gone afterwards
    del sys.modules["by_name"]
    config = settings("--config", str(tmp_path / "run.yaml"), "--plugins", "by_name",
                      "--noise.kind", "by_name")
    assert config.plugins == ("by_name",)
    with pytest.raises(ConfigError, match="noise.kind=other is wrong"):
        settings("--noise.kind", "other")


def test_another_folder_has_another_file_of_that_name(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        plugin(folder)
        monkeypatch.chdir(folder)
        assert settings("--plugins", "mine.py", "--noise.kind", "mine").noise.kind == "mine"
        assert (folder / "mark").read_text() == "imported "


@pytest.mark.parametrize("text, name, says", [
    (None, "gone.py", "plugins: there is no file gone.py in "),
    (None, "gone", "plugins: gone cannot be imported: ModuleNotFoundError: No module named 'gone'; "
                   "a file's name ends with .py"),
    ("\nraise KeyError('a\\nb')", "bad.py", "bad.py cannot be imported: KeyError: "),
    ("1 +", "bad.py", "bad.py cannot be imported: SyntaxError: invalid syntax"),
    ("import sys; sys.exit(3)", "bad.py", "bad.py cannot be imported: SystemExit: 3 (line 1)"),
    ("from hvdnoise import GNC, register_noise\nregister_noise('none', GNC)", "bad.py",
     "bad.py cannot be imported: ValueError: kind='none' means no noise; choose another name "
     "(line 2)"),
])
def test_a_bad_plugin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any,
                                  text: str | None, name: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    for _ in range(2):  # the second time too
        with pytest.raises(ConfigError) as caught:
            settings("--plugins", name)
        assert says in str(caught.value) and "\n" not in str(caught.value)
    assert cli.main(["train", "--plugins", name]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("text, says", [
    ("plugins: mine.py", "plugins=mine.py is wrong: give a list"),
    ("plugins: [1, {a: b}]", "plugins"), ("plugins: 3", "plugins=3 is wrong: give a list"),
    ("plugin: [mine.py]", "unknown setting 'plugin': did you mean plugins")])
def test_a_wrong_list_of_plugins_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings("--config", str(tmp_path / "run.yaml"))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_plan_takes_them_and_hands_them_on() -> None:
    flags = ["--hosts", "2", "--plugins", SCALED, "--noise.kind", "scaled", "--noise.radius", "1"]
    config, kept = read(flags)
    assert isinstance(config, PlanConfig) and config.noise.kind == "scaled"
    assert kept == flags[2:]


def test_plan_says_what_a_plugin_costs(capsys: Any) -> None:
    assert cli.main(["plan", "--hosts", "2", "--plugins", SCALED, "--noise.kind", "scaled",
                     "--noise.radius", "1", "--noise.source", "gathered", "--noise.lag", "0",
                     "--data.dataset", "synthetic", "--model", "small-cnn", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["exchange_needed"] and set(said["plans"][0]["memory"]) == {"0", "1", "2"}


def test_they_belong_to_the_run(tmp_path: Path) -> None:
    path = plugin(tmp_path)
    before, now = configs.flatten(settings()), configs.flatten(settings("--plugins", str(path)))
    assert configs.changes(before, now, resize=False) == ["plugins"]
    assert configs.identity(settings("--plugins", str(path)))["plugins"] == [str(path)]
    del before["plugins"]  # a checkpoint from when there were none
    assert configs.changes(before, configs.flatten(settings()), resize=False) == []
    assert configs.changes(before, now, resize=False) == ["plugins"]


def test_ranks_compare_what_they_imported(tmp_path: Path) -> None:
    assert not any("plugin" in key for key in records.versions())
    path = plugin(tmp_path)
    settings("--plugins", str(path))
    assert len(records.versions()[f"plugin {path}"]) == 16


def test_eval_imports_nothing_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    path = plugin(tmp_path)
    (run / "weights.pt").write_bytes(b"")
    (run / "config.yaml").write_text(
        f"plugins: [{path}, {tmp_path}/gone.py]\nmodel: resnet20\n"
        "noise: {kind: mine, height: 3}\ndata: {dataset: synthetic}\n")
    config, weights = rerun.find(str(run), "final", "/elsewhere")
    assert not (tmp_path / "mark").exists()
    assert (config.model, config.data.dataset, config.data.root) == (
        "resnet20", "synthetic", "/elsewhere")
    assert config.plugins == () and config.noise.kind == "none"
    assert weights == run / "weights.pt"


@pytest.mark.parametrize("text, says", [
    ("modle: resnet20", "unknown setting 'modle': did you mean model"), ("- 1", "no settings"),
    ("epochs: [", "cannot be read")])
def test_eval_refuses_a_damaged_run(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        rerun.find(str(tmp_path), "final", None)
    assert says in str(caught.value) and "\n" not in str(caught.value)
