"""`hvdnoise reproduce` in one process: what it refuses, says and compares. Ranks: integration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdnoise import cli
from hvdnoise.reproduce import command, differences, results
from hvdnoise.reproduce.config import ReproduceConfig
from hvdnoise.reproduce.record import plugin_file, read
from hvdnoise.training.config import ConfigError
from tests.trainer import GNC, metrics, speaking, train

__all__ = ["speaking"]
PLUGIN = """
import pathlib
pathlib.Path("imported").touch()
from hvdnoise.noise.base import MeanNoise
from hvdnoise.noise.registry import register_noise

@register_noise("of-a-plugin")
class OfAPlugin(MeanNoise):
    def mean_noise(self, bucket, observation, context):
        return None
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, *GNC, "--epochs", "1")
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in the current folder."""
    subprocess.run(["cp", "-r", whole, tmp_path / "run"], check=True)
    monkeypatch.chdir(tmp_path)
    return Path("run")


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reproduce(*arguments: str, capsys: Any) -> tuple[int, str, str]:
    code = cli.main(["reproduce", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_dry_run_says_what_differs_and_starts_nothing(run: Path, capsys: Any) -> None:
    before = contents(Path())
    code, out, _ = reproduce("run", "--dry_run", capsys=capsys)
    assert code == 0 and "nothing that is recorded differs from the record" in out
    assert "--run_dir=run/reproduced --resume=never" in out
    change(run / "environment.json", versions={"torch": "1.0", "hvdnoise": "abc"}, threads=3,
           processor="Pentium", hosts=["node7"], variables={"MKL_CBWR": "AVX2", "MKL_X": "$(x)"})
    code, out, _ = reproduce("run", "--dry_run", capsys=capsys)
    assert code == 0 and "torch: 1.0 in the record," in out and "Pentium in the record" in out
    assert "hvdnoise (digest of its code): abc in the record" in out and "hosts: node7" in out
    assert "MKL_X: $(x) in the record, none here" in out and "MKL_CBWR" not in out
    assert "--threads=3" in out
    before[str(run / "environment.json")] = (run / "environment.json").read_bytes()
    assert contents(Path()) == before
    found = command.environment(read(run))
    assert found["MKL_CBWR"] == "AVX2" and "MKL_X" not in found and "OMP_NUM_THREADS" not in found


@pytest.mark.parametrize("ranks, transport, begins", [
    (1, "gloo", "python"), (2, "gloo", "horovodrun"), (3, "mpi", "mpirun"),
    (2, "torch", "torchrun"), (2, None, "horovodrun")])
def test_as_many_ranks_by_the_launcher_of_the_record(run: Path, ranks: int, transport: Any,
                                                     begins: str) -> None:
    change(run / "environment.json", ranks=ranks, transport=transport)
    change(run / "summary.json", ranks=ranks)
    words = command.words(ReproduceConfig("run"), read(run))
    assert Path(words[0]).name.startswith(begins)
    number = "--nproc-per-node" if begins == "torchrun" else "-np"
    assert ranks == 1 or words[words.index(number) + 1] == str(ranks)


def test_groups_of_several_hosts_stay_as_they_were(run: Path) -> None:
    text = (run / "config.yaml").read_text().replace("exchange: auto", "exchange: group")
    (run / "config.yaml").write_text(text)
    change(run / "environment.json", ranks=4, local_size=2, hosts=["a", "a", "b", "b"])
    change(run / "summary.json", ranks=4)
    assert "--exchange=group:2" in command.words(ReproduceConfig("run"), read(run))


def damage(name: str, text: str | bytes) -> Any:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda run: (run / name).write_bytes(data)


REFUSED: dict[str, tuple[Any, str]] = {
    "no folder": (lambda run: subprocess.run(["rm", "-r", run]), "holds no config.yaml"),
    "unfinished": (lambda run: (run / "summary.json").unlink(), "holds no finished run"),
    "diverged": (lambda run: change(run / "summary.json", outcome="diverged"), "'diverged'"),
    "no digest": (damage("summary.json", "{}"), "holds no finished run"),
    "no environment": (lambda run: (run / "environment.json").unlink(), "environment.json"),
    "text": (damage("environment.json", "text"), "environment.json cannot be read"),
    "list": (damage("summary.json", "[1]"), "holds no object"),
    "binary": (damage("summary.json", b"\xff\x00"), "summary.json cannot be read"),
    "deep": (damage("summary.json", "[" * 100_000), "summary.json cannot be read"),
    "digits": (damage("environment.json", '{"ranks": ' + "9" * 5000 + "}"), "cannot be read"),
    "ranks": (lambda run: change(run / "environment.json", ranks=7), "one of them is damaged"),
    "no number": (lambda run: change(run / "environment.json", ranks=True), "is damaged"),
    "too many": (lambda run: change(run / "environment.json", ranks=10 ** 6), "is damaged"),
    "settings": (damage("config.yaml", "epochs: [1]"), "epochs"),
    "yaml": (damage("config.yaml", "!!python/object/apply:os.system [touch hacked]"),
             "config.yaml"),
    "plugins": (damage("config.yaml", "plugins: 7"), "is no list of names"),
    "no plugin": (damage("config.yaml", "plugins: [nowhere.py]"), "nowhere.py is missing here"),
    "no module": (damage("config.yaml", "plugins: [no.such.thing]"), "no.such.thing is missing"),
    "no data": (damage("config.yaml", "data: {dataset: imagefolder, root: nowhere}"), "nowhere"),
    "resized": (lambda run: change(run / "summary.json", starts=[
        {"step": 0, "ranks": 2, "virtual_workers": 2}, {"step": 5, "ranks": 1,
                                                        "virtual_workers": 4}]),
        "resumed at step 5 on 1 ranks x 4 virtual workers, after 2 x 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_record_is_one_line(run: Path, capsys: Any, name: str) -> None:
    action, expected = REFUSED[name]
    action(run)
    before = contents(Path())
    code, _, err = reproduce("run", capsys=capsys)
    assert code == 2 and expected in err and len(err.splitlines()) == 1, err
    assert contents(Path()) == before


@pytest.mark.parametrize("flags, expected", [
    (["--out", "run"], "the record is in it"), (["--out", "."], "the record is in it"),
    (["--out", "run/logs"], "holds no run"), (["--out", "run/summary.json"], "not a folder"),
    (["--out", "x" * 300], "too long"), (["--data_root"], "data_root"),
    (["--out", "other"], "--overwrite to replace it")])
def test_where_the_new_run_may_not_go(run: Path, capsys: Any, flags: list[str], expected: str
                                      ) -> None:
    subprocess.run(["cp", "-r", run, "other"], check=True)
    before = contents(Path())
    code, _, err = reproduce("run", *flags, capsys=capsys)
    assert code == 2 and expected in err and len(err.splitlines()) == 1, err
    assert contents(Path()) == before


def test_a_run_that_was_resized_cannot_be_had_again(tmp_path: Path, capsys: Any) -> None:
    train(tmp_path, *GNC, stop_after=3, expect=75)
    train(tmp_path, *GNC, "--resume", "auto", "--resume_resize", "--virtual_workers", "3")
    code, _, err = reproduce(str(tmp_path), capsys=capsys)
    assert code == 2 and "on 1 ranks x 3 virtual workers, after 1 x 2 (resume_resize)" in err


def test_other_settings_at_a_resumption_are_said(tmp_path: Path) -> None:
    train(tmp_path, *GNC, stop_after=3, expect=75)
    summary = train(tmp_path, *GNC, "--resume", "auto", "--epochs", "1")
    assert [each["step"] for each in summary["starts"]] == [0, 3]
    record = read(tmp_path)
    found = differences.before_and_now(record, differences.here(record))
    assert found == ["the run was resumed at step 3 with others than before: epochs: 2.0, 1.0 then"]


def test_plugins_are_named_and_imported_only_when_trusted(run: Path, capsys: Any) -> None:
    Path("mine.py").write_text(PLUGIN)
    (run / "config.yaml").write_text("plugins: [mine.py]\nmodel: mlp\nnoise: {kind: of-a-plugin}\n")
    code, _, err = reproduce("run", capsys=capsys)
    assert code == 2 and "the run imports mine.py (not as recorded" in err
    code, out, _ = reproduce("run", "--dry_run", capsys=capsys)
    assert code == 0 and "plugin mine.py: mine.py (not as recorded" in out
    assert "plugin mine.py: none in the record" in out
    assert not Path("imported").exists()
    command.check(ReproduceConfig("run", trust_plugins=True), read(run))
    assert Path("imported").exists()


def test_a_module_is_found_without_being_imported(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "a_package_of_mine").mkdir()
    for name in ("__init__", "inner"):
        (tmp_path / "a_package_of_mine" / f"{name}.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugin_file("a_package_of_mine.inner") == tmp_path / "a_package_of_mine" / "inner.py"
    assert plugin_file("a_package_of_mine.none") is None and plugin_file("") is None
    assert "a_package_of_mine" not in sys.modules


def test_equal_on_one_rank_and_differs_after_a_change(run: Path, capfd: Any) -> None:
    before = contents(run)
    assert cli.main(["reproduce", "run"]) == 0
    digest = json.loads((run / "summary.json").read_text())["weights_sha256"]
    assert f"equal: weights_sha256 {digest}" in capfd.readouterr().out
    after = contents(run)
    assert {name: after[name] for name in before} == before  # nothing of the record is touched
    assert {name.split("/")[1] for name in after.keys() - before.keys()} == {"reproduced"}

    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("lr: 0.05", "lr: 0.06"))
    assert cli.main(["reproduce", "run", "--overwrite"]) == 1
    out = capfd.readouterr().out
    assert f"differs:\n  weights_sha256: {digest} in the record" in out
    assert "tensors differ" in out and "metrics differ first at step 2 (train): " in out


def test_weights_are_compared_tensor_by_tensor(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    state = torch.load(run / "weights.pt", weights_only=True)
    expected = json.loads((run / "summary.json").read_text())["weights_sha256"]
    name, *others = state
    state[name].view(-1)[3] += 0.5
    state["more"] = state.pop(others[-1])
    state[others[0]] = state[others[0]].double()
    torch.save(state, again / "weights.pt")
    found = "\n".join(results.weights(run, again, expected))
    assert f"4 of {len(state) + 1} tensors differ" in found and "more: only in the new run" in found
    assert f"{name}: 1 of {state[name].numel()} numbers, by 0.5 at most" in found
    assert f"{others[0]}: torch.float32" in found and f"{others[-1]}: only in the record" in found
    (run / "weights.pt").write_bytes(b"damaged")
    assert "cannot be compared one by one" in results.weights(run, again, expected)[0]


def test_metrics_but_those_of_time(run: Path, tmp_path: Path) -> None:
    lines = metrics(run)
    again = tmp_path / "again"
    again.mkdir()
    for line in lines:
        line["step_seconds"] = 9.0
    (again / "metrics.jsonl").write_text("\n".join(["{", "[1]", *map(json.dumps, lines)]))
    assert results.metrics(run, again) == [f"the metrics of {len(lines)} lines are equal"]
    lines[2]["loss"] = -1
    (again / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (said,) = results.metrics(run, again)
    assert f"differ first at step {lines[2]['step']} (train): loss" in said


def test_another_transport_is_read_leniently(run: Path) -> None:
    change(run / "environment.json", transport=["mpi"], threads="many", versions=7, hosts=3,
           variables=[1], gpus=None)
    record = read(run)
    assert record.transport == "gloo" and record.threads == 1 and record.variables == {}
    assert differences.before_and_now(record, differences.here(record))
    with pytest.raises(ConfigError, match="holds no config.yaml"):
        read(Path("nowhere"))
