"""A data set and a model of the user's own: what is taken, and one line for what is not."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from hvdnoise import cli
from hvdnoise.training import data, models, own_data, plugins, rerun, yamlfile
from hvdnoise.training.config import ConfigError, TrainConfig, nested
from hvdnoise.training.data import DataConfig, DataError, Datasets
from hvdnoise.training.options import parse

FILE = "mine.py"
NAME = f"{FILE}:load"
X, Y = torch.arange(40.0).view(10, 4), torch.arange(10) % 3
GOOD: dict[str, Any] = {"train": (X, Y), "test": (X[:3], Y[:3]), "classes": 3}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "_functions", {})
    monkeypatch.setattr(plugins, "_digests", {})
    own_data._sets.cache_clear()
    yield tmp_path
    own_data._sets.cache_clear()


def built(monkeypatch: pytest.MonkeyPatch, returned: Any, **settings: Any) -> Datasets:
    """The data sets of a function that returns this."""
    own_data._sets.cache_clear()
    monkeypatch.setitem(plugins._functions, NAME, lambda root: returned)
    return data.build(DataConfig(NAME, **settings), seed=3)


class Items(Dataset[Any]):
    """A map-style data set of these items."""

    def __init__(self, *items: Any, **attributes: Any) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield X[0], 0


class NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return X[0], 0


class Broken(Items):
    def __getitem__(self, index: int) -> Any:
        raise KeyError("picture")


class Drawn(Items):
    """Items that draw from each of the three generators."""

    def __getitem__(self, index: int) -> Any:
        x, label = self.items[index]
        return x + torch.rand(()) + np.random.rand() + random.random(), label


# ---- what is taken

def test_pairs_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = built(monkeypatch, {**GOOD, "mean": 2.0, "std": (1.0, 2.0, 4.0, 8.0)})
    assert (sets.spec.num_classes, sets.spec.image_shape, sets.spec.num_train, sets.spec.num_test,
            sets.spec.dtype) == (3, (4,), 10, 3, "float32")
    x, y = sets.train.batch([1, 9], None)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0])
    torch.testing.assert_close(x, (X[[1, 9]] - 2) / scale)
    assert y.tolist() == [1, 0] and y.dtype == torch.int64


@pytest.mark.parametrize("x, right, dtype", [
    (X.double().numpy(), X, "float32"), (X.half(), X, "float32"),
    (X.byte(), X / 255, "float32"),                          # pixels
    (X.int(), X.long(), "int64"), (X > 7, (X > 7).long(), "int64")])
def test_kinds_of_numbers(monkeypatch: pytest.MonkeyPatch, x: Any, right: Tensor, dtype: str
                          ) -> None:
    sets = built(monkeypatch, {**GOOD, "train": (x, Y.numpy()), "test": [x, Y.int()]})
    items = built(monkeypatch, {**GOOD, "train": Items(*zip(x, Y)), "test": Items(*zip(x, Y))})
    for each in (sets, items):
        found, _ = each.train.batch(range(10), None)
        assert found.dtype == right.dtype and each.spec.dtype == dtype
        torch.testing.assert_close(found, right)


def test_data_sets_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Items(*zip(X, Y.tolist()))
    for train in (whole, TensorDataset(X, Y), TensorDataset(X, Y, X) and list(zip(X, Y)),
                  Items(*zip(X.numpy(), Y.numpy())), Items(*zip(X, Y), targets=Y.tolist()),
                  Items(*zip(X, Y), targets=(Y + 1).tolist())):  # of before a target_transform
        sets = built(monkeypatch, {**GOOD, "train": train})
        assert sets.train.labels.tolist() == Y.tolist()
        assert torch.equal(sets.train.batch([4], 0)[0], X[4:5])
    sets = built(monkeypatch, {**GOOD, "train": Subset(whole, [7, 2, 2])})
    assert sets.train.labels.tolist() == [1, 2, 2]
    assert torch.equal(sets.train.batch([0, 2], 0)[0], X[[7, 2]])


def test_targets_save_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Counted(Items):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return super().__getitem__(index)
    many = [(X[0], n % 3) for n in range(1000)]
    built(monkeypatch, {**GOOD, "train": Counted(*many, targets=[n % 3 for n in range(1000)])})
    assert len(read) < 20
    read.clear()
    built(monkeypatch, {**GOOD, "train": Counted(*many)})
    assert len(set(read)) == 1000


def test_draws_depend_on_seed_epoch_and_index_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = built(monkeypatch, {**GOOD, "train": Drawn(*zip(X, Y)), "test": Drawn(*zip(X, Y))})
    x, _ = sets.train.batch([3, 5, 8], 2)
    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    torch.rand(7), np.random.rand(3)  # wherever the generators are
    again, _ = sets.train.batch([8, 3], 2)
    assert torch.equal(again, x[[2, 0]])
    assert not torch.equal(sets.train.batch([3], 3)[0], x[:1])
    for images, epoch in ((sets.train, None), (sets.test, None), (sets.test, 4)):
        assert torch.equal(images.batch([3], epoch)[0], images.batch([3, 1], None)[0][:1])
    torch.set_rng_state(before[0])
    state = torch.get_rng_state()
    sets.train.batch([1], 1)
    assert torch.equal(state, torch.get_rng_state())  # left where it was
    still = built(monkeypatch, {**GOOD, "train": Drawn(*zip(X, Y))}, augment=False)
    assert torch.equal(still.train.batch([3], 1)[0], still.train.batch([3], 2)[0])


def test_the_function_draws_the_same_each_time(folder: Path) -> None:
    (folder / FILE).write_text(
        "import numpy, random, torch\n"
        "def load(root):\n"
        "    x = torch.rand(9, 2) + numpy.random.rand() + random.random()\n"
        "    return dict(train=(x, torch.zeros(9).long()), test=(x, torch.ones(9).long()),"
        " classes=2)\n")
    digests = []
    for seed in (1, 2):
        config = parse(TrainConfig, ["--data.dataset", NAME], program="p")
        torch.manual_seed(seed)
        own_data._sets.cache_clear()
        digests.append(data.build(config.data, seed=seed).train.digests(whole=True))
    assert digests[0] == digests[1]


def test_held_out_and_noisy_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = built(monkeypatch, GOOD, validation=3, limit=5, label_noise=0.4)
    assert sets.validation is not None and len(sets.validation) == 3 and len(sets.train) == 5
    wrong = [int(y != x[0] // 4 % 3) for x, y in (sets.train[n] for n in range(5))]
    assert sum(wrong) == 2


def test_digests_see_every_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    def digests(returned: Any) -> dict[str, str]:
        return built(monkeypatch, returned).train.digests(whole=True)
    right = digests(GOOD)
    changed = X.clone()
    changed[7, 2] += 1
    for name, other in (("images", {"train": (changed, Y)}), ("labels", {"train": (X, 2 - Y)}),
                        ("facts", {"classes": 4}), ("facts", {"mean": 0.5}), ("facts", {"std": 2})):
        found = digests({**GOOD, **other})
        assert [key for key in right if found[key] != right[key]] == [name]


# ---- what is not

@pytest.mark.parametrize("returned, says", [
    (None, "returned None: return a dict with train, test, classes, and mean and std"),
    ((X, Y), "returned a tuple: return a dict"),
    ({"train": (X, Y), "test": (X, Y)}, "returned a dict without classes: add it"),
    ({}, "returned a dict without train and test and classes: add them"),
    ({**GOOD, "class": 3}, "returned the unknown key 'class': did you mean classes?"),
    ({**GOOD, "classes": 1}, "classes is 1: give a whole number of at least 2"),
    ({**GOOD, "classes": 3.0}, "classes is 3.0: give a whole number"),
    ({**GOOD, "train": (X, Y[:7])}, "train: the labels have the shape (7,): give one whole number "
     "for each of the 10 examples, (10,)"),
    ({**GOOD, "train": (X, Y.float())}, "train: the labels are float32: give whole numbers 0 .. 2, "
     "for instance by .long()"),
    ({**GOOD, "test": (X, torch.eye(10))}, "test: the labels are float32"),
    ({**GOOD, "test": (X, Y == 1)}, "test: the labels are bool"),
    ({**GOOD, "test": (X, torch.eye(10).long())}, "test: the labels have the shape (10, 10)"),
    ({**GOOD, "train": (X, Y + 1)}, "train[2] has the label 3, and classes is 3: labels are 0 .. 2 "
     "(3 of 10 are not)"),
    ({**GOOD, "train": (X, Y - 1)}, "train[0] has the label -1, and classes is 3"),
    ({**GOOD, "train": (X[:0], Y[:0])}, "train: the examples have the shape (0, 4)"),
    ({**GOOD, "train": (X[:, 0], Y)}, "train: the examples have the shape (10,)"),
    ({**GOOD, "train": (X + 1j, Y)}, "train: x is complex64"),
    ({**GOOD, "test": (X[:, :3], Y)}, "an example of test is float32 (3,), and one of train "
     "float32 (4,): give both the same"),
    ({**GOOD, "test": (X.int(), Y)}, "an example of test is int64 (4,), and one of train float32"),
    ({**GOOD, "mean": (1, 2)}, "mean is (1, 2): give one number, or one for each of the 4 "
     "channels"),
    ({**GOOD, "std": 0.0}, "std is [0.0]: give numbers above 0"),
    ({**GOOD, "std": float("nan")}, "std is nan: give one number"),
    ({**GOOD, "mean": "half"}, "mean is 'half': give one number"),
    ({**GOOD, "train": (X.int(), Y), "test": (X.int(), Y), "mean": 3},
     "mean is given, and examples are whole numbers (int64)"),
    ({**GOOD, "train": Endless()}, "train is an IterableDataset (Endless), whose examples have no "
     "number to draw them by: give a data set"),
    ({**GOOD, "train": NoLength()}, "train is a NoLength without a length: add __len__"),
    ({**GOOD, "train": Items()}, "train is empty"),
    ({**GOOD, "train": {"x": X, "y": Y}}, "train is a dict: give a data set whose items are (x, "
     "label), or a pair of tensors"),
    ({**GOOD, "train": torch.utils.data.DataLoader(TensorDataset(X, Y))}, "train is a DataLoader"),
    ({**GOOD, "train": Items({"x": X[0], "y": 1})}, "train[0] is a dict: give (x, label)"),
    ({**GOOD, "train": TensorDataset(X, Y, Y)}, "train[0] is a tuple of 3: give (x, label)"),
    ({**GOOD, "train": X}, "train[0] is a Tensor: give (x, label)"),
    ({**GOOD, "train": Items(("cat.png", 1))}, "train[0]: x is a str: give a tensor"),
    ({**GOOD, "train": Items((X[0, 0], 1))}, "train[0]: x is a single number"),
    ({**GOOD, "train": Items((X[0], 1.0))}, "train[0]: the label is 1.0 (float): give a whole "),
    ({**GOOD, "train": Items((X[0], Y[0]), (X[0], Y[0].float()))}, "train[1]: the label is 0.0"),
    ({**GOOD, "train": Items((X[0], Y[:2]))}, "train[0]: the label has the shape (2,)"),
    ({**GOOD, "train": Items((X[0], True))}, "train[0]: the label is True (bool)"),
    ({**GOOD, "train": Items((X[0], 1), (X[0], 3))}, "train[1] has the label 3, and classes is 3"),
    ({**GOOD, "train": Broken(1)}, "its examples cannot be read: KeyError: 'picture'"),
    ({**GOOD, "train": (np.array([[object()]]), Y)}, "its examples cannot be read: TypeError: "),
])
def test_a_bad_return_is_one_line(monkeypatch: pytest.MonkeyPatch, returned: Any, says: str
                                  ) -> None:
    with pytest.raises(DataError) as caught:
        built(monkeypatch, returned)
    text = str(caught.value)
    assert text.startswith(f"data.dataset={NAME}") and says in text and "\n" not in text


def test_what_shows_in_a_batch_names_the_item(monkeypatch: pytest.MonkeyPatch) -> None:
    ragged = Items(*((X[0, :2 if n == 6 else 4], n % 3) for n in range(10)))
    sets = built(monkeypatch, {**GOOD, "train": ragged})
    with pytest.raises(DataError, match=r"train\[6\] is float32 \(2,\), and the first one float32 "
                       r"\(4,\)"):
        sets.train.batch(range(10), 0)
    with pytest.raises(DataError):  # the ranks' comparison comes upon it before the run
        sets.train.digests(whole=True)
    unsteady = Items(*zip(X, Y))
    sets = built(monkeypatch, {**GOOD, "train": unsteady})
    unsteady.items = tuple(zip(X, (Y + 1) % 3))
    with pytest.raises(DataError, match=r"train\[2\] has the label 0 now, and had 2"):
        sets.train.batch([2], 0)


def test_what_does_not_travel_to_loading_processes(folder: Path, monkeypatch: pytest.MonkeyPatch
                                                   ) -> None:
    returned = {**GOOD, "train": Items(*zip(X, Y), transform=lambda x: x)}
    built(monkeypatch, returned)
    with pytest.raises(DataError, match="cannot be sent to the data.loader_workers=2 processes"):
        built(monkeypatch, returned, loader_workers=2)
    built(monkeypatch, GOOD, loader_workers=2)
    (folder / FILE).write_text("")
    sets = built(monkeypatch, {**GOOD, "train": Items(*zip(X, Y))}, loader_workers=2)
    assert torch.equal(pickle.loads(pickle.dumps(sets.train)).batch([4], 1)[0], X[4:5])


@pytest.mark.parametrize("dataset, text, says", [
    ("mine.py", "", "data.dataset=mine.py is wrong: give one of fashion-mnist, "),
    ("/data/mine", "", "or a function of your own as FILE.py:FUNCTION or MODULE:FUNCTION"),
    ("gone.py:load", "", "data.dataset=gone.py:load is wrong: there is no file gone.py in "),
    ("mine:load", "", "mine cannot be imported: ModuleNotFoundError: No module named 'mine'; a "
     "file is named mine.py:load"),
    ("mine.py:lod", "def load(root): pass", "mine.py has no function lod; did you mean load?"),
    ("mine.py:load", "load = 3", "mine.py has no function load"),
    ("mine.py:load", "1 +", "mine.py cannot be imported: SyntaxError: invalid syntax"),
    ("mine.py:load", "\nimport nowhere", "mine.py cannot be imported: ModuleNotFoundError: No "
     "module named 'nowhere' (line 2)"),
])
def test_a_function_that_is_not_there_is_one_line(folder: Path, capsys: Any, dataset: str,
                                                  text: str, says: str) -> None:
    (folder / FILE).write_text(text)
    for flag in ("data.dataset", "model"):
        if flag == "model" and ":" not in dataset:
            continue
        assert cli.main(["train", f"--{flag}", dataset]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says.replace("data.dataset", flag) in line
    assert [path.name for path in folder.iterdir() if path.suffix != ".py"] in ([], ["__pycache__"])


@pytest.mark.parametrize("text, says", [
    ("def load(): pass", "cannot be called with data.root (too many positional arguments)"),
    ("def load(root, size): pass", "cannot be called with data.root (missing a required argument: "
     "'size')"),
    ("def load(root):\n    a = {}\n    return a['b']", "raised KeyError: 'b' (line 3)"),
    ("def load(root):\n    import sys\n    sys.exit(4)", "raised SystemExit: 4 (line 3)"),
    ("def load(root):\n    assert False", "raised AssertionError (line 2)")])
def test_a_function_that_raises_is_one_line(folder: Path, text: str, says: str) -> None:
    (folder / FILE).write_text(text)
    config = parse(TrainConfig, ["--data.dataset", NAME], program="p")
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            data.build(config.data, seed=1)
        assert says in str(caught.value) and "\n" not in str(caught.value)


# ---- models

NET = """
import torch
from torch import nn
def net(classes, shape):
    return nn.Linear(shape[0], classes)
class Net(nn.Module):
    def __init__(self, classes, shape):
        super().__init__()
        self.words, self.head = nn.Embedding(50, 3), nn.Linear(3, classes)
    def forward(self, words):
        return self.head(self.words(words).mean(1))
def flat(classes, shape):
    return nn.Linear(shape[0], 1)
def tokens(classes, shape):
    return lambda x: x
def fails(classes, shape):
    raise OSError("no weights here")
def stays(classes, shape):
    class Stays(nn.Linear):
        def forward(self, x):
            raise IndexError("too far")
    return Stays(2, 2)
def alone(classes):
    pass
"""


def model(name: str, classes: int, shape: tuple[int, ...], **options: Any) -> Any:
    Path(FILE).write_text(NET)
    config = parse(TrainConfig, ["--model", f"{FILE}:{name}"], program="p")
    return models.build(config.model, classes, shape, **options)


def test_a_model_of_ones_own() -> None:
    assert model("net", 3, (4,)).weight.shape == (3, 4)
    assert model("Net", 3, (9,), dtype="int64").training
    outline = models.outline(f"{FILE}:net", 3, (4,))
    assert outline.weight.device.type == "meta"
    assert models.build("mlp", 3, (4,))(torch.zeros(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("name, says", [
    ("flat", "gives float32 (1, 1) for the batch float32 (1, 4): give logits (1, 3)"),
    ("tokens", "returned function: return a torch.nn.Module"),
    ("fails", "called with 3 classes and the shape (4,), raised OSError: no weights here (line "
     "17)"),
    ("stays", "cannot take the batch float32 (1, 4): IndexError: too far (line 21)"),
    ("alone", "raised TypeError: alone() takes 1 positional argument but 2 were given")])
def test_a_bad_model_is_one_line(name: str, says: str) -> None:
    for build in (models.build, models.outline):
        with pytest.raises(ValueError) as caught:
            model(name, 3, (4,))
            build(f"{FILE}:{name}", 3, (4,))
        text = str(caught.value)
        assert text.startswith(f"model={FILE}:{name}") and says in text and "\n" not in text


def test_models_of_images_say_that_they_take_images() -> None:
    for name, shape, dtype in (("small-cnn", (4,), "float32"), ("mlp", (4,), "int64")):
        with pytest.raises(ValueError, match="takes images .* give a model of your own"):
            models.build(name, 3, shape, dtype=dtype)
    with pytest.raises(ValueError, match="norm=batch does nothing in model 'mine.py:net'"):
        models.find("mine.py:net", "batch")


def test_torchvision_is_no_function() -> None:
    assert not plugins.names_function("torchvision:resnet18")
    assert not plugins.names_function("comm:25M")
    assert models.find("torchvision:resnet18") is not None


# ---- a run folder is data

def test_what_a_run_folder_names_is_not_imported(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    (run / "weights.pt").write_bytes(b"")
    (folder / FILE).write_text("open('mark', 'w')\nraise KeyError\n")
    settings = nested(TrainConfig(data=DataConfig(NAME), model=f"{FILE}:net"))
    (run / "config.yaml").write_text(yamlfile.dump(settings))
    with pytest.raises(ConfigError) as caught:
        rerun.find("run", "final", None)
    assert str(caught.value) == (
        f"run=run was made with data.dataset={NAME} and model={FILE}:net: code, which may come "
        "from wherever the run does; look at it, and add --trust_plugins")
    with pytest.raises(ConfigError, match="code that this command was not told to run"):
        data.build(DataConfig(NAME), seed=1)
    assert not (folder / "mark").exists()
    with pytest.raises(ConfigError, match="mine.py cannot be imported: KeyError"):
        rerun.find("run", "final", None, trust=True)
    assert (folder / "mark").exists()


def test_names_of_folders(folder: Path) -> None:
    config = TrainConfig(data=DataConfig("sub/mine.py:load"), model="a.b:net")
    assert config.title == "a.b-net-sub-mine.py-load"
    assert TrainConfig(model="torchvision:resnet18").title == "torchvision-resnet18-fashion-mnist"
    assert TrainConfig(name="first").title == "first"


def test_ranks_compare_the_file(folder: Path) -> None:
    (folder / FILE).write_text(NET)
    parse(TrainConfig, ["--model", f"{FILE}:net"], program="p")
    assert list(plugins.versions()) == [f"plugin {FILE}"]


def test_plan_calls_the_function(folder: Path, capsys: Any) -> None:
    (folder / FILE).write_text(NET + """
def load(root):
    x = torch.zeros(100, 7)
    return dict(train=(x, torch.zeros(100).long()), test=(x, torch.zeros(100).long()), classes=5)
""")
    assert cli.main(["plan", "--hosts", "2", "--data.dataset", NAME, "--model", f"{FILE}:net",
                     "--data.batch_size", "8"]) == 0
    said = capsys.readouterr().out
    assert "40, " in said and "100 training images of mine.py:load" in said
    assert cli.main(["plan", "--hosts", "2", "--data.dataset", NAME, "--examples", "9"]) == 2
    assert "examples=9 is wrong" in capsys.readouterr().err
