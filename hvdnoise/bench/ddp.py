"""torch's process group beside Horovod's world, for the variant that uses it.

Rank 0 opens a store on a port that the system chooses, and the others learn address and port
through Horovod; so two benchmarks on one host do not meet. The group uses nccl where every rank
has a GPU of its own, else gloo on the same network interface as the bytes are counted on.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Iterator

import torch
import torch.distributed as dist

from hvdnoise.comm import World
from hvdnoise.limits import Limits, from_environment


@contextmanager
def process_group(wanted: bool, world: World, hosts: list[dict[str, Any]], device: torch.device,
                  interface: str) -> Iterator[None]:
    """The default process group of all ranks, while inside; nothing unless ``wanted``."""
    if not wanted:
        yield
        return
    limit = timedelta(seconds=from_environment().step or Limits().step)
    store = None
    if world.rank == 0:
        store = dist.TCPStore(hosts[0]["address"], 0, world.size, is_master=True,
                              timeout=limit, wait_for_workers=False)
    port = world.gather_json(store.port if store else 0, name="bench.port")[0]
    if store is None:
        store = dist.TCPStore(hosts[0]["address"], port, world.size, is_master=False,
                              timeout=limit, wait_for_workers=False)
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    dist.init_process_group(_backend(world, device), store=store, rank=world.rank,
                            world_size=world.size, timeout=limit)
    yield
    dist.destroy_process_group()  # not after an exception: the others may be stuck


def _backend(world: World, device: torch.device) -> str:
    own = device.type == "cuda" and world.local_size <= torch.cuda.device_count()
    return "nccl" if own else "gloo"
