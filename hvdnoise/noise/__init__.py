"""The noises, and the one place where their names are looked up."""

from hvdnoise.noise.base import Noise, StepContext
from hvdnoise.noise.covariance import COVARIANCES, CovarianceNoise, register_covariance
from hvdnoise.noise.gnc import GNC
from hvdnoise.noise.registry import kinds, make_noise, noise_options, register_noise
from hvdnoise.noise.signature import Option

__all__ = ["COVARIANCES", "GNC", "CovarianceNoise", "Noise", "Option", "StepContext", "kinds",
           "make_noise", "noise_options", "register_covariance", "register_noise"]
