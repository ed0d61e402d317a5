"""Training runs: compute-optimal tokens, time and cost."""

from __future__ import annotations

from dataclasses import dataclass

from oneblock.errors import OneblockError


@dataclass(frozen=True)
class Gpu:
    """An accelerator, by its data sheet. Prices are rough rental prices of late 2025: give your own."""

    name: str
    flops: float  # per second, 16-bit, dense
    memory: float  # bytes
    bandwidth: float  # bytes per second
    price: float  # dollars per hour


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", 65e12, 16e9, 320e9, 0.35),
        Gpu("l4", 121e12, 24e9, 300e9, 0.70),
        Gpu("rtx-4090", 165e12, 24e9, 1.008e12, 0.40),
        Gpu("l40s", 362e12, 48e9, 864e9, 1.00),
        Gpu("a100", 312e12, 80e9, 2.039e12, 1.50),
        Gpu("h100", 989e12, 80e9, 3.35e12, 2.50),
        Gpu("h200", 989e12, 141e9, 4.8e12, 3.00),
        Gpu("b200", 2250e12, 180e9, 8.0e12, 5.00),
        Gpu("mi300x", 1307e12, 192e9, 5.3e12, 2.50),
    )
}


def gpu(name: str) -> Gpu:
    if name.lower() not in GPUS:
        raise OneblockError(f"unknown GPU {name!r}: choose from {', '.join(GPUS)}")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Run:
    """FLOPs, time and cost of training on `tokens` tokens."""

    tokens: float
    flops: float
    seconds: float
    dollars: float


def run(flops_per_token: float, tokens: float, gpu: Gpu, gpus: int, utilisation: float, price: float | None) -> Run:
    """Time and cost of a run. `utilisation` is the share of peak FLOPs reached (MFU, arXiv:2204.02311); 0.4 is common.

    `price` is dollars per GPU and hour; None takes the table's.
    """
    if not 0 < utilisation <= 1:
        raise OneblockError(f"utilisation is {utilisation}, but it must lie in (0, 1]")
    if gpus < 1 or tokens < 0:
        raise OneblockError(f"{gpus} GPUs and {tokens} tokens: a run needs at least 1 GPU and 0 tokens")
    flops = flops_per_token * tokens
    seconds = flops / (gpus * gpu.flops * utilisation)
    return Run(tokens, flops, seconds, seconds / 3600 * gpus * (gpu.price if price is None else price))


@dataclass(frozen=True)
class Law:
    """Loss = E + A / N ** alpha + B / D ** beta, for N parameters and D tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, n: float, d: float) -> float:
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def tokens(self, n: float) -> float:
        """The compute-optimal D for N: at fixed N x D, alpha A / N ** alpha = beta B / D ** beta."""
        return (self.beta * self.B / (self.alpha * self.A) * n**self.alpha) ** (1 / self.beta)


HOFFMANN = Law(1.6934, 406.4, 410.7, 0.3392, 0.2849)  # arXiv:2203.15556, appendix D.3; far from its own 20 to 1
BESIROGLU = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # arXiv:2404.10102: the same data, fitted again

TOKENS_PER_PARAMETER = 20  # arXiv:2203.15556, table 3, about


def optimal_tokens(n: float, law: Law | None = None) -> float:
    """Compute-optimal training tokens for `n` parameters, by a fitted law or (None) 20 per parameter."""
    return TOKENS_PER_PARAMETER * n if law is None else law.tokens(n)
