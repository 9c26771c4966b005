"""From the record of a benchmark (bench.json) to its table and figure.

Everything is computed from the record alone: `results` adds medians and quartiles over the
rounds; ratios are formed within a round and then summarized, which a machine that drifts from
round to round does not disturb.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, Sequence

from hvdnoise.bench.measure import LEAST_SEEN
from hvdnoise.training.records import write_text
from hvdnoise.training.results import table

Spread = dict[str, float]


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (of the values as they are, between them linear)."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def results(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One summary per variant, plain first; times in seconds, sizes in bytes, ratios to plain.

    What was not measured, or cannot be seen, is None.
    """
    plain = record["variants"][0]
    assert plain["name"] == "plain"
    plain_bytes, plain_memory = _bytes(plain), _most(plain["memory"])
    gradients = 4 * record["parameters"]
    rows = []
    for each in record["variants"]:
        received, memory = _bytes(each), _most(each["memory"])
        more = memory - plain_memory if memory is not None and plain_memory is not None else None
        rows.append({
            "name": each["name"], "plan": each["plan"], "seconds": spread(each["seconds"]),
            "ratio": spread([a / b for a, b in zip(each["seconds"], plain["seconds"])]),
            "bytes": received, "bytes_4P": _over(received, gradients),
            "bytes_ratio": _over(received, plain_bytes),
            "predicted_4P": each["predicted_bytes"] / gradients,
            "memory": memory, "memory_beside_plain": more,
            "memory_beside_plain_4P": _over(more, gradients),
            "noise_memory_4P": _over(each["noise_memory"], gradients)})
    return rows


def _bytes(variant: dict[str, Any]) -> float | None:
    """Median over the rounds; None where the interface does not see what is exchanged."""
    predicted: float = variant["predicted_bytes"]
    found = statistics.median(variant["interface_bytes"])
    return found if predicted > 0 and found >= LEAST_SEEN * predicted else None


def _most(by_rank: Sequence[int | None] | None) -> int | None:
    """Of the ranks' memory; None where one of them could not measure."""
    known = [each for each in by_rank or [] if each is not None]
    return max(known) if known and len(known) == len(by_rank or []) else None


def _over(number: float | None, by: float | None) -> float | None:
    return None if number is None or not by else number / by


# ---------------------------------------------------------------------------- words

_HEADS = ("variant", "plan", "ms per step", "x plain", "MB received", "x 4P", "predicted",
          "x plain", "MB memory", "beside plain x 4P", "noise x 4P")


def text(record: dict[str, Any]) -> str:
    """What was measured, where and how, as Markdown that reads well on a terminal."""
    cells = [_HEADS, *(_cells(row) for row in record["results"])]
    return "\n".join([*_where(record), "", *table(cells, left=2), "", *_notes(record)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    time = {key: 1000 * value for key, value in row["seconds"].items()}
    return (row["name"], row["plan"], _range(time, ".1f"), _range(row["ratio"], ".2f"),
            _number(_over(row["bytes"], 1e6), ".2f"), _number(row["bytes_4P"], ".2f"),
            _number(row["predicted_4P"], ".2f"), _number(row["bytes_ratio"], ".2f"),
            _number(_over(row["memory"], 1e6), ".0f"),
            _number(row["memory_beside_plain_4P"], "+.2f"),
            _number(row["noise_memory_4P"], ".2f"))


def _range(values: Spread, form: str) -> str:
    return f"{values['median']:{form}} [{values['q1']:{form}}, {values['q3']:{form}}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _where(record: dict[str, Any]) -> list[str]:
    settings, packages, machine = record["settings"], record["versions"], record["machine"]
    hosts = len({(each["host"], each["network"]) for each in record["hosts"]})
    compute = f", {settings['compute_ms']:g} ms of emulated computation" \
        if settings["compute_ms"] else ""
    return [f"hvdnoise bench: {settings['model']}, {record['parameters']:,} parameters (P), "
            f"{settings['batch_size']} examples per rank{compute}",
            f"{_some(record['ranks'], 'rank')} on {_some(hosts, 'host')}, {record['launcher']}, "
            f"{record['device']} with {_some(record['threads'], 'thread')} per rank; "
            f"{machine['cpu']}, {machine['cores']} cores; torch {packages['torch']}, "
            f"Horovod {packages['horovod']}",
            f"{settings['rounds']} rounds of {settings['steps']} steps, interleaved, seed "
            f"{settings['seed']}; bytes on {record['interface']}"]


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _notes(record: dict[str, Any]) -> list[str]:
    rows = record["results"]
    notes = ["Medians over the rounds, with quartiles; x plain: ratios within each round. Bytes "
             "received and memory are per rank;", "predicted: by hvdnoise.plans, x 4P; noise: "
             "what hvdnoise counts of its own memory."]
    if record["ranks"] > 1 and any(row["bytes"] is None for row in rows):
        notes.append(f"MB received -: interface {record['interface']} does not see the exchange. "
                     "MPI on one host uses shared memory: start with Gloo, or mpirun --mca btl "
                     "tcp,self.")
    hosts = {(each["host"], each["network"]) for each in record["hosts"]}
    if 1 < len(hosts) < record["ranks"]:
        notes.append("Ranks share hosts: predicted counts what they receive from each other too, "
                     "MB received only what came over the network.")
    for each in record["variants"]:
        if not each["replicas_equal"]:
            notes.append(f"WARNING: {each['name']}: the ranks' weights differ.")
        if not each["distance_moved"]:
            notes.append(f"WARNING: {each['name']} did not train (lr too large, or 0?).")
    return notes


# ---------------------------------------------------------------------------- files

def write(record: dict[str, Any], folder: Path) -> None:
    """bench.json, table.md and figure.png."""
    write_text(folder / "bench.json", json.dumps(record, indent=1))
    write_text(folder / "table.md", text(record) + "\n")
    figure(record, folder / "figure.png")


def figure(record: dict[str, Any], path: Path) -> None:
    """Left: time by variant, as ratio to plain, with quartiles. Right: bytes and prediction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    rows = record["results"]
    places = range(len(rows))
    drawing = Figure(figsize=(11, 1.8 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(drawing)
    time, sent = drawing.subplots(1, 2, sharey=True)
    middle = [row["ratio"]["median"] for row in rows]
    time.errorbar(middle, places, fmt="o", capsize=3, xerr=[
        [row["ratio"]["median"] - row["ratio"]["q1"] for row in rows],
        [row["ratio"]["q3"] - row["ratio"]["median"] for row in rows]])
    time.axvline(1, color="grey", linewidth=0.8)
    time.set(xlabel="time per step, x plain (median, quartiles)", yticks=list(places),
             yticklabels=[row["name"] for row in rows], xlim=(0, 1.1 * max(
                 1.0, *(row["ratio"]["q3"] for row in rows))))
    time.invert_yaxis()
    sent.barh(places, [row["bytes_4P"] or 0 for row in rows], color="tab:blue", label="measured")
    sent.plot([row["predicted_4P"] for row in rows], places, "k|", markersize=14,
              markeredgewidth=2, label="predicted")
    sent.set(xlabel="bytes received per rank and step, x 4P")
    sent.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    for axes in (time, sent):
        axes.grid(axis="x", alpha=0.3)
    drawing.suptitle("\n".join(_where(record)[:2]), fontsize=8, wrap=True)
    drawing.savefig(path, dpi=130)
