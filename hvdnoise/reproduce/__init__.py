"""`hvdnoise reproduce`: a run once more, from the record in its folder, and the same bits or not.

- config.py: the settings. record.py: what a run folder says, which is data from others.
- command.py: what is started. differences.py: what is another here than in the record.
- results.py: the weights and metrics of both runs. run.py: all of it in its order.
"""
