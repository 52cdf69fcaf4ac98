"""The cross-entropy of a classifier or a language model, for batches as people have them.

Shapes: S samples, T tokens, V classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The label of a token that counts for nothing, as in PyTorch and Hugging Face."""


def cross_entropy_loss(
    predict: Callable[..., Any], batch: Any, reduction: Literal["mean", "token", "none"] = "mean"
) -> Tensor:
    r"""−log p(label), in the form that `icl.sampling.estimate_llc` takes.

    A batch is one of

    - `(inputs, labels)`: logits (S, ..., V) for labels (S, ...), each label for the logits in its place;
    - a tensor of tokens (S, T), or a mapping with `input_ids` (S, T): each token is the label of the logits before it. `attention_mask`
      goes to the model, and tokens that it leaves out are no labels. With `labels` (S, T) these take the tokens' place; with labels (S,)
      the samples are classified.

    The model gives logits, or a record or mapping with `logits`. Labels of −100 count for nothing.

    Args:
        reduction: "mean", over all labels that count (a scalar); "token" (T,), parts that have this mean, ℓ_t = (T/N) Σ_s −log p_st with N
            labels that count; "none" (S, T) or (S,), each label's own, 0 where it does not count.

    Raises:
        ValueError: a batch of another form, logits whose shape does not fit the labels, or a batch without any label.
    """
    logits, labels = _logits_and_labels(predict, batch)
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}; the last dimension of logits is that "
            "of the classes"
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
    """How many labels of a batch count: what a mean over several batches is weighed by."""
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
    """(S, T) the labels of the logits in their places, −100 where there is none."""
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
        f"cross_entropy_loss takes (inputs, labels), tokens (S, T), or a mapping with input_ids, and got a {type(batch).__name__}; write a "
        "loss of your own, (predict, batch) -> loss"
    )


def _shifted(batch: Any) -> bool:
    """Whether each label is that of the logits before it: tokens that follow one another."""
    if isinstance(batch, Tensor):
        return True
    return isinstance(batch, Mapping) and ("labels" not in batch or batch["labels"].ndim > 1)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ValueError(f"the model gave a {type(output).__name__} without logits; write a loss of your own")
    return found
