"""Client groups whose clients train side by side, in Lightning's loop."""
