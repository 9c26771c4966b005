"""What settings and runs raise."""


class ConfigError(ValueError):
    """A setting is wrong; one line that names it and the remedy."""


class DataError(ValueError):
    """A data set is missing, damaged or too small; one line that names the path and the remedy."""


class Diverged(RuntimeError):
    """The run cannot go on with the numbers it has; one line, equal on all ranks."""


class CommonDataError(DataError):
    """A `DataError` that all ranks raise together."""
