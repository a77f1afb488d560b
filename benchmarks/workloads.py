"""The four networks that the benchmarks train, each cut in two: small messages, middling, large, and much arithmetic.

The client holds the data and the first part; its labels go to the server with the activations. Data are random numbers:
the time of a step does not depend on what is learned. SGD with momentum at both parties, one torch thread each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import cutlayer as cl

__all__ = ["WORKLOADS", "Workload", "optimizer"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A network, where it is cut, and how it is measured.

    Attributes:
        title: What it is and where it is cut.
        head, body: Make the two parts.
        sample: Shape of an input; `tokens`: it is of integers below this number, not of floats.
        cut: Shape of what crosses, without the batch.
        batch: Samples a step.
        steps: Steps measured in a round.
    """

    title: str
    head: Callable[[], nn.Module]
    body: Callable[[], nn.Module]
    sample: tuple[int, ...]
    cut: tuple[int, ...]
    batch: int
    steps: int
    tokens: int = 0

    def plan(self) -> cl.Plan:
        """Return the plan of one epoch: the head at the client, body and loss at the server."""
        cut = f"float32[batch, {', '.join(map(str, self.cut))}]"
        return cl.vanilla("client", "server", cut=cut, output="float32[batch, 10]", batch_size=self.batch)

    def data(self, steps: int) -> cl.TensorTable:
        """Return the samples of `steps` steps: `x` of shape (samples, *sample), `y` int64 of shape (samples,)."""
        torch.manual_seed(0)
        shape = (steps * self.batch, *self.sample)
        x = torch.randint(0, self.tokens, shape) if self.tokens else torch.randn(shape)
        return cl.TensorTable(x=x, y=torch.randint(0, 10, (len(x),)))

    def parts(self) -> tuple[nn.Module, nn.Module]:
        """Return head and body, with the same weights at each call."""
        torch.manual_seed(1)
        return self.head(), self.body()


def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return plain SGD with momentum, as a user writes it."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


class Residual(nn.Module):
    """A basic block of ResNet-18 (He et al. 2016)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        """Two 3x3 convolutions, and a 1x1 one beside them where the shape changes."""
        super().__init__()
        self.one, self.two = (
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(out), nn.BatchNorm2d(out)])
        same = stride == 1 and channels == out
        self.beside = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to (batch, out, height / stride, width / stride)."""
        y = self.norms[0](self.one(x)).relu()
        return (self.norms[1](self.two(y)) + self.beside(x)).relu()


class Embedding(nn.Module):
    """Tokens and their positions as vectors of 128 numbers."""

    def __init__(self) -> None:
        """256 tokens, 64 positions."""
        super().__init__()
        self.token, self.position = nn.Embedding(256, 128), nn.Parameter(torch.zeros(64, 128))

    def forward(self, x: Tensor) -> Tensor:
        """Map int64 (batch, 64) to float32 (batch, 64, 128)."""
        return self.token(x) + self.position


def _attention() -> nn.Module:
    return nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True, norm_first=True)


def _stage(channels: int, out: int, stride: int) -> list[nn.Module]:
    return [Residual(channels, out, stride), Residual(out, out, 1)]


WORKLOADS = {
    "a": Workload(
        title="MLP 64-256-256-128-10, cut after the first layer",
        head=lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU()),
        body=lambda: nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)),
        sample=(64,),
        cut=(256,),
        batch=32,
        steps=600,
    ),
    "b": Workload(
        title="CNN on 28x28, cut after convolution, ReLU and pooling",
        head=lambda: nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        body=lambda: nn.Sequential(
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(), nn.Linear(128, 10)),
        ),
        sample=(1, 28, 28),
        cut=(16, 14, 14),
        batch=64,
        steps=60,
    ),
    "c": Workload(
        title="ResNet-18 for 32x32, cut after its first stage",
        head=lambda: nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), *_stage(64, 64, 1)
        ),
        body=lambda: nn.Sequential(
            *(*_stage(64, 128, 2), *_stage(128, 256, 2), *_stage(256, 512, 2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)),
        ),
        sample=(3, 32, 32),
        cut=(64, 32, 32),
        batch=64,
        steps=2,
    ),
    "d": Workload(
        title="transformer, 4 layers of 128, 64 tokens, cut after layer 1",
        head=lambda: nn.Sequential(Embedding(), _attention()),
        body=lambda: nn.Sequential(_attention(), _attention(), _attention(), nn.Flatten(), nn.Linear(8192, 10)),
        sample=(64,),
        cut=(64, 128),
        batch=32,
        steps=12,
        tokens=256,
    ),
}
