"""horovodrun, but for one look: whether Horovod has been built with Gloo and MPI.

horovodrun imports torch in a process of its own for that, which takes as long as the ranks of most
tests do. `launch/setup.sh` has looked. The scripts of launch/ and the quickstart start horovodrun
itself, so tests of those do, too.
"""

import sys

from horovod.common import util

util.gloo_built = util.mpi_built = lambda verbose=False: True  # before launch.py takes the names

from horovod.runner.launch import run_commandline  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_commandline())
