"""A campaign of faults against real launches: `python -m tests.faults --seed S --count N`."""
