"""icl: how in-context learning develops in small transformers, and the local learning coefficient that shows its stages.

Start with `icl.model`, `icl.tasks`, `icl.training.loop` and `icl.sampling`. Importing this package touches nothing: no
folder, no environment, no credential, no accelerator library.
"""

__version__ = "0.1.0"
