"""What ends a secure aggregation."""


class SecureAggregationError(RuntimeError):
    """A secure aggregation ends without a sum; nobody has learned one client's update."""


class ProtocolError(SecureAggregationError):
    """A message is not what an honest participant would have sent at this point; the client ends the round."""


class RetryRefused(SecureAggregationError):
    """The same vector would leave a second time among other participants, and the two sums would tell it."""
