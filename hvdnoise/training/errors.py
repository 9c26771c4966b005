"""What settings raise."""


class ConfigError(ValueError):
    """A setting is wrong; one line that names it and the remedy."""
