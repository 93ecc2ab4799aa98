"""Client groups whose clients train together, in Lightning's loop."""
