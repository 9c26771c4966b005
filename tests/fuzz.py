"""Random settings, right and wrong, for every command of hvdnoise.

    python -m tests.fuzz --seed 3 --count 2000

Each case is a file of settings and arguments. The command is run in this process up to the point
where it would start Horovod, and must end with 0, or with 2 and one line on stderr; within
`SECONDS`, without a traceback, and with nothing created where it ends with 2. A configuration that
is taken must come back the same from the file that a run writes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator
from unittest import mock

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from hvdnoise import cli
from hvdnoise.bench.config import BenchConfig
from hvdnoise.export.config import ExportConfig
from hvdnoise.measure.config import MeasureConfig
from hvdnoise.planning.config import PlanConfig
from hvdnoise.quadratic.config import QuadraticConfig
from hvdnoise.report.config import ReportConfig
from hvdnoise.reproduce.config import ReproduceConfig
from hvdnoise.study.config import StudyConfig
from hvdnoise.training import yamlfile
from hvdnoise.training.config import TrainConfig, flatten, nested
from hvdnoise.training.options import parse

SECONDS = 60
FILE = "my.yaml"
KINDS: dict[str, Any] = {
    "train": TrainConfig, "plan": PlanConfig, "bench": BenchConfig, "quadratic": QuadraticConfig,
    "eval": cli.EvalConfig, "measure": MeasureConfig, "report": ReportConfig,
    "doctor": cli.DoctorConfig, "reproduce": ReproduceConfig, "study": StudyConfig,
    "export": ExportConfig}
NOISE = ["noise." + name for name in (
    "kind", "source", "radius", "lr", "relative", "share", "final", "lag", "structure",
    "emulated_batch", "scope", "per", "echo", "decay", "every", "trace", "also")]
NAMES = {command: [*flatten(kind()), *(NOISE if command in ("train", "plan") else [])]
         for command, kind in KINDS.items()}
LONG = "9" * 5000
DEEP = 3000
TOKENS = [  # as a flag's value, and as a value in YAML
    "", "0", "1", "2", "3", "-1", "0.5", "-0.0", "1e-3", "1e400", "-1e400", ".nan", "nan", ".inf",
    "-.inf", "inf", "NaN", "Infinity", "1_000", "0x10", "0o17", "017", "1:30", "1:30:00.5", LONG,
    "-" + LONG, "1e" + LONG, "0." + LONG, "0x" + "f" * 5000, "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "1000000000", "4294967296", "null", "~", "true",
    "false", "yes", "on", "None", "2026-01-02", "2026-01-02T03:04:05Z", "2026-99-99", "[]", "{}",
    "[1, 2]", "[0.1, 0.2]", "[[1]]", "{a: 1}", "[null]", "[nan, inf]", "{null: 1}", "{1: 2}",
    "{[1, 2]: 3}", "? [1]", "[" * DEEP, "{a: " * DEEP, "[" * DEEP + "]" * DEEP, "&a [*a]", "*a",
    "!!python/object/apply:os.system [touch hacked]", "!!python/name:os.system ''",
    "!!binary aGVsbG8=", "!!binary '!'", "!!set {a}", "!!omap [a: 1]", "!!int x", "!!float x",
    "!!timestamp x", "!!bool 7", "!mine 1", "%TAG ! x", "'", '"', '"\\x00"', "\0", "\ud800", "é",
    "\U0001f600", "\u2028", "\u0085", "a\nb", "a b", "-", "--", "---", "...", "@", "`", "%", "#",
    ": ", "- ", "|", ">", "x" * 100_000, "../..", "/", "/dev/null", "/dev/zero", ".", "a-folder",
    "broken-link", "loop", "pipe", FILE, "none.yaml", "/proc/self/mem", "a" * 300, "~nobody/x",
    "a-run", "os", "json", "sys", "torch.hub", "no.such", ".x", "a-folder/x.py", "wrong.py",
    "small-cnn", "mlp", "resnet18", "vit_b_16", "torchvision:resnet18", "resnet20", "gnc", "sam",
    "covariance", "pnm", "none", "own", "gathered", "diagonal", "kronecker", "examples", "full",
    "adamw", "step", "polynomial", "synthetic", "imagefolder", "cifar10", "auto", "never", "group",
    "group:0", "group:-1", "group:x", "group:" + LONG, "allgather", "cuda", "cpu", "fp16", "bf16"]
RIGHT = ["1", "2", "3", "8", "64", "0.1", "0.5", "1e-3", "2.5", "true", "false", "null", "mlp",
         "none", "text", "1e3", "1.0", "0.9"]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12))
MERGES = "".join(f"m{n}: &m{n} {{k{n}: 1, <<: [{', '.join([f'*m{n - 1}'] * 9 if n else ['{}'])}]}}"
                 "\n" for n in range(12))
DOCUMENTS = [
    b"", b" ", b"\n\n", b"# nothing\n", b"---\n", b"---\n...\n", b"a: 1\n---\nb: 2\n", b"- 1\n",
    b"1\n", b"text\n", b"epochs: 1\nepochs: 2\n", b"epoch: 1\n", b"epochs:\n", b"epochs: 1\n",
    b"? epochs\n", b"null: 1\n", b"1: 2\n", b"true: 1\n", b"[a, b]: 1\n", b"? {a: 1}\n: 2\n",
    b"optim:\n- lr\n", b"optim: 1\n", b"optim: [1]\n", b"optim: null\n", b"data: synthetic\n",
    b"optim: {lr: {lr: 1}}\n", b"optim: {lr: 0.1, lr: 0.2}\n", b"optim.lr: 0.1\n",
    b"noise: []\n", b"noise: [1]\n", b"noise: [{}]\n", b"noise: [{kind: gnc}, {kind: gnc}]\n",
    b"noise: [{kind: gnc}, {kind: pnm}]\n", b"noise: {also: [{also: [{}]}]}\n",
    b"noise: {kind: gnc, also: 1}\n", b"noise: {also: [{kind: gnc, nothing: 1}]}\n",
    b"noise: [{kind: [1]}]\n", b"noise: {options: {}}\n", b"noise: [[{}]]\n",
    b"plugins: os\n", b"plugins: [1]\n", b"plugins: {a: 1}\n", b"plugins: [wrong.py]\n",
    b"plugins: ['\\0']\n", b"plugins: ['']\n", b"plugins: ['.']\n", b"plugins: [.py]\n",
    b"plugins: [null]\n", b"plugins: [a-folder]\n", b"config: other.yaml\n", b"config: [my.yaml]\n",
    b"print_config: true\n", b"help: true\n", b"__path__: 1\n", b"class_path: os.system\n",
    b"optim: {class_path: os.system, init_args: {}}\n", b"data: my.yaml\n", b"optim: my.yaml\n",
    BOMB.encode(), b"epochs: *a\n", b"&a [*a]\n", b"a: &a {b: *a}\n", b"epochs: &a [*a]\n",
    b"noise: &a [*a]\n", b"noise: &a {also: [*a]}\n", b"&a optim: *a\n", MERGES.encode(),
    b"<<: 1\n", b"<<: {epochs: 2}\n", b"<<: [1]\n", b"optim: {<<: &a {<<: *a}}\n",
    b"!!python/object/apply:os.system [touch hacked]\n", b"!!python/object/new:dict {}\n",
    b"!!binary aGVsbG8=\n", b"!!set {epochs}\n", b"!!omap [epochs: 1]\n", b"!!pairs [epochs: 1]\n",
    b"epochs: !!python/object/apply:os.system [touch hacked]\n", b"epochs: !!float nan\n",
    b"\xff\xfe\x00\x00", b"\xff\xfee\x00p\x00", b"\xef\xbb\xbfepochs: 1\n", b"epochs: \x00\n",
    b"epochs: '\xff'\n", b"name: \xc3\xa9\n", b'name: "\\ud800"\n', b'name: "\\0"\n',
    b"\x80\x04\x95\x10\x00", b"\x7fELF", b"PK\x03\x04", b"\t\tepochs: 1\n", b"epochs:\t1\n",
    b"%YAML 9.9\n---\na: 1\n", b"%TAG ! tag:x,2000:\n---\na: !b 1\n", b"{" * DEEP, b"[" * 100_000,
    b"{a: " * DEEP + b"1" + b"}" * DEEP, b"- " * DEEP, b"? " * DEEP, b"a:\n" + b" b:\n" * 2000,
    b"x" * 1_000_000, b"'" + b"x" * 1_000_000, b"epochs: " + b"9" * 1_000_000, b"#" * 1_000_000,
    b"name: " + b"n" * 100_000, b"{" + b", ".join(b"k%d: 1" % n for n in range(20_000)) + b"}",
    b"lr: {milestones: [" + b"1, " * 100_000 + b"]}", b"plugins: [" + b"os, " * 10_000 + b"]",
    b"lr.milestones: [1]\nlr: {schedule: step}\n", b"lr: {milestones: 1}\n", b"=: 1\n",
    b"optim: {betas: [.9]}\n", b"optim: {betas: [.9, .9, .9]}\n", b"optim: {betas: {a: 1}}\n",
    b"data:\n  dataset: synthetic\n  num_classes: 99999999999\n",
    b"data: {dataset: synthetic, num_examples: 99999999999999}\n",
    b"data: {dataset: synthetic, image_size: 99999999}\nnoise: {kind: covariance, structure: "
    b"kronecker, emulated_batch: 8}\nvirtual_workers: 2\n",
    # a study's
    b"methods: 1\n", b"methods: [plain]\n", b"methods: {}\n", b"methods: {plain: 1}\n",
    b"methods: {plain: null}\n", b"methods: {1: {}}\n", b"methods: {null: {}}\n",
    b"seeds: 0\n", b"seeds: -1\n", b"seeds: [x]\n", b"batches: [0]\n", b"batches: 1\n"]
STUDY = {"settings": {"data": {"dataset": "synthetic", "num_examples": 128, "validation": 32,
                               "image_size": 8}, "model": "mlp", "epochs": 1},
         "batches": [32], "virtual_workers": 2, "baseline": "plain", "trials": 2,
         "search": {"optim.lr": {"low": .01, "high": 1.0, "log": True}},
         "tuning_seeds": [8], "seeds": [1], "methods": {"plain": {}, "same": {}}}
STUDY_NAMES = [*NAMES["study"], "search.optim.lr", "search.optim.lr.low", "search.epochs",
               "search.optim", "search.none", "settings.data", "settings.noise", "settings.seed",
               "settings.plugins", "settings.optim.lr", "methods.plain", "methods.plain.settings",
               "methods.plain.search", "methods.plain.batches", "methods.plain.virtual_workers",
               "methods.plain.label", "methods.plain.settings.noise", "methods.same.weights"]


@dataclass(frozen=True)
class Case:
    """A command, and the file beside it."""

    arguments: list[str]
    file: bytes


# ---------------------------------------------------------------------- what is generated

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(TOKENS), st.sampled_from([2 ** 63, -2 ** 70, 10 ** 4000, 1e300, 5e-324]))
values = st.recursive(scalars, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=5)
tokens = st.one_of(st.sampled_from(TOKENS), st.sampled_from(TOKENS), scalars.map(str),
                   st.text(max_size=10))


@st.composite
def names(draw: Any, command: str) -> str:
    """A setting's name, now and then one that is none."""
    name: str = draw(st.sampled_from(NAMES[command]))
    kind = draw(st.integers(0, 19))
    if kind == 0:
        name = name[:draw(st.integers(0, len(name)))]
    elif kind == 1:
        place = draw(st.integers(0, len(name)))
        name = name[:place] + draw(st.sampled_from("axs._-+= \0é\n")) + name[place:]
    elif kind == 2:
        name = draw(st.sampled_from(["help", "print_config", "config", "data", "optim", "noise",
                                     "lr", "checkpoint", "data.help", "noise.help", "plugins+",
                                     "lr.milestones+", "", "optim.lr.x", "__x__", "c", "-"]))
    return name


@st.composite
def flag(draw: Any, command: str) -> list[str]:
    name, token = draw(names(command)), draw(st.one_of(st.sampled_from(RIGHT), tokens))
    forms = [[f"--{name}={token}"]] * 15 + [[f"--{name}", token], [f"--{name}"], [token],
                                            [f"--{name}", token, token], [f"-{name}", token]]
    return list(draw(st.sampled_from(forms)))


@st.composite
def structured(draw: Any, command: str) -> bytes:
    """Settings as the right kind of file, with some wrong ones among them."""
    inside: dict[str, Any] = json.loads(json.dumps(STUDY)) if command == "study" else {}
    known = st.sampled_from(STUDY_NAMES) if command == "study" else names(command)
    for name in draw(st.lists(known, max_size=4)):
        *groups, last = name.split(".") if draw(st.booleans()) else [name]
        at = inside
        for group in groups:
            if not isinstance(at.get(group), dict):
                at[group] = {}
            at = at[group]
        at[last] = draw(st.one_of(st.sampled_from(RIGHT).map(yaml.safe_load), values))
    text: str = yaml.safe_dump(inside, allow_unicode=draw(st.booleans()),
                               default_flow_style=draw(st.booleans()))
    return text.encode(errors="surrogatepass")


@st.composite
def lines(draw: Any, command: str) -> bytes:
    """Lines of YAML that nobody has checked."""
    found = draw(st.lists(st.tuples(names(command), tokens), min_size=1, max_size=4))
    return "\n".join(f"{name}: {token}" for name, token in found).encode(errors="surrogatepass")


@st.composite
def damaged(draw: Any, command: str) -> bytes:
    whole = bytearray(draw(structured(command)) or b"a")
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(whole) - 1))
        whole[place:place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
        whole = whole or bytearray(b"a")
    return bytes(whole)


@st.composite
def cases(draw: Any) -> Case:
    command = draw(st.sampled_from(["train"] * 12 + ["plan"] * 2 + ["study"] * 3 + [
        each for each in KINDS if each not in ("train", "plan", "study")]))
    file = draw(st.one_of(structured(command), st.sampled_from(DOCUMENTS), lines(command),
                          damaged(command), st.binary(max_size=50)))
    arguments = [FILE] if command == "study" else \
        ["a-run"] if command in ("eval", "measure", "report", "reproduce", "export") else []
    if command != "study" and draw(st.booleans()):  # one thing is wrong, or nothing
        return Case(_as_system([command, *arguments, *draw(flag(command))]), file)
    if draw(st.integers(0, 9)) == 0:
        arguments = [draw(tokens)]
    if command != "study" and draw(st.integers(0, 2)) > 0:
        arguments = [*arguments, "--config", FILE]
    for each in draw(st.lists(flag(command), max_size=3)):
        arguments = [*arguments, *each]
    if command == "study":
        arguments = [*arguments, "--dry_run"]
    return Case(_as_system([command, *arguments]), file)


def _as_system(arguments: list[str]) -> list[str]:
    """As the system hands them on: no NUL, and bytes that are no UTF-8 as surrogates."""
    return [each.replace("\0", "").encode("utf-8", "surrogatepass").decode("utf-8",
                                                                           "surrogateescape")
            for each in arguments]


# ---------------------------------------------------------------------- what must hold

class Fault(AssertionError):
    """A case that does not end as it must."""


def make_place(folder: Path) -> None:
    """The files that cases name."""
    (folder / "a-folder").mkdir()
    (folder / "broken-link").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "wrong.py").write_text("raise RuntimeError('a plugin that fails')\n")
    (folder / "a-run").mkdir()
    (folder / "a-run" / "config.yaml").write_text("model: mlp\ndata: {dataset: synthetic}\n")
    (folder / "a-run" / "weights.pt").write_bytes(b"")
    (folder / "a-run" / "summary.json").write_text('{"weights_sha256": "0", "ranks": 2}')
    (folder / "a-run" / "environment.json").write_text('{"ranks": 2}')


def run(case: Case, folder: Path) -> tuple[int, str]:
    """The exit code and what was said on stderr."""
    (folder / FILE).write_bytes(case.file)
    said = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    shown = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder) if sys.version_info >= (3, 11)
                            else _chdir(folder))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("hvdnoise.cli._in_world", "hvdnoise.doctor.examine"):
            stack.enter_context(mock.patch(name, mock.Mock(return_value=0)))
        for name in ("preemption.Preemption", "process.watch"):  # would be of this process
            stack.enter_context(mock.patch(f"hvdnoise.training.{name}"))
        stack.enter_context(mock.patch("hvdnoise.study.run.Study.run", lambda self: 0))
        stack.enter_context(mock.patch("hvdnoise.reproduce.run._run", lambda *_: (0, 15)))
        stack.enter_context(mock.patch("hvdnoise.report.run.run", lambda config: 0))
        stack.enter_context(mock.patch("hvdnoise.export.run.run", lambda *_: 0))
        stack.enter_context(contextlib.redirect_stderr(said))
        stack.enter_context(contextlib.redirect_stdout(shown))
        try:
            code = cli.main(case.arguments)
            shown.flush()
        except SystemExit as done:
            code = int(done.code or 0)
            shown.flush()
    torch.set_num_threads(1)
    said.seek(0)
    return code, said.read()


def check(case: Case, folder: Path) -> int:
    """The exit code; a Fault for a case that does not end as it must."""
    before = _contents(folder)
    try:
        with _limit():
            code, said = run(case, folder)
    except Fault:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = "".join(traceback.format_exception(error)[-3:])
        raise Fault(f"{type(error).__name__}: {error}\n{where}") from error
    if (folder / "hacked").exists():
        raise Fault("a command of the file was executed")
    if code == 2:
        # YAML's and Unicode's line ends too
        if len(said.splitlines()) != 1 or not said.startswith("hvdnoise: error: "):
            raise Fault(f"not one line: {said[:2000]!r}")
        if len(said) > 2000:
            raise Fault(f"a line of {len(said)} characters: {said[:300]!r}")
        if new := _contents(folder) - before:
            raise Fault(f"made {new}")
    elif code != (143 if case.arguments[0] == "reproduce" and code else 0):
        raise Fault(f"exit code {code}: {said[:2000]!r}")
    elif case.arguments[0] == "train":
        _check_returns(case, folder)
    return code


def _check_returns(case: Case, folder: Path) -> None:
    """Settings that are taken come back from the file that a run writes."""
    with _chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        try:
            config = parse(TrainConfig, case.arguments[1:], program="again")
        except SystemExit:  # --help
            return
        text = yamlfile.dump(nested(config))
        (folder / "written.yaml").write_text(text)
        try:
            again = parse(TrainConfig, ["--config", "written.yaml"], program="again")
        except ValueError as error:
            raise Fault(f"does not come back: {error}") from error
        finally:
            (folder / "written.yaml").unlink()
    if again != config:
        raise Fault(f"comes back as another: {config} {again}")


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _limit() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Fault(f"not done after {SECONDS} s\n" + "".join(traceback.format_stack()[-12:]))
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _contents(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if path.name not in (FILE, "__pycache__")
            and path.parent.name != "__pycache__"}


def campaign(number: int, count: int) -> tuple[dict[int, int], dict[str, Case]]:
    """How many cases ended with each code, and an example of each kind of fault."""
    codes: dict[int, int] = {}
    faults: dict[str, Case] = {}

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(cases())
    def each(case: Case) -> None:
        with tempfile.TemporaryDirectory(prefix="hvdnoise-fuzz-") as name:
            folder = Path(name)
            make_place(folder)
            try:
                code = check(case, folder)
                codes[code] = codes.get(code, 0) + 1
            except Fault as fault:
                codes[-1] = codes.get(-1, 0) + 1
                kind = str(fault).replace(name, "FOLDER")
                faults.setdefault(kind[:3000], case)
    each()
    return codes, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    given_ = parser.parse_args()
    codes, faults = campaign(given_.seed, given_.count)
    for kind, case in faults.items():
        print(f"--- {[each[:200] for each in case.arguments]} {case.file[:200]!r}\n{kind}")
    print(f"seed {given_.seed}: exit codes {codes}, {len(faults)} kinds of fault")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
