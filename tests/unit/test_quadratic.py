"""`hvdnoise quadratic`: theory by brute force, settings, and that it finds what is wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdnoise import GNC, cli, register_covariance
from hvdnoise.noise import COVARIANCES
from hvdnoise.noise.full_examples import FullExampleCovariance
from hvdnoise.quadratic import intervals, regression, theory
from hvdnoise.quadratic.cases import known, without_formula
from hvdnoise.quadratic.config import QuadraticConfig, validate
from hvdnoise.quadratic.problem import HESSIAN, SIZES, START, Problem
from hvdnoise.quadratic.run import run
from hvdnoise.training.config import ConfigError
from tests import reference
from tests.fake_world import run_threads
from tests.noises import forgotten_afterwards

PROBLEM = Problem(0.6, 0.0, workers=4, batch_size=2, emulated_batch=2)
WITH_MOMENTUM = Problem(0.3, 0.5, workers=4, batch_size=2, emulated_batch=2)
P = len(HESSIAN)
QUICK: dict[str, Any] = dict(replicas=16, steps=8, momentum=0.0, regression=False,
                             progress="none", false_alarm=1e-3)


# ---------------------------------------------------------------------------- theory

def points(covariance_PP: np.ndarray) -> np.ndarray:
    """(2P, P): equally likely points with mean 0 and exactly this covariance."""
    root = np.linalg.cholesky(covariance_PP) * np.sqrt(P)
    return np.concatenate([root.T, -root.T])


def enumerated(problem: Problem, law: theory.Law, steps: int) -> list[np.ndarray]:
    """E theta theta' after each step, over all paths of noise that takes a few values."""
    theta_NP, velocity_NP, found = START[None], np.zeros((1, P)), []
    for _ in range(steps):
        parts = [points(theory.COVARIANCE / problem.batch)]
        if law.multiplies:
            parts.append(np.sqrt(problem.missing) * points(theory.COVARIANCE))
        elif (noise_PP := law.moment(
                theta_NP.T @ theta_NP / len(theta_NP))).any():
            parts.append(points(noise_PP))
        sums = np.array([sum(each) for each in itertools.product(*parts)])
        gradient_NP = theta_NP @ HESSIAN
        pushed = gradient_NP[:, None] + sums
        if law.multiplies:  # + sqrt(1/M - 1/B) (-1 or 1) A theta
            pushed = np.concatenate([
                pushed + sign * np.sqrt(problem.missing) * gradient_NP[:, None]
                for sign in (-1, 1)], axis=1)
        velocity = problem.momentum * velocity_NP[:, None] + pushed
        theta_NP = (theta_NP[:, None] - problem.learning_rate * velocity).reshape(-1, P)
        velocity_NP = velocity.reshape(-1, P)
        found.append(theta_NP.T @ theta_NP / len(theta_NP))
    return found


@pytest.mark.parametrize("problem", [PROBLEM, WITH_MOMENTUM], ids=["plain", "momentum"])
@pytest.mark.parametrize("name", [name for name in known() if not name.startswith("gnc")])
def test_second_moments_by_enumeration(name: str, problem: Problem) -> None:
    case = known()[name]
    sigmas, _ = theory.moments(problem, case.law(problem), START, 2)
    for sigma_PP, expected_PP in zip(sigmas, enumerated(problem, case.law(problem), 2)):
        np.testing.assert_allclose(sigma_PP, expected_PP, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_second_moments_of_the_reference(momentum: float) -> None:
    problem = Problem(0.3, momentum, 4, 2, 2)
    sigmas, noises = theory.moments(problem, theory.CovarianceLaw(problem, "diagonal"), START, 30)
    noise_PP = theory.COVARIANCE / 8 + reference.noise_covariance(
        "diagonal", theory.COVARIANCE, 8, 2)
    state = np.zeros((2 * P, 2 * P))
    state[:P, :P] = np.outer(START, START)
    for sigma_PP, nu_PP in zip(sigmas, noises):
        state = reference.quadratic_momentum_step(HESSIAN, noise_PP, 0.3, momentum, state)
        np.testing.assert_allclose(sigma_PP, state[:P, :P], rtol=1e-10)
        assert theory.loss(sigma_PP) == pytest.approx(reference.quadratic_loss(HESSIAN, sigma_PP))
        assert theory.increase(problem, nu_PP) == pytest.approx(
            reference.quadratic_noise_increase(HESSIAN, nu_PP, 0.3))


def test_the_limit_of_full_noise() -> None:
    """S = A commutes with A."""
    sigmas, _ = theory.moments(PROBLEM, theory.CovarianceLaw(PROBLEM, "full"), START, 400)
    curvatures_P = np.linalg.eigvalsh(HESSIAN)
    assert theory.loss(sigmas[-1]) == pytest.approx(
        reference.quadratic_limit(curvatures_P, curvatures_P / 2, 0.6))


def test_structures() -> None:
    trace = np.trace(HESSIAN)
    structures = {each: theory.structured(each, HESSIAN) for each in theory.FORMULAS}
    assert all(np.trace(each) == pytest.approx(trace) for each in structures.values())
    for each in ("full", "diagonal", "isotropic"):
        np.testing.assert_allclose(structures[each] / 4,
                                   reference.noise_covariance(each, HESSIAN, 4, 2))
    first, second = (np.diag(HESSIAN)[part].mean() for part in (slice(0, 2), slice(2, 4)))
    assert SIZES == (2, 2)
    np.testing.assert_allclose(structures["layerwise"], np.diag([first, first, second, second]))
    speed = {each: float(np.trace(HESSIAN @ own)) for each, own in structures.items()}
    assert speed["full"] == pytest.approx(np.linalg.norm(HESSIAN) ** 2)
    assert speed["diagonal"] == pytest.approx(np.linalg.norm(np.diag(HESSIAN)) ** 2)
    assert speed["full"] > speed["diagonal"] > speed["layerwise"] > speed["isotropic"]


@pytest.mark.parametrize("source", ["own", "gathered", "isotropic", "layerwise"])
def test_mean_displacements_by_many_samples(source: str) -> None:
    """The definition of GNC, worker by worker, 40,000 times."""
    samples, W, s = 40_000, 4, PROBLEM.noise_scale
    generator = np.random.default_rng(5)
    law = known()[f"gnc-{source}"].law(PROBLEM)
    delta_NWP = np.zeros((samples, W, P))
    for step in range(4):
        mean_NP = delta_NWP.mean(1) @ HESSIAN
        expected_PP = law.moment(np.zeros((P, P)))
        found_PP = mean_NP.T @ mean_NP / samples
        scale = max(np.abs(expected_PP).max(), 1e-12)
        assert np.abs(found_PP - expected_PP).max() < 0.05 * scale, step
        root = np.linalg.cholesky(theory.COVARIANCE / PROBLEM.batch_size)
        rows_NWP = generator.standard_normal((samples, W, P)) @ root.T + delta_NWP @ HESSIAN
        d_NWP = rows_NWP - rows_NWP.mean(1, keepdims=True)
        if source == "own":
            delta_NWP = -s * d_NWP
        elif source == "gathered":
            mix_NWW = generator.standard_normal((samples, W, W))
            delta_NWP = s / np.sqrt(W - 1) * mix_NWW @ d_NWP
        else:
            size = P if source == "isotropic" else 2
            variance_NGk = (d_NWP ** 2).sum(1).reshape(samples, -1, size).mean(2) / (W - 1)
            z_NWP = generator.standard_normal((samples, W, P))
            delta_NWP = s * np.sqrt(variance_NGk.repeat(size, axis=1))[:, None] * z_NWP


def test_growth_tells_what_diverges() -> None:
    largest = float(np.linalg.eigvalsh(HESSIAN)[-1])
    for factor, stable in ((1.99, True), (2.01, False)):
        problem = Problem(factor / largest, 0.0, 4, 2, 2)
        assert (theory.growth(problem, False) < 1) == stable
    missing = PROBLEM.missing  # (1-x)^2 + missing x^2 < 1 for x < 2/(1 + missing)
    for factor, stable in ((1.99, True), (2.01, False)):
        problem = Problem(factor / (1 + missing) / largest, 0.0, 4, 2, 2)
        assert (theory.growth(problem, True) < 1) == stable


# ---------------------------------------------------------------------------- intervals

@pytest.mark.parametrize("freedom", [1, 4, 40])
def test_intervals_miss_as_often_as_they_say(freedom: int) -> None:
    """On both sides, also of values as skewed as a mean of few squares."""
    values = np.random.default_rng(1).chisquare(freedom, (6000, 24)) / freedom
    found = [intervals.positive_mean(each, 0.02) for each in values]
    below = np.mean([each.low > 1 for each in found])
    above = np.mean([each.high < 1 for each in found])
    assert 0.004 < below < 0.02 and 0.004 < above < 0.02, (below, above)


def test_intervals_of_little_and_of_much() -> None:
    alike = intervals.positive_mean(np.full(9, 0.3), 1e-6)
    assert alike.low < 0.3 < alike.high and alike.high - alike.low < 1e-9
    wild = intervals.positive_mean(np.array([1e-9] * 8 + [1.0]), 1e-12)
    assert wild.low < 0.01 and wild.high == np.inf
    near = intervals.positive_mean(np.array([1.0, 1.0003] * 5), 0.01)
    usual = intervals.difference(np.array([1.0, 1.0003] * 5), 0.01)
    assert near.high - near.low == pytest.approx(usual.high - usual.low, rel=1e-3)


# ---------------------------------------------------------------------------- settings

@pytest.mark.parametrize("flags, says", [
    (["--structures", "ful-workers"], "did you mean full-workers"),
    (["--structures", "quux"], "give all, or some of none, full-workers"),
    (["--structures", "none,"], "structures=''"),
    (["--learning_rate", "0"], "learning_rate=0.0"), (["--learning_rate", "nan"], "nan"),
    (["--learning_rate", "fast"], "learning_rate=fast is wrong: give a number"),
    (["--learning_rate", "2"], "diverges"),
    (["--learning_rate", "1.4"], "full-examples diverges"),
    (["--momentum", "1"], "give 0 <= m < 1"), (["--momentum", "nan"], "momentum=nan"),
    (["--batch_size", "0"], "batch_size=0"), (["--batch_size", "2.5"], "a whole number"),
    (["--emulated_batch", "16"], "give less than 16, the whole batch (8 workers of 2)"),
    (["--emulated_batch", "0"], "emulated_batch=0"),
    (["--virtual_workers", "1"], "need 2 workers"), (["--virtual_workers", "0"], "1 or more"),
    (["--replicas", "7"], "give 8 or more"), (["--steps", "7"], "give 8 or more"),
    (["--steps", "ten"], "steps=ten"), (["--false_alarm", "0"], "false_alarm=0.0"),
    (["--false_alarm", "nan"], "false_alarm=nan"), (["--false_alarm", "0.5"], "1e-12 to 0.1"),
    (["--seed", "-1"], "seed=-1"), (["--threads", "0"], "threads=0"),
    (["--regression", "maybe"], "regression=maybe"), (["--progress", "loud"], "progress=loud"),
    (["--quick"], "unknown"), (["--stepps", "9"], "did you mean steps"),
])
def test_wrong_options_are_one_line_and_make_nothing(flags: list[str], says: str, tmp_path: Path,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["quadratic", "--out", str(out), *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line and not out.exists()


def test_folders_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "quadratic.json").write_text("{}")
    for flags, says in ((["--out", str(tmp_path)], "it holds such results already"),
                        (["--out", str(tmp_path / "file")], "it is not a folder"),
                        (["--overwrite"], "it goes with --out")):
        assert cli.main(["quadratic", *flags]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert says in line
    validate(QuadraticConfig(out=str(tmp_path), overwrite=True), 2)


def test_structures_that_are_not_registered_are_left_out() -> None:
    with forgotten_afterwards():
        del COVARIANCES["diagonal", "workers"]
        assert "diagonal-workers" not in known() and "diagonal" not in regression.ways()
        with pytest.raises(ConfigError, match="diagonal-workers"):
            validate(QuadraticConfig(structures="diagonal-workers"), 2)

        @register_covariance("striped", "examples")
        class Striped(FullExampleCovariance):
            """Some other structure."""
        assert without_formula() == ["striped-examples"] and "striped-examples" not in known()


# ---------------------------------------------------------------------------- the command

def command(capsys: pytest.CaptureFixture[str], **settings: Any) -> tuple[int, str, str]:
    """Exit code, output and error of the command on one rank."""
    config = QuadraticConfig(**{**QUICK, **settings})
    cases = validate(config, 1)
    (code,) = run_threads(1, lambda world: run(config, cases, world), timeout=200)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.slow
@pytest.mark.parametrize("name, wrong", [*((name, 2.0) for name in known() if name != "none"),
                                         ("full-workers", 0.5)])
def test_a_wrong_variance_is_found_and_named(name: str, wrong: float,
                                             monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    structure, _, source = name.rpartition("-")
    if structure == "gnc":
        right = GNC.displacement

        def displacement(self: GNC, *arguments: Any) -> Any:
            numbers, factors = right(self, *arguments)
            return numbers, [wrong ** 0.5 * factor for factor in factors]
        monkeypatch.setattr(GNC, "displacement", displacement)
    else:
        maker: Any = COVARIANCES[structure, source]
        missing = maker.missing_variance
        monkeypatch.setattr(maker, "missing_variance", lambda *given: wrong * missing(*given))
    code, out, err = command(capsys, structures=name)
    (line,) = err.strip().splitlines()
    assert code == 1 and f"{name} (" in line and "differs" in line
    assert f"| {name} " in out


@pytest.mark.slow
def test_another_structure_of_the_same_trace_is_found(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(COVARIANCES, ("diagonal", "workers"), COVARIANCES["isotropic", "workers"])
    code, _, err = command(capsys, structures="none,layerwise-workers,diagonal-workers")
    assert code == 1 and "theory: diagonal-workers (" in err and "differs" in err
    assert "none" not in err and "layerwise" not in err


@pytest.mark.slow
def test_too_few_runs_to_tell_are_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, structures="full-workers", replicas=8, steps=8,
                           false_alarm=1e-12)
    assert code == 1 and "too few runs to tell: full-workers" in err


@pytest.mark.slow
def test_table_json_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(regression, "RUNS", 2)
    code, out, err = command(capsys, structures="none,isotropic-workers,gnc-own", momentum=0.5,
                             regression=True, progress="lines", out=str(tmp_path / "a" / "b"))
    assert (code, err) == (0, "")
    folder = tmp_path / "a" / "b"
    assert sorted(path.name for path in folder.iterdir()) == ["figure.png", "quadratic.json",
                                                              "table.md"]
    record = json.loads((folder / "quadratic.json").read_text())
    assert {check["verdict"] for check in record["checks"]} == {"agrees"}
    assert {check["momentum"] for check in record["checks"]} == {0.0, 0.5}
    own = {check["quantity"]: check for check in record["checks"] if check["case"] == "gnc-own"}
    assert abs(own["no noise"]["measured"]) < 1e-12
    assert own["smoothing"]["measured"] == pytest.approx(own["smoothing"]["theory"], rel=1e-10)
    (row,) = record["frobenius"]
    assert row["structure"] == "isotropic" and row["low"] < row["theory"] < row["high"]
    small, large, *_ = record["regression"]
    assert small["name"] == "small batch" and large["last_excess"] < small["last_excess"]
    assert large["noise_trace_ratio"] == pytest.approx(1 / 16, rel=0.3)
    assert (folder / "table.md").read_text().splitlines()[2] in out
