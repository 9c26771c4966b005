"""hvdnoise measure: how sharp the minimum is that a run has found, and what lies around it.

    hvdnoise measure RUN
    horovodrun -np 2 hvdnoise measure RUN --checkpoint ema --examples 4096

- config.py: the settings. run.py: a measurement from its settings to its record.
- problem.py: the loss on some training images, its gradients and Hessian-vector products, with the
  images spread over the ranks.
- spectrum.py: largest eigenvalues and trace. alignment.py: noise and curvature.
- surface.py: line, plane and weight noise. report.py: words, measure.json and figures.

docs/measure.md says what each number is, how wrong it may be, and where it comes from.
"""
