import pytest
import torch

from icl.analysis.trajectories import gradient_row, output_row, weight_row
from icl.engine import loss_and_grad
from icl.model import InContextRegressionTransformer, flatten

GENERATOR = torch.Generator().manual_seed(0)
MODEL = InContextRegressionTransformer(3, 5, embed_size=14, mlp_size=7, num_heads=2, num_layers=2, seed=1)
XS = torch.randn(11, 5, 3, generator=GENERATOR)
YS = torch.randn(11, 5, 1, generator=GENERATOR)


def test_rows_of_outputs():
    tokens = output_row(MODEL, XS, YS, batch_size=4).reshape(11, 10, 4)
    predictions = output_row(MODEL, XS, YS, "predictions", batch_size=4)
    torch.testing.assert_close(predictions.reshape(11, 5), tokens[:, ::2, 0])
    torch.testing.assert_close(predictions.reshape(11, 5, 1), MODEL(XS, YS).detach())
    with pytest.raises(ValueError, match="part must be"):
        output_row(MODEL, XS, YS, "y_tokens")  # type: ignore[arg-type]


def test_row_of_weights_is_the_flat_vector():
    row = weight_row(dict(MODEL.named_parameters()))
    assert not row.requires_grad
    torch.testing.assert_close(row, flatten(dict(MODEL.named_parameters())).detach())


@pytest.mark.parametrize("batch_size", [4, 11, 100])
def test_row_of_gradients_does_not_depend_on_the_batches(batch_size):
    flat = flatten(dict(MODEL.named_parameters())).detach()
    expected = loss_and_grad(MODEL.shape, flat, XS, YS)[1]
    torch.testing.assert_close(gradient_row(MODEL, XS, YS, batch_size), expected, rtol=1e-4, atol=1e-6)
