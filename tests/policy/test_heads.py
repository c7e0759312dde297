"""The critic: one linear map of detached states."""

import pytest
import torch

from halos.policy.heads import ValueHead


def head() -> ValueHead:
    made = ValueHead(3)
    with torch.no_grad():
        made.linear.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        made.linear.bias.fill_(0.25)
    return made


def test_values_start_at_zero() -> None:
    assert ValueHead(3)(torch.randn(2, 4, 3)).eq(0).all()


def test_a_value_by_hand() -> None:
    assert head()(torch.tensor([[3.0, 1.0, 2.0], [0.0, 0.0, 0.0]])).tolist() == [2.25, 0.25]


@pytest.mark.parametrize("shape", [(), (5,), (2, 1, 4)])
def test_one_value_for_each_state(shape: tuple[int, ...]) -> None:
    assert head()(torch.randn(*shape, 3)).shape == shape


def test_values_do_not_move_the_policy() -> None:
    states, made = torch.ones(4, 3, requires_grad=True), head()
    made(states).sum().backward()
    assert states.grad is None
    assert made.linear.weight.grad is not None
    assert made.linear.weight.grad.tolist() == [[4.0, 4.0, 4.0]]


@pytest.mark.parametrize(
    ("head_dtype", "state_dtype", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_values_are_at_least_float32(head_dtype: torch.dtype, state_dtype: torch.dtype, expected: torch.dtype) -> None:
    assert head().to(head_dtype)(torch.ones(2, 3, dtype=state_dtype)).dtype == expected


def test_values_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head()(torch.ones(2, 3)).dtype == torch.float32
