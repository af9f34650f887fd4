"""Muon: momentum whose matrices are made orthogonal before they are added to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from minisd.features.fast import capabilities, has_bfloat16

COEFFICIENTS = 3.4445, -4.7750, 2.0315


def orthogonalized(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values of a matrix (rows, columns) near 1, and keep its singular vectors.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (Newton-Schulz iteration). Its
    polynomial converges only roughly, to values between 0.7 and 1.2, but in few steps and in bfloat16, which is used
    except on CPUs that only emulate it, many times slower than float32.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.device.type != "cpu" or has_bfloat16(capabilities()) else matrix.float()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        # x ← a x + b (x xᵀ) x + c (x xᵀ)² x
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    return x.to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for weights of two and more dimensions, Adam for biases, norms and tables of fewer; decoupled weight decay.

    A convolution (out, in, k, k) is taken as the matrix (out, in · k · k). The update of a matrix is scaled to the
    root mean square that Adam's usually has, so that one learning rate serves both (Liu et al. 2025, "Muon is Scalable
    for LLM Training", equation 4).
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay}
        super().__init__(list(parameters), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._muon if parameter.ndim > 1 else self._adam
                parameter.add_(update(parameter, group), alpha=-group["lr"])

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        average = state.setdefault("momentum", torch.zeros_like(parameter))
        average.lerp_(gradient, 1 - group["momentum"])
        looking_ahead = gradient.lerp(average, group["momentum"])  # Nesterov
        matrix = orthogonalized(looking_ahead.flatten(1))
        # the root mean square of an orthogonal matrix's entries is 1/√max(rows, columns)
        return (0.2 * max(matrix.shape) ** 0.5 * matrix).view_as(parameter)

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, gradient, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        assert gradient is not None
        mean = state.setdefault("mean", torch.zeros_like(parameter))
        square = state.setdefault("square", torch.zeros_like(parameter))
        step = state["step"] = state.get("step", 0) + 1
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        return mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + 1e-8)
