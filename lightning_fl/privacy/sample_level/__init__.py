"""Differential privacy for examples: DP-SGD inside each client."""
