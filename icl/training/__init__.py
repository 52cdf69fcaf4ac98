"""Training: the loop, the steppers that do its steps, the optimisers, and the starting point of a run."""

from icl.training.loop import Member, train, train_members
from icl.training.standing import TrainingDiverged, TrainingOutcome, first_missing_step

__all__ = ["Member", "TrainingDiverged", "TrainingOutcome", "first_missing_step", "train", "train_members"]
