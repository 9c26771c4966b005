"""The layout of parameters in flat buckets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hvdnoise.buckets import build_layout, default_bucket_bytes, fingerprint

Named = list[tuple[str, Tensor]]


def parameters(*sizes: int, dtype: torch.dtype = torch.float32) -> Named:
    return [(f"p{n}", nn.Parameter(torch.full((size,), float(n), dtype=dtype)))
            for n, size in enumerate(sizes)]


def names(layout: Any) -> list[tuple[str, ...]]:
    return [bucket.names for bucket in layout.buckets]


def test_in_reverse_order() -> None:
    assert names(build_layout(parameters(1, 2, 3), bucket_bytes=100)) == [("p2", "p1", "p0")]


def test_a_bucket_closes_before_it_passes_the_limit() -> None:
    named = parameters(5, 5, 5, 5)
    assert names(build_layout(named, bucket_bytes=40)) == [("p3", "p2"), ("p1", "p0")]
    assert names(build_layout(named, bucket_bytes=39)) == [("p3",), ("p2",), ("p1",), ("p0",)]


def test_one_parameter_may_exceed_the_limit() -> None:
    assert names(build_layout(parameters(1, 100, 1), bucket_bytes=8)) == [("p2",), ("p1",), ("p0",)]


def test_limit_0_gives_each_its_own() -> None:
    assert len(build_layout(parameters(1, 1, 1), bucket_bytes=0).buckets) == 3


def test_one_dtype_a_bucket() -> None:
    named = parameters(2) + [("half", nn.Parameter(torch.zeros(2, dtype=torch.float16)))] \
        + [("last", nn.Parameter(torch.zeros(2)))]
    layout = build_layout(named, bucket_bytes=100)
    assert names(layout) == [("last", "p0"), ("half",)]
    assert [bucket.dtype for bucket in layout.buckets] == [torch.float32, torch.float16]
    assert names(build_layout(named, bucket_bytes=100, groups=1)) == [("last", "p0"), ("half",)]


def test_frozen_parameters_have_no_place() -> None:
    named = parameters(1, 2, 3)
    named[1][1].requires_grad_(False)
    layout = build_layout(named, bucket_bytes=100)
    assert names(layout) == [("p2", "p0")]
    assert set(layout.places()) == {named[0][1], named[2][1]}


def test_no_trainable_parameter() -> None:
    assert build_layout([], bucket_bytes=100).buckets == ()


def test_a_number_of_groups() -> None:
    named = parameters(1, 1, 1, 1, 1)
    two = build_layout(named, bucket_bytes=0, groups=2)
    assert names(two) == [("p4", "p3", "p2"), ("p1", "p0")]
    assert len(build_layout(named, bucket_bytes=0, groups=9).buckets) == 5


def test_lists_of_groups() -> None:
    named = parameters(1, 1, 1, 1)
    groups = [[named[0][1], named[3][1]], [named[1][1]]]
    layout = build_layout(named, bucket_bytes=0, groups=groups)
    assert names(layout) == [("p3", "p0"), ("p2",), ("p1",)]


def test_views_are_the_parameters_places() -> None:
    named: Named = [("w", nn.Parameter(torch.zeros(2, 3))), ("b", nn.Parameter(torch.zeros(2)))]
    (bucket,) = build_layout(named, bucket_bytes=100).buckets
    flat = torch.arange(8.0)
    bias, weight = bucket.views(flat)
    assert bucket.names == ("b", "w") and (bias.shape, weight.shape) == ((2,), (2, 3))
    assert weight.tolist() == [[2, 3, 4], [5, 6, 7]]  # row-major
    weight[0, 0] = -1
    assert flat[2] == -1
    assert bucket.starts == (0, 2) and bucket.sizes == (2, 6) and bucket.size == 8
    assert bucket.new().shape == (8,) and bucket.new(4).shape == (4, 8)


def test_places_and_indices() -> None:
    named = parameters(5, 5, 5)
    layout = build_layout(named, bucket_bytes=40)
    assert [bucket.index for bucket in layout.buckets] == [0, 1]
    assert layout.places() == {named[2][1]: (0, 0), named[1][1]: (0, 1), named[0][1]: (1, 0)}


def test_the_digest_tells_layouts_apart() -> None:
    digest = build_layout(parameters(2, 4), bucket_bytes=100).digest
    assert build_layout(parameters(2, 4), bucket_bytes=100).digest == digest
    renamed = [(f"other{name}", p) for name, p in parameters(2, 4)]
    reshaped = [("p0", nn.Parameter(torch.zeros(2))), ("p1", nn.Parameter(torch.zeros(2, 2)))]
    others = [build_layout(named, bucket_bytes=size).digest for named, size in (
        (parameters(4, 2), 100), (parameters(2, 4), 8), (renamed, 100), (reshaped, 100),
        (parameters(2, 4, dtype=torch.float64), 100), (parameters(2), 100))]
    assert len({digest, *others}) == 7


def test_the_fingerprint_notices_changes() -> None:
    named = parameters(2, 3)
    every = [p for _, p in named]
    before = fingerprint(every)
    assert before == build_layout(named, bucket_bytes=0).fingerprint
    every[0].grad = torch.ones(2)
    with torch.no_grad():
        every[0].add_(1)
    assert fingerprint(every) == before
    every[0].requires_grad_(False)
    frozen = fingerprint(every)
    every[0].requires_grad_(True)
    every[1].data = every[1].data.double()
    assert len({before, frozen, fingerprint(every), fingerprint(every[:1])}) == 4


@pytest.mark.parametrize("total, expected", [(1000, 2 ** 20), (2 ** 25, 2 ** 23),
                                             (2 ** 30, 25 * 2 ** 20)])
def test_the_default_is_a_share_of_the_whole(monkeypatch: pytest.MonkeyPatch, total: int,
                                             expected: int) -> None:
    monkeypatch.delenv("HOROVOD_FUSION_THRESHOLD", raising=False)
    assert default_bucket_bytes(total) == expected


@pytest.mark.parametrize("threshold, expected", [("", 2 ** 23), ("1000", 1000), ("0", 0),
                                                 (str(2 ** 30), 2 ** 23)])
def test_horovods_threshold_bounds_the_default(monkeypatch: pytest.MonkeyPatch,
                                               threshold: str, expected: int) -> None:
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", threshold)
    assert default_bucket_bytes(2 ** 25) == expected


KINDS = st.sampled_from([torch.float16, torch.float32, torch.float64])


@settings(max_examples=100, deadline=None)
@given(kinds=st.lists(st.tuples(st.integers(0, 50), KINDS), max_size=20),
       limit=st.integers(0, 400), groups=st.none() | st.integers(1, 5))
def test_every_parameter_has_one_place(kinds: list[tuple[int, torch.dtype]], limit: int,
                                       groups: int | None) -> None:
    named: Named = [(f"p{n}", nn.Parameter(torch.zeros(size, dtype=dtype)))
                    for n, (size, dtype) in enumerate(kinds)]
    layout = build_layout(named, bucket_bytes=limit, groups=groups)
    assert sorted(name for b in layout.buckets for name in b.names) == sorted(n for n, _ in named)
    for bucket in layout.buckets:
        assert {p.dtype for p in bucket.parameters} == {bucket.dtype}
        flat = bucket.new()
        for t, view in enumerate(bucket.views(flat)):
            view.fill_(t + 1)
        assert [int((flat == t + 1).sum()) for t in range(len(bucket.sizes))] == list(bucket.sizes)
        assert (flat > 0).all(), "no gaps"
        order = [int(name[1:]) for name in bucket.names]
        assert order == sorted(order, reverse=True)
        if groups is None:
            assert len(order) == 1 or bucket.size * bucket.dtype.itemsize <= limit
