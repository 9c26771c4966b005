"""The exponential moving average of the weights, as torch has it.

    average' = decay * average + (1 - decay) * weights        after each step

Buffers (BatchNorm's running statistics) are averaged likewise, so the average can be evaluated as
it is.
"""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def make_ema(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """The average of ``model``, to be updated after each step; None without a decay."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
