"""In place of `hvdnoise train` for tests of a study: a run folder in a tenth of a second.

    python fake_trainer.py DEFAULTS.json --FLAG=VALUE ...

The scores are functions of learning rate and seed. What else happens is asked for by `model`:
"fail", "flaky" (the first time only), "diverge", "slow" (until SIGTERM, then 75; the second time it
ends well), "stubborn" (it has a child, and both ignore SIGTERM).
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main() -> int:
    settings = json.loads(Path(sys.argv[1]).read_text())
    for flag in sys.argv[2:]:
        name, _, value = flag.removeprefix("--").partition("=")
        settings[name] = value_of(value)
    folder, model = Path(settings["run_dir"]), settings["model"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    (folder / "config.yaml").write_text(json.dumps(settings))
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    first = len((folder / "starts").read_text().split()) == 1
    if model == "fail" or model == "flaky" and first:
        print("hvdnoise: error: the disk is full\nrubbish after it")
        return 1
    if model == "slow" and first:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        time.sleep(30)
    if model == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["setsid", "sleep", "30"])
        time.sleep(30)
    summary = {"outcome": "diverged", "seconds": 1.0} if model == "diverge" else score(settings)
    (folder / "summary.json").write_text(json.dumps(summary))
    return int(model == "diverge")


def score(settings: dict[str, Any]) -> dict[str, Any]:
    """Best at a learning rate of 0.1; .9 there, less .1 a decade, plus a share of the seed.

    The moving average of the weights, where there is one: best at 1, .96 there.
    """
    def accuracy(best: float, rate: float) -> float:
        decades = abs(math.log10(settings["optim.lr"] / rate))
        return best - .1 * decades + settings["seed"] % 7 / 1000
    found = {"": accuracy(.9, .1)}
    if settings["ema"]:
        found["ema_"] = accuracy(.96, 1.0)
    return {"outcome": "finished", "seconds": 1.0, "steps": 4, "test_loss": 1.0,
            **{f"{which}validation_accuracy": value - .1 for which, value in found.items()},
            **{f"{which}test_accuracy": value for which, value in found.items()}}


if __name__ == "__main__":
    sys.exit(main())
