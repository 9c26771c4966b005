"""The largest eigenvalues and the trace of the Hessian H, with error estimates.

Eigenvalues: ARPACK's restarted Lanczos iteration (`scipy.sparse.linalg.eigsh`) from
Hessian-vector products. It runs on rank 0 alone and the other ranks take part in its products, so
ranks whose processors round differently still do the same number of them.

Trace: with the k orthonormal vectors V that Lanczos gave, and Q = I - V V',

    tr H = tr(V' H V) + tr(Q H Q)

whose first term is known and whose second is Hutchinson's estimate: the mean of z' Q H Q z over
probes z of random signs. It is unbiased whatever V is, and its variance lacks the part of the
largest eigenvalues. This is the idea of Hutch++ (Meyer et al., arXiv:2010.09649), with vectors that
are there anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdnoise import streams
from hvdnoise.measure.problem import Problem

TOLERANCE = 5e-3  # residual by eigenvalue where Lanczos stops
RESTARTS = 30
BASIS = 10  # vectors between restarts; more for more than three eigenvalues
GROUP = 8  # vectors multiplied at a time
Product = Callable[[Any], Any]


class _NotFinite(ArithmeticError):
    """A product of the Hessian is not finite."""


@dataclass(frozen=True)
class Eigen:
    """Eigenvalues of H, the largest first.

    Args:
        values: Rayleigh quotients v' H v; those that Lanczos did not find are missing at the end.
        errors: norms of the residuals H v - value v. H has an eigenvalue within that distance.
        vectors_KP: v, (K, P), orthonormal, in the weights' dtype.
        products: Hessian-vector products that it took, at one vector each.
    """

    values: list[float]
    errors: list[float]
    vectors_KP: Tensor
    products: int


def largest(problem: Problem, count: int, seed: int) -> Eigen:
    """The ``count`` algebraically largest eigenvalues. Collective.

    Raises:
        ValueError: when there are not more weights than that.
    """
    check(problem, count)
    vectors_KP = problem.weights().new_zeros(0, problem.size)
    if count == 0:
        return Eigen([], [], vectors_KP, 0)
    found, used = _lanczos(problem, count, seed)
    number = problem.world.gather_json([len(found), used], name="measure.found")[0]
    vectors_KP = vectors_KP.new_zeros(number[0], problem.size)
    if number[0] == 0:
        return Eigen([], [], vectors_KP, number[1])
    if problem.world.rank == 0:
        vectors_KP.copy_(torch.from_numpy(found))
    problem.world.broadcast_(vectors_KP, root=0, name="measure.vectors").wait()
    products_KP, v_KP = problem.products(vectors_KP).double(), vectors_KP.double()
    values_K = (v_KP * products_KP).sum(1)
    errors_K = (products_KP - values_K[:, None] * v_KP).norm(dim=1)
    order = values_K.argsort(descending=True).tolist()
    return Eigen([values_K[i].item() for i in order], [errors_K[i].item() for i in order],
                 vectors_KP[order], number[1] + len(order))


def check(problem: Problem, count: int) -> None:
    """Raise a ValueError when H is too small to have ``count`` eigenvalues found."""
    if count >= problem.size:
        raise ValueError(f"eigenvalues={count} is wrong: the model has {problem.size} weights; "
                         "give a smaller number")


def _lanczos(problem: Problem, count: int, seed: int) -> tuple[Any, int]:
    """On rank 0: eigenvectors (K, P) float64 and the number of products; elsewhere none."""
    message = torch.zeros(problem.size + 1, dtype=torch.float64)  # a vector, and whether to go on
    like, used = problem.weights(), 0

    def receive() -> Tensor | None:
        """The product with rank 0's vector; None at the end."""
        problem.world.broadcast_(message, root=0, name="measure.lanczos").wait()
        if message[-1] == 0:
            return None
        vector_P = message[:-1].to(like)
        return problem.products(vector_P[None])[0]

    def multiply(vector: Any) -> Any:
        nonlocal used
        message[:-1], message[-1], used = torch.from_numpy(vector.reshape(-1)), 1, used + 1
        product_P = receive()
        assert product_P is not None
        if not torch.isfinite(product_P).all():
            raise _NotFinite
        return product_P.double().cpu().numpy()

    if problem.world.rank > 0:
        while receive() is not None:
            pass
        return [], 0
    start = streams.normal(problem.size, seed, "measure.lanczos", dtype=torch.float64)
    found = _eigenvectors(multiply, problem.size, count, start.numpy())
    message[-1] = 0
    receive()
    return found, used


def _eigenvectors(multiply: Product, size: int, count: int, start: Any) -> Any:
    """Rows of unit length; fewer than ``count`` where the iteration did not converge."""
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh
    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    try:
        _, columns = eigsh(operator, k=count, which="LA", v0=start, tol=TOLERANCE,
                           ncv=min(size, max(2 * count + 4, BASIS)), maxiter=RESTARTS)
    except ArpackNoConvergence as error:
        columns = error.eigenvectors
    except (ArpackError, _NotFinite):
        return np.zeros((0, size))
    return np.linalg.qr(columns)[0].T.copy()  # orthonormal to the last bit


def trace(problem: Problem, eigen: Eigen, probes: int, seed: int
          ) -> tuple[float | None, float | None]:
    """Trace of H and its standard error from ``probes`` random vectors. Collective.

    The error is None for one probe; both are None for none. The error is that of the probes; the
    loss is that of the problem's images, and other images have another Hessian.
    """
    if probes == 0:
        return None, None
    v_KP, terms = eigen.vectors_KP, []
    for first in range(0, probes, GROUP):
        probes_KP = torch.stack([_signs(problem, seed, number)
                                 for number in range(first, min(first + GROUP, probes))])
        probes_KP -= probes_KP @ v_KP.T @ v_KP
        terms += (probes_KP.double() * problem.products(probes_KP).double()).sum(1).tolist()
    known = sum(eigen.values)
    return known + float(np.mean(terms)), standard_error(terms)


def _signs(problem: Problem, seed: int, number: int) -> Tensor:
    draws = torch.randint(0, 2, (problem.size,),
                          generator=streams.generator(seed, "measure.probe", number))
    return (2 * draws - 1).to(problem.parameters[0])


def standard_error(values: list[float]) -> float | None:
    """Of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))
