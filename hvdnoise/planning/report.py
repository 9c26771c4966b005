"""A plan as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any, Sequence

from hvdnoise.planning import lines
from hvdnoise.planning.config import PlanConfig, read
from hvdnoise.planning.outline import Outline, outline, shape
from hvdnoise.planning.predict import Cluster, Prediction, predict_all
from hvdnoise.plans import PLANS

_MB = 1e6
_MEANING = """MB/rank: 10^6 bytes that a rank receives in a step, with ring algorithms; MB/host: \
those that
cross the link into one host. mem L, ms L, x L, at lag L: MB of one rank for the noise, beside those
of plain training; a step's milliseconds; the same over those of a step without noise.
Times come from a simple model. A host's link is shared by its ranks and used in full; latency,
mixing and what stays in a host take no time; gradients leave during the last backward pass
(backward: 2/3 of the compute time). With lag 1 the noise must arrive before the next step, with
lag 2 during it."""


def run(arguments: Sequence[str]) -> int:
    """`hvdnoise plan`: print the plan, and write its files; the exit code.

    Raises:
        ConfigError: for anything wrong; nothing was printed or written.
    """
    config, flags = read(arguments)
    run_ = outline(config)
    predictions = predict(config, run_)
    written = lines.write(Path(config.write), lines.files(config, flags)) if config.write else []
    if config.json:
        print(json.dumps(as_json(config, flags, run_, predictions), indent=2, allow_nan=False))
        return 0
    print(as_text(config, flags, run_, predictions))
    for path in written:
        print(f"wrote {path}")
    return 0


def cluster(config: PlanConfig) -> Cluster:
    """The cluster of these settings, in seconds and bytes."""
    rate, compute = config.bandwidth_gbit, config.compute_ms
    return Cluster(len(config.names), config.ranks_per_host,
                   None if rate is None else rate * 1e9 / 8,
                   None if compute is None else compute / 1e3,
                   config.virtual_workers * config.accumulate)


def predict(config: PlanConfig, run: Outline) -> list[Prediction]:
    """All plans at the lags 1 and 2, and 0 where that is configured."""
    lags = (0, 1, 2) if _lag(config) == 0 else (1, 2)
    return predict_all(shape(config, run.parameters, run.statistics_bytes), cluster(config), lags)


# ---------------------------------------------------------------------- JSON


def as_json(config: PlanConfig, flags: Sequence[str], run: Outline,
            predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Everything there is to know; bytes and seconds, lags as text."""
    plans = [{**dataclasses.asdict(each), "impossible": each.impossible or None}
             for each in predictions]
    return {
        "cluster": dict(dataclasses.asdict(cluster(config)), hostnames=config.names,
                        bytes_per_second=_finite(cluster(config).bytes_per_second)),
        "run": dict(dataclasses.asdict(run), batch=run.batch,
                    virtual_workers=config.virtual_workers,
                    plan={"name": run.plan.name, "group_size": run.plan.group_size,
                          "reason": run.plan.reason}),
        "exchange_needed": run.mixes, "plans": plans,
        "commands": {"train": lines.train(flags), "horovodrun": lines.horovodrun(config, flags),
                     "mpirun": lines.mpirun(config, flags)},
        "files": lines.files(config, flags)}


def _finite(value: float | None) -> float | None:
    return None if value in (None, float("inf")) else value


# ---------------------------------------------------------------------- text


def as_text(config: PlanConfig, flags: Sequence[str], run: Outline,
            predictions: Sequence[Prediction]) -> str:
    """What a terminal shows."""
    reasons = {each.impossible: f"{each.plan} {each.precision}" for each in predictions
               if each.impossible}
    return "\n".join([
        *_facts(config, run), "", *_table(predictions), "",
        *(f"{which} cannot be used: {why}" for why, which in reasons.items()),
        *_advice(config, run, predictions), _MEANING, "",
        "# horovodrun, where every machine on the network is trusted",
        shlex.join(lines.horovodrun(config, flags)),
        "# mpirun", shlex.join(lines.mpirun(config, flags)),
        *([] if config.write else
          ["# Slurm: job.sbatch", lines.slurm(config, flags),
           "# Kubernetes: mpijob.yaml", lines.mpijob(config, flags)])])


def _facts(config: PlanConfig, run: Outline) -> list[str]:
    data, scaling = config.data.dataset, config.lr.scaling
    scaled = "" if scaling == "none" else \
        f" ({config.optim.lr:g}, {scaling} with {run.batch}/{config.lr.base_batch})"
    facts = {
        "workers": f"{run.workers}: {len(config.names)} hosts x {config.ranks_per_host} ranks x "
                   f"{config.virtual_workers} virtual workers",
        "batch": f"{run.batch} examples a step, {run.worker_batch} of each worker",
        "learning rate": f"{run.first_rate:.4g} at the first step, {run.peak_rate:.4g} at the peak"
                         f"{scaled}",
        "steps": f"{run.steps_per_epoch} an epoch, {run.total_steps} in all; {run.examples:,} "
                 f"training images of {data}",
        "parameters": f"{run.parameters:,}, {run.parameters * 4 / _MB:.4g} MB",
        "noise": _noise(config, run),
        "exchange": f"{run.plan.name}: {run.plan.reason}"}
    return [f"{name:<14} {text}" for name, text in facts.items()]


def _noise(config: PlanConfig, run: Outline) -> str:
    noise = config.noise
    if noise.kind == "none":
        return "none"
    name = " with ".join(" ".join(filter(None, [each.kind, each.structure, each.source]))
                         for each in noise.each())
    if run.mixes:
        return f"{name}, lag {_lag(config)}"
    memory = f"; {run.noise_memory / _MB:.4g} MB of a rank" if run.noise_memory else ""
    if not run.statistics_bytes:
        return f"{name}: it needs no exchange, the allreduce of the gradients is all that " \
               f"travels{memory}"
    return f"{name}: it needs no exchange but {run.statistics_bytes:,} bytes of statistics{memory}"


def _lag(config: PlanConfig) -> int:
    noise = config.noise.build(seed=0, batch_size=1, total_steps=1)
    return 1 if noise is None else noise.lag


def _table(predictions: Sequence[Prediction]) -> list[str]:
    lags = sorted(predictions[0].memory)
    timed = any(each.seconds for each in predictions)
    rows = [["plan", "noise", "MB/rank", "x plain", "MB/host", *(f"mem {lag}" for lag in lags),
             *(f"ms {lag}" for lag in lags if timed), *(f"x {lag}" for lag in lags if timed)]]
    for each in predictions:
        rows.append([each.plan + ("" if not each.impossible else " (no)"), each.precision,
                     _number(each.received / _MB), _number(each.ratio),
                     _number(each.into_host / _MB),
                     *(_number(each.memory[lag] / _MB) for lag in lags),
                     *(_number(each.seconds[lag] * 1e3) for lag in lags if timed),
                     *(_number(each.overhead.get(lag)) for lag in lags if timed)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) if column < 2 else text.rjust(width) for column,
                      (text, width) in enumerate(zip(row, widths))).rstrip() for row in rows]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _advice(config: PlanConfig, run: Outline, predictions: Sequence[Prediction]) -> list[str]:
    """What the configuration could do better, or what is missing to say so."""
    said = []
    if config.bandwidth_gbit is None or config.compute_ms is None:
        said.append("give --bandwidth_gbit and --compute_ms to have step times predicted")
    possible = [PLANS[each.plan] for each in predictions if not each.impossible]
    same_law = [each for each in predictions if not each.impossible
                and PLANS[each.plan].all_workers and each.precision == _bits(config)]
    taken = [each for each in same_law if each.plan == run.plan.name]
    if run.mixes and taken and same_law:
        least = min(same_law, key=lambda each: each.into_host)
        if least.into_host < 0.99 * taken[0].into_host:
            said.append(f"on these hosts {least.plan} carries least over a link: "
                        f"{least.into_host / taken[0].into_host:.2f} x {taken[0].plan}; try "
                        f"--exchange {least.plan}")
    if run.mixes and len(config.names) > 1:
        said += [f"{plan.name} {plan.note}" for plan in dict.fromkeys(possible)
                 if plan.note and plan is not run.plan.plan]
    return said


def _bits(config: PlanConfig) -> str:
    return "fp32" if config.noise_precision == "fp32" else "bf16"
