"""Errors that end a secure sum."""


class SecureAggregationError(RuntimeError):
    """A secure sum failed; no client's update was revealed."""


class ProtocolError(SecureAggregationError):
    """A message that an honest participant would not have sent; the client leaves the round."""


class RetryRefused(SecureAggregationError):
    """The same vector would be summed with a different set of participants, and the two sums would reveal an update."""
