"""PyTorch files of other programs, opened without running any code that is in them."""

import os
import pickle
import warnings
from typing import Any

import torch

from icl.checkpoints.format import CheckpointError


def load_plain(path: str | os.PathLike[str]) -> Any:
    """The content of a PyTorch file that holds tensors and plain values only, on the CPU; no code in it can run.

    Raises:
        CheckpointError: there is no such file, it is truncated, or it is a pickle that asks to run code.
    """
    try:
        with warnings.catch_warnings():
            # The unpickler refuses unknown contents anyway, so this warning tells the user nothing.
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}; check the path") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain dictionary of weights: it is damaged, or asks to run code, and was not loaded; "
            "use a file you trust that holds tensors and plain values only"
        ) from error
    # torch reports damage by many classes of errors, and none of them says more than this message.
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or not a PyTorch file; download it again") from error
