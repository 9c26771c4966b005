"""Files and flags that are wrong in every way: one line and exit code 2, or a right configuration.

`python -m tests.fuzz` draws more of them.
"""

from __future__ import annotations

import itertools
import resource
from pathlib import Path
from typing import Any

import pytest

from hvdnoise.training import yamlfile
from hvdnoise.training.config import ConfigError, NoiseConfig
from hvdnoise.training.values import check_value
from tests import fuzz
from tests.fuzz import BOMB, DOCUMENTS, FILE, MERGES, TOKENS, Case

COUNT = 120
MOST_GROWTH = 600 << 10  # KiB of this process's largest size


@pytest.fixture
def place(tmp_path: Path) -> Path:
    fuzz.make_place(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_drawn_cases() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codes, faults = fuzz.campaign(7, COUNT)
    assert not faults, "\n".join(f"{case.arguments} {case.file[:200]!r}: {fault}"
                                 for fault, case in faults.items())
    assert codes[2] > COUNT // 2 and codes[0] > COUNT // 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH


@pytest.mark.parametrize("text, expected", [
    ("", "holds no settings"), ("- 1", "holds no settings"), ("text", "holds no settings"),
    ("epochs: 1\nepochs: 2", "epochs is there twice"),
    ("optim: {lr: 1, 'lr': 2}", "lr is there twice"), ("1: 2", "the key 1 is no text"),
    ("null: 2", "the key None is no text"), ("? [a]\n: 2", "cannot be read"),
    ("a: &a {b: *a}", "*a stands inside of itself"), (BOMB, "more than 10000 values"),
    (MERGES, "more than 10000 values"), ("[" * 50, "nested more than 40 deep"),
    ("a: " + "[" * 5000 + "]" * 5000, "nested more than 40 deep"),
    ("a: !!python/object/apply:os.system [ls]", "python/object"), ("a: !!bool 7", "a value cannot"),
    ("a: !!timestamp x", "cannot be read"), ("a: !!timestamp 2026-01-02", "is no setting"),
    ("a: !!binary aGVsbG8=", "is no setting"), ("a: !!set {b}", "is no setting"),
    ("a: " + "9" * 5000, "cannot be read"), ("a: 1\n---\nb: 2", "no YAML"),
    ("a: \0", "no YAML"), ("a: [", "no YAML"), ("#" * (1 << 20) + "#", "1048577 bytes")])
def test_a_file_that_is_no_settings(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        yamlfile.read(path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("name, expected", [
    ("a-folder", "is no file"), ("pipe", "is no file"), ("/dev/zero", "is no file"),
    ("loop", "cannot be read"), ("none", "No such file"), ("x" * 300, "File name too long"),
    ("broken-link", "No such file"), ("a\0b", "cannot be read"), ("latin", "no text in UTF-8")])
def test_what_is_no_file(place: Path, name: str, expected: str) -> None:
    (place / "latin").write_bytes(b"name: \xe9\n")
    with pytest.raises(ConfigError) as caught:
        yamlfile.read(place / name)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_aliases_and_a_byte_order_mark_are_right(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: &a {lr: 1e-3}\nb: *a\nc: {<<: *a, d: 1_0}\n")
    assert yamlfile.read(path)[1] == {"a": {"lr": 1e-3}, "b": {"lr": 1e-3},
                                      "c": {"lr": 1e-3, "d": 10}}


@pytest.mark.parametrize("value", [
    "1e-3", "1.5", "0x10", "1_000", "1:30", "null", "~", "true", "yes", "2026-01-02", ".inf", "",
    " a ", "a: b", "- a", "é", "\u2028", "\x85", "\x7f", "a\nb", "'", '"', "&a", "*a", "!a", "#"])
def test_text_comes_back_as_text(value: str) -> None:
    values = {"name": value, "list": [value, {"inside": value}]}
    assert yamlfile.load(yamlfile.dump(values)) == values


@pytest.mark.slow
@pytest.mark.parametrize("command", [["train", "--config"], ["study"]])
def test_every_document(place: Path, command: list[str]) -> None:
    last = ["--dry_run"] if command == ["study"] else []
    documents = DOCUMENTS[::3] if command == ["study"] else DOCUMENTS
    codes = [fuzz.check(Case([*command, FILE, *last], document), place) for document in documents]
    assert codes.count(2) > len(documents) * 0.8


@pytest.mark.slow
def test_values_of_a_few_flags(place: Path) -> None:
    """They go to one flag of each kind in turn."""
    flags = itertools.cycle(["epochs", "seed", "name", "run_dir", "optim.betas", "overwrite",
                             "model", "noise.also", "plugins", "exchange", "config", "data.root"])
    for token, flag in zip(TOKENS[::3], flags):
        argument = f"--{flag}={token}".replace("\0", "").replace("\ud800", "\udc80")
        fuzz.check(Case(["train", argument], b""), place)


@pytest.mark.parametrize("arguments, expected", [
    (["--epochs=.nan"], "epochs=nan is wrong"), (["--optim.lr=.nan"], "optim.lr=nan is wrong"),
    (["--epochs=1e300"], "of at most 1e+09"), (["--seed=9223372036854775808"], "64"),
    (["--threads=100000"], "give 1 to 1024"), (["--virtual_workers=1000000000"], "at most 65536"),
    (["--data.loader_workers=99999"], "too large"), (["--name=\udcff"], "no text in UTF-8"),
    (["--data.dataset=synthetic", "--data.num_examples=99999999999999"], "this machine has"),
    (["--noise.also=[{kind: gnc, radius: .nan}]", "--noise.kind=pnm"], "nan"),
    (["--epochs=[[[[" + "[" * 5000], "nested more than 40 deep"), (["--epochs=&a [*a]"], "itself"),
    (["--plugins=sys"], ""), (["--config=/dev/zero"], "is no file"), (["x" * 100_000], "unknown")])
def test_a_value_that_is_wrong(place: Path, arguments: list[str], expected: str) -> None:
    code, said = fuzz.run(Case(["train", *arguments], b""), place)
    assert code == (2 if expected else 0) and expected in said and len(said) < 1100, said
    assert len(said.splitlines()) == (1 if expected else 0), said


@pytest.mark.parametrize("name", ["epochs", "seed", "overwrite", "resume", "data.root", "optim.lr",
                                  "noise.kind", "plugins"])
def test_null_where_a_value_is_needed(place: Path, name: str) -> None:
    group, _, last = name.rpartition(".")
    text = f"{group}: {{{last}: null}}" if group else f"{name}: null\nmodel: mlp"
    code, said = fuzz.run(Case(["train", "--config", FILE], text.encode()), place)
    assert code == 2 and len(said.splitlines()) == 1, said
    assert f"{name}=null" in said or f"{name}=None" in said, said


def test_a_noise_in_a_list_has_numbers(place: Path) -> None:
    text = b"noise: [{kind: gnc, radius: 1e-3}, {kind: pnm, beta: 1e-1}]\nvirtual_workers: 2\n"
    (place / FILE).write_bytes(text)
    from hvdnoise.training.config import TrainConfig
    from hvdnoise.training.options import parse
    found = parse(TrainConfig, ["--config", str(place / FILE)], program="x").noise
    assert found == NoiseConfig("gnc", radius=1e-3, also=[{"kind": "pnm", "beta": 0.1}])


@pytest.mark.parametrize("value", [float("nan"), 1 << 63, -(1 << 63), "\udcff", [1, [float("nan")]],
                                   {"\ud800": 1}, {"a": {"b": 1 << 70}}])
def test_what_no_setting_can_be(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        check_value("data.it", value)
    assert str(caught.value).startswith("data.it")
    check_value("data.it", [1, -1.5, float("inf"), (1 << 63) - 1, "é", None, True, {"a": [{}]}])


@pytest.mark.parametrize("arguments", [
    ["eval"], ["measure"], ["report"], ["reproduce"], ["export"], ["study"],
    ["train", "--run_dir"], ["export", "a-run", "--output"],
    ["train", "--resume"], ["bench", "--out"], ["quadratic", "--out"], ["eval", "--checkpoint"],
    ["plan", "--config"], ["measure", "a-run", "--out"]])
@pytest.mark.parametrize("name", ["x" * 300, "loop", "/proc/1/fd/x"])
def test_a_path_that_the_system_refuses(place: Path, arguments: list[str], name: str) -> None:
    code, said = fuzz.run(Case([*arguments, name], b""), place)
    assert len(said.splitlines()) == (1 if code else 0) and code in (0, 2), said
    assert len(name) < 300 or code == 2
