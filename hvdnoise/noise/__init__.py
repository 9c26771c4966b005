"""The noises, and the one place where their names are looked up."""

from hvdnoise.noise.anticorrelated import AnticorrelatedNoise
from hvdnoise.noise.base import Noise, StepContext
from hvdnoise.noise.covariance import COVARIANCES, CovarianceNoise, register_covariance
from hvdnoise.noise.extrapolation import Extrapolation
from hvdnoise.noise.gnc import GNC
from hvdnoise.noise.momentum_sam import MomentumSAM
from hvdnoise.noise.pnm import PNM
from hvdnoise.noise.registry import kinds, make_noise, noise_options, register_noise
from hvdnoise.noise.sam import SAM, StaleSAM
from hvdnoise.noise.signature import Option

__all__ = ["COVARIANCES", "GNC", "PNM", "SAM", "AnticorrelatedNoise", "CovarianceNoise",
           "Extrapolation", "MomentumSAM", "Noise", "Option", "StaleSAM", "StepContext", "kinds",
           "make_noise", "noise_options", "register_covariance", "register_noise"]
