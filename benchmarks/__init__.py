"""Measurements behind the numbers in README.md and docs/; each module is a command: `python -m benchmarks.NAME`."""
