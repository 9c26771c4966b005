"""`hvdnoise export`: a run's network in a form that other programs take; docs/export.md.

- config.py: the settings, and what is refused before anything is made.
- source.py: the run's network, its facts and its test images.
- formats.py: writing and reading each form.
- run.py: write beside, check against the run, rename.
"""
