"""A reproduction in its order: read the record, say what differs, run again, compare."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path
from typing import Any, Callable

from hvdnoise.reproduce import command, differences, results
from hvdnoise.reproduce.config import ReproduceConfig, validate
from hvdnoise.reproduce.record import Record, read, read_json
from hvdnoise.study import launch
from hvdnoise.training.config import ConfigError
from hvdnoise.training.errors import one_line_errors
from hvdnoise.training.process import EXIT_FAILED

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(config: ReproduceConfig) -> int:
    """`hvdnoise reproduce`; the exit code.

    Raises:
        ConfigError: for a folder that holds no finished run, and what is missing here; nothing
            was started.
    """
    record = _read(config)
    if not config.dry_run:
        command.check(config, record)
    words = command.words(config, record)
    found = differences.before_and_now(record, differences.here(record))
    _say(f"{record.folder}: {record.ranks} ranks, {record.transport}, "
         f"{record.threads} threads of each; the new run goes to {config.folder}")
    _say_plugins(record)
    _say("what differs from the record:" if found else
         "nothing that is recorded differs from the record")
    for line in found:
        _say(f"  {line}")
    _say(shlex.join(words))
    if config.dry_run:
        return 0
    code, wish = _run(words, config, record)
    if wish is not None:
        _say(f"{signal.Signals(wish).name}: ended; nothing is left running, and the unfinished run "
             f"is in {config.folder}")
        return 128 + wish
    return _compare(config, record, code)


@one_line_errors()
def _read(config: ReproduceConfig) -> Record:
    record = read(Path(config.run))
    validate(config)
    return record


def _say(text: str) -> None:
    print(text, flush=True)


def _say_plugins(record: Record) -> None:
    for plugin in record.plugins:
        _say(f"plugin {plugin}: {command.describe(record, plugin)}")


def _run(words: list[str], config: ReproduceConfig, record: Record) -> tuple[int, int | None]:
    """Run to the end, or to a signal; the exit code, and the signal. Nothing is left running."""
    got: list[int] = []
    before: dict[int, Any] = {
        number: signal.signal(number, lambda number, _: got.append(number)) for number in _SIGNALS}
    started = launch.start_guarded(words, run_folder=config.folder,
                                   env=command.environment(record))
    try:
        while started.process.poll() is None and not got:
            time.sleep(launch.POLL_SECONDS)
    finally:
        started.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    return started.process.returncode, got[0] if got else None


def _compare(config: ReproduceConfig, record: Record, code: int) -> int:
    """Say whether the new run is the old one; the exit code."""
    out = config.folder
    summary = _whole(lambda: read_json(out / "summary.json"))
    if code != 0 or summary is None or summary.get("outcome") != "finished":
        _say(f"differs: the new run did not finish (exit code {code}); see {out / 'logs'}")
        return EXIT_FAILED
    again = Record(out, {}, _whole(lambda: read_json(out / "environment.json")) or {}, summary,
                   record.ranks)
    lines = results.digests(record.digests, again.digests)
    if not lines:
        _say(f"equal: weights_sha256 {record.digests['weights_sha256']}")
        return 0
    _say("differs:")
    lines += results.weights(record.folder, out, record.digests["weights_sha256"])
    lines += results.metrics(record.folder, out)
    now = {**differences.here(record), **again.environment}
    lines += differences.before_and_now(record, now) or ["nothing that is recorded differs"]
    for line in lines:
        _say(f"  {line}")
    return EXIT_FAILED


def _whole(action: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What ``action`` reads; None where it is missing or damaged."""
    try:
        return action()
    except ConfigError:
        return None
