"""Structured gradient noise for large-batch data-parallel training with Horovod or torchrun.

`DistributedOptimizer` takes the place of ``hvd.DistributedOptimizer``; `GNC` and
`CovarianceNoise` are the noises, `register_noise` adds others; `init` starts Horovod, also inside a
larger MPI program, or torch.distributed under torchrun. `SAM`, `StaleSAM`, `MomentumSAM`,
`Extrapolation`, `AnticorrelatedNoise` and `PNM` are what others do, to compare with.
"""

from hvdnoise.comm import init, shutdown
from hvdnoise.noise import (
    GNC,
    PNM,
    SAM,
    AnticorrelatedNoise,
    CovarianceNoise,
    Extrapolation,
    MomentumSAM,
    StaleSAM,
    make_noise,
    register_covariance,
    register_noise,
)
from hvdnoise.optimizer import DistributedOptimizer

__all__ = ["GNC", "PNM", "SAM", "AnticorrelatedNoise", "CovarianceNoise", "DistributedOptimizer",
           "Extrapolation", "MomentumSAM", "StaleSAM", "init", "make_noise", "register_covariance",
           "register_noise", "shutdown"]
__version__ = "0.1.0"
