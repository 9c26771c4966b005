"""What is another here than in the record, of all that the bits of a run depend on."""

from __future__ import annotations

import socket
from typing import Any

from hvdnoise.reproduce.record import Record, plugin_digest, starts
from hvdnoise.training import records

SHOWN = ("transport", "threads", "processor", "cpu_capability", "image", "mpi", "git", "platform",
         "data")
_MEANING = {"hvdnoise": "hvdnoise (digest of its code)", "git": "commit", "image": "image",
            "data": "digest of the data", "cpu_capability": "processor's vector instructions"}


def here(record: Record) -> dict[str, Any]:
    """As environment.json will have it of the new run, as far as it is known before the start."""
    versions = records.versions()
    versions.update({f"plugin {plugin}": plugin_digest(plugin) or "missing"
                     for plugin in record.plugins})
    transport = record.transport
    found = records.environment([socket.gethostname()] * record.ranks,
                                {"local_size": record.ranks}, transport)
    found.update(versions=versions, threads=record.threads, variables=record.variables)
    if "ATEN_CPU_CAPABILITY" in record.variables:
        del found["cpu_capability"]  # of the ranks it is not this process's
    return found


def before_and_now(record: Record, now: dict[str, Any]) -> list[str]:
    """A line for each difference, the code and the libraries first."""
    was = record.environment
    lines = _compare(_table(was, "versions"), _table(now, "versions"))
    lines += _compare({key: was.get(key) for key in SHOWN}, {key: now.get(key) for key in SHOWN
                                                             if key in now})
    lines += _compare(_table(was, "variables"), _table(now, "variables")) \
        if "variables" in was else []
    lines += _compare({"gpus": _gpus(record, was)}, {"gpus": _gpus(record, now)})
    lines += _compare({"hosts": _hosts(was)}, {"hosts": _hosts(now)})
    lines += _missing(was) + _of_starts(record)
    return lines


def _table(facts: dict[str, Any], key: str) -> dict[str, Any]:
    found = facts.get(key)
    return found if isinstance(found, dict) else {}


def _compare(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Where both know; what only one has counts in tables of names."""
    lines = []
    for key in {**was, **now}:
        if key in SHOWN and (key not in now or was.get(key) is None):
            continue  # older records, and what is known after the run only
        if was.get(key) != now.get(key):
            lines.append(f"{_MEANING.get(key, key)}: {_text(was.get(key))} in the record, "
                         f"{_text(now.get(key))} here")
    return lines


def _text(value: Any) -> str:
    text = "none" if value in (None, [], {}) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _gpus(record: Record, facts: dict[str, Any]) -> Any:
    """Those that are used."""
    return facts.get("gpus") if record.device == "cuda" else None


def _hosts(facts: dict[str, Any]) -> str:
    found = facts.get("hosts")
    return ", ".join(sorted({str(each) for each in found})) if isinstance(found, list) else ""


def _missing(was: dict[str, Any]) -> list[str]:
    """What an older hvdnoise has not recorded."""
    gone = [key for key in ("transport", "processor", "cpu_capability") if key not in was]
    return [f"not in the record: {', '.join(gone)}"] if gone else []


def _of_starts(record: Record) -> list[str]:
    """What changed within the run itself, where it was resumed."""
    lines = []
    found = starts(record.summary)
    for old, new in zip(found, found[1:]):
        changed = [line for line in _compare(_flat(old), _flat(new))]
        if changed:
            text = "; ".join(changed).replace(" in the record", "").replace(" here", " then")
            lines.append(f"the run was resumed at step {new.get('step')} with others than before: "
                         f"{text}")
    return lines


def _flat(start: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in start.items()
            if key not in ("step", "versions", "variables")}
    return {**_table(start, "versions"), **_table(start, "variables"), **kept}
