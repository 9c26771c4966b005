"""`hvdnoise report`: from the records of runs and studies to one page; see docs/report.md.

It reads files and starts nothing. `cost_figure` draws the one figure of a study that a README shows.
"""

from hvdnoise.report.readme import cost_figure

__all__ = ["cost_figure"]
