"""What of the collectives can be told without ranks and without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hvdnoise.comm import HorovodWorld


@pytest.mark.parametrize("is_cuda", [False, True])
def test_without_nccl_a_gpus_tensors_go_through_the_hosts_memory(is_cuda: bool) -> None:
    """Horovod's own copy comes from another thread, while gradients must not be written to."""
    world: Any = HorovodWorld.__new__(HorovodWorld)
    world.hvd = SimpleNamespace(nccl_built=lambda: False)
    assert world._through_host(SimpleNamespace(is_cuda=is_cuda)) is is_cuda
