"""Bring a data set to its place: find, download, check, unpack.

Nothing is used before its SHA-256 is right (CIFAR's unpacked pickles: before their MD5 is right,
the sums that torchvision ships; the archive they come from has its SHA-256 checked). Files are
written beside their target and renamed, so a half-written file is never taken for a whole one, and
hosts that share the folder may prepare it at the same time.

Archives are looked for in `DataConfig.root` and then in the folders of the environment variable
HVDNOISE_DATASETS (separated by colons; default /usr/share/datasets, where Debian's package
dataset-fashion-mnist puts its files), in each also under the data set's name.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import tarfile
import threading
import urllib.request
import uuid
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError

from hvdnoise.comm import World
from hvdnoise.training.dataspec import DataConfig, DataError

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 5.0  # until a server answers: a missing data set is an error within 10 s
_STALL_SECONDS = 30.0  # between two pieces of a download
_CHUNK = 1 << 20

# Unpacked file: SHA-256 of its content, of Debian's .gz and of upstream's .gz. The two archives
# hold the same compressed stream; they differ in the time and the name in the gzip header.
FASHION_MNIST = {
    "train-images-idx3-ubyte": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
    "train-labels-idx1-ubyte": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
    "t10k-images-idx3-ubyte": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
    "t10k-labels-idx1-ubyte": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
}
FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
CIFAR_SHA256 = {  # of the .tar.gz
    "cifar10": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    "cifar100": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
}


def prepare(config: DataConfig, world: World) -> None:
    """Have the data set ready and checked on every host. Collective.

    The rank of local rank 0 on each host does the work, the others wait for it.

    Raises:
        DataError: on every rank alike, when any host failed, or when hosts hold different images.
    """
    cause: Exception | None = None
    found: dict[str, str | None] = {"error": None, "content": None}
    if world.local_rank == 0:
        try:
            found["content"] = _prepare_here(config)
        except Exception as error:  # whatever it is, the other ranks must not wait for ever
            cause, found["error"] = error, _one_line(error, config)
    everyone = world.gather_json(found, name="data.prepare")
    for rank, each in enumerate(everyone):
        if each["error"] is not None:
            where = f" ({world.places()[rank]})" if rank else ""
            raise DataError(each["error"] + where) from cause
    contents = {each["content"]: rank for rank, each in enumerate(everyone) if each["content"]}
    if len(contents) > 1:
        places = world.places()
        ranks = " and ".join(places[rank] for rank in sorted(contents.values())[:2])
        raise DataError(f"{ranks} hold different images in {config.path}: "
                        "give every host the same files, or a shared folder")


def _one_line(error: Exception, config: DataConfig) -> str:
    if isinstance(error, DataError):
        return str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return (f"cannot prepare {config.dataset} in {config.path}: {text}; choose a data.root that "
            "can be written and has space")


def _prepare_here(config: DataConfig) -> str | None:
    """Do the work of one host; the digest of the content where it is not fixed by checksums."""
    if config.dataset == "fashion-mnist":
        _prepare_fashion_mnist(config)
    elif config.dataset in CIFAR_SHA256:
        _prepare_cifar(config)
    elif config.dataset == "imagefolder":
        return _check_folders(config.path)
    return None


def _prepare_fashion_mnist(config: DataConfig) -> None:
    folder = config.path / "FashionMNIST" / "raw"  # where torchvision's class looks
    for name, (content, *archives) in FASHION_MNIST.items():
        if digest(folder / name) == content:
            continue
        archive = _archive(f"{name}.gz", archives, FASHION_MNIST_URL + f"{name}.gz", folder, config)
        with gzip.open(archive) as source:
            _write(source, folder / name, [content])


def _prepare_cifar(config: DataConfig) -> None:
    from torchvision import datasets
    kind = datasets.CIFAR10 if config.dataset == "cifar10" else datasets.CIFAR100
    folder = config.path / kind.base_folder
    wanted = dict([*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])])
    if all(digest(folder / name, "md5") == md5 for name, md5 in wanted.items()):
        return
    archive = _archive(kind.filename, [CIFAR_SHA256[config.dataset]], kind.url, config.path, config)
    with tarfile.open(archive) as tar:  # only members of known names are read: no path can escape
        for name, md5 in wanted.items():
            source = tar.extractfile(f"{kind.base_folder}/{name}")
            if source is None:
                raise DataError(f"{archive} holds no file {kind.base_folder}/{name}: delete it")
            _write(source, folder / name, [md5], "md5")


def _check_folders(root: Path) -> str:
    """Check the layout root/{train,val}/CLASS/IMAGE; the digest of all names in it."""
    from torchvision import datasets
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise DataError(f"{root / part} is not a folder: data.root must hold train/CLASS/IMAGE "
                            "and val/CLASS/IMAGE")
    names = hashlib.sha256()
    classes = []
    for part in ("train", "val"):
        try:
            found = datasets.ImageFolder(root / part)
        except FileNotFoundError as error:
            text = " ".join(str(error).split())
            raise DataError(f"{root / part}: {text}; every class needs a folder with images "
                            "in train/ and in val/") from error
        classes.append(found.classes)
        for path, _ in found.samples:
            names.update(os.path.relpath(path, root).encode() + b"\0")
    if classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))[0]
        raise DataError(f"{root}: the class {odd!r} is in only one of train/ and val/: give both "
                        "the same class folders")
    return names.hexdigest()


def digest(path: Path, algorithm: str = "sha256") -> str | None:
    """The checksum of a file in hexadecimal, None where there is no file."""
    if not path.is_file():
        return None
    total = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(_CHUNK), b""):
            total.update(chunk)
    return total.hexdigest()


def _archive(name: str, sums: Collection[str], url: str, home: Path, config: DataConfig) -> Path:
    """The path of a checked archive: found, or else downloaded to ``home``.

    Raises:
        DataError: when there is none and none can be had.
    """
    shared = os.environ.get("HVDNOISE_DATASETS", "/usr/share/datasets").split(os.pathsep)
    folders = [home, config.path, *(Path(each) for each in shared if each)]
    damaged = None
    for path in [place / name for each in folders for place in (each, each / config.dataset)]:
        found = digest(path)
        if found is None:
            continue
        if found in sums:
            return path
        damaged = path
        _log.warning("%s is not used: its SHA-256 is %s", path, found)
    if config.download:
        return _download(url, home / name, sums)
    if damaged is not None:
        raise DataError(f"{damaged} is damaged (wrong SHA-256): delete it and fetch it again, or "
                        "set data.download=true")
    package = "install Debian's dataset-fashion-mnist, " if "mnist" in config.dataset else ""
    raise DataError(f"{config.dataset} is not in {config.path} and {name} not in "
                    f"{os.pathsep.join(shared)}: {package}put {name} into {home}, or set "
                    "data.download=true")


def _download(url: str, target: Path, sums: Collection[str]) -> Path:
    """Fetch and check one file.

    Raises:
        DataError: when it cannot be had or has the wrong checksum; nothing is left behind.
    """
    _log.info("downloading %s", url)
    try:
        with _open(url) as source:
            _write(source, target, sums)
    except (URLError, HTTPException, ConnectionError, TimeoutError, FutureTimeout) as error:
        reason = " ".join(str(error).split()) or f"no answer in {_PATIENCE_SECONDS:g} s"
        raise DataError(f"cannot download {url} ({reason}): fetch it elsewhere and put it into "
                        f"{target.parent}, or name its folder in HVDNOISE_DATASETS") from error
    return target


def _open(url: str) -> IO[bytes]:
    """urlopen, given up when no answer comes; looking up a name has no timeout of its own."""
    result: Future[Any] = Future()

    def attempt() -> None:
        try:
            result.set_result(urllib.request.urlopen(url, timeout=_STALL_SECONDS))
        except Exception as error:
            result.set_exception(error)

    threading.Thread(target=attempt, daemon=True).start()
    response: IO[bytes] = result.result(timeout=_PATIENCE_SECONDS)
    return response


def _write(source: IO[bytes] | gzip.GzipFile, target: Path, sums: Collection[str],
           algorithm: str = "sha256") -> None:
    """Copy to ``target``, which appears only when the checksum is one of ``sums``.

    Raises:
        DataError: when it is not, or when the source breaks off.
    """
    total = hashlib.new(algorithm, usedforsecurity=False)
    with _beside(target) as part:
        with part.open("wb") as file:
            for chunk in iter(lambda: source.read(_CHUNK), b""):
                total.update(chunk)
                file.write(chunk)
        if total.hexdigest() not in sums:
            raise DataError(f"{target} was refused: its {algorithm.upper()} "
                            f"{total.hexdigest()} is not the known one; the source is damaged or "
                            "was cut off: start again, or put a good copy there")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A scratch path beside ``target``, renamed to it when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
