"""The reference against itself, each formula by a second route.

Statistical tests: seeds are fixed, so each either always passes or always fails; their tolerance
is stated as the false-alarm rate over a new choice of the seed. ``Z`` = 5 standard errors: 6e-7
for one normal comparison; over the at most 200 numbers of a test below 1.2e-4.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests import reference as ref

W, P, b = 5, 4, 3
B = W * b
Z = 5.0


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20260101)


@pytest.fixture
def gradients_WP(rng: np.random.Generator) -> ref.Array:
    return rng.normal(size=(W, P)) * [1.0, 2.0, 0.5, 3.0] + 1.0


def assert_covariance(samples_NP: ref.Array, expected_PP: ref.Array) -> None:
    """Mean 0 and this covariance, within Z standard errors estimated from the samples."""
    count = len(samples_NP)
    mean_error_P = samples_NP.std(axis=0) / math.sqrt(count)
    assert np.all(np.abs(samples_NP.mean(axis=0)) <= Z * mean_error_P)
    products_NPP = samples_NP[:, :, None] * samples_NP[:, None, :]
    error_PP = products_NPP.std(axis=0) / math.sqrt(count)
    assert np.all(np.abs(products_NPP.mean(axis=0) - expected_PP) <= Z * error_PP)


# ---- S1

def test_deviations_sum_to_zero(gradients_WP: ref.Array) -> None:
    deviations_WP = ref.deviations(gradients_WP)
    assert np.allclose(deviations_WP.sum(axis=0), 0, atol=1e-12)
    assert np.allclose(deviations_WP + gradients_WP.mean(axis=0), gradients_WP)


def test_worker_covariance_is_unbiased(rng: np.random.Generator) -> None:
    """The mean of C^ over all 4^4 equally likely draws of the shards is C exactly."""
    examples_NP = rng.normal(size=(4, 2))  # a population of 4 examples, drawn with replacement
    truth_PP = ref.example_covariance(examples_NP)
    workers, per_worker = 2, 2
    draws = list(itertools.product(range(4), repeat=workers * per_worker))
    total_PP = np.zeros((2, 2))
    for draw in draws:
        shards_WbP = examples_NP[list(draw)].reshape(workers, per_worker, 2)
        total_PP += ref.worker_covariance(shards_WbP.mean(axis=1), per_worker)
    assert np.allclose(total_PP / len(draws), truth_PP)


def test_worker_covariance_agrees_with_numpy(gradients_WP: ref.Array) -> None:
    assert np.allclose(ref.worker_covariance(gradients_WP, b), b * np.cov(gradients_WP.T))


def test_second_moment_is_covariance_plus_mean(gradients_WP: ref.Array) -> None:
    mean_P = gradients_WP.mean(axis=0)
    assert np.allclose(ref.example_second_moment(gradients_WP),
                       ref.example_covariance(gradients_WP) + np.outer(mean_P, mean_P))


# ---- S2: GNC

def test_own_displacement_points_back_to_the_mean(gradients_WP: ref.Array) -> None:
    displacements_WP = ref.gnc_own(ref.deviations(gradients_WP), 1.0)
    assert np.allclose(gradients_WP + displacements_WP, gradients_WP.mean(axis=0))
    assert np.allclose(displacements_WP.mean(axis=0), 0)


def test_gathered_equals_the_matrix_product(rng: np.random.Generator,
                                            gradients_WP: ref.Array) -> None:
    deviations_WP, epsilon_WW = ref.deviations(gradients_WP), rng.normal(size=(W, W))
    expected_WP = 0.3 / math.sqrt(W - 1) * epsilon_WW @ deviations_WP
    assert np.allclose(ref.gnc_gathered(deviations_WP, epsilon_WW, 0.3), expected_WP)


def test_gathered_law(rng: np.random.Generator, gradients_WP: ref.Array) -> None:
    """Each worker's displacement is N(0, s^2 DtD/(W-1)); two workers' are independent."""
    deviations_WP = ref.deviations(gradients_WP)
    samples_NWP = np.stack([ref.gnc_gathered(deviations_WP, rng.normal(size=(W, W)), 0.7)
                            for _ in range(4000)])
    law_PP = 0.7 ** 2 * np.cov(gradients_WP.T)
    assert np.allclose(ref.gnc_gathered_covariance(deviations_WP, 0.7), law_PP)
    two_N2P = samples_NWP[:, [0, 3]].reshape(-1, 2 * P)
    assert_covariance(two_N2P, np.kron(np.eye(2), law_PP))


def test_isotropic_has_the_gathered_size_and_no_structure(rng: np.random.Generator,
                                                          gradients_WP: ref.Array) -> None:
    deviations_WP = ref.deviations(gradients_WP)
    samples_NP = np.concatenate([
        ref.gnc_isotropic(deviations_WP, rng.normal(size=(W, P)), 0.7) for _ in range(2000)])
    trace = 0.7 ** 2 * np.trace(np.cov(gradients_WP.T))
    assert_covariance(samples_NP, trace / P * np.eye(P))


def test_scales(rng: np.random.Generator, gradients_WP: ref.Array) -> None:
    deviations_WP = ref.deviations(gradients_WP)
    unit_WP = ref.gnc_own(deviations_WP, 1.0)
    scaled_WP = ref.gnc_own(deviations_WP, ref.radius_scale(unit_WP, 0.05))
    norms_W = [np.linalg.norm(row) for row in scaled_WP]
    assert math.isclose(math.sqrt(sum(n ** 2 for n in norms_W) / W), 0.05)
    assert ref.learning_rate_scale(0.5, 0.1) == 0.05
    scale = ref.expected_radius_scale(deviations_WP, 0.05)
    square_norms_N = [np.mean(np.sum(ref.gnc_gathered(
        deviations_WP, rng.normal(size=(W, W)), scale) ** 2, axis=1)) for _ in range(4000)]
    error = np.std(square_norms_N) / math.sqrt(len(square_norms_N))
    assert abs(np.mean(square_norms_N) - 0.05 ** 2) <= Z * error


def test_relative_scales_act_tensor_by_tensor(rng: np.random.Generator,
                                              gradients_WP: ref.Array) -> None:
    unit_WP, theta_P = ref.deviations(gradients_WP), rng.normal(size=P)
    first, second = ref.relative_scales(unit_WP, theta_P, [1, 3], 0.1)
    for tensor, scale in ((slice(0, 1), first), (slice(1, 4), second)):
        size = ref.root_mean_square_norm(scale * unit_WP[:, tensor])
        assert math.isclose(size, 0.1 * np.linalg.norm(theta_P[tensor]))
    with pytest.raises(AssertionError):
        ref.relative_scales(unit_WP, theta_P, [1, 2], 0.1)


# ---- S3, I1, I2: noise on the gradient

@pytest.mark.parametrize("emulated_batch", [1, 2.5, B - 1, B])
def test_i1_weights_give_the_noise(rng: np.random.Generator, gradients_WP: ref.Array,
                                   emulated_batch: float) -> None:
    epsilon_W = rng.normal(size=W)
    weights_W = ref.worker_weights(epsilon_W, b, emulated_batch)
    assert math.isclose(weights_W.mean(), 1.0)
    expected_P = (gradients_WP.mean(axis=0)
                  + ref.worker_noise(gradients_WP, epsilon_W, b, emulated_batch))
    assert np.allclose((weights_W[:, None] * gradients_WP).mean(axis=0), expected_P)


def test_worker_noise_covariance_by_enumeration(gradients_WP: ref.Array) -> None:
    """Signs as epsilon (mean 0, variance 1, independent): all 2^W give the covariance exactly."""
    samples_NP = np.stack([ref.worker_noise(gradients_WP, signs, b, 2)
                           for signs in itertools.product([-1, 1], repeat=W)])
    assert np.allclose(samples_NP.mean(axis=0), 0)
    covariance_PP = samples_NP.T @ samples_NP / len(samples_NP)
    expected_PP = (1 / 2 - 1 / B) * b * np.cov(gradients_WP.T)
    assert np.allclose(covariance_PP, expected_PP)
    truth_PP = ref.worker_covariance(gradients_WP, b)
    assert np.allclose(ref.noise_covariance("full", truth_PP, B, 2), expected_PP)


@pytest.mark.parametrize("emulated_batch", [1, 2.5, 5])
def test_i2_covariance_by_enumeration(rng: np.random.Generator, emulated_batch: float) -> None:
    examples_BP = rng.normal(size=(6, 3))
    samples_NP = np.stack([
        (ref.example_weights(signs, emulated_batch)[:, None] * examples_BP).mean(axis=0)
        for signs in itertools.product([-1, 1], repeat=6)])
    mean_P = examples_BP.mean(axis=0)
    assert np.allclose(samples_NP.mean(axis=0), mean_P)
    covariance_PP = (samples_NP - mean_P).T @ (samples_NP - mean_P) / len(samples_NP)
    second_PP = ref.example_second_moment(examples_BP)
    assert np.allclose(covariance_PP,
                       (6 - emulated_batch) / (6 * emulated_batch) * second_PP)
    assert np.allclose(covariance_PP, ref.noise_covariance("full", second_PP, 6, emulated_batch))


def test_emulation_factor_by_the_variance_of_the_mean(rng: np.random.Generator) -> None:
    """Var of a mean of B = 3 draws, plus the missing part, is Var of a mean of M = 2 draws."""
    population = rng.normal(size=4)
    variance = {n: np.var([population[list(draw)].mean()
                           for draw in itertools.product(range(4), repeat=n)]) for n in (2, 3)}
    missing = ref.emulation_factor(3, 2) * population.var()
    assert math.isclose(variance[3] + missing, variance[2])
    assert ref.emulation_factor(7, 7) == 0.0


@pytest.mark.parametrize("structure", ["isotropic", "diagonal"])
def test_control_structures(rng: np.random.Generator, gradients_WP: ref.Array,
                            structure: str) -> None:
    covariance_PP = ref.worker_covariance(gradients_WP, b)
    expected_PP = ref.noise_covariance(structure, covariance_PP, B, 2)
    full_PP = ref.noise_covariance("full", covariance_PP, B, 2)
    assert math.isclose(np.trace(expected_PP), np.trace(full_PP))  # same variance in all
    samples_NP = np.stack([ref.shared_normal_noise(structure, covariance_PP, rng.normal(size=P),
                                                   B, 2) for _ in range(8000)])
    assert_covariance(samples_NP, expected_PP)


# ---- S4: bytes

@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_bytes_by_simulating_the_ring(ranks: int) -> None:
    """Count the chunks that rank 0 receives, round by round; P divides by the ranks."""
    parameters = 24
    chunk = parameters // ranks * 4
    reduce_scatter = all_gather = (ranks - 1) * chunk  # one chunk from the neighbour each round
    alltoall = (ranks - 1) * chunk                     # one chunk from each other rank
    assert ref.allreduce_bytes(ranks, parameters) == reduce_scatter + all_gather
    assert ref.transposition_bytes(ranks, parameters) == 2 * alltoall + all_gather
    assert ref.allgather_bytes(ranks, parameters) == (ranks - 1) * parameters * 4
    extra = (ref.transposition_bytes(ranks, parameters) - ref.allreduce_bytes(ranks, parameters))
    assert extra == (ranks - 1) / ranks * 4 * parameters  # I5: one alltoall
    assert ref.allreduce_bytes(ranks, parameters, 2) == ref.allreduce_bytes(ranks, parameters) / 2


# ---- S5: the quadratic

A = np.array([[2.0, 0.5], [0.5, 1.0]])
S = np.array([[1.0, -0.3], [-0.3, 0.5]])


def simulate(momentum: float, steps: int, rng: np.random.Generator, runs: int = 20000,
             alpha: float = 0.3) -> tuple[ref.Array, ref.Array]:
    theta_NP, velocity_NP = np.tile([1.0, -2.0], (runs, 1)), np.zeros((runs, 2))
    for _ in range(steps):
        noise_NP = rng.multivariate_normal([0, 0], S, size=runs)
        velocity_NP = momentum * velocity_NP + theta_NP @ A + noise_NP
        theta_NP = theta_NP - alpha * velocity_NP
    losses_N = 0.5 * np.einsum("np,pq,nq->n", theta_NP, A, theta_NP)
    return losses_N, theta_NP


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_second_moment_against_simulation(rng: np.random.Generator, steps: int) -> None:
    second_PP = np.outer([1.0, -2.0], [1.0, -2.0])
    for _ in range(steps):
        second_PP = ref.quadratic_step(A, S, 0.3, second_PP)
    losses_N, _ = simulate(0.0, steps, rng)
    error = losses_N.std() / math.sqrt(len(losses_N))
    assert abs(losses_N.mean() - ref.quadratic_loss(A, second_PP)) <= Z * error


def test_momentum_recursion_against_simulation(rng: np.random.Generator) -> None:
    start_Q = np.array([1.0, -2.0, 0.0, 0.0])
    second_QQ = np.outer(start_Q, start_Q)
    for _ in range(6):
        second_QQ = ref.quadratic_momentum_step(A, S, 0.3, 0.8, second_QQ)
    losses_N, _ = simulate(0.8, 6, rng)
    error = losses_N.std() / math.sqrt(len(losses_N))
    assert abs(losses_N.mean() - ref.quadratic_loss(A, second_QQ[:2, :2])) <= Z * error


def test_momentum_recursion_without_momentum_is_the_plain_one() -> None:
    second_PP, second_QQ = np.eye(2), np.diag([1.0, 1.0, 0.0, 0.0])
    for _ in range(5):
        second_PP = ref.quadratic_step(A, S, 0.3, second_PP)
        second_QQ = ref.quadratic_momentum_step(A, S, 0.3, 0.0, second_QQ)
    assert np.allclose(second_QQ[:2, :2], second_PP)


def test_noise_increase_is_the_difference_of_one_step() -> None:
    second_PP = np.array([[2.0, 0.1], [0.1, 1.0]])
    with_noise = ref.quadratic_loss(A, ref.quadratic_step(A, S, 0.3, second_PP))
    without = ref.quadratic_loss(A, ref.quadratic_step(A, 0 * S, 0.3, second_PP))
    assert math.isclose(with_noise - without, ref.quadratic_noise_increase(A, S, 0.3))
    frobenius = 0.3 ** 2 / 2 * np.linalg.norm(A) ** 2  # the Frobenius claim: S = A, S = diag A
    assert math.isclose(ref.quadratic_noise_increase(A, A, 0.3), frobenius)
    diagonal_PP = np.diag(np.diag(A))
    assert ref.quadratic_noise_increase(A, diagonal_PP, 0.3) < frobenius
    assert np.trace(diagonal_PP) == np.trace(A)


def test_limit_is_where_the_recursion_ends() -> None:
    curvatures_P, variances_P = np.array([2.0, 0.5]), np.array([1.0, 3.0])
    rotation_PP = np.array([[0.6, -0.8], [0.8, 0.6]])
    hessian_PP = rotation_PP @ np.diag(curvatures_P) @ rotation_PP.T
    noise_PP = rotation_PP @ np.diag(variances_P) @ rotation_PP.T  # commutes with it
    second_PP = np.eye(2)
    for _ in range(500):
        second_PP = ref.quadratic_step(hessian_PP, noise_PP, 0.3, second_PP)
    assert math.isclose(ref.quadratic_loss(hessian_PP, second_PP),
                        ref.quadratic_limit(curvatures_P, variances_P, 0.3))


def test_cubic_gain_by_quadrature() -> None:
    """E d/dtheta c (theta + delta)^3 by Gauss-Hermite quadrature, exact for polynomials."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    c, theta, variance = 0.7, 1.3, 0.4
    gradients = 3 * c * (theta + math.sqrt(variance) * nodes) ** 2
    gain = (weights @ gradients) / weights.sum() - 3 * c * theta ** 2
    assert math.isclose(gain, ref.cubic_gradient_gain(c, variance))


# ---- S7

def test_noise_scale_is_the_worker_covariance_s_trace(gradients_WP: ref.Array) -> None:
    """tr C by McCandlish's two norms and by C^ are the same number; the norms are unbiased."""
    mean_P = gradients_WP.mean(axis=0)
    worker_square_norm = float(np.mean(np.sum(gradients_WP ** 2, axis=1)))
    estimate = ref.noise_scale(b, B, worker_square_norm, float(mean_P @ mean_P))
    trace = np.trace(ref.worker_covariance(gradients_WP, b))
    assert math.isclose(estimate.covariance_trace, trace)
    assert math.isclose(estimate.gradient_square_norm, mean_P @ mean_P - trace / B)
    assert math.isclose(estimate.simple_noise_scale, trace / (mean_P @ mean_P - trace / B))


def test_spectrum(gradients_WP: ref.Array) -> None:
    covariance_PP = ref.worker_covariance(gradients_WP, b)
    eigenvalues_W = ref.noise_spectrum(gradients_WP, b)
    expected = np.linalg.eigvalsh(covariance_PP)[::-1]
    count = min(W, P)
    assert np.allclose(eigenvalues_W[:count], expected[:count])
    assert np.allclose(eigenvalues_W[count:], 0, atol=1e-12)
    assert math.isclose(eigenvalues_W.sum(), np.trace(covariance_PP))
    assert math.isclose(np.linalg.norm(eigenvalues_W), np.linalg.norm(covariance_PP))  # I4
    rank = ref.stable_rank(eigenvalues_W)
    assert math.isclose(rank, np.trace(covariance_PP) / np.linalg.norm(covariance_PP, 2))
    assert 1 <= rank <= P
