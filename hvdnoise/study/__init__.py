"""`hvdnoise study`: methods against one another, fairly, from one file to one table.

    config.py       the file: settings, methods, search
    search.py       the points that are tried
    plan.py         every run that there is, and its checks
    runs.py         what the run folders say
    launch.py       command lines, places of runs, several at once; around each run is a
                    hvdnoise.supervise.guard, so that nothing outlives the study
    lock.py         one study at a time in a folder
    statistics.py   paired differences, intervals, Holm's correction
    results.py      results.json, the choice, the table
    words.py        what is said on the terminal
    run.py          all of it in its order

docs/studies.md says what it does and why.
"""
