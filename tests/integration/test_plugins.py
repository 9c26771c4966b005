"""A noise that the package does not know, trained by its name under the launcher."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from tests.integration.running import TINY, error_lines, finished, hvdnoise
from tests.launcher import ROOT


def test_a_noise_of_a_file_trains_by_its_name(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "noises" / "scaled.py", tmp_path / "scaled.py")
    once = TINY.replace("kind: gnc", "kind: scaled, factor: 1") + "plugins: [scaled.py]\n"
    digests = []
    for name, settings in (("one", once), ("three", once.replace("factor: 1", "factor: 3"))):
        (tmp_path / f"{name}.yaml").write_text(settings)
        ended = hvdnoise(2, "train", "--config", f"{name}.yaml", "--run_dir", name, "--epochs",
                         "1", cwd=tmp_path)
        summary = finished(ended, tmp_path / name)
        assert (summary["ranks"], summary["noise"]) == (2, "scaled")
        digests.append(summary["weights_sha256"])
    assert digests[0] != digests[1]  # the factor is at work
    written = yaml.safe_load((tmp_path / "three" / "config.yaml").read_text())
    assert written["plugins"] == ["scaled.py"] and written["noise"]["factor"] == 3.0

    ended = hvdnoise(2, "train", "--config", "three.yaml", "--run_dir", "three", "--resume",
                     "auto", "--epochs", "2", cwd=tmp_path)
    assert finished(ended, tmp_path / "three")["steps"] == 2 * summary["steps"]

    (tmp_path / "scaled.py").unlink()  # scoring a run needs no noise
    ended = hvdnoise(1, "eval", "three", cwd=tmp_path)
    assert ended.exit_code == 0 and "test accuracy" in ended.output, ended.report()
    ended = hvdnoise(2, "train", "--config", "three.yaml", "--run_dir", "new", cwd=tmp_path)
    (line,) = error_lines(ended.output)
    assert "plugins: there is no file scaled.py" in line and not (tmp_path / "new").exists()
