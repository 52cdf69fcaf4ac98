"""What a checkpoint is, the checkpoints of a run, and what can be done with whole runs."""

from icl.checkpoints.format import Checkpoint, CheckpointError, DamagedCheckpointError
from icl.checkpoints.pickled import load_plain
from icl.checkpoints.reference import load_reference_checkpoint, load_reference_state_dict
from icl.checkpoints.run import Checkpoints

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "DamagedCheckpointError",
    "load_plain",
    "load_reference_checkpoint",
    "load_reference_state_dict",
]
