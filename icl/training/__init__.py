"""Training: one loop, its steppers, its optimisers, and where a run stands."""

from icl.training.loop import Member, train, train_members
from icl.training.standing import TrainingDiverged, TrainingOutcome, first_missing_step

__all__ = ["Member", "TrainingDiverged", "TrainingOutcome", "first_missing_step", "train", "train_members"]
