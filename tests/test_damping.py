"""The split of λ over two factors, and what happens where a factor is zero."""

from itertools import product

import pytest
import torch
from torch import Tensor

from kfac.damping import damped, factored_damping, pi_ratio, trace


def factor(*diagonal: float) -> Tensor:
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)).view(1, 1, *2 * [len(diagonal)])


def test_pi_is_the_root_of_the_ratio_of_mean_eigenvalues() -> None:
    a, g = factor(1.0, 3.0), factor(0.5, 0.5, 0.5)
    assert pi_ratio(a, g, 2, 3).item() == pytest.approx((2.0 / 0.5) ** 0.5)
    on_a, on_g = factored_damping(a, g, torch.tensor([0.01], dtype=torch.float64), 2, 3)
    assert on_a.item() == pytest.approx(2 * 0.1)
    assert on_g.item() == pytest.approx(0.1 / 2)


def test_the_two_parts_multiply_to_the_damping_and_follow_the_scale_of_the_factors() -> None:
    a, g, damping = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 5, 5), torch.tensor([0.1, 2.0])
    a, g = a @ a.mT, g @ g.mT
    on_a, on_g = factored_damping(a, g, damping, 4, 5)
    torch.testing.assert_close(on_a * on_g, damping.unsqueeze(1).expand(2, 3))
    scaled_a, scaled_g = factored_damping(100 * a, g / 100, damping, 4, 5)
    torch.testing.assert_close(scaled_a / 100, on_a)
    torch.testing.assert_close(scaled_g * 100, on_g)


@pytest.mark.parametrize(("a", "g"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_pi_is_one_where_a_trace_is_zero(a: float, g: float) -> None:
    assert pi_ratio(factor(a, a), factor(g), 2, 1).item() == 1.0


def test_diagonal_factors_have_the_trace_of_dense_ones() -> None:
    dense = factor(1.0, 2.0, 4.0)
    assert trace(dense).tolist() == trace(dense.diagonal(dim1=2, dim2=3)).tolist() == [[7.0]]


def test_blocks_on_the_diagonal_have_the_trace_of_all_and_are_damped_alike() -> None:
    blocks = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    traces = [[sum(b.trace().item() for b in group) for group in layer] for layer in blocks]
    assert trace(blocks).tolist() == [pytest.approx(layer) for layer in traces]
    amount = torch.rand(2, 3, dtype=torch.float64)
    added = damped(blocks, amount) - blocks
    for layer, group, block in product(range(2), range(3), range(4)):
        expected = amount[layer, group] * torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(added[layer, group, block], expected)


def test_damping_is_added_to_a_copy() -> None:
    dense, amount = factor(1.0, 2.0), torch.tensor([[0.5]], dtype=torch.float64)
    for original in (dense, dense.diagonal(dim1=2, dim2=3).clone()):
        before = original.clone()
        result = damped(original, amount)
        assert torch.equal(original, before)
        assert trace(result).item() == 4.0
