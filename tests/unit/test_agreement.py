"""What ranks must have alike: settings, environment, data; and data that a resumed run finds."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvdnoise.training import agreement, checkpoint, data, fetch
from hvdnoise.training.config import ConfigError, TrainConfig, flatten
from hvdnoise.training.dataspec import DataConfig
from hvdnoise.training.digest import digests_of
from hvdnoise.training.images import ArrayImages
from hvdnoise.training.options import parse
from hvdnoise.world import handshake
from tests.fake_world import ThreadWorld, run_threads
from tests.trainer import speaking, train

__all__ = ["speaking"]  # a fixture
CPU = torch.device("cpu")


def named(facts: list[dict[str, Any]]) -> str | None:
    """What the handshake says of ranks with these facts, all the same; None where it is content."""
    def work(world: ThreadWorld) -> str | None:
        try:
            handshake(world, facts[world.rank])
        except ValueError as error:
            return str(error)
        return None
    said = run_threads(len(facts), work)
    assert len(set(said)) == 1
    return said[0]


def test_every_setting_is_compared_but_those_of_a_host() -> None:
    keys = flatten(parse(TrainConfig, [], program="hvdnoise train"))
    assert len(keys) > 50 and agreement.OF_A_HOST <= keys.keys()
    compared = agreement.settings(parse(TrainConfig, [], program="hvdnoise train"))
    assert compared.keys() == keys.keys() - agreement.OF_A_HOST
    for key in ("epochs", "eval_every", "log_every", "checkpoint.every_steps", "resume", "run_dir",
                "overwrite", "tensorboard", "max_bad_steps", "data.digest", "device"):
        said = named([compared, compared, {**compared, key: "another"}])
        assert said is not None and f"rank 0: {key} on rank 2; start" in said


@pytest.mark.parametrize("name", [
    "HVDNOISE_TIMEOUT", "HVDNOISE_IMAGE", "HOROVOD_FUSION_THRESHOLD", "HOROVOD_CYCLE_TIME",
    "HOROVOD_GLOO_TIMEOUT_SECONDS", "HOROVOD_HIERARCHICAL_ALLREDUCE", "HOROVOD_CPU_OPERATIONS",
    "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "NCCL_ALGO", "NCCL_PROTO",
    "NCCL_P2P_DISABLE", "OMPI_MCA_coll_tuned_allreduce_algorithm", "ATEN_CPU_CAPABILITY",
    "MKL_CBWR"])
def test_variables_that_are_compared(monkeypatch: Any, name: str) -> None:
    before = agreement.environment()
    monkeypatch.setenv(name, "x")
    said = named([before, agreement.environment()])
    assert said is not None and f"environment {name} on rank 1" in said


@pytest.mark.parametrize("name", [
    "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE",
    "HOROVOD_CROSS_RANK", "HOROVOD_HOSTNAME", "HOROVOD_GLOO_IFACE", "HOROVOD_TIMELINE",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT", "HVDNOISE_DATASETS",
    "HVDNOISE_HOME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_DEBUG", "OMPI_COMM_WORLD_RANK",
    "OMPI_MCA_ess_base_vpid", "OMP_NUM_THREADS", "HOSTNAME", "PATH"])
def test_variables_that_may_differ(monkeypatch: Any, name: str) -> None:
    before = agreement.environment()
    monkeypatch.setenv(name, "x")
    assert agreement.environment() == before


# ---- data

def images(content: Any, labels: Any) -> ArrayImages:
    return ArrayImages(content, labels, mean=(0.5,), std=(0.5,), padding=None, seed=0)


def test_one_bit_of_an_image_or_a_label_makes_another_digest() -> None:
    content = np.zeros((100, 1, 8, 8), dtype=np.uint8)
    labels = np.zeros(100, dtype=np.int64)
    whole = images(content, labels).digests(whole=False)
    assert whole.keys() == {"labels", "images"}
    other = content.copy()
    other[57, 0, 3, 4] ^= 1
    assert images(other, labels).digests(whole=False)["images"] != whole["images"]
    wrong = labels.copy()
    wrong[99] = 1
    assert images(content, wrong).digests(whole=False)["labels"] != whole["labels"]
    assert images(content.reshape(100, 1, 4, 16), labels).digests(whole=False) != whole


def test_a_large_set_is_sampled_unless_all_is_asked_for(monkeypatch: Any) -> None:
    monkeypatch.setattr("hvdnoise.training.images.MODERATE_BYTES", 640)
    content = np.zeros((100, 1, 8, 8), dtype=np.uint8)
    other = content.copy()
    other[57] ^= 1  # between two of the ten that are looked at
    labels = np.zeros(100, dtype=np.int64)
    assert images(content, labels).digests(whole=False) == images(other, labels).digests(
        whole=False)
    assert images(content, labels).digests(whole=True) != images(other, labels).digests(whole=True)
    assert images(content, labels).digests(whole=True).keys() == {"labels", "images"}
    assert images(content, labels).digests(whole=False).keys() == {"labels", "sampled images"}


def test_what_is_chosen_counts(tmp_path: Path) -> None:
    def of(seed: int = 0, **options: Any) -> dict[str, str]:
        config = DataConfig("synthetic", num_examples=64, image_size=8, **options)
        return digests_of(data.build(config, seed=seed), whole=False)
    assert of() == of() and of().keys() == {
        "data.train.labels", "data.train.images", "data.test.labels", "data.test.images"}
    assert of(seed=1)["data.train.images"] != of()["data.train.images"]
    held_out = of(validation=16)
    assert held_out["data.train.images"] == of()["data.train.images"]
    assert "data.validation.chosen" in held_out and "data.validation.images" not in held_out
    assert of(validation=16, label_noise=0.5)["data.train.chosen"] != held_out["data.train.chosen"]


def test_sixty_thousand_images_take_little_time() -> None:
    content = np.random.default_rng(0).integers(0, 256, (60_000, 1, 28, 28), dtype=np.uint8)
    labels = np.zeros(60_000, dtype=np.int64)
    started = time.process_time()
    images(content, labels).digests(whole=False)
    seconds = time.process_time() - started
    print(f"{seconds:.3f} s")
    assert seconds < 0.5


def folder_of_images(root: Path, count: int = 16) -> Path:
    from PIL import Image
    draws = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.bmp")
    return root


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def test_an_image_folder_by_names_sizes_and_contents(tmp_path: Path, monkeypatch: Any) -> None:
    root = folder_of_images(tmp_path / "set", 40)

    def of(whole: bool = False) -> dict[str, str]:
        return digests_of(data.build(DataConfig("imagefolder", str(root), image_size=8), seed=0),
                          whole=whole)
    before, path = of(), root / "train" / "b" / "17.bmp"
    flip(path)
    assert {key for key, value in of().items() if value != before[key]} == {"data.train.images"}
    flip(path)
    path.rename(path.with_name("171.bmp"))
    assert "data.train.names and sizes" in {key for key, value in of().items()
                                            if value != before[key]}
    path.with_name("171.bmp").rename(path)
    assert of() == before
    monkeypatch.setattr("hvdnoise.training.folder.MODERATE_BYTES", 1)
    sampled, every = of(), of(whole=True)
    assert "data.train.sampled images" in sampled and sampled.keys().isdisjoint(
        {"data.train.images"})
    odd = 0
    for number in range(0, 40, 3):
        flip(root / "train" / "a" / f"{number}.bmp")
        odd += of() != sampled
        assert of(whole=True) != every
        flip(root / "train" / "a" / f"{number}.bmp")
    assert 5 <= odd < 14  # 64 of 80 are looked at
    path.write_bytes(path.read_bytes() + b"0")
    assert of()["data.train.names and sizes"] != sampled["data.train.names and sizes"]


def test_a_rank_with_other_data_is_named_on_all(tmp_path: Path) -> None:
    roots = [folder_of_images(tmp_path / str(rank)) for rank in range(3)]
    flip(roots[1] / "train" / "a" / "3.bmp")
    one_at_a_time = threading.Lock()

    def work(world: ThreadWorld) -> str:
        config = DataConfig("imagefolder", str(roots[world.rank]), image_size=8)
        with one_at_a_time:
            datasets = data.build(config, seed=0)
        with pytest.raises(ConfigError) as caught:
            agreement.agree_on_data(datasets, config, CPU, world)
        return str(caught.value)
    said = run_threads(3, work)
    assert len(set(said)) == 1 and "data.train.images on rank 1; start" in said[0]


def test_a_rank_that_cannot_read_its_data_is_named_on_all(tmp_path: Path) -> None:
    config = DataConfig("imagefolder", str(folder_of_images(tmp_path / "set")), image_size=8)
    datasets = data.build(config, seed=0)
    gone = data.build(config, seed=0)
    gone.train.samples.append((str(tmp_path / "nowhere.bmp"), 0))  # type: ignore[attr-defined]

    def work(world: ThreadWorld) -> None:
        with pytest.raises(ConfigError, match=r"nowhere.bmp.*\(rank 1\)"):
            agreement.agree_on_data(gone if world.rank else datasets, config, CPU, world)
    run_threads(2, work)


def on_images(root: Path, folder: Path, *flags: str, **options: Any) -> dict[str, Any]:
    return train(folder, "--data.dataset", "imagefolder", "--data.root", str(root), *flags,
                 **options)


def contents(folder: Path) -> dict[Path, bytes]:
    """All but the logs, which the first run in this process keeps open."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.parent.name != "logs"}


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    root, folder = folder_of_images(tmp_path / "set"), tmp_path / "run"
    on_images(root, folder, stop_after=3, expect=75)
    digests = json.loads((folder / "environment.json").read_text())["data"]
    assert digests["data.train.images"] and len(digests) == 6
    flip(root / "val" / "b" / "3.bmp")
    before = contents(folder)
    with pytest.raises(ConfigError, match="cannot resume with other data: data.test.images of"):
        on_images(root, folder, "--resume", "auto")
    assert contents(folder) == before
    flip(root / "val" / "b" / "3.bmp")
    moved = root.rename(tmp_path / "elsewhere")
    assert on_images(moved, folder, "--resume", "auto", "--data.digest", "whole")["steps"]


def test_a_checkpoint_without_a_digest_is_gone_on_from_and_that_is_said(tmp_path: Path) -> None:
    train(tmp_path, stop_after=3, expect=75)
    (path,) = (tmp_path / "checkpoints").glob("*/shared.pt")
    shared = checkpoint.read(path)
    del shared["data"]
    torch.save(shared, path)
    manifest = json.loads(path.with_name("manifest.json").read_text())
    manifest["files"]["shared.pt"] = {"bytes": path.stat().st_size, "sha256": fetch.digest(path)}
    path.with_name("manifest.json").write_text(json.dumps(manifest))
    train(tmp_path, "--resume", "auto")
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "does not say what data it was trained on: not compared" in log
