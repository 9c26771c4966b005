"""`hvdnoise report`: from the records of runs and studies to one page; see docs/report.md.

It reads files and starts nothing. `cost_figure` draws the figure of a study for a README.
"""

from hvdnoise.report.readme import cost_figure

__all__ = ["cost_figure"]
