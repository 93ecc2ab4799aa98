"""The error for settings that contradict each other."""


class ConfigurationError(ValueError):
    """Raised for settings that contradict each other; the strategy raises it as a ``MisconfigurationException``."""
