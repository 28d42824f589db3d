"""SoftRounding: a weight whose every number lies between its two neighbours on the grid, and learns which to become.

    W~ = s clip(floor(W / s) + h(a), qmin - z, qmax - z)        h(a) = clip(1.2 sigmoid(a) - 0.1, 0, 1)
    r(a) = sum (1 - |2 h(a) - 1|^beta)                          is 0 where every h is 0 or 1

Both are those of AdaRound (Nagel 2020, arXiv:2004.10568, equations 22 to 24, with zeta = 1.1 and gamma = -0.1). At the
beginning h is the fractional part of W / s, so that W~ is W (within the grid); at the end a >= 0 rounds up. The
gradients are in closed form, computed in place in a few passes over memory:

    dh/da = 1.2 sigmoid(a) (1 - sigmoid(a))     where 0 < h < 1, else 0
    dW~/dh = s                                  where floor(W / s) + h is within the grid, else 0
    dr/dh = -2 beta |2 h - 1|^(beta - 1) sign(2 h - 1)
"""

from __future__ import annotations

import torch

from fxquant.numerics.fake_quant import FakeQuant

STRETCH, SHIFT = 1.2, 0.1  # zeta - gamma, -gamma


class SoftRounding:
    """The rounding of one weight while it is learned.

    Arguments:
        weight: of any shape.
        quantizer: its FakeQuant, whose grid (per tensor, channel or block) stands still meanwhile.

    `alpha` (float32, of the weight's shape) is what an optimizer moves: `backward` leaves its gradient in `alpha.grad`.
    """

    def __init__(self, weight: torch.Tensor, quantizer: FakeQuant) -> None:
        scale, zero_point = (part.detach() for part in quantizer.grid_for(weight.ndim))
        steps = weight.detach().to(torch.float32) / scale
        self.floor = torch.floor(steps)
        self.scale = scale
        self.zero_point = zero_point
        self.low = quantizer.spec.qmin - zero_point.to(torch.float32)
        self.high = quantizer.spec.qmax - zero_point.to(torch.float32)
        fraction = steps.sub_(self.floor)
        self.alpha = -torch.log(STRETCH / (fraction + SHIFT) - 1)
        self.alpha.grad = torch.zeros_like(self.alpha)
        self._h = torch.empty_like(self.alpha)
        self._slope = torch.empty_like(self.alpha)

    def weight(self) -> torch.Tensor:
        """W~ as alpha says now: a fresh leaf that wants a gradient, for `backward`."""
        torch.sigmoid(self.alpha, out=self._h)
        torch.mul(self._h, 1 - self._h, out=self._slope).mul_(STRETCH)
        self._h.mul_(STRETCH).sub_(SHIFT)
        self._slope.mul_((self._h > 0) & (self._h < 1))
        self._h.clamp_(0, 1)
        return (self.floor + self._h).clamp_(self.low, self.high).mul_(self.scale).requires_grad_()

    def backward(self, grad: torch.Tensor, beta: float | None, strength: float) -> None:
        """Put the gradient of loss + strength r(alpha) into `alpha.grad`, given the loss's by the last `weight()`.

        beta: None leaves r out.
        """
        found = self.alpha.grad
        assert found is not None
        code = self.floor + self._h
        torch.mul(grad, self.scale, out=found).mul_((code >= self.low) & (code <= self.high))
        if beta is not None:
            centred = self._h.mul(2).sub_(1)
            found.add_(centred.abs().pow_(beta - 1).mul_(centred.sign_()), alpha=-2 * beta * strength)
        found.mul_(self._slope)

    def regulariser(self, beta: float) -> float:
        """r(alpha) as of the last `weight()`."""
        return float((1 - self._h.mul(2).sub_(1).abs_().pow_(beta)).sum())

    def is_hard(self) -> bool:
        """Whether every h was 0 or 1 at the last `weight()`: no gradient moves it any more."""
        return bool(((self._h == 0) | (self._h == 1)).all())

    def codes(self) -> torch.Tensor:
        """Codes (int32) with every number rounded as alpha says: up where it is 0 or more."""
        return self._as_codes(self.floor + (self.alpha >= 0))

    def codes_of(self, weight: torch.Tensor) -> torch.Tensor:
        """Codes (int32) of a weight on this grid, rounded to the nearest."""
        return self._as_codes(torch.round(weight.detach().to(torch.float32) / self.scale))

    def real(self, codes: torch.Tensor) -> torch.Tensor:
        """The weight (float32) that has these codes."""
        return (codes - self.zero_point).to(torch.float32) * self.scale

    def _as_codes(self, steps: torch.Tensor) -> torch.Tensor:
        return (torch.clamp(steps, self.low, self.high) + self.zero_point).to(torch.int32)
