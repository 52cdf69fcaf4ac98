"""The cross-entropy of a classifier or a language model, for the usual forms of batches.

Shapes: S samples, T tokens, V classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a token that is ignored, as in PyTorch and Hugging Face."""


def cross_entropy_loss(
    predict: Callable[..., Any], batch: Any, reduction: Literal["mean", "token", "none"] = "mean"
) -> Tensor:
    r"""−log p(label), in the form that `icl.sampling.estimate_llc` takes.

    A batch is one of these:

    - `(inputs, labels)`: the model gives logits (S, ..., V), and labels (S, ...) belong to the logits at the same place.
    - A tensor of tokens (S, T), or a mapping with `input_ids` (S, T). Each token is the label of the logits one place before it. An
      `attention_mask` is passed to the model, and tokens that it masks are not labels. If the mapping has `labels` (S, T), they are
      used instead of the tokens. If it has labels (S,), they classify whole samples.

    The model returns logits, or a record or mapping with `logits`. Labels of −100 are ignored.

    Args:
        reduction: "mean" gives the mean over all labels that are not ignored (a scalar). "token" gives (T,) losses whose mean is that
            scalar: ℓ_t = (T/N) Σ_s −log p_st with N labels that are not ignored. "none" gives each label's own loss, (S, T) or (S,),
            and 0 for ignored ones.

    Raises:
        ValueError: the batch has another form, or the shape of the logits does not fit that of the labels.
    """
    logits, labels = _logits_and_labels(predict, batch)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}; logits need the labels' shape and "
            "one last dimension for the classes"
        )
    flat = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    each = flat.view(labels.shape)
    if reduction == "none":
        return each
    counted = (labels != IGNORED).sum().clamp(min=1)
    if reduction == "mean":
        return each.sum() / counted
    return each.sum(dim=0) * (each.shape[1] if each.ndim > 1 else 1) / counted


def weight_of(batch: Any) -> Tensor:
    """The number of labels of a batch that are not ignored: the batch's weight in a mean over several batches."""
    return (_labels(batch) != IGNORED).sum()


cross_entropy_loss.weight = weight_of  # type: ignore[attr-defined]


def _logits_and_labels(predict: Callable[..., Any], batch: Any) -> tuple[Tensor, Tensor]:
    labels = _labels(batch)
    if isinstance(batch, Tensor):
        output = predict(batch)
    elif isinstance(batch, Mapping):
        output = predict(**{name: value for name, value in batch.items() if name != "labels"})
    else:
        output = predict(batch[0])
    logits = _logits(output)
    return (logits[:, :-1] if _shifted(batch) else logits), labels


def _labels(batch: Any) -> Tensor:
    """The labels of the logits at the same places, −100 where there is none."""
    if isinstance(batch, Tensor):
        return batch[:, 1:]
    if isinstance(batch, Mapping) and "input_ids" in batch:
        labels = batch.get("labels", batch["input_ids"])
        if not _shifted(batch):
            return labels
        mask = batch.get("attention_mask")
        labels = labels if mask is None else torch.where(mask.bool(), labels, IGNORED)
        return labels[:, 1:]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[1]
    raise ValueError(
        f"cross_entropy_loss takes (inputs, labels), tokens (S, T), or a mapping with input_ids, and got a {type(batch).__name__}; write "
        "your own loss, (predict, batch) -> loss"
    )


def _shifted(batch: Any) -> bool:
    """Whether each label belongs to the logits one place before it, as for tokens of a text."""
    if isinstance(batch, Tensor):
        return True
    return isinstance(batch, Mapping) and ("labels" not in batch or batch["labels"].ndim > 1)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model gave a {type(output).__name__} without logits; write your own loss, (predict, batch) -> loss"
        )
    return found
