"""A run with everything it touches, and many runs: on this machine, on a Ray cluster, from W&B agents."""
