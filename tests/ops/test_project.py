"""The map of a decoding step against the modules that it stands for."""

import pytest
import torch
from transformers.activations import ACT2FN

from nsa.ops.project import project


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_norm_bias_and_sigmoid_of_some_columns() -> None:
    x, weight, bias, norm = tensor(3, 8), tensor(5, 8), tensor(5), tensor(8)
    z = x / (x.square().sum(1, keepdim=True) / 8 + 1e-2) ** 0.5 * norm
    expected = torch.stack([weight @ row + bias for row in z])
    expected[:, 2:] = 1 / (1 + (-expected[:, 2:]).exp())
    found = project(x, weight, bias, norm=norm, eps=1e-2, sigmoid_from=2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_first_map_gates_the_second() -> None:
    x, weight, up = tensor(3, 8), tensor(5, 8), tensor(5, 8)
    gate = x @ weight.T
    expected = gate / (1 + (-gate).exp()) * (x @ up.T)
    torch.testing.assert_close(project(x, weight, up=up), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ACT2FN["silu"](gate) * (x @ up.T), expected, rtol=1e-12, atol=1e-12)


def test_the_residual_is_added() -> None:
    x, weight, add = tensor(3, 8), tensor(5, 8), tensor(3, 5)
    torch.testing.assert_close(project(x, weight, add=add), add + x @ weight.T, rtol=1e-12, atol=1e-12)
    assert project(tensor(0, 8), weight).shape == (0, 5)


@pytest.mark.parametrize(
    ("name", "shape"), [("bias", (4,)), ("norm", (5,)), ("up", (5, 7)), ("add", (2, 5)), ("weight", (5, 7))]
)
@pytest.mark.usefixtures("without_shape_checks")
def test_shapes_that_do_not_fit_are_one_line(name, shape) -> None:
    given = {"x": tensor(3, 8), "weight": tensor(5, 8), name: tensor(*shape)}
    with pytest.raises(ValueError, match=f"project: {name} should have shape"):
        project(**given)
