"""`hvdnoise plan`: what a run will be, cost and look like, said before it is launched.

- config.py: the settings, those of a run and of the cluster.
- predict.py: numbers of the run; bytes, memory and step time of every exchange plan.
- lines.py: the commands and files that launch it.
- report.py: both as text or JSON.

On one machine, in one process, without Horovod, and without data but for an imagefolder's.
"""
