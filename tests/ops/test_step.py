"""The maps and norms of a decoding step, against their formulas."""

import pytest
import torch

from nsa.ops.step import project, rms_norm


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_bias_and_sigmoid_of_some_columns() -> None:
    x, weight, bias = tensor(3, 8), tensor(5, 8), tensor(5)
    expected = torch.stack([weight @ row + bias for row in x])
    expected[:, 2:] = 1 / (1 + (-expected[:, 2:]).exp())
    torch.testing.assert_close(project(x, weight, bias, sigmoid_from=2), expected, rtol=1e-12, atol=1e-12)


def test_the_first_map_gates_the_second() -> None:
    x, weight, up = tensor(3, 8), tensor(5, 8), tensor(5, 8)
    gate = x @ weight.T
    expected = gate / (1 + (-gate).exp()) * (x @ up.T)
    torch.testing.assert_close(project(x, weight, up=up), expected, rtol=1e-12, atol=1e-12)


def test_the_residual_is_added() -> None:
    x, weight, add = tensor(3, 8), tensor(5, 8), tensor(3, 5)
    torch.testing.assert_close(project(x, weight, add=add), add + x @ weight.T, rtol=1e-12, atol=1e-12)
    assert project(tensor(0, 8), weight).shape == (0, 5)


def test_the_norm() -> None:
    x, weight = tensor(3, 8), tensor(8)
    z = rms_norm(x, weight, 1e-2)
    for row in range(3):
        length = (sum(float(y) ** 2 for y in x[row]) / 8 + 1e-2) ** 0.5
        torch.testing.assert_close(z[row], x[row] / length * weight, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(("name", "shape"), [("bias", (4,)), ("up", (5, 7)), ("add", (2, 5)), ("weight", (5, 7))])
def test_shapes_that_do_not_fit_are_one_line(name, shape) -> None:
    given = {"x": tensor(3, 8), "weight": tensor(5, 8), name: tensor(*shape)}
    with pytest.raises(ValueError, match=f"project: {name} should have shape"):
        project(**given)
    with pytest.raises(ValueError, match="rms_norm: weight should have shape"):
        rms_norm(tensor(3, 8), tensor(7), 0.0)
