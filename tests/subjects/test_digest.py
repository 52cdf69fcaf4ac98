"""The digest of weights: equal for equal state, different for any other, whatever the memory they lie in."""

import warnings

import pandas as pd
import pytest
import torch
from torch import nn

from icl.analysis.run_tables import RunTable, read_run_table, write_run_tables
from icl.subjects.digest import DIGEST, first_changed, weights_digest


class Holding(nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value)


def test_only_names_types_shapes_and_bytes_count():
    values = torch.arange(6.0).reshape(2, 3)
    digest = weights_digest(Holding(w=values))
    assert len(digest) == 16
    assert int(digest, 16) >= 0
    transposed = values.T.contiguous().T  # the same values in another order of memory
    assert weights_digest(Holding(w=transposed)) == digest
    changed = values.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [
        Holding(v=values),
        Holding(w=values.reshape(3, 2)),
        Holding(w=values.view(torch.int32)),
        Holding(w=changed),
        Holding(w=values, v=values[:0]),
    ]
    assert len({digest, *map(weights_digest, others)}) == 1 + len(others)


def test_every_kind_of_tensor_has_one():
    kinds = (torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.uint8, torch.bool)
    tensors = {str(kind).split(".")[1]: torch.ones(3, 2).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(7.0), "none": torch.zeros(0, 3), "sparse": torch.eye(3).to_sparse()}
    with warnings.catch_warnings(action="ignore"):
        tensors |= {"quantised": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}
    tensors |= {"conjugate": torch.tensor([1 + 2j]).conj()}
    digests = {name: weights_digest(Holding(w=value)) for name, value in tensors.items()}
    assert digests == {name: weights_digest(Holding(w=value.clone())) for name, value in tensors.items()}
    assert len(set(digests.values())) == len(digests)


def test_the_first_step_with_other_weights_is_found_and_steps_without_a_digest_are_not_compared():
    models = {step: nn.Linear(2, step) for step in (1, 3, 8)}

    class Subject:
        model = staticmethod(models.__getitem__)

    known = {step: weights_digest(model) for step, model in models.items()}
    assert first_changed(Subject(), known) is None  # type: ignore[arg-type]
    assert first_changed(Subject(), {8: "0", 3: "0", 1: known[1]}) == 3  # type: ignore[arg-type]
    assert first_changed(Subject(), {8: None, 3: float("nan")}) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("digest", ["0012345678901234", "1234567e12345678", "9999999999999999"])
def test_a_digest_that_looks_like_a_number_stays_a_text_in_a_table(tmp_path, digest):
    rows = pd.DataFrame({"width": [2, 2], "step": [0, 7], DIGEST: [digest, None]})
    table = RunTable(tmp_path / "a.csv", ("width",), rows, {}, {"width=2": "mine"})
    write_run_tables([table])
    read = read_run_table(table.path)
    assert read is not None
    assert read.digests() == {("width=2", 0): digest}
