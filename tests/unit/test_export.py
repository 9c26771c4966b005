"""Weights that load elsewhere, and `hvdnoise export` in one process."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import torchvision
from torch import Tensor

from hvdnoise import cli
from hvdnoise.export import source
from hvdnoise.export.config import PACKAGES, SUFFIXES
from hvdnoise.training import models, own_data, plugins, rerun, weights
from hvdnoise.training.errors import Diverged
from tests.folders import write_folders
from tests.trainer import GNC, poison, speaking, train

__all__ = ["speaking"]
ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/export.md").read_text(), re.M | re.S)
FORMS = list(SUFFIXES)
MANY = ["--data.num_examples", "4000", "--data.limit", "48"]  # and so 1,000 test images


def needs(form: str) -> None:
    for package in PACKAGES[form]:
        pytest.importorskip(package)


def not_with_the_oldest_torch() -> None:
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 writes no ONNX file of a ResNet-18 that works")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs/NAME, a ResNet-18 with moving average."""
    place = tmp_path_factory.mktemp("trained")
    train(place / "runs" / "NAME", *MANY, "--ema", "0.5", "--data.image_size", "16", "--epochs",
          "1", model="resnet18")
    return place


@pytest.fixture
def place(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """It, as the current folder."""
    monkeypatch.chdir(trained)
    return trained


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is quick to export."""
    folder = tmp_path_factory.mktemp("small") / "run"
    train(folder, *GNC, "--epochs", "1", model="mlp")
    return folder


def export(*arguments: str) -> int:
    return cli.main(["export", *arguments])


def refused(capsys: Any, *arguments: str, code: int = 2) -> str:
    """The line that an export ends with."""
    assert export(*arguments) == code
    said = capsys.readouterr().err
    assert said.startswith("hvdnoise: error: ") and said.count("\n") == 1, said
    return str(said)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- weights.pt

def test_weights_of_a_run_load_into_torchvision_as_documented(place: Path) -> None:
    found: dict[str, Any] = {}
    exec(BLOCKS[0], found)
    config, path = rerun.find("runs/NAME", "final", None)
    datasets, model = rerun.restore(config, path, torch.device("cpu"))
    images, _ = datasets.test.batch(range(64), None)
    with torch.no_grad():
        assert torch.equal(found["network"](images), model.eval()(images))


@pytest.mark.parametrize("name, options", [
    ("resnet18", {}), ("mobilenet_v3_small", {}), ("densenet121", {}), ("squeezenet1_0", {}),
    ("googlenet", {"aux_logits": False, "init_weights": False})])
def test_weights_load_into_torchvision(name: str, options: Any, tmp_path: Path) -> None:
    written = models.build(f"torchvision:{name}", 7, (3, 64, 64)).state_dict()
    weights.write(tmp_path / "weights.pt", written)
    network = torchvision.models.get_model(name, num_classes=7, **options)
    network.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for key, value in network.state_dict().items():
        assert torch.equal(value, written[key]) and value.dtype == written[key].dtype, key
    size = sum(value.nbytes for value in written.values())
    assert (tmp_path / "weights.pt").stat().st_size < 1.05 * size + 300_000  # and nothing else


@pytest.mark.parametrize("name", ["mlp", "small-cnn", "resnet20", "resnet18-cifar"])
def test_weights_of_own_models_load_as_documented(name: str, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "OTHER").mkdir(parents=True)
    written = models.build(name, 10, (3, 32, 32)).state_dict()
    weights.write(tmp_path / "runs" / "OTHER" / "weights.pt", written)
    found: dict[str, Any] = {}
    exec(BLOCKS[1].replace("resnet20", name), found)
    loaded = found["network"].state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in written.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_weights_are_written_on_the_cpu(tmp_path: Path) -> None:
    weights.write(tmp_path / "weights.pt", {"weight": torch.ones(3, device="cuda")})
    assert torch.load(tmp_path / "weights.pt", weights_only=True)["weight"].device.type == "cpu"


# ---- files that predict as the run does

def predictor(form: str, path: Path, blank: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    """Of a file, as a program of others would read it; it takes values 0 .. 1."""
    if form == "torch":
        return torch.export.load(path).module()  # type: ignore[return-value]
    if form == "onnx":
        import onnxruntime
        session = onnxruntime.InferenceSession(str(path))
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    from safetensors.torch import load_file
    model = blank().eval()
    model.load_state_dict(load_file(path))
    return lambda images: model((images - 0.5) / 0.25)  # the synthetic set's


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_an_exported_network_predicts_as_the_run_does(form: str, place: Path, capsys: Any) -> None:
    needs(form)
    if form == "onnx":
        not_with_the_oldest_torch()
    assert export("runs/NAME", "--format", form) == 0
    assert "on 1000 test images its logits are the run's to" in capsys.readouterr().out
    target = place / "runs" / "NAME" / "export" / f"weights{SUFFIXES[form]}"
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask()
    config, path = rerun.find("runs/NAME", "final", None)
    datasets, model = rerun.restore(config, path, torch.device("cpu"))
    stored = torch.stack([datasets.test[index][0] for index in range(200)])  # uint8
    predict = predictor(form, target, lambda: torchvision.models.resnet18(num_classes=10))
    with torch.no_grad():
        expected = model.eval()(datasets.test.batch(range(200), None)[0])
        for some in (slice(0, 1), slice(1, 4), slice(0, 200)):
            found = predict(stored[some].float() / 255)
            difference = (found - expected[some]).abs().max() / expected.abs().max()
            assert difference <= 1e-5, some
    assert (found.argmax(1) == expected.argmax(1)).all() and expected.std(0).min() > 1e-3


@pytest.mark.slow
def test_the_documented_programs_run(place: Path, capsys: Any) -> None:
    not_with_the_oldest_torch()
    for form in FORMS:
        needs(form)
        if not Path(f"runs/NAME/export/weights{SUFFIXES[form]}").exists():  # by the test above
            assert export("runs/NAME", "--format", form, "--check", "8") == 0
    summary = json.loads(Path("runs/NAME/summary.json").read_text())
    for block in BLOCKS[2:5]:
        capsys.readouterr()
        found: dict[str, Any] = {}
        exec(block, found)
        printed = re.findall(r"'(\w+)'", capsys.readouterr().out)
        assert len(printed) == 5 and set(printed) <= {str(label) for label in range(10)}
        facts = found["facts"]
        assert facts["weights_sha256"] == summary["weights_sha256"]
        assert (facts["model"], facts["step"]) == ("resnet18", str(summary["steps"]))
        assert json.loads(facts["mean"]) == [0.5] * 3 and json.loads(facts["std"]) == [0.25] * 3


def test_other_weights_of_a_run(place: Path) -> None:
    summary = json.loads(Path("runs/NAME/summary.json").read_text())
    checkpoint = next(Path("runs/NAME/checkpoints").iterdir())
    config, _ = rerun.find("runs/NAME", "final", None)
    found = {}
    for which in ("final", "ema", "best", str(checkpoint)):
        config, path = rerun.find("runs/NAME", which, None)
        settings = cli_settings("runs/NAME", checkpoint=which, check=0)
        found[which] = source.read(settings, config, path).facts
    assert found["final"]["weights_sha256"] == summary["weights_sha256"]
    assert found["ema"]["weights_sha256"] == summary["weights_ema_sha256"]
    assert len({facts["weights_sha256"] for facts in found.values()}) >= 2
    assert found["best"]["step"] == str(summary["best_step"])
    assert found[str(checkpoint)]["step"] == str(int(checkpoint.name[5:]))
    assert found[str(checkpoint)]["weights"] == checkpoint.name


def cli_settings(run: str, **options: Any) -> Any:
    from hvdnoise.export.config import ExportConfig
    return ExportConfig(run, **options)


def test_class_names_are_kept_whatever_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: Any) -> None:
    """Also without the data, and data with other classes are refused."""
    monkeypatch.chdir(tmp_path)
    names = ['a "quoted", one', "line\nend", "ß 犬", os.fsdecode(b"no utf-8 \xff")]
    write_folders(tmp_path / "images", classes=names)
    train(tmp_path / "run", "--data.dataset", "imagefolder", "--data.root", "images", "--epochs",
          "1", model="mlp")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["labels"] == sorted(names)
    forms = [form for form in FORMS if all(map(there, PACKAGES[form]))]
    for form in forms:
        assert export("run", "--format", form) == 0
        assert "on 8 test images its logits are the run's" in capsys.readouterr().out
    for part in ("train", "val"):
        (tmp_path / "images" / part / "ß 犬").rename(tmp_path / "images" / part / "cat")
    assert "other classes than the run was trained on" in refused(capsys, "run", "--overwrite")
    shutil.rmtree(tmp_path / "images")
    assert "images/train is not a folder: data.root must" in refused(capsys, "run", "--overwrite")
    assert export("run", "--check", "0", "--overwrite") == 0
    assert capsys.readouterr().out.endswith("4 classes; not checked\n")
    extra = {"hvdnoise.json": ""}
    torch.export.load(tmp_path / "run" / "export" / "weights.pt2", extra_files=extra)
    assert json.loads(json.loads(extra["hvdnoise.json"])["labels"]) == sorted(names)
    if "safetensors" in forms:
        from safetensors import safe_open
        with safe_open(tmp_path / "run" / "export" / "weights.safetensors", "pt") as file:
            assert json.loads(file.metadata()["labels"]) == sorted(names)


OWN = """
import torch
from torch import nn

def floats(root):
    x = torch.randn(60, 3, 5, generator=torch.Generator().manual_seed(1)) * 4 + 2
    return {"train": (x[:48], torch.arange(48) % 4), "test": (x[48:], torch.arange(12) % 4),
            "classes": 4, "mean": [1.0, 2.0, 3.0], "std": [3.0, 4.0, 5.0]}

def pixels(root):
    x = torch.randint(0, 256, (60, 2, 3, 3), generator=torch.Generator().manual_seed(1)).byte()
    return {"train": (x[:48], torch.arange(48) % 4), "test": (x[48:], torch.arange(12) % 4),
            "classes": 4, "mean": 0.5, "std": 0.25}

def tokens(root):
    x = torch.randint(0, 9, (60, 7), generator=torch.Generator().manual_seed(1))
    return {"train": (x[:48], torch.arange(48) % 4), "test": (x[48:], torch.arange(12) % 4),
            "classes": 4}

def flat(classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), classes))

def words(classes, shape):
    return nn.Sequential(nn.Embedding(9, 6), nn.Flatten(), nn.Linear(6 * shape[0], classes))
"""


@pytest.mark.parametrize("data_set, model, goes_in", [
    ("floats", "flat", "inside: the network takes x as the data set has it"),
    ("pixels", "flat", "inside: the network takes values x in 0..1"),
    ("tokens", "words", "none: the network takes whole numbers")])
def test_networks_of_the_users_own(data_set: str, model: str, goes_in: str, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_functions", {})
    monkeypatch.setattr(plugins, "_digests", {})
    own_data._sets.cache_clear()
    Path("mine.py").write_text(OWN)
    names = {"data.dataset": f"mine.py:{data_set}", "model": f"mine.py:{model}"}
    train(tmp_path / "run", *(word for name, value in names.items()
                              for word in (f"--{name}", value)), "--data.image_size", "null",
          "--epochs", "1")
    assert "look at it, and add --trust_plugins" in refused(capsys, "run")
    forms = [form for form in FORMS if all(map(there, PACKAGES[form]))]
    for form in forms:
        assert export("run", "--format", form, "--trust_plugins") == 0
        assert "on 12 test images its logits are the run's" in capsys.readouterr().out
    extra = {"hvdnoise.json": ""}
    network = torch.export.load("run/export/weights.pt2", extra_files=extra).module()
    facts = json.loads(extra["hvdnoise.json"])
    assert facts["normalization"].startswith(goes_in)
    made: dict[str, Any] = {}
    exec(OWN, made)
    given = made[data_set](None)
    x = given["test"][0]
    x = x.float() / 255 if data_set == "pixels" else x
    mean, std = (torch.tensor(given.get(key, other)).view(-1, *[1] * (x.ndim - 2))
                 for key, other in (("mean", 0.0), ("std", 1.0)))
    mine = made[model](4, x.shape[1:])
    mine.load_state_dict(torch.load("run/weights.pt", weights_only=True))
    with torch.no_grad():
        expected = mine(x if data_set == "tokens" else (x - mean) / std)
        assert (network(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert expected.std() > 0.01


def there(package: str) -> bool:
    import importlib.util
    return importlib.util.find_spec(package) is not None


def umask() -> int:
    found = os.umask(0)
    os.umask(found)
    return found


# ---- what is refused, and leaves nothing

@pytest.mark.parametrize("form", FORMS)
def test_a_network_that_predicts_something_else_is_not_kept(
        form: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
        ) -> None:
    needs(form)
    run = shutil.copytree(small, tmp_path / "run")
    if form == "safetensors":  # its reader normalises with what stands in the file
        facts = source._facts
        monkeypatch.setattr(source, "_facts", lambda *args: {**facts(*args),
                                                             "mean": "[0.5, 0.5, 0.5001]"})
    else:
        right = source.normalisation
        monkeypatch.setattr(source, "normalisation", lambda *args: (
            right(*args)[0] * 1.0001, right(*args)[1]))
    before = files(tmp_path)
    said = refused(capsys, str(run), "--format", form, code=1)
    assert re.search(r"differ from the run's by [\d.e-]+ of the largest on 12 test images", said)
    assert files(tmp_path) == before


def test_a_network_that_torch_cannot_export_is_one_line(small: Path, tmp_path: Path, capsys: Any,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, images: Tensor) -> Tensor:
        return images if float(images.sum()) > 0 else -images  # depends on the numbers
    monkeypatch.setattr(source.Network, "forward", forward)
    run = shutil.copytree(small, tmp_path / "run")
    before = files(tmp_path)
    assert "model=mlp cannot be written with format=torch (" in refused(capsys, str(run), code=1)
    assert files(tmp_path) == before


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_is_one_line(form: str, small: Path, tmp_path: Path, capsys: Any) -> None:
    needs(form)
    run = shutil.copytree(small, tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = files(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the weights alone are more
    try:
        said = refused(capsys, str(run), "--format", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written (File too large): give another name, or make room" in said
    assert files(tmp_path) == before


def test_damaged_weights_are_refused(small: Path, tmp_path: Path, capsys: Any) -> None:
    run = shutil.copytree(small, tmp_path / "run")
    content = bytearray((run / "weights.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "weights.pt").write_bytes(content)
    before = files(tmp_path)
    assert "weights.pt does not have the SHA-256" in refused(capsys, str(run))
    (run / "summary.json").unlink()
    assert "CRC-32" in refused(capsys, str(run))
    assert files(tmp_path) == before - {"run/summary.json"}


@pytest.mark.parametrize("form", ["onnx", "safetensors"])
def test_missing_packages_are_one_line(form: str, small: Path, tmp_path: Path, capsys: Any,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    needs(form)
    missing = PACKAGES[form][-1]
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
    said = refused(capsys, str(small), "--format", form, "--output",
                   str(tmp_path / f"net{SUFFIXES[form]}"))
    assert f"needs {missing}, which is not installed: pip install 'hvdnoise[export]'" in said
    assert files(tmp_path) == set() and not (small / "export").exists()


def test_what_is_there_is_replaced_only_if_asked(small: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "net.pt2"
    target.write_text("mine")
    assert "it is there already" in refused(capsys, str(small), "--output", str(target))
    assert target.read_text() == "mine"
    assert export(str(small), "--output", str(target), "--overwrite") == 0
    torch.export.load(target)
    assert files(tmp_path) == {"net.pt2"} and not (small / "export").exists()


@pytest.mark.parametrize("arguments, message", [
    (["--output", "{tmp}/net.onnx"], "format=torch ends with .pt2"),
    (["--output", "{tmp}/none/net.pt2"], "there is no folder"),
    (["--output", "{tmp}/a.pt2"], "it is a folder"),
    (["--output", "{tmp}/file/net.pt2"], "there is no folder"),
    (["--check", "-1"], "check=-1 is wrong: give 0 or more"),
    (["--format", "pickle"], "format=pickle is wrong: give one of torch, onnx, safetensors"),
    (["--checkpoint", "ema"], "there is no"), (["--threads", "0"], "threads=0 is wrong")])
def test_bad_input_is_one_line(arguments: list[str], message: str, small: Path, tmp_path: Path,
                               capsys: Any) -> None:
    (tmp_path / "a.pt2").mkdir()
    (tmp_path / "file").touch()
    before = files(tmp_path) | files(small)
    assert message in refused(capsys, str(small), *(
        each.replace("{tmp}", str(tmp_path)) for each in arguments))
    assert files(tmp_path) | files(small) == before


def test_folders_without_final_weights(tmp_path: Path, capsys: Any,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    assert "holds no config.yaml: give the folder of a run" in refused(capsys, str(tmp_path))
    poison(monkeypatch, set(range(100)))
    with pytest.raises(Diverged):
        train(tmp_path / "run", "--max_bad_steps", "2")
    before = files(tmp_path)
    assert re.search(r"there is no .*weights.pt; there are: ", refused(
        capsys, str(tmp_path / "run")))
    assert files(tmp_path) == before


def test_one_rank_of_several_exports(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                     ) -> None:
    target = tmp_path / "net.pt2"
    monkeypatch.setenv("HOROVOD_SIZE", "2")
    monkeypatch.setenv("HOROVOD_RANK", "1")
    assert export(str(small), "--output", str(target)) == 0 and not target.exists()
    monkeypatch.setenv("HOROVOD_RANK", "0")
    assert export(str(small), "--output", str(target)) == 0 and target.exists()


def test_labels_that_a_run_folder_has_from_others(small: Path, tmp_path: Path, capsys: Any) -> None:
    run = shutil.copytree(small, tmp_path / "run")
    facts = json.loads((run / "environment.json").read_text())
    for wrong in ({"a": 1}, [1, 2], "abc"):
        (run / "environment.json").write_text(json.dumps({**facts, "labels": wrong}))
        assert "its labels are no list of names" in refused(capsys, str(run))
    (run / "environment.json").write_text(json.dumps({**facts, "labels": ["a", "b"]}))
    assert "does not fit the model" in refused(capsys, str(run), "--check", "0")
    del facts["labels"]  # of an older version: then from the data
    (run / "environment.json").write_text(json.dumps(facts))
    assert export(str(run), "--check", "0") == 0
