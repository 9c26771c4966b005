"""A study's folder with plausible records, as `hvdnoise study` and the trainer leave it behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import yaml
from scipy import stats

VERSIONS = {"versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "horovod": "0.28.1"},
            "platform": "Linux", "hosts": ["node"], "ranks": 2}
SETTINGS = {"model": "mlp", "data": {"dataset": "fashion-mnist", "limit": 2048, "validation": 512},
            "epochs": 30.0, "virtual_workers": 8, "score_train": True}
LABELS = ("Plain SGD", "GNC, own deviations", "GNC, gathered", "GNC, isotropic", "SAM",
          "Momentum SAM", "Stale SAM", "Covariance, full", "Covariance, diagonal",
          "Covariance, layerwise", "Covariance, isotropic", "Echo GNC", "Echo SAM", "LARS", "LAMB")


def write_run(folder: Path, *, seed: int = 0, epochs: int = 12, steps: int = 4, level: float = 0.9,
              noise: str = "gnc", outcome: str = "finished", passes: int = 1, per_line: int = 1,
              measured: bool = False) -> dict[str, Any]:
    """A run's folder; its summary."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "epochs": float(epochs),
                                                        "seed": seed, "noise": {"kind": noise}}))
    (folder / "environment.json").write_text(json.dumps(VERSIONS))
    lines = []
    accuracy = 0.1
    for step in range(1, epochs * steps + 1):
        epoch = step / steps
        accuracy = level - (level - 0.1) * math.exp(-4 * epoch / epochs) + rng.normal(0, 0.004)
        if step % per_line == 0:
            lines.append({
                "kind": "train", "step": step, "epoch": epoch, "loss": 2.3 * math.exp(
                    -5 * epoch / epochs) + 0.05 + abs(rng.normal(0, 0.02)), "accuracy": accuracy,
                "learning_rate": 0.1 * (1 + math.cos(math.pi * epoch / epochs)) / 2,
                "step_seconds": 0.3 + abs(rng.normal(0, 0.02)), "bad_steps": int(step == 7),
                "communication_seconds": 0.04, "noise_rms": 0.05, "noise_radius": 0.05,
                "noise_share": 0.02, "noise_lr_multiple": 3.0 + step / 40,
                "gradient_noise_scale": 200 * math.exp(4 * epoch / epochs),
                "noise_due_steps": step - 1, "noise_missed_steps": 0})
        if step % steps == 0:
            lines.append({"kind": "validation", "step": step, "epoch": epoch, "seconds": step * 0.3,
                          "validation_loss": 2.3 - 2 * accuracy, "validation_accuracy": accuracy})
            lines.append({"kind": "covariance", "step": step, "trace": 400 / epoch,
                          "frobenius": 200 / epoch, "stable_rank": 3 + 0.1 * epoch,
                          "alignment": 0.1, "eigenvalue_1": 130 / epoch, "eigenvalue_2": 60 / epoch,
                          "share/0.weight": 0.7, "share/0.bias": 0.3})
    ended = {"outcome": outcome, "steps": epochs * steps, "epochs": float(epochs), "noise": noise,
             "seconds": round(epochs * steps * 0.3 * passes + float(rng.normal(0, 0.3)), 3),
             "ranks": 2, "workers": 16, "worker_batch": 32, "global_batch": 512}
    if outcome == "diverged":
        lines = lines[:len(lines) // 2]
        ended["reason"] = "the gradient was not finite in 10 steps in a row"
    else:
        test = float(accuracy + rng.normal(0, 0.003))
        lines.append({"kind": "test", "step": epochs * steps, "epoch": float(epochs),
                      "seconds": ended["seconds"], "test_loss": 1 - test, "test_accuracy": test})
        ended.update(test_accuracy=test, test_loss=1 - test, train_accuracy=min(1.0, test + 0.06),
                     validation_accuracy=float(accuracy), best_test_accuracy=test,
                     gradient_evaluations=epochs * steps * 512 * passes,
                     exchange_bytes=epochs * steps * 836_000)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "logs").mkdir()
    (folder / "logs" / "rank-0.log").write_text(
        "2026-11-26 11:18:25,430 INFO rank 0, process 6385 on node\n"
        "2026-11-26 11:18:26,430 INFO resumed at step 4\n"
        "2026-11-26 11:18:27,430 WARNING 1 steps without a finite gradient were skipped\n")
    (folder / "summary.json").write_text(json.dumps(ended))
    if measured:
        (folder / "measure").mkdir()
        (folder / "measure" / "measure.json").write_text(json.dumps(_measured(rng)))
    return ended


def _measured(rng: np.random.Generator) -> dict[str, Any]:
    at = np.linspace(-1, 1, 21)
    return {"format": 1, "examples": 512, "loss": 0.3, "hessian": {
        "eigenvalues": [20 + float(rng.normal()), 11.0, None],
        "eigenvalue_errors": [0.1, 0.2, None], "trace": 150 + float(rng.normal()),
        "trace_error": 3.0, "mean_curvature": 0.01},
        "alignment": {"workers": 16, "trace_hc": 30.0, "trace_c": 10.0, "noise_curvature": 3.0},
        "line": {"at": at.tolist(), "loss": [*(0.3 + at[:-1] ** 2).tolist(), None],
                 "accuracy": (0.9 - 0.3 * at ** 2).tolist()}, "plane": None,
        "noise": [{"level": level, "accuracy": 0.9 - level, "accuracy_error": 0.01}
                  for level in (0.05, 0.1, 0.2, 0.4)]}


def write_study(folder: Path, *, methods: int | Sequence[str] = 3, seeds: int = 3, trials: int = 4,
                batches: Sequence[int] = (512,), state: str = "complete", diverged: bool = False,
                failed: bool = False, **run: Any) -> dict[str, Any]:
    """A study's folder; what its results.json holds. The second method has the trouble, if any."""
    labels = [LABELS[n] if n < len(LABELS) else f"Method number {n}" for n in range(methods)] \
        if isinstance(methods, int) else list(methods)
    folder.mkdir(parents=True)
    entries = [_entry(folder, place, label, batch, seeds, trials, run,
                      "diverged" if diverged and place == 1 else
                      "failed" if failed and place == 1 else "finished")
               for batch in batches for place, label in enumerate(labels)]
    comparisons = _compare(entries, batches)
    results = {
        "name": folder.name, "about": "Does it help?", "baseline": "m0", "state": state,
        "score": "test_accuracy", "chance": 0.1, "trials_per_method": trials,
        "tuning_seeds": [100], "seeds": list(range(seeds)), "ranks": 2, "virtual_workers": 8,
        "workers": 16, "settings": SETTINGS, "methods": entries, "comparisons": comparisons,
        "adjusted": "holm", "runs": {
            "planned": len(entries) * (seeds + trials), "finished": sum(
                final["outcome"] == "finished" for entry in entries for final in entry["finals"])
            + len(entries) * trials - len(entries) * (trials > 1),
            "diverged": sum(entry["diverged"] for entry in entries)
            + len(entries) * (trials > 1), "failed": sum(entry["failed"] for entry in entries)}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "study.yaml").write_text(yaml.safe_dump({"name": folder.name, "seeds": seeds}))
    (folder / "environment.json").write_text(json.dumps(VERSIONS))
    return results


def _entry(folder: Path, place: int, label: str, batch: int, seeds: int, trials: int,
           run: dict[str, Any], trouble: str) -> dict[str, Any]:
    rng = np.random.default_rng(place)
    level = 0.86 + 0.004 * place - 0.01 * (batch > 512)
    finals = []
    for seed in range(seeds):
        outcome = trouble if seed == 0 else "finished"
        name = f"runs/m{place}/b{batch}/final-seed-{seed}"
        ended = write_run(folder / name, seed=1000 * place + seed + batch, level=level,
                          passes=1 + (label.endswith("SAM") and "M" not in label),
                          outcome=outcome, **run)
        score = ended.get("test_accuracy") if outcome == "finished" else \
            0.1 if outcome == "diverged" else None
        finals.append({"run": name, "seed": seed, "outcome": outcome, "score": score, **{
            key: ended.get(key) for key in ("test_accuracy", "test_loss", "validation_accuracy",
                                            "train_accuracy", "seconds", "steps",
                                            "gradient_evaluations", "exchange_bytes")}})
    scores = [final["score"] for final in finals if final["score"] is not None]
    whole = len(scores) == seeds > 0
    tried = [{"run": f"runs/m{place}/b{batch}/trial-{n:02d}-seed-100", "seed": 100,
              "settings": {"optim.lr": float(0.02 * 3 ** n), "noise.radius": 0.05 * (n + 1)},
              "outcome": "diverged" if n == trials - 1 > 0 else "finished",
              "validation_accuracy": None if n == trials - 1 > 0 else
              float(level - 0.02 * (n - 1) ** 2 + rng.normal(0, 0.003))} for n in range(trials)]
    return {"method": f"m{place}", "label": label, "batch": batch,
            "settings": {"noise.kind": "gnc"},
            "search": {"optim.lr": {"low": 0.02, "high": 2.0, "log": True},
                       **({"noise.radius": [0.05, 0.1, 0.15, 0.2]} if place else {})},
            "trials": tried, "chosen": tried[min(1, trials - 1)]["settings"] if trials else None,
            "finals": finals, "mean": float(np.mean(scores)) if whole else None,
            "error": float(np.std(scores, ddof=1) / math.sqrt(seeds)) if whole and seeds > 1
            else None, "n": len(scores), "diverged": int(trouble == "diverged" and seeds > 0),
            "failed": int(trouble == "failed" and seeds > 0), "versus_baseline": None}


def _compare(entries: list[dict[str, Any]], batches: Sequence[int]) -> int:
    made = 0
    for entry in entries:
        base = next(each for each in entries if each["method"] == "m0"
                    and each["batch"] == entry["batch"])
        if entry is base or entry["mean"] is None or base["mean"] is None:
            continue
        pairs = np.array([a["score"] - b["score"] for a, b in zip(entry["finals"], base["finals"])])
        error = float(stats.sem(pairs)) if len(pairs) > 1 else None
        low, high = stats.t.interval(0.95, len(pairs) - 1, pairs.mean(), error) if error else \
            (None, None)
        p = float(stats.ttest_1samp(pairs, 0).pvalue) if error else None
        entry["versus_baseline"] = {
            "batch": base["batch"], "difference": float(pairs.mean()), "error": error, "low": low,
            "high": high, "level": 0.95, "p": p, "p_holm": None if p is None else min(1.0, 5 * p),
            "n": len(pairs)}
        made += 1
    return made
