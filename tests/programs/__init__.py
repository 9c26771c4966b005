"""Whole training programs in the shape that real ones have, small enough for many checks."""

from __future__ import annotations

from typing import Callable

from tests.programs.adversarial import gan, gan_unfrozen, wgan_clipped, wgan_gp
from tests.programs.lab import Lab
from tests.programs.language import gpt, lora, lstm
from tests.programs.mixed import (
    dlrm,
    experts,
    lbfgs,
    mean_teacher,
    sgd_closure,
    towers,
    towers_locked,
    towers_separate,
)

Program = Callable[[Lab], None]
PROGRAMS: dict[str, Program] = {program.__name__: program for program in (
    gan, gan_unfrozen, wgan_gp, wgan_clipped, gpt, lstm, lora, mean_teacher, experts, dlrm,
    towers, towers_separate, towers_locked, lbfgs, sgd_closure)}
