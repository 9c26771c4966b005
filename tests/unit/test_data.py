"""Data sets in their true on-disk formats, written small by the tests; damage is refused."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import os
import pickle
import shutil
import struct
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import datasets as torchvision_datasets

from hvdnoise.comm import World
from hvdnoise.training import data, fetch
from hvdnoise.training.data import DataConfig, DataError
from hvdnoise.training.datasets import DATASETS
from hvdnoise.training.folder import FolderImages
from hvdnoise.training.images import Images, Subset, noisy_labels
from tests.fake_world import ThreadWorld, run_threads
from tests.fashion import REAL
from tests.folders import write_folders


@pytest.fixture(autouse=True)
def no_system_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HVDNOISE_DATASETS", str(tmp_path / "shared"))


@pytest.fixture
def world() -> World:
    worlds: list[World] = run_threads(1, lambda world: world)
    return worlds[0]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server on loopback: its address and the folder it serves."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}/", folder
    served.shutdown()
    served.server_close()


def change(monkeypatch: pytest.MonkeyPatch, name: str, **facts: object) -> None:
    """Put a data set's record aside for one with other facts."""
    monkeypatch.setitem(DATASETS, name, dataclasses.replace(
        DATASETS[name], **facts))  # type: ignore[arg-type]


def known_files() -> dict[str, tuple[str, ...]]:
    """The checksums in the record of Fashion-MNIST."""
    found: dict[str, tuple[str, ...]] = getattr(DATASETS["fashion-mnist"], "files")
    return found


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


# ---- Fashion-MNIST ----

def idx(array: np.ndarray) -> bytes:
    """The IDX format: magic 00 00 08 (uint8) and the number of dimensions, sizes, bytes."""
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Small Fashion-MNIST archives in the shared folder, as Debian's package lays them out."""
    rng = np.random.default_rng(0)
    arrays, sums = {}, {}
    for part, count in (("train", 30), ("t10k", 8)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, count, np.uint8)
    folder = tmp_path / "shared" / "fashion-mnist"
    folder.mkdir(parents=True)
    for name, array in arrays.items():
        packed = gzip.compress(idx(array))
        (folder / f"{name}.gz").write_bytes(packed)
        sums[name] = (sha256(idx(array)), sha256(packed), "0" * 64)
    change(monkeypatch, "fashion-mnist", files=sums)
    return arrays


def fashion_config(tmp_path: Path, **options: object) -> DataConfig:
    return DataConfig("fashion-mnist", **{  # type: ignore[arg-type]
        "root": str(tmp_path / "data"), "download": False, **options})


def test_fashion_mnist_is_unpacked_and_read(tmp_path: Path, world: World,
                                            fashion: dict[str, np.ndarray]) -> None:
    config = fashion_config(tmp_path)
    data.prepare(config, world)
    sets = data.build(config, seed=0)
    assert sets.spec == data.DataSpec("fashion-mnist", 10, (1, 28, 28), 30, 8)
    image, label = sets.train[3]
    assert image.dtype == torch.uint8
    assert np.array_equal(image[0], fashion["train-images-idx3-ubyte"][3])
    assert label == fashion["train-labels-idx1-ubyte"][3]
    images, labels = sets.test.batch(range(8), None)
    expected = (fashion["t10k-images-idx3-ubyte"] / 255 - 0.2860) / 0.3530
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    np.testing.assert_allclose(images[:, 0], expected, atol=1e-6)
    assert labels.tolist() == fashion["t10k-labels-idx1-ubyte"].tolist()
    assert len(data.build(fashion_config(tmp_path, limit=7), seed=0).train) == 7
    assert not list(tmp_path.rglob("*.part"))
    file = tmp_path / "data/FashionMNIST/raw/t10k-labels-idx1-ubyte"
    for short in (file.read_bytes()[:-1], b""):
        file.write_bytes(short)
        with pytest.raises(DataError, match="cannot read fashion-mnist in"):
            data.build(config, seed=0)


def test_a_damaged_unpacked_file_is_prepared_again(tmp_path: Path, world: World,
                                                   fashion: dict[str, np.ndarray]) -> None:
    config = fashion_config(tmp_path)
    data.prepare(config, world)
    target = tmp_path / "data/FashionMNIST/raw/train-images-idx3-ubyte"
    whole = target.read_bytes()
    for broken in (whole[:-9], whole[:99] + bytes([whole[99] ^ 1]) + whole[100:], b""):
        target.write_bytes(broken)
        data.prepare(config, world)
        assert target.read_bytes() == whole


def test_a_damaged_archive_is_refused(tmp_path: Path, world: World,
                                      fashion: dict[str, np.ndarray]) -> None:
    archive = tmp_path / "shared/fashion-mnist/t10k-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz is damaged .*delete it"):
        data.prepare(fashion_config(tmp_path), world)
    assert not (tmp_path / "data/FashionMNIST/raw/t10k-images-idx3-ubyte").exists()


def test_content_is_checked_besides_the_archive(tmp_path: Path, world: World,
                                                fashion: dict[str, np.ndarray],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {name: ("1" * 64, *rest) for name, (_, *rest) in known_files().items()}
    change(monkeypatch, "fashion-mnist", files=sums)
    with pytest.raises(DataError, match="train-images-idx3-ubyte was refused"):
        data.prepare(fashion_config(tmp_path), world)
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_a_missing_set_is_one_error_on_all_ranks(tmp_path: Path) -> None:
    config = fashion_config(tmp_path)

    def work(world: ThreadWorld) -> str:
        with pytest.raises(DataError) as caught:
            data.prepare(config, world)
        return str(caught.value)

    start = time.monotonic()
    texts = run_threads(3, work, local_size=3)
    assert time.monotonic() - start < 5
    assert len(set(texts)) == 1 and "\n" not in texts[0]
    for part in (str(tmp_path / "data"), "dataset-fashion-mnist", "data.download=true"):
        assert part in texts[0]


def test_hosts_may_prepare_a_shared_folder_together(tmp_path: Path,
                                                    fashion: dict[str, np.ndarray]) -> None:
    config = fashion_config(tmp_path)
    with fetch._beside(tmp_path / "x") as one, fetch._beside(tmp_path / "x") as other:
        assert one != other
        one.touch()
        other.touch()
    run_threads(3, lambda world: data.prepare(config, world), local_size=1)
    assert len(data.build(config, seed=0).train) == 30
    assert not list(tmp_path.rglob("*.part"))


def test_an_unwritable_root_is_one_line(tmp_path: Path, world: World,
                                        fashion: dict[str, np.ndarray]) -> None:
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(DataError, match="cannot prepare fashion-mnist in .*choose a data.root"):
        data.prepare(fashion_config(tmp_path), world)


def test_a_cut_off_download_is_refused_and_fetched_again(
        tmp_path: Path, world: World, fashion: dict[str, np.ndarray],
        server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    address, folder = server
    change(monkeypatch, "fashion-mnist", url=address)
    shared = tmp_path / "shared/fashion-mnist"
    for archive in list(shared.iterdir()):
        archive.rename(folder / archive.name)
    archive = folder / "t10k-labels-idx1-ubyte.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:-3])
    config = fashion_config(tmp_path, download=True)
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte.gz was refused"):
        data.prepare(config, world)
    raw = tmp_path / "data/FashionMNIST/raw"
    assert not [path.name for path in raw.iterdir() if "t10k-labels" in path.name]
    archive.write_bytes(whole)
    data.prepare(config, world)
    assert len(data.build(config, seed=0).test) == 8
    archive.unlink()
    (raw / "t10k-labels-idx1-ubyte").unlink()
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="cannot download http://127.*404.*put it into"):
        data.prepare(config, world)


def test_a_silent_server_is_given_up(tmp_path: Path, world: World,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    import socket
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        change(monkeypatch, "fashion-mnist",
               url=f"http://127.0.0.1:{silent.getsockname()[1]}/")
        monkeypatch.setattr(fetch, "_PATIENCE_SECONDS", 0.3)
        with pytest.raises(DataError, match="cannot download"):
            data.prepare(fashion_config(tmp_path, download=True), world)


@pytest.mark.skipif(REAL is None, reason="Fashion-MNIST is not on this machine")
def test_the_real_fashion_mnist(tmp_path: Path, world: World,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    assert REAL is not None
    monkeypatch.setenv("HVDNOISE_DATASETS", str(REAL))
    config = fashion_config(tmp_path)
    data.prepare(config, world)
    sets = data.build(config, seed=0)
    assert (sets.spec.num_train, sets.spec.num_test) == (60000, 10000)
    images, labels = sets.train.batch(range(60000), None)
    assert abs(images.double().mean()) < 1e-3 and abs(images.double().std() - 1) < 1e-3
    assert labels.bincount().tolist() == [6000] * 10


@pytest.mark.skipif(REAL is None, reason="Fashion-MNIST is not on this machine")
def test_upstream_archives_hold_the_same_stream() -> None:
    """Upstream's .gz = Debian's with time and name in the header; torchvision knows its MD5."""
    assert REAL is not None
    known = dict(torchvision_datasets.FashionMNIST.resources)
    for name, (_, debian, upstream) in known_files().items():
        packed = (REAL / f"{name}.gz").read_bytes()
        assert sha256(packed) == debian
        seconds = 1504176606 if name.startswith("train") else 1504176627  # 2017-08-31
        head = b"\x1f\x8b\x08\x08" + struct.pack("<I", seconds) + b"\0\x03" + name.encode() + b"\0"
        rebuilt = head + packed[10:]
        assert md5(rebuilt) == known[f"{name}.gz"]
        assert sha256(rebuilt) == upstream


# ---- CIFAR ----

def cifar_files(kind: str, rng: np.random.Generator) -> dict[str, bytes]:
    """The pickles of the python version: (N, 3072) uint8, red then green then blue planes."""
    ten = kind == "cifar10"
    files = {}
    parts = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    for part in parts:
        count = 4
        batch: dict[str, object] = {
            "batch_label": part, "data": rng.integers(0, 256, (count, 3072), np.uint8),
            "filenames": [f"{part}_{i}.png" for i in range(count)]}
        labels = rng.integers(0, 10 if ten else 100, count).tolist()
        batch |= {"labels": labels} if ten else {
            "fine_labels": labels, "coarse_labels": [label // 5 for label in labels]}
        files[part] = pickle.dumps(batch, protocol=2)
    meta: dict[str, object] = {"label_names": [f"class {i}" for i in range(10)]} if ten else {
        "fine_label_names": [f"class {i}" for i in range(100)],
        "coarse_label_names": [f"group {i}" for i in range(20)]}
    files["batches.meta" if ten else "meta"] = pickle.dumps(meta, protocol=2)
    return files


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request: pytest.FixtureRequest, tmp_path: Path,
          monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, bytes], Path]:
    """(name, unpacked files, archive) with torchvision's and our checksums set to match."""
    name = request.param
    kind = torchvision_datasets.CIFAR10 if name == "cifar10" else torchvision_datasets.CIFAR100
    files = cifar_files(name, np.random.default_rng(1))
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(kind, table, [[part, md5(files[part])]
                                          for part, _ in getattr(kind, table)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(files[kind.meta["filename"]])})
    source = tmp_path / "source" / kind.base_folder
    source.mkdir(parents=True)
    for part, content in files.items():
        (source / part).write_bytes(content)
    archive = tmp_path / "shared" / kind.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=kind.base_folder)
    change(monkeypatch, name, sha256=sha256(archive.read_bytes()))
    return name, files, archive


def test_cifar_is_unpacked_and_read(tmp_path: Path, world: World,
                                    cifar: tuple[str, dict[str, bytes], Path]) -> None:
    name, files, _ = cifar
    config = DataConfig(name, root=str(tmp_path / "data"), download=False)
    data.prepare(config, world)
    sets = data.build(config, seed=0)
    ten = name == "cifar10"
    assert sets.spec == data.DataSpec(name, 10 if ten else 100, (3, 32, 32), 20 if ten else 4, 4)
    raw = pickle.loads(files["data_batch_2" if ten else "train"])
    index = 6 if ten else 2  # example 2 of that file
    image, label = sets.train[index]
    assert np.array_equal(image, raw["data"][2].reshape(3, 32, 32))
    assert label == raw["labels" if ten else "fine_labels"][2]
    assert sets.test.classes == tuple(f"class {i}" for i in range(10 if ten else 100))
    assert torch.equal(sets.test.normalise(sets.test.stored([1, 0])),
                       sets.test.batch([1, 0], None)[0])


def test_damaged_cifar_is_never_unpickled(tmp_path: Path, world: World,
                                          cifar: tuple[str, dict[str, bytes], Path]) -> None:
    name, files, archive = cifar
    config = DataConfig(name, root=str(tmp_path / "data"), download=False)
    data.prepare(config, world)
    part = "test_batch" if name == "cifar10" else "test"
    target = next((tmp_path / "data").rglob(part))
    spy = f"cbuiltins\nopen\n(S'{tmp_path}/opened'\nS'w'\ntR.".encode()  # a hostile pickle
    target.write_bytes(spy)
    with pytest.raises(DataError, match="prepare first"):
        data.build(config, seed=0)
    data.prepare(config, world)
    assert target.read_bytes() == files[part]
    target.write_bytes(spy)
    archive.write_bytes(archive.read_bytes()[:-8])
    with pytest.raises(DataError, match="is damaged .wrong SHA-256.: delete it"):
        data.prepare(config, world)
    assert not (tmp_path / "opened").exists()


# ---- folders of images ----

def folder_config(root: Path, **options: object) -> DataConfig:
    return DataConfig("imagefolder", **{  # type: ignore[arg-type]
        "root": str(root), "image_size": 16, **options})


def test_image_folders_are_read(tmp_path: Path, world: World) -> None:
    write_folders(tmp_path)
    config = folder_config(tmp_path)
    data.prepare(config, world)
    sets = data.build(config, seed=0)
    assert sets.spec == data.DataSpec("imagefolder", 3, (3, 16, 16), 10, 6)
    assert sets.test.classes == list("abc")
    assert torch.equal(sets.test.normalise(sets.test.stored([5, 0])),
                       sets.test.batch([5, 0], None)[0])
    images, labels = sets.train.batch(range(10), 0)
    assert images.shape == (10, 3, 16, 16) and images.dtype == torch.float32
    assert labels.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    black = [i for i in range(4) if sets.train[i][0].size == (30, 30)]
    images, _ = sets.train.batch(black, None)
    expected = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(images, expected.view(1, 3, 1, 1).expand(1, 3, 16, 16))


def test_augmentation_of_folders_leaves_other_draws_alone(tmp_path: Path) -> None:
    write_folders(tmp_path)
    sets = data.build(folder_config(tmp_path), seed=0)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = sets.train.batch([4, 2], 7)[0]
    assert torch.equal(torch.rand(3), expected)
    again = sets.train.batch([9, 2, 4], 7)[0]
    assert torch.equal(first[0], again[2]) and torch.equal(first[1], again[1])
    assert not torch.equal(sets.train.batch([2], 8)[0][0], first[1])


def test_each_file_of_a_folder_has_its_own_draws(tmp_path: Path) -> None:
    write_folders(tmp_path)
    for i in (1, 2):
        shutil.copy(tmp_path / "train/b/0.jpg", tmp_path / f"train/b/{i}.jpg")
    sets = data.build(folder_config(tmp_path), seed=0)
    assert isinstance(sets.train, FolderImages)
    copies = [i for i, (path, _) in enumerate(sets.train.samples)
              if path.endswith(("b/0.jpg", "b/1.jpg", "b/2.jpg"))]
    plain, augmented = sets.train.batch(copies, None)[0], sets.train.batch(copies, 0)[0]
    assert torch.equal(plain[0], plain[1]) and not torch.equal(augmented[0], augmented[1])


def test_wrong_folders_are_refused(tmp_path: Path, world: World) -> None:
    with pytest.raises(DataError, match="train is not a folder.*must hold train/CLASS/IMAGE"):
        data.prepare(folder_config(tmp_path), world)
    write_folders(tmp_path)
    (tmp_path / "train/d").mkdir()
    with pytest.raises(DataError, match="every class needs a folder with images"):
        data.prepare(folder_config(tmp_path), world)
    os.rename(tmp_path / "train/a/0.jpg", tmp_path / "train/d/0.jpg")
    with pytest.raises(DataError, match="the class 'd' is in only one of train/ and val/"):
        data.prepare(folder_config(tmp_path), world)


def test_hosts_with_different_images_are_refused(tmp_path: Path) -> None:
    for host in ("0", "1"):
        write_folders(tmp_path / host)
    (tmp_path / "1/train/a/0.jpg").unlink()

    def work(world: ThreadWorld) -> str:
        with pytest.raises(DataError) as caught:
            data.prepare(folder_config(tmp_path / str(world.rank // 2)), world)
        return str(caught.value)

    texts = run_threads(4, work, local_size=2)
    assert all("rank 0 and rank 2 hold different images" in text for text in texts)


def test_a_broken_image_names_its_file(tmp_path: Path) -> None:
    write_folders(tmp_path)
    sets = data.build(folder_config(tmp_path), seed=0)
    path = tmp_path / "train/b/0.jpg"
    for broken in (path.read_bytes()[:200], b"no image"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="b/0.jpg cannot be read as an image"):
            sets.train.batch([4], None)


# ---- which images are used, and with which labels ----

@pytest.fixture(params=["synthetic", "imagefolder"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Of a data set of 10 training images, in memory or in files."""
    if request.param == "synthetic":
        return {"dataset": "synthetic", "num_examples": 10, "image_size": 8, "num_classes": 3}
    write_folders(tmp_path)
    return {"dataset": "imagefolder", "root": str(tmp_path), "image_size": 16}


def indices(images: Images | None) -> list[int]:
    assert isinstance(images, Subset)
    return images.indices.tolist()


def test_images_are_held_out_and_left_out_by_the_seed(settings: dict[str, Any]) -> None:
    whole = data.build(DataConfig(**settings), seed=0)
    assert whole.validation is None and not isinstance(whole.train, Subset)
    sets = data.build(DataConfig(**settings, validation=4), seed=0)
    assert sorted(indices(sets.train) + indices(sets.validation)) == list(range(10))
    assert (sets.spec.num_train, sets.spec.num_validation) == (6, 4)
    assert sets.spec.num_test == len(sets.test) == len(whole.test)
    few = data.build(DataConfig(**settings, validation=4, limit=3), seed=0)
    fewer = data.build(DataConfig(**settings, validation=4, limit=2), seed=0)
    assert indices(few.validation) == indices(sets.validation)
    assert set(indices(fewer.train)) < set(indices(few.train)) < set(indices(sets.train))
    many = data.build(DataConfig(**settings, validation=4, limit=60), seed=0)
    assert indices(many.train) == indices(sets.train)
    seeds = [data.build(DataConfig(**settings, validation=4, limit=3), seed=seed)
             for seed in range(5)]
    assert len({tuple(indices(each.validation)) for each in seeds}) > 2
    assert len({tuple(indices(each.train)) for each in seeds}) > 2
    for part in (few.train, few.validation):
        assert part is not None
        for epoch in (None, 3):  # an image is augmented as it would be in the whole set
            images, labels = part.batch(range(len(part)), epoch)
            expected, its_labels = whole.train.batch(indices(part), epoch)
            assert torch.equal(images, expected) and torch.equal(labels, its_labels)
        assert part[1][1] == whole.train[indices(part)[1]][1]


def test_label_noise_is_in_training_labels_alone(settings: dict[str, Any]) -> None:
    clean = data.build(DataConfig(**settings, validation=4), seed=2)
    noisy = data.build(DataConfig(**settings, validation=4, label_noise=0.5), seed=2)
    assert indices(noisy.train) == indices(clean.train)
    assert noisy.validation is not None and clean.validation is not None
    for part, share in ((0, 3), (1, 0), (2, 0)):
        before, after = ((sets.train, sets.validation, sets.test)[part] for sets in (clean, noisy))
        assert before is not None and after is not None
        labels = after.batch(range(len(after)), 1 if part == 0 else None)[1]
        assert labels.tolist() == after.labels.tolist() == [
            after[place][1] for place in range(len(after))]
        assert int((torch.from_numpy(before.labels) != labels).sum()) == share
    alone = data.build(DataConfig(**settings, label_noise=0.31), seed=2)
    assert int((alone.train.labels != data.build(DataConfig(**settings), seed=2).train.labels
                ).sum()) == 3


def test_a_wrong_label_is_any_other_class_alike() -> None:
    labels = np.repeat(np.arange(5), 20_000)
    noisy = noisy_labels(labels, 0.3, 5, seed=1)
    counts = np.array([[np.sum(noisy[labels == a] == b) for b in range(5)] for a in range(5)])
    wrong = counts[~np.eye(5, dtype=bool)]
    assert wrong.sum() == 30_000
    expected = 30_000 / 20  # of each pair of classes; 19 degrees of freedom
    assert ((wrong - expected) ** 2 / expected).sum() < stats.chi2.ppf(1 - 1e-6, 19)
    assert not np.array_equal(noisy, noisy_labels(labels, 0.3, 5, seed=2))
    assert noisy_labels(labels[:7], 0.0, 5, seed=1).tolist() == labels[:7].tolist()


def test_ranks_and_virtual_workers_get_the_same_examples_of_a_subset() -> None:
    config = DataConfig("synthetic", num_examples=40, image_size=8, validation=7, limit=27,
                        label_noise=0.2)

    def batches(ranks: int, virtual: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = {}
        for rank in range(ranks):
            sets = data.build(config, seed=3)
            sampler = data.WorkerSampler(len(sets.train), num_workers=4, batch_size=2, seed=3,
                                         worker_ids=range(rank * virtual, (rank + 1) * virtual))
            for number, batch in enumerate(data.train_loader(sets, sampler)):
                found[number // virtual, rank * virtual + number % virtual] = batch
        return [found[key] for key in sorted(found)]
    alone = batches(1, 4)
    assert len(alone) == 3 * 4
    for other in (batches(2, 2), batches(4, 1)):
        assert all(torch.equal(a, b) for one, two in zip(alone, other, strict=True)
                   for a, b in zip(one, two))


def test_too_few_images_are_one_line() -> None:
    with pytest.raises(DataError, match="data.validation=10 leaves none of the 10 training images"):
        data.build(DataConfig("synthetic", num_examples=10, image_size=8, validation=10), seed=0)


# ---- settings ----

def test_wrong_settings_are_one_line() -> None:
    for options, text in (
            ({"dataset": "mnist"}, "data.dataset=mnist is wrong: give one of fashion-mnist"),
            ({"batch_size": 0}, "data.batch_size=0 is too small: give 1 or more"),
            ({"dataset": "cifar10", "image_size": 64}, "data.image_size=64 does not go with cifar"),
            ({"limit": 0}, "data.limit=0 is too small"),
            ({"validation": -1}, "data.validation=-1 is too small: give 0 or more"),
            ({"repeat": 0}, "data.repeat=0 is too small: give 1 or more"),
            ({"label_noise": 1.0}, "data.label_noise=1.0 is wrong: give 0 <= share < 1"),
            ({"label_noise": -0.1}, "data.label_noise=-0.1 is wrong"),
            ({"loader_workers": -1}, "data.loader_workers=-1 is too small: give 0 or more")):
        with pytest.raises(DataError, match=text):
            DataConfig(**options)
