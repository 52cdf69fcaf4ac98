"""icl: how in-context learning develops in small transformers, and the local learning coefficient that shows its stages.

Start with `icl.model`, `icl.tasks`, `icl.training.loop` and `icl.sampling`; `icl.open_run` and `icl.open_runs` read what
the commands left. Importing this package touches nothing: no folder, no environment, no credential, no accelerator
library.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icl.execution.opened import open_run, open_runs

__version__ = "0.1.0"
__all__ = ["__version__", "open_run", "open_runs"]


def __getattr__(name: str) -> Any:
    # On first use: what reads runs needs pandas, and `import icl` should not.
    if name in ("open_run", "open_runs"):
        from icl.execution import opened

        return getattr(opened, name)
    raise AttributeError(f"module 'icl' has no attribute {name!r}")
