"""Digests of the images and labels that a run uses, to compare them between ranks and runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdnoise.training.data import Datasets


def digests_of(datasets: Datasets, *, whole: bool) -> dict[str, str]:
    """Digests of all that is trained on, held out and tested with, by what they are of.

    Args:
        whole: of all contents, where a sample is taken otherwise (`Images.digests`).

    Raises:
        OSError: when a file cannot be read.
    """
    from hvdnoise.training.images import Subset
    found: dict[str, str] = {}
    parts = {"train": datasets.train, "validation": datasets.validation, "test": datasets.test}
    seen: set[int] = set()
    for part, images in parts.items():
        if isinstance(images, Subset):
            found[f"data.{part}.chosen"] = images.chosen_digest()
            images = images.whole
        if images is not None and id(images) not in seen:
            seen.add(id(images))
            found.update((f"data.{part}.{name}", digest)
                         for name, digest in images.digests(whole=whole).items())
    return found
