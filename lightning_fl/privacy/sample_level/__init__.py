"""Sample-level differential privacy: DP-SGD inside each client."""
