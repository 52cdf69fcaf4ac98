"""The file format of a checkpoint: named tensors and a checked record, as one safetensors file.

The header's metadata has a single entry `icl`: a JSON text with sorted keys that holds the format version, kind, step,
sha256 and the caller's metadata. It is one entry because equal contents must give equal bytes, and safetensors writes
several entries in an order that changes from process to process.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMAT_VERSION = 1
_ENTRY = "icl"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says in one line why and what to do."""


class DamagedCheckpointError(CheckpointError):
    """The bytes are not a whole checkpoint of this library: truncated, altered or foreign. An older one may be whole."""


class Checkpoint(NamedTuple):
    """What one file holds. `step` counts from 0: the checkpoint of step t follows t + 1 updates."""

    step: int
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def encode(step: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], kind: str) -> bytes:
    """Return the bytes of a checkpoint; equal arguments give equal bytes in every process.

    Args:
        step: index of the last update made, 0 or more.
        tensors: any names, shapes and devices; copied to the CPU.
        metadata: anything JSON can hold.
        kind: `weights` or `state`; a reader asks for one of them.

    Raises:
        CheckpointError: the step is negative or the metadata is not JSON.
    """
    import safetensors.torch  # here and in `decode`, so that programs without checkpoints do not need the library

    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(f"a checkpoint's step must be a whole number from 0, not {step!r}")
    # Cloned, because safetensors refuses tensors that share memory, such as views of one flat vector.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    record = {"format": FORMAT_VERSION, "kind": kind, "step": step, "metadata": dict(metadata)}
    try:
        record["sha256"] = _digest(record, copies)
        return safetensors.torch.save(copies, {_ENTRY: _canonical(record)})
    except (TypeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"this checkpoint cannot be written: {error}") from error


def decode(data: bytes, source: str, kind: str) -> Checkpoint:
    """Return the checkpoint in `data`; `source` is its name in error messages. No code in the file can run.

    Raises:
        DamagedCheckpointError: truncated, altered, or written by another program.
        CheckpointError: written by a newer version of this library, or of the other kind.
    """
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
    except (
        safetensors.SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
        MemoryError,
    ) as error:
        # Tested only after a failure: a sound checkpoint may begin with the same bytes, as the length of its header.
        if data[:1] == b"\x80" or data[:4] == b"PK\x03\x04":
            raise DamagedCheckpointError(
                f"{source} is a pickle or PyTorch file, which could run code when opened, and was not read; "
                "load_reference_checkpoint reads the weights of the reference code's files safely"
            ) from error
        raise DamagedCheckpointError(
            f"{source} is truncated or not a checkpoint ({len(data)} bytes: {_one_line(error)}); use an earlier one"
        ) from error
    record = _read_record(data, source)
    if record["format"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{source} has format {record['format']}, this version of icl reads up to {FORMAT_VERSION}; upgrade icl"
        )
    expected = record.pop("sha256")
    if _digest(record, tensors) != expected:
        raise DamagedCheckpointError(f"{source} was altered since it was written (wrong checksum); use an earlier one")
    if record["kind"] != kind:
        raise CheckpointError(f"{source} holds {record['kind']!r}, not {kind!r}; if it was renamed, rename it back")
    return Checkpoint(record["step"], tensors, record["metadata"])


def check_layout(tensors: Mapping[str, Tensor], layout: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Check that `tensors` have exactly the names and shapes of `layout` and are float32, as all trained weights are.

    Raises:
        CheckpointError: the file belongs to another architecture; the message names the first differences.
    """
    faults = [f"{name} is missing" for name in layout if name not in tensors]
    faults += [f"{name} is not expected" for name in tensors if name not in layout]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)} instead of {tuple(shape)}"
        for name, shape in layout.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    faults += [f"{name} is {value.dtype}" for name, value in tensors.items() if value.dtype != torch.float32]
    if faults:
        more = f" and {len(faults) - 3} more differences" if len(faults) > 3 else ""
        raise CheckpointError(
            f"{source} is of a different architecture: {'; '.join(faults[:3])}{more}; "
            "load it with the configuration it was trained with"
        )


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the record and of every tensor's name, dtype, shape and bytes, in the order of the names."""
    layout = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
    digest = hashlib.sha256(_canonical([record, layout]).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_record(data: bytes, source: str) -> dict[str, Any]:
    """The JSON record of a file whose header safetensors has already accepted."""
    length = int.from_bytes(data[:8], "little")
    try:
        record = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_ENTRY])
        sound = (
            type(record["format"]) is int
            and type(record["step"]) is int
            and record["step"] >= 0
            and isinstance(record["kind"], str)
            and isinstance(record["sha256"], str)
            and isinstance(record["metadata"], dict)
        )
    # RecursionError: the text may come from another program and be nested too deeply.
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{source} is a safetensors file of another program, not a checkpoint") from error
    if not sound:
        raise DamagedCheckpointError(f"{source} has a damaged record; use an earlier checkpoint")
    return record


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
