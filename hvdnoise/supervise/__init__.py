"""`hvdnoise launch`: a run that goes on after failures, from its newest checkpoint.

    options.py      the command line
    scripts.py      launch/horovodrun.sh and launch/mpirun.sh: where they are, one attempt each
    guard.py        a program around each attempt: nothing outlives the supervisor
    attempt.py      one attempt: its output passes through, signals are passed on
    cause.py        which rank failed first, and why, from that output
    runstate.py     what the run folder says: checkpoints, the last step, the end
    failures.py     when a failure is the same again
    alone.py        one supervisor of a run at a time on this machine
    run.py          all of it in its order

docs/cluster.md says how it is used.
"""
