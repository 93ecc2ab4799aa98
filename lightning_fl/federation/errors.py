"""Errors of a federation's settings."""


class ConfigurationError(ValueError):
    """Settings that can't be right together; a framework around the federation may show it as an error of its own."""
