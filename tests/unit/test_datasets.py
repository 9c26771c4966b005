"""A data set is one record: settings, plans, prepare, build and the doctor know it by that."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hvdnoise
from hvdnoise import doctor
from hvdnoise.planning.config import read
from hvdnoise.planning.outline import outline
from hvdnoise.training import data
from hvdnoise.training.config import ConfigError, TrainConfig
from hvdnoise.training.data import DataConfig, DataError, DataSpec
from hvdnoise.training.datasets import DATASETS, ArrayRecord, DataRecord
from hvdnoise.training.options import parse
from tests.fake_world import run_threads

PACKAGE = Path(hvdnoise.__file__).parent
RECORDS = PACKAGE / "training" / "datasets.py"


@dataclass(frozen=True, kw_only=True)
class Stripes(ArrayRecord):
    """Gray images, drawn; `prepare` leaves a file, so that it can be seen at work."""

    def prepare(self, config: DataConfig) -> None:
        place = config.path / (self.folder or "")
        place.mkdir(parents=True)
        (place / "prepared").touch()

    def arrays(self, config: DataConfig, seed: int, part: str) -> Any:
        if not (config.path / (self.folder or "") / "prepared").exists():
            raise FileNotFoundError("no stripes")
        count = self.images if part == "train" else 5
        labels = np.arange(count) % self.classes
        images = np.zeros((count, *self.shape(config)), np.uint8)
        images[:, :, ::2] = labels.astype(np.uint8)[:, None, None, None]
        return images, labels


@pytest.fixture
def stripes(monkeypatch: pytest.MonkeyPatch) -> DataRecord:
    record = Stripes(name="stripes", mean=(0.5,), std=(0.2,), images=40, classes=3, side=12,
                     padding=1, folder="stripes/raw", package="dataset-stripes")
    monkeypatch.setitem(DATASETS, record.name, record)
    return record


def test_a_new_record_is_prepared_and_built(tmp_path: Path, stripes: DataRecord) -> None:
    config = DataConfig("stripes", root=str(tmp_path), limit=31)
    with pytest.raises(DataError, match="cannot read stripes in .*no stripes.*prepare first"):
        data.build(config, seed=0)
    run_threads(1, lambda world: data.prepare(config, world))
    sets = data.build(config, seed=0)
    assert sets.spec == DataSpec("stripes", 3, (1, 12, 12), 31, 5)
    images, labels = sets.train.batch([4, 5], None)
    assert labels.tolist() == [1, 2]
    assert images[0, 0, 0, 0].item() == pytest.approx((1 / 255 - 0.5) / 0.2)


def test_a_new_record_is_planned(stripes: DataRecord) -> None:
    flags = ["--data.dataset", "stripes", "--data.batch_size", "8", "--model", "small-cnn"]
    run = outline(read(flags)[0])
    assert (run.examples, run.steps_per_epoch) == (40, 5)
    with pytest.raises(ConfigError, match="goes with data.dataset=imagefolder; stripes is known"):
        read([*flags, "--examples", "9"])
    with pytest.raises(ConfigError, match="40 training examples"):
        read([*flags, "--global_batch", "41"])


def test_a_new_record_is_a_choice(stripes: DataRecord, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"data.dataset=mnist is wrong: give one of "
                       "fashion-mnist, cifar10, cifar100, imagefolder, synthetic, stripes, or a "):
        parse(TrainConfig, ["--data.dataset", "mnist"], program="p")
    with pytest.raises(DataError, match="image_size=8 does not go with stripes"):
        DataConfig("stripes", image_size=8)
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"], program="p")
    said = " ".join(capsys.readouterr().out.split())
    assert f"(type: Union[Literal[{', '.join(map(repr, DATASETS))}], str]" in said
    assert "only for imagefolder (default 224) and synthetic (default 32), the other" in said


def test_the_doctor_looks_for_a_new_record(tmp_path: Path, stripes: DataRecord,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> list[tuple[str, str]]:
        return [each for each in doctor._data(tmp_path / "root") if "stripes" in each[1]]
    monkeypatch.setattr(doctor, "SHARED", str(tmp_path / "shared"))
    assert said() == [("note", f"stripes is not in {tmp_path / 'root'}: it is downloaded when "
                       "first used")]
    (tmp_path / "shared" / "stripes").mkdir(parents=True)
    assert said() == [("ok", f"stripes in {tmp_path / 'shared'} (Debian's package; unpacked when "
                       "first used)")]
    (tmp_path / "root" / "stripes" / "raw").mkdir(parents=True)
    assert said() == [("ok", f"stripes in {tmp_path / 'root' / 'stripes' / 'raw'}")]


def test_records_agree_with_torchvision() -> None:
    from torchvision import datasets
    for name, kind in (("cifar10", datasets.CIFAR10), ("cifar100", datasets.CIFAR100)):
        assert DATASETS[name].folder == kind.base_folder
    for name, record in DATASETS.items():
        assert record.name == name and len(record.mean) == len(record.std)


def test_names_stand_in_the_records_alone() -> None:
    """Whole words; a label like data.synthetic.blocks, which names random numbers, is not one."""
    names = re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, DATASETS))})(?![\w-])")
    found = [f"{path.relative_to(PACKAGE)}:{line}: {text!r}"
             for path in sorted(PACKAGE.rglob("*.py")) if path != RECORDS
             for line, text in strings(path) if names.search(text)]
    assert found == []
    assert {name for _, text in strings(RECORDS) for name in names.findall(text)} == set(DATASETS)


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """The string literals of a module, parts of f-strings too, but no docstrings."""
    tree = ast.parse(path.read_text())
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
            yield node.lineno, node.value
