"""docs/examples: each command of its README runs as shown, and says what the README says.

The README names each command in a block that begins with ``$``; the lines below it in that block
are what one sees. Words must be the same, numbers within a tolerance: other processors round
otherwise.
"""

from __future__ import annotations

import ast
import difflib
import functools
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.integration.running import HVDNOISE
from tests.launcher import ROOT, Ended, run_command

EXAMPLES = ROOT / "docs" / "examples"
README = (EXAMPLES / "README.md").read_text()
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
RELATIVE, ABSOLUTE = 0.25, 0.06  # what a number may be off: the larger of the two


@dataclass(frozen=True)
class Shown:
    """A command of the README and what it says there."""

    command: str
    lines: list[str]

    @property
    def file(self) -> str:
        """The example's, as in docs/examples."""
        return re.findall(r"docs/examples/([\w.]+)", self.command)[0]


def shown() -> dict[str, Shown]:
    """By the example's file; more commands of one by the command's own name."""
    found: dict[str, Shown] = {}
    for block in re.findall(r"^```\n(\$ .*?)^```", README, re.M | re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, *lines = part.rstrip("\n").split("\n")
            each = Shown(command, lines)
            name = each.file if "docs/examples/" in command else command.split()[1]
            found[name] = each
    return found


SHOWN = shown()


def run(command: str, cwd: Path, launcher: str = "gloo") -> Ended:
    """A command as the README has it, from a folder like the repository's."""
    words = shlex.split(command)
    ranks = 1
    if words[:2] == ["horovodrun", "-np"]:
        ranks, words = int(words[2]), words[3:]
    words[0] = {"python": sys.executable, "hvdnoise": HVDNOISE}[words[0]]
    if not (cwd / "docs").exists():
        (cwd / "docs").symlink_to(ROOT / "docs")
    ended = run_command(ranks, words, launcher=launcher if ranks > 1 else "none", cwd=cwd,
                        timeout=120)
    assert ended.exit_code == 0 and not ended.leftovers, ended.report()
    return ended


def said(ended: Ended) -> list[str]:
    """The lines, without a launcher's tags."""
    return [re.sub(r"\[\d+(?:,\d+)?\]<std\w+>:", "", line) for line in ended.output.splitlines()]


def alike(readme: str, text: str) -> bool:
    """Whether a line is there, somewhere: two ranks may write on one."""
    pattern = NUMBER.pattern.join(map(re.escape, NUMBER.split(readme)))
    shown = list(map(float, NUMBER.findall(readme)))
    return any(all(abs(a - b) <= max(ABSOLUTE, RELATIVE * abs(a)) for a, b in zip(
        shown, map(float, NUMBER.findall(found[0])))) for found in re.finditer(pattern, text))


def assert_says(ended: Ended, shown: Shown) -> None:
    """Each line of the README is there."""
    text = "\n".join(said(ended))
    for readme in shown.lines:
        assert alike(readme, text), f"{readme!r} is not in {text}"


def numbers(ended: Ended, pattern: str) -> list[float]:
    return [float(each) for each in re.findall(pattern, "\n".join(said(ended)))]


def assert_weights_equal(ended: Ended) -> None:
    """Both ranks have said the sum of their weights, and it is the same."""
    sums = re.findall(r"rank (\d)  sum of weights (-?[\d.]+)", "\n".join(said(ended)))
    assert sorted(rank for rank, _ in sums) == ["0", "1"], ended.report()
    assert len({total for _, total in sums}) == 1, sums


@functools.lru_cache
def changed_lines() -> list[str]:
    """The README's diff."""
    found = re.search(r"^```diff\n(.*?)^```", README, re.M | re.S)
    assert found is not None
    return found[1].splitlines()


# ---- the page

def test_every_example_is_on_the_page_and_every_command_names_one() -> None:
    files = {path.name for path in EXAMPLES.glob("*.py")}
    named = {name.replace("signals.yaml", "signals.py") for name in SHOWN if "." in name}
    assert named == files
    assert all(each.lines for name, each in SHOWN.items() if "." in name)


def test_three_lines_make_the_loop_noisy() -> None:
    plain, noisy = ((EXAMPLES / name).read_text().splitlines()
                    for name in ("horovod_loop.py", "horovod_loop_gnc.py"))
    differ = [line for line in difflib.ndiff(plain, noisy) if line[0] in "+-" and line[2:].strip()]
    assert sum(line[0] == "+" for line in differ) == 3
    assert sum(line[0] == "-" for line in differ) == 2
    assert changed_lines() == [line[0] + line[2:] for line in differ]


def test_examples_are_whole_programs_of_their_own() -> None:
    """They import no tests and nothing but the library's public names."""
    for path in EXAMPLES.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else \
                [each.name for each in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith(("tests", "hvdnoise."))], path


# ---- the examples

@pytest.mark.slow
def test_the_plain_loop_and_the_noisy_one(tmp_path: Path) -> None:
    """Without its noise the second is the first, bit for bit; so the noise is what differs."""
    plain = run(SHOWN["horovod_loop.py"].command, tmp_path)
    noisy = run(SHOWN["horovod_loop_gnc.py"].command, tmp_path, launcher="mpi")
    for ended, name in ((plain, "horovod_loop.py"), (noisy, "horovod_loop_gnc.py")):
        assert_says(ended, SHOWN[name])
        assert_weights_equal(ended)
        losses = numbers(ended, r"last loss (\S+)")
        assert losses[-1] < 0.7 * losses[0]
    assert plain.output != noisy.output


@pytest.mark.slow
def test_the_gpt_learns_the_language(tmp_path: Path) -> None:
    shown = SHOWN["gpt.py"]
    ended = run(shown.command, tmp_path)
    assert_says(ended, Shown(shown.command, [each for each in shown.lines if "lines" not in each]))
    assert_weights_equal(ended)
    losses, best = numbers(ended, r"loss (\S+)"), numbers(ended, r"best possible (\S+)")[0]
    assert losses == sorted(losses, reverse=True) and best < losses[-1] < 1.3 * best
    (right,) = numbers(ended, r"(\d+) of 100 lines")
    (readme,) = re.findall(r"(\d+) of 100 lines", "\n".join(shown.lines))
    assert right >= 70 and abs(right - int(readme)) <= 20


@pytest.mark.slow
def test_frozen_layers_stay(tmp_path: Path) -> None:
    ended = run(SHOWN["finetune.py"].command, tmp_path)
    assert_says(ended, SHOWN["finetune.py"])
    assert_weights_equal(ended)
    counts = re.findall(r"(\d+) of (\d+) tensors of the body unchanged", ended.output)
    assert counts == [("14", "14")] * 2
    known, pretrained, random = numbers(ended, r"test accuracy ([\d.]+\d)")
    assert known > 0.9 and pretrained > random + 0.1


@pytest.mark.slow
def test_gnc_leaves_the_sharp_minimum(tmp_path: Path) -> None:
    ended = run(SHOWN["gnc_2d.py"].command, tmp_path)
    assert_says(ended, SHOWN["gnc_2d.py"])
    ends = dict(re.findall(r"^(.*): (\d) of 4 runs end in the wide", "\n".join(said(ended)), re.M))
    assert ends == {"SGD": "0", "GNC": "4", "white noise": "0"}
    file = tmp_path / SHOWN["gnc_2d.py"].command.split()[-1]
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and file.stat().st_size > 20_000


@pytest.mark.slow
def test_a_data_set_and_a_model_of_ones_own(tmp_path: Path) -> None:
    """Trained, and scored again with the code that the user trusts."""
    shown = SHOWN["signals.yaml"]
    ended = run(shown.command, tmp_path)
    assert_says(ended, shown)
    state = torch.load(tmp_path / "runs" / "signals" / "weights.pt", weights_only=True)
    assert [tuple(each.shape) for each in state.values()][-1] == (4,)
    again = run(SHOWN["eval"].command, tmp_path)
    assert_says(again, SHOWN["eval"])
    accuracy = r"test accuracy (\d\.\d+)"
    assert numbers(again, accuracy)[-1] == numbers(ended, accuracy)[-1]
