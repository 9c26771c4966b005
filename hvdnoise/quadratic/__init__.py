"""hvdnoise quadratic: the noises on a convex quadratic, measured against exact second moments.

    hvdnoise quadratic
    horovodrun -np 2 hvdnoise quadratic --out RESULTS

The real optimizer runs on the real ranks, many times from new seeds. What it does must agree with
formulas that know nothing of its code (hvdnoise.quadratic.theory), within intervals of a stated
rate of false alarms (hvdnoise.quadratic.intervals).

- config.py: the settings.
- problem.py: the quadratic, and one run of the optimizer on it.
- theory.py: second moments of the weights, step by step.
- cases.py: each noise with its law.
- checks.py: what is measured and compared.
- regression.py: a regression in two dimensions, as a figure of paths.
- report.py, figure.py: table, JSON and figure. run.py: all of it in its order.
"""
