"""A short digest of a model's weights, by which results say of which weights they are."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from icl.subjects.subject import Subject

DIGEST = "weights_digest"
"""The column of a row that holds the digest of the weights that the row is about."""


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits of the sha256 over names, types, shapes and bytes of all tensors of a model's state."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):  # a module may keep other things in its state
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(_plain(value).reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _plain(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    value = value.dequantize() if value.is_quantized else value.to_dense()
    return value.resolve_conj().resolve_neg().contiguous()


def first_changed(subject: Subject, digests: Mapping[int, object]) -> int | None:
    """The first step at which the weights now are not those of its digest; None if there is no such step.

    Whatever is no text is no digest: rows of an older version have none, and are not compared.
    """
    known = {step: digest for step, digest in sorted(digests.items()) if isinstance(digest, str)}
    return next((step for step, digest in known.items() if weights_digest(subject.model(step)) != digest), None)
