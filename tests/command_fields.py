"""Fields that the tests of the command name: closed forms, whose numbers are independent of everything trained."""

from __future__ import annotations

import torch

from solvers.paths import Linear
from tests.test_gmm import mixture as exact

mixture = exact(Linear()).to(torch.float32)  # a field of x (B, 6)
number = 3


def picture(x, t):
    """A field of x (B, 1, 4, 4)."""
    return torch.sin(3 * t) * x - torch.cos(x)


class Scaled:
    """A field of x (B, 1, 4, 4) that is conditioned: sample i decays at its own rate. It counts calls."""

    asked = 0
    stops_at = -1  # raises KeyboardInterrupt there

    def __init__(self, samples: int):
        self.rate = 1 + torch.arange(samples) / samples

    def __call__(self, x, t):
        Scaled.asked += len(x)
        if Scaled.asked == Scaled.stops_at:
            raise KeyboardInterrupt
        return -self.rate[:, None, None, None].to(x) * x / (0.2 + t) + torch.sin(x)

    def select(self, rows):
        few = Scaled(len(rows))
        few.rate = self.rate[rows]
        return few


def wrong_shape(x, t):
    return x[:, :1]


def raises(x, t):
    raise RuntimeError("out of sorts")
