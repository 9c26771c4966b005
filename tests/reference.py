"""The formulas of METHODS.md, dense and brute force, float64: what fast paths are tested against.

Nothing here is clever. Each function is one formula, names the section (S2) or identity (I1) it
comes from, takes anything numpy can read (CPU tensors too) and answers in float64 numpy. Shape
suffixes: W workers, B examples of a step, P parameters; ``x_WP`` has shape (W, P).

Legend (METHODS S1): g_i mean gradient of worker i over its b examples, mean_gradient their mean,
d_i = g_i - mean_gradient, C the covariance of ONE example's gradient, M the emulated batch size.
"""

import math
from typing import NamedTuple, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def as_float64(values: ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float64)


# ---- S1: deviations and covariance

def deviations(gradients_WP: ArrayLike) -> Array:
    """S1: d_i = g_i - mean_j g_j."""
    gradients_WP = as_float64(gradients_WP)
    return gradients_WP - gradients_WP.mean(axis=0)


def worker_covariance(gradients_WP: ArrayLike, examples_per_worker: int) -> Array:
    """S1: C^ = b/(W-1) D^T D, the unbiased estimate of one example's gradient covariance."""
    deviations_WP = deviations(gradients_WP)
    num_workers = len(deviations_WP)
    return examples_per_worker / (num_workers - 1) * deviations_WP.T @ deviations_WP


def example_covariance(gradients_BP: ArrayLike) -> Array:
    """S1: C of a given finite set of examples, centred: (1/B) sum (g_n - mean)(g_n - mean)^T."""
    centred_BP = deviations(gradients_BP)
    return centred_BP.T @ centred_BP / len(centred_BP)


def example_second_moment(gradients_BP: ArrayLike) -> Array:
    """S3, "full, from examples": the uncentred (1/B) sum g_n g_n^T."""
    gradients_BP = as_float64(gradients_BP)
    return gradients_BP.T @ gradients_BP / len(gradients_BP)


# ---- S2: GNC, noise on the weights

def gnc_own(deviations_WP: ArrayLike, scale: float) -> Array:
    """S2 `own`: delta_i = -s d_i."""
    return -scale * as_float64(deviations_WP)


def gnc_gathered(deviations_WP: ArrayLike, epsilon_WW: ArrayLike, scale: float) -> Array:
    """S2 `gathered`: delta_i = s/sqrt(W-1) sum_j epsilon_ij d_j; row i for worker i only."""
    deviations_WP, epsilon_WW = as_float64(deviations_WP), as_float64(epsilon_WW)
    displacements_WP = np.zeros_like(deviations_WP)
    for i, row in enumerate(epsilon_WW):
        for j, epsilon in enumerate(row):
            displacements_WP[i] += epsilon * deviations_WP[j]
    return scale / math.sqrt(len(deviations_WP) - 1) * displacements_WP


def gnc_gathered_covariance(deviations_WP: ArrayLike, scale: float) -> Array:
    """S2 `gathered`: the law is delta_i ~ N(0, s^2 D^T D/(W-1))."""
    deviations_WP = as_float64(deviations_WP)
    return scale ** 2 / (len(deviations_WP) - 1) * deviations_WP.T @ deviations_WP


def gnc_isotropic(deviations_WP: ArrayLike, normal_WP: ArrayLike, scale: float) -> Array:
    """S2 `isotropic`: delta_i = s z_i, E||s z_i||^2 = the trace of gathered noise's covariance."""
    normal_WP = as_float64(normal_WP)
    trace = np.trace(gnc_gathered_covariance(deviations_WP, scale))
    return math.sqrt(trace / normal_WP.shape[1]) * normal_WP


def learning_rate_scale(kappa: float, learning_rate: float) -> float:
    """S2 `lr`: s = kappa alpha."""
    return kappa * learning_rate


def root_mean_square_norm(displacements_WP: ArrayLike) -> float:
    """S2: sqrt of the mean over workers of ||delta_i||^2."""
    return math.sqrt(float(np.mean(np.sum(as_float64(displacements_WP) ** 2, axis=1))))


def radius_scale(unit_displacements_WP: ArrayLike, radius: float) -> float:
    """S2 `radius`: the s that brings these displacements (made with s = 1) to the rms norm rho."""
    return radius / root_mean_square_norm(unit_displacements_WP)


def expected_radius_scale(deviations_WP: ArrayLike, radius: float) -> float:
    """S2 `radius` for random sources, in expectation: s^2 tr(D^T D)/(W-1) = rho^2."""
    return radius / math.sqrt(float(np.trace(gnc_gathered_covariance(deviations_WP, 1.0))))


def share_radius(parameters_P: ArrayLike, share: float) -> float:
    """S2 `share`: rho is a share of the norm of all displaced weights."""
    return share * math.sqrt(float(np.sum(as_float64(parameters_P) ** 2)))


def relative_scales(unit_displacements_WP: ArrayLike, parameters_P: ArrayLike,
                    sizes: Sequence[int], relative: float) -> list[float]:
    """S2 `relative`: one s per tensor: rms over workers of ||delta_i|| = rho ||theta||, in it.

    ``sizes``: the number of elements of each tensor, in the order in which they lie in P.
    """
    unit_displacements_WP = as_float64(unit_displacements_WP)
    parameters_P = as_float64(parameters_P)
    scales, start = [], 0
    for size in sizes:
        tensor = slice(start, start + size)
        radius = relative * float(np.linalg.norm(parameters_P[tensor]))
        scales.append(radius_scale(unit_displacements_WP[:, tensor], radius))
        start += size
    assert start == len(parameters_P), "sizes must cover all parameters"
    return scales


def share_of(displacements_WP: ArrayLike, parameters_P: ArrayLike) -> float:
    """S7: the root mean square of |delta_i| as a share of |theta|."""
    return root_mean_square_norm(displacements_WP) / share_radius(parameters_P, 1.0)


def lr_multiple(displacements_WP: ArrayLike, along_WP: ArrayLike, rates_P: ArrayLike) -> float:
    """S7: the root mean square of |delta_i| over that of |alpha u_i|."""
    return root_mean_square_norm(displacements_WP) / root_mean_square_norm(
        as_float64(along_WP) * as_float64(rates_P))


# ---- S3, I1, I2: noise on the gradient

def emulation_factor(batch: int, emulated_batch: float) -> float:
    """S3: 1/M - 1/B: what the covariance of a batch of B lacks of that of M, per unit of C."""
    return 1.0 / emulated_batch - 1.0 / batch


def worker_noise(gradients_WP: ArrayLike, epsilon_W: ArrayLike, examples_per_worker: int,
                 emulated_batch: float) -> Array:
    """S3 "full, from workers": nu = sqrt(b(1/M - 1/B)/(W-1)) sum_j epsilon_j d_j (noise only)."""
    deviations_WP, epsilon_W = deviations(gradients_WP), as_float64(epsilon_W)
    num_workers, num_parameters = deviations_WP.shape
    missing = emulation_factor(num_workers * examples_per_worker, emulated_batch)
    total_P = np.zeros(num_parameters)
    for epsilon, deviation_P in zip(epsilon_W, deviations_WP):
        total_P += epsilon * deviation_P
    return math.sqrt(examples_per_worker * missing / (num_workers - 1)) * total_P


def worker_weights(epsilon_W: ArrayLike, examples_per_worker: int, emulated_batch: float) -> Array:
    """I1: the scalar that worker j multiplies its gradient by: 1 + c (epsilon_j - mean epsilon)."""
    epsilon_W = as_float64(epsilon_W)
    num_workers = len(epsilon_W)
    missing = emulation_factor(num_workers * examples_per_worker, emulated_batch)
    c = num_workers * math.sqrt(examples_per_worker * missing / (num_workers - 1))
    return 1.0 + c * (epsilon_W - epsilon_W.mean())


def example_weights(xi_B: ArrayLike, emulated_batch: float) -> Array:
    """I2: the factor of example n's loss: 1 + sqrt((B-M)/M) xi_n."""
    xi_B = as_float64(xi_B)
    return 1.0 + math.sqrt((len(xi_B) - emulated_batch) / emulated_batch) * xi_B


def noise_covariance(structure: str, covariance_PP: ArrayLike, batch: int, emulated_batch: float,
                     sizes: Sequence[int] = ()) -> Array:
    """S3: Cov(nu) = (1/M - 1/B) S with S of the named structure made from C.

    ``sizes``: of the tensors, in the order in which they lie in P, for `layerwise`.
    """
    covariance_PP = as_float64(covariance_PP)
    num_parameters = len(covariance_PP)
    ends = np.cumsum(sizes or [num_parameters])
    shares = [np.full(part.size, part.mean())
              for part in np.split(np.diag(covariance_PP), ends[:-1])]
    structured_PP = {
        "layerwise": np.diag(np.concatenate(shares)),
        "isotropic": np.trace(covariance_PP) / num_parameters * np.eye(num_parameters),
        "diagonal": np.diag(np.diag(covariance_PP)),
        "full": covariance_PP,
    }[structure]
    return emulation_factor(batch, emulated_batch) * structured_PP


def running_mean(values: Sequence[Array], decay: float) -> Array:
    """S3 `diagonal`: the bias-corrected mean, the last one weighing most."""
    weights = [decay ** age for age in range(len(values))][::-1]
    return as_float64(sum(w * each for w, each in zip(weights, values)) / sum(weights))


def shared_normal_noise(structure: str, covariance_PP: ArrayLike, normal_P: ArrayLike,
                        batch: int, emulated_batch: float, sizes: Sequence[int] = ()) -> Array:
    """S3, structures without correlations: nu = sqrt(diag Cov(nu)) * one shared normal vector."""
    assert structure in ("isotropic", "diagonal", "layerwise"), structure
    variance_P = np.diag(noise_covariance(structure, covariance_PP, batch, emulated_batch, sizes))
    return np.sqrt(variance_P) * as_float64(normal_P)


# ---- S4: bytes that one rank receives per step

def allreduce_bytes(num_ranks: int, num_parameters: int, itemsize: int = 4) -> float:
    """S4: ring allreduce, 2(W-1)/W 4P."""
    return 2 * (num_ranks - 1) / num_ranks * itemsize * num_parameters


def allgather_bytes(group_size: int, num_parameters: int, itemsize: int = 4) -> float:
    """S4: allgather of every member's row in a group of k: (k-1) 4P."""
    return float((group_size - 1) * itemsize * num_parameters)


def transposition_bytes(num_ranks: int, num_parameters: int, itemsize: int = 4) -> float:
    """S4, I5: two alltoalls and an allgather of the mean, in all, 3(W-1)/W 4P."""
    return 3 * (num_ranks - 1) / num_ranks * itemsize * num_parameters


# ---- S5: the convex quadratic

def quadratic_loss(hessian_PP: ArrayLike, second_moment_PP: ArrayLike) -> float:
    """S5: E L = 1/2 tr(A Sigma), Sigma = E theta theta^T."""
    return 0.5 * float(np.trace(as_float64(hessian_PP) @ as_float64(second_moment_PP)))


def quadratic_step(hessian_PP: ArrayLike, noise_covariance_PP: ArrayLike, learning_rate: float,
                   second_moment_PP: ArrayLike) -> Array:
    """S5: Sigma' = (I - alpha A) Sigma (I - alpha A) + alpha^2 S."""
    hessian_PP = as_float64(hessian_PP)
    contraction_PP = np.eye(len(hessian_PP)) - learning_rate * hessian_PP
    return (contraction_PP @ as_float64(second_moment_PP) @ contraction_PP.T
            + learning_rate ** 2 * as_float64(noise_covariance_PP))


def quadratic_momentum_step(hessian_PP: ArrayLike, noise_covariance_PP: ArrayLike,
                            learning_rate: float, momentum: float,
                            second_moment_QQ: ArrayLike) -> Array:
    """S5 with momentum, v' = mu v + A theta + nu, theta' = theta - alpha v'; Q: (theta, v)."""
    hessian_PP, noise_covariance_PP = as_float64(hessian_PP), as_float64(noise_covariance_PP)
    identity_PP = np.eye(len(hessian_PP))
    transition_QQ = np.block([
        [identity_PP - learning_rate * hessian_PP, -learning_rate * momentum * identity_PP],
        [hessian_PP, momentum * identity_PP]])
    entry_QP = np.vstack([-learning_rate * identity_PP, identity_PP])
    return (transition_QQ @ as_float64(second_moment_QQ) @ transition_QQ.T
            + entry_QP @ noise_covariance_PP @ entry_QP.T)


def quadratic_noise_increase(hessian_PP: ArrayLike, noise_covariance_PP: ArrayLike,
                             learning_rate: float) -> float:
    """S5: one step's increase of E L that is due to the noise: alpha^2/2 tr(A S)."""
    trace = np.trace(as_float64(hessian_PP) @ as_float64(noise_covariance_PP))
    return learning_rate ** 2 / 2 * float(trace)


def quadratic_limit(curvatures_P: ArrayLike, noise_variances_P: ArrayLike,
                    learning_rate: float) -> float:
    """S5: the limit of E L for S that commutes with A: 1/2 sum_i alpha s_i/(2 - alpha a_i)."""
    curvatures_P, noise_variances_P = as_float64(curvatures_P), as_float64(noise_variances_P)
    terms_P = learning_rate * noise_variances_P / (2 - learning_rate * curvatures_P)
    return 0.5 * float(terms_P.sum())


def cubic_gradient_gain(cubic: float, displacement_variance: float) -> float:
    """S5: convolving a loss term c theta^3 with such noise adds 3 c Var(delta) to its gradient."""
    return 3 * cubic * displacement_variance


# ---- S7: noise scale and spectrum

class NoiseScale(NamedTuple):
    covariance_trace: float        # estimate of tr C, per example
    gradient_square_norm: float    # estimate of ||grad L||^2
    simple_noise_scale: float      # their ratio, in examples


def noise_scale(examples_per_worker: int, batch: int, worker_square_norm: float,
                gradient_square_norm: float) -> NoiseScale:
    """S7 (McCandlish et al. 2018): both unbiased estimates, from norms at two batch sizes.

    ``worker_square_norm``: mean_i ||g_i||^2, at b; ``gradient_square_norm``: ||mean||^2, at B.
    From E||g_b||^2 = ||grad L||^2 + tr C/b at both sizes.
    """
    small, big = examples_per_worker, batch
    trace = (worker_square_norm - gradient_square_norm) / (1 / small - 1 / big)
    square_norm = (big * gradient_square_norm - small * worker_square_norm) / (big - small)
    return NoiseScale(trace, square_norm, trace / square_norm)


def noise_spectrum(gradients_WP: ArrayLike, examples_per_worker: int) -> Array:
    """S7: the eigenvalues of C^ that can be nonzero, descending: those of b/(W-1) D D^T."""
    deviations_WP = deviations(gradients_WP)
    gram_WW = examples_per_worker / (len(deviations_WP) - 1) * deviations_WP @ deviations_WP.T
    return as_float64(np.linalg.eigvalsh(gram_WW)[::-1])


def stable_rank(eigenvalues: ArrayLike) -> float:
    """S7: tr/lambda_1."""
    eigenvalues = as_float64(eigenvalues)
    return float(eigenvalues.sum() / eigenvalues.max())
