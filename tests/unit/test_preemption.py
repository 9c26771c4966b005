"""The wish to save and end: which signals it takes, and what counts as the second one."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os, signal, sys, time
from hvdnoise.training.preemption import Preemption
def wanted(preemption, seconds=10):
    until = time.monotonic() + seconds
    while not preemption.wanted and time.monotonic() < until:
        time.sleep(0.01)
    return preemption.wanted
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
preemption = Preemption()
preemption.listen()
os.kill(os.getpid(), signal.SIGHUP)
assert not wanted(preemption, 0.5)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
preemption = Preemption()
import horovod.torch  # takes SIGHUP over
preemption.listen()
os.kill(os.getpid(), signal.SIGHUP)
assert wanted(preemption)
preemption = Preemption()
child = os.fork()  # as of a data loader
if child == 0:
    time.sleep(60)
    os._exit(0)
time.sleep(1)
os.kill(child, signal.SIGTERM)
assert os.waitpid(child, 0)[1] == signal.SIGTERM
assert not wanted(preemption, 0.5)
preemption.want()
time.sleep(1.2)
os.kill(os.getpid(), signal.SIGTERM)  # the first signal, though not the first wish
time.sleep(1.2)
print("lives", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_signals_and_wishes() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True,
                           timeout=200)
    assert (ended.returncode, ended.stdout) == (143, "lives\n"), ended
    assert ended.stderr == "hvdnoise: second SIGTERM: ending at once\n"
