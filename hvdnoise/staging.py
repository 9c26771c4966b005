"""Collectives on a copy in the host's memory, for tensors that a transport cannot take."""

from __future__ import annotations

import socket
import warnings
from abc import abstractmethod
from typing import Callable

import torch
from torch import Tensor

from hvdnoise.world import Finished, Handle, World


class _StagedHandle:
    """A collective on a copy in the host's memory."""

    def __init__(self, handle: Handle, device: torch.device, target: Tensor | None) -> None:
        self._handle, self._device, self._target = handle, device, target

    def wait(self, poll: Callable[[], None] | None = None) -> Tensor:
        result = self._handle.wait(poll)
        if self._target is None:
            return result.to(self._device)
        return self._target.copy_(result.view(self._target.shape))

    def done(self) -> bool:
        return self._handle.done()


class StagingWorld(World):
    """A world whose GPUs talk through NCCL, which takes one rank a GPU.

    Where several ranks share one, what they exchange goes through the host's memory, with a
    warning; and without NCCL.
    """

    _shared_gpu: bool | None = None  # not known yet

    @property
    @abstractmethod
    def has_nccl(self) -> bool:
        """Whether the transport can take a GPU's tensors."""

    def _start(self, start: Callable[[Tensor, Tensor | None], Handle], tensor: Tensor,
               target: Tensor | None) -> Handle:
        """``start(sent, storage of the result)``, on the device or through the host."""
        if self.size == 1:
            return Finished(tensor)
        if not self._through_host(tensor):
            return start(tensor, target)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        host.copy_(tensor)
        return _StagedHandle(start(host, None), tensor.device, target)

    def _through_host(self, tensor: Tensor) -> bool:
        if not tensor.is_cuda:
            return False
        if not self.has_nccl:
            return True  # Horovod would, but a thread of its own would write into the gradients
        if self._shared_gpu is None:
            properties = torch.cuda.get_device_properties(tensor.device)
            mine = [socket.gethostname(), str(getattr(properties, "uuid", tensor.device.index))]
            everyone = self.gather_json(mine, name="hvdnoise.gpus")
            self._shared_gpu = len({tuple(each) for each in everyone}) < self.size
            if self._shared_gpu and self.rank == 0:
                warnings.warn("several ranks share a GPU, which NCCL does not do: gradients go "
                              "through the host's memory; start one rank a GPU to use NCCL",
                              stacklevel=2)
        return self._shared_gpu
