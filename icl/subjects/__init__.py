"""What an estimate is about: a model along its checkpoints, its loss and its data. One file for each kind of subject."""

from icl.subjects.subject import Subject, inputs_of

__all__ = ["Subject", "inputs_of"]
