"""Doing runs: one run with its storage, lock and tracker, and many runs on this machine, on Ray, or from W&B agents."""
