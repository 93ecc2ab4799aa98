"""The errors of a federation that its parties tell apart."""


class ConfigurationError(ValueError):
    """Raised for settings that contradict each other; the strategy raises it as a ``MisconfigurationException``."""


class NotFiniteError(ValueError):
    """Raised if the next server state would hold NaN or Inf; the present one is unchanged."""
