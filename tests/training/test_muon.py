"""Muon against singular values and a step by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from minisd.training.muon import Muon, orthogonalized


@pytest.mark.parametrize(("bfloat16", "tolerance"), [(True, 0.06), (False, 1e-4)])
@pytest.mark.parametrize("shape", [(16, 144), (96, 40), (1, 7), (5, 5)])
def test_orthogonalized_keeps_directions_and_evens_out_sizes(shape, bfloat16, tolerance, monkeypatch):
    monkeypatch.setattr("minisd.training.muon.has_bfloat16", lambda cpu: bfloat16)
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    # in the basis of its own singular vectors the result is diagonal, with entries near 1
    inside = u.T @ orthogonalized(matrix, steps=8) @ vt.T
    assert float((inside - inside.diag().diag()).abs().max()) < tolerance
    assert float(inside.diag().min()) > 0.6 and float(inside.diag().max()) < 1.3


def test_first_steps_of_muon_by_hand():
    matrix, bias = nn.Parameter(torch.zeros(1, 4)), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = Muon([matrix, bias], lr=0.1, weight_decay=0.5)
    matrix.grad, bias.grad = torch.tensor([[3.0, 0.0, 4.0, 0.0]]), torch.tensor([7.0, -0.01])
    optimizer.step()
    # a row's only singular vectors are 1 and the row brought to unit length; 0.2 √4 = 0.4
    step = matrix.detach() / -(0.1 * 0.4)
    assert 0.6 < float(step.norm()) < 1.3
    torch.testing.assert_close(step / step.norm(), torch.tensor([[0.6, 0.0, 0.8, 0.0]]), atol=0.01, rtol=0.01)
    # Adam's first step has the size of the learning rate, whatever the gradient; before it the weights decay by 5%
    torch.testing.assert_close(bias.detach(), torch.tensor([0.95 - 0.1, 1.9 + 0.1]), atol=1e-5, rtol=1e-5)


def test_muon_resumes_from_its_state():
    def run(steps: int, parameter: nn.Parameter, optimizer: Muon) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (parameter - 3).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(4, 3, 2, 2))
    optimizer = Muon([first], lr=0.01)
    run(5, first, optimizer)
    second = nn.Parameter(first.detach().clone())
    other = Muon([second], lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(5, first, optimizer)
    run(5, second, other)
    assert torch.equal(first, second)
    assert math.isfinite(float(first.detach().sum()))
