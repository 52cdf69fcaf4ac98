"""Weights in the names of the reference code (public code of arXiv 2402.02364), and its checkpoint files.

A reference file is a PyTorch pickle of a dictionary whose entry `model` holds the weights. Its rows of queries, keys
and values are grouped per head as in this library, so only names differ. The reference code adds every block's residual
twice, so these weights give the same predictions only in a model with `residual="doubled"`.
"""

import os
import re
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from icl.checkpoints.format import CheckpointError, check_layout
from icl.checkpoints.pickled import load_plain

Model = TypeVar("Model", bound=nn.Module)

_ROOT = "token_sequence_transformer."
_RENAMED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"postn_embedding\.", "position_embedding."),
        (r"(blocks\.\d+)\.attention\.attention\.", r"\1.attention.qkv."),
        (r"(blocks\.\d+)\.compute\.0\.", r"\1.mlp.up."),
        (r"(blocks\.\d+)\.compute\.2\.", r"\1.mlp.down."),
        (r"(blocks\.\d+)\.layer_norms\.0\.", r"\1.attention_norm."),
        (r"(blocks\.\d+)\.layer_norms\.1\.", r"\1.mlp_norm."),
        (r"unembedding\.0\.", "final_norm."),
        (r"unembedding\.1\.", "unembedding."),
    )
]
_MASK = re.compile(re.escape(_ROOT) + r"blocks\.\d+\.attention\.causal_mask\Z")


def load_reference_state_dict(model: Model, state: Mapping[str, Tensor]) -> Model:
    """Copy weights in the reference code's names into `model`, and return it.

    The causal masks that such a state may hold are left out: they carry no information.

    Raises:
        CheckpointError: weights are missing, unexpected or of another shape; the message names them, and the model is
            left as it was.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"the entry {name!r} of the reference state is not a named tensor; pass its 'model' entry"
            )
        if _MASK.match(name):
            continue
        if _our_name(name) in renamed:
            raise CheckpointError(f"the reference state holds {_our_name(name)} twice, the second time as {name}")
        renamed[_our_name(name)] = value
    layout = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_layout(renamed, layout, "this reference state")
    model.load_state_dict(renamed)
    return model


def load_reference_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the weights, in the reference code's names, of a reference checkpoint file; no code in it can run.

    Raises:
        CheckpointError: there is no such file, it is truncated, it asks to run code, or it has no weights.
    """
    content = load_plain(path)
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(f"{path} has no entry 'model' with weights; it is not a checkpoint of the reference code")
    return weights


def _our_name(name: str) -> str:
    """The library's name of a weight. A weight without a counterpart keeps its name, which the error message then shows."""
    if not name.startswith(_ROOT):
        return name
    inner = name.removeprefix(_ROOT)
    for pattern, replacement in _RENAMED:
        inner, found = pattern.subn(replacement, inner, count=1)
        if found:
            break
    return inner
