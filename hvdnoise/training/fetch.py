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
from hvdnoise.training.errors import CommonDataError

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 5.0  # until a server answers: a missing data set is an error within 10 s
_STALL_SECONDS = 30.0  # between two pieces of a download
_CHUNK = 1 << 20
SHARED = "/usr/share/datasets"  # where Debian's packages put archives


def prepare(config: DataConfig, world: World) -> None:
    """Have the data set ready and checked on every host. Collective.

    The rank of local rank 0 on each host does the work, the others wait for it.

    Raises:
        CommonDataError: on every rank alike, when any host failed, or when hosts hold different
            images.
    """
    cause: Exception | None = None
    found: dict[str, str | None] = {"error": None, "content": None}
    if world.local_rank == 0:
        try:
            found["content"] = prepare_here(config)
        except DataError as error:
            cause, found["error"] = error, str(error)
    everyone = world.gather_json(found, name="data.prepare")
    for rank, each in enumerate(everyone):
        if each["error"] is not None:
            where = f" ({world.places()[rank]})" if rank else ""
            raise CommonDataError(each["error"] + where) from cause
    contents = {each["content"]: rank for rank, each in enumerate(everyone) if each["content"]}
    if len(contents) > 1:
        places = world.places()
        ranks = " and ".join(places[rank] for rank in sorted(contents.values())[:2])
        raise CommonDataError(f"{ranks} hold different images in {config.path}: "
                              "give every host the same files, or a shared folder")


def prepare_here(config: DataConfig) -> str | None:
    """As `prepare`, for this process alone; see `DataRecord.prepare`.

    Raises:
        DataError: whatever fails.
    """
    try:
        return config.record.prepare(config)
    except Exception as error:  # whatever it is, other ranks must not wait for ever
        raise DataError(_one_line(error, config)) from error


def _one_line(error: Exception, config: DataConfig) -> str:
    if isinstance(error, DataError):
        return str(error)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return (f"cannot prepare {config.dataset} in {config.path}: {text}; choose a data.root that "
            "can be written and has space")


def unpack_gz(url: str, archives: Collection[str], target: Path, content: str,
              config: DataConfig) -> None:
    """Have the file ``target``, out of a .gz of its own, unless it is there already.

    Args:
        url: of the archive, whose name is looked for here too.
        archives: the SHA-256 of each archive that is right.
        content: the SHA-256 of the file.

    Raises:
        DataError: when it cannot be had, or is not right.
    """
    if digest(target) == content:
        return
    archive = _archive(url.rpartition("/")[2], archives, url, target.parent, config)
    with gzip.open(archive) as source:
        _write(source, target, [content])


def unpack_tar(url: str, name: str, archive_sum: str, wanted: dict[str, str],
               config: DataConfig) -> None:
    """Have files out of one .tar.gz below the root, unless all are there already.

    Args:
        url, name: of the archive.
        archive_sum: its SHA-256.
        wanted: the MD5 of each file by its path, in the archive and below the root.

    Raises:
        DataError: when they cannot be had, or are not right.
    """
    if all(digest(config.path / member, "md5") == md5 for member, md5 in wanted.items()):
        return
    archive = _archive(name, [archive_sum], url, config.path, config)
    with tarfile.open(archive) as tar:  # only members of known names are read: no path can escape
        for member, md5 in wanted.items():
            source = tar.extractfile(member)
            if source is None:
                raise DataError(f"{archive} holds no file {member}: delete it")
            _write(source, config.path / member, [md5], "md5")


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
    shared = os.environ.get("HVDNOISE_DATASETS", SHARED).split(os.pathsep)
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
    package = config.record.package
    install = f"install Debian's {package}, " if package else ""
    raise DataError(f"{config.dataset} is not in {config.path} and {name} not in "
                    f"{os.pathsep.join(shared)}: {install}put {name} into {home}, or set "
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
