"""What settings raise."""


class ConfigError(ValueError):
    """A setting is wrong; one line that names it and the remedy."""


class DataError(ValueError):
    """A data set is missing, damaged or too small; one line that names the path and the remedy."""


class CommonDataError(DataError):
    """A `DataError` that all ranks raise together."""
