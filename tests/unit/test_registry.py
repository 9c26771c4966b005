"""The kinds of noise: how they are registered, and the options that their constructors declare."""

from __future__ import annotations

import functools
import re
from typing import Any, Callable, Iterator, Literal

import pytest
import torch

import hvdnoise
from hvdnoise import GNC, CovarianceNoise, make_noise, register_covariance, register_noise
from hvdnoise.noise import COVARIANCES, kinds, noise_options
from hvdnoise.noise.base import Schedule
from hvdnoise.noise.emulated import EmulatedBatchNoise
from hvdnoise.noise.registry import supplied
from hvdnoise.noise.signature import REQUIRED
from tests.noises import forgotten_afterwards

BUILT_IN = ["gnc", "covariance", "sam", "stale-sam", "momentum-sam", "extrapolation",
            "anticorrelated", "pnm"]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with forgotten_afterwards():
        yield


class Plain(hvdnoise.noise.Noise):
    """A noise.

    More of it.

    Args:
        size: how large,
            on two lines.
        first, second: what both are.

    Raises:
        ValueError: never.
    """

    def __init__(self, size: Schedule, *, first: Literal["a", "b"] = "a",
                 second: list[int] | None = None, seed: int = 0, batch_size: int = 1) -> None:
        super().__init__(seed=seed)


class LowRank(EmulatedBatchNoise):
    """Of few directions.

    Args:
        rank: how many.
    """

    def __init__(self, emulated_batch: int, *, rank: int = 3, **options: Any) -> None:
        super().__init__(emulated_batch, **options)
        self.rank = rank


def test_the_built_in_kinds_and_their_options() -> None:
    assert kinds() == BUILT_IN
    assert list(noise_options("gnc")) == ["radius", "lr", "relative", "share", "source",
                                          "lag", "scope", "per", "echo"]
    assert list(noise_options("covariance")) == ["structure", "emulated_batch", "source", "decay",
                                                 "every", "trace", "labels", "damping",
                                                 "eigenvalues", "layers", "skip"]
    assert noise_options("none") == {} and supplied("none") == []
    assert supplied("gnc") == ["seed"] and supplied("covariance") == ["seed", "batch_size"]
    for kind in kinds():
        assert all(option.text for option in noise_options(kind).values())


def test_a_constructor_says_types_defaults_and_texts() -> None:
    register_noise("plain", Plain)
    found = noise_options("plain")
    assert list(found) == ["size", "first", "second"]  # the trainer gives seed and batch_size
    assert (found["size"].hint, found["size"].schedule) == (float, True)
    assert found["size"].default is REQUIRED
    assert found["size"].text == "how large, on two lines."
    assert found["first"].text == found["second"].text == "what both are."
    assert (found["first"].hint, found["first"].default) == (Literal["a", "b"], "a")
    assert found["second"].hint == list[int] | None and not found["second"].schedule


def test_options_handed_on_are_those_of_the_class_above() -> None:
    class Wider(GNC):
        """GNC.

        Args:
            radius: another text.
        """

        def __init__(self, width: int = 1, **options: Any) -> None:
            super().__init__(**options)
    register_noise("wider", Wider)
    found = noise_options("wider")
    assert list(found) == ["width", *noise_options("gnc")]
    assert found["radius"].text == "another text." and found["lag"] == noise_options("gnc")["lag"]


def test_registering_is_a_call_or_a_decorator() -> None:
    assert register_noise("plain", Plain) is Plain
    made: Callable[..., Any] = register_noise("by-function")(lambda **options: GNC(0.1))
    assert isinstance(make_noise("by-function"), GNC) and made is not None
    assert isinstance(make_noise("plain", size=1.0, seed=3), Plain)
    assert register_noise("plain", Plain) is Plain  # again
    twin = type("Plain", (Plain,), {"__module__": Plain.__module__,
                                    "__qualname__": Plain.__qualname__})
    assert register_noise("plain", twin) is twin  # the same after another import
    assert type(make_noise("plain", size=1.0)) is twin
    with pytest.raises(ValueError, match="^kind='plain' is tests.unit.test_registry.Plain already"):
        register_noise("plain", LowRank)
    with pytest.raises(ValueError, match="kind='gnc' is hvdnoise.noise.gnc.GNC already"):
        register_noise("gnc")(Plain)


@pytest.mark.parametrize("kind", ["none", "", "Mine", "1st", "a b", "a:b", "a.b", "a=b", 3, None])
def test_bad_names_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError) as caught:
        register_noise(kind, Plain)
    assert repr(kind) in str(caught.value) and "\n" not in str(caught.value)
    assert kinds() == BUILT_IN


def takes_final(final: float = 0.0) -> Any: ...
def takes_tensor(start: torch.Tensor) -> Any: ...
def takes_place(place: int, /) -> Any: ...
def takes_nobody_knows(place: "Nowhere") -> Any: ...  # type: ignore[name-defined] # noqa: F821


@pytest.mark.parametrize("maker, says", [
    (takes_final, "an option cannot be called 'final'"), (takes_tensor, "'start' is no number"),
    (takes_place, "'place' cannot be given by name"), (takes_nobody_knows, "cannot be read"),
    (functools.partial(GNC, 0.1), "neither a class nor a function"), (3, "neither a class")])
def test_makers_that_flags_cannot_tell_anything_are_refused(maker: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        register_noise("mine", maker)
    assert "\n" not in str(caught.value) and "mine" not in kinds()


def test_an_unknown_kind_is_told_what_there_is() -> None:
    register_noise("plain", Plain)
    for call in (make_noise, noise_options):
        with pytest.raises(ValueError, match="^noise kind='gcn' must be one of none, "
                                             f"{', '.join(BUILT_IN)}, plain$"):
            call("gcn")
    assert make_noise("none") is None


def test_a_covariance_brings_its_own_options() -> None:
    assert register_covariance("low-rank", "workers")(LowRank) is LowRank
    found = noise_options("covariance")
    assert list(found)[:3] == ["structure", "emulated_batch", "source"] and "rank" in found
    assert (found["rank"].hint, found["rank"].default) == (int, None)
    assert found["rank"].text == "(of low-rank) how many."
    noise = CovarianceNoise("low-rank", 4, rank=7, batch_size=2, seed=5)
    assert isinstance(noise, LowRank)
    assert (noise.rank, noise.emulated_batch, noise.batch_size, noise.seed) == (7, 4, 2, 5)
    plain = make_noise("covariance", structure="low-rank", emulated_batch=4)
    assert isinstance(plain, LowRank) and plain.rank == 3
    with pytest.raises(ValueError, match="^rank=7 does not go with structure='full' from "
                                         "source='workers'; options of its own: none$"):
        CovarianceNoise("full", 4, rank=7)
    with pytest.raises(ValueError, match="not one of: full from workers, .*low-rank from workers"):
        CovarianceNoise("low-rank", 4, source="examples")


def test_an_option_that_a_covariance_needs() -> None:
    @register_covariance("needy", "examples")
    class Needy(EmulatedBatchNoise):
        def __init__(self, depth: int, *, emulated_batch: int, batch_size: int | None = None,
                     seed: int = 0) -> None:
            super().__init__(emulated_batch, batch_size=batch_size, seed=seed)
    assert noise_options("covariance")["depth"].default is None  # other structures need none
    with pytest.raises(ValueError, match="structure='needy' from source='examples' needs depth="):
        CovarianceNoise("needy", 4, source="examples")
    assert isinstance(CovarianceNoise("needy", 4, source="examples", depth=1), Needy)


@pytest.mark.parametrize("structure, source, made, says", [
    ("full", "workers", LowRank, "FullWorkerCovariance already"),
    ("Full", "workers", LowRank, "structure='Full' is no name"),
    ("low-rank", "", LowRank, "source='' is no name"),
    ("low-rank", "workers", Plain, "takes emulated_batch")])
def test_bad_covariances_are_refused(structure: str, source: str, made: Any, says: str) -> None:
    before = dict(COVARIANCES)
    with pytest.raises(ValueError, match=re.escape(says)):
        register_covariance(structure, source)(made)
    assert COVARIANCES == before
