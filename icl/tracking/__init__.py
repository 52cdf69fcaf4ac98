"""Where a run's metrics go: to local files, to W&B, to both, or nowhere."""

from icl.tracking.trackers import LocalTracker, NullTracker, TeeTracker, Tracker, read_metrics, read_summary

__all__ = ["LocalTracker", "NullTracker", "TeeTracker", "Tracker", "read_metrics", "read_summary"]
