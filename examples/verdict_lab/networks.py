"""Small networks and synthetic data with something to learn."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, TOKENS = 4, 5


class Attention(nn.Module):
    """Self-attention with two heads, q, k and v in one Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> the same."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return out


class Block(nn.Module):
    """A pre-LN block, or a post-LN one."""

    def __init__(self, width: int, post: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = Attention(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.post = post

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> the same."""
        for norm, part in zip(self.norms, (self.attention, self.mlp), strict=True):
            x = norm(x + part(x)) if self.post else x + part(norm(x))
        return x


class Transformer(nn.Module):
    """One block on a few tokens, their mean read out."""

    def __init__(self, width: int, post: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.place: Tensor
        self.register_buffer("place", 0.1 * torch.randn(TOKENS, width))
        self.block = Block(width, post)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, 8] -> logits."""
        out: Tensor = self.head(self.norm(self.block(self.embed(x) + self.place)).mean(1))
        return out


Part = Callable[[int], nn.Module]


def _nothing(width: int) -> nn.Module:
    return nn.Identity()


def _mlp(width: int, activation: type[nn.Module], norm: Part = _nothing) -> nn.Module:
    def hidden(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, width), norm(width), activation()]

    return nn.Sequential(*hidden(16), *hidden(width), nn.Linear(width, CLASSES))


def _conv(width: int, activation: type[nn.Module], norm: Part = _nothing) -> nn.Module:
    channels = width // 4 * 2

    def hidden(inputs: int) -> list[nn.Module]:
        layer = nn.Conv2d(inputs, channels, 3, stride=2, padding=1)
        return [layer, norm(channels), activation()]

    last = nn.Linear(4 * channels, CLASSES)
    return nn.Sequential(*hidden(2), *hidden(channels), nn.Flatten(), last)


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


NETWORKS: dict[str, Callable[[int, type[nn.Module]], nn.Module]] = {
    "mlp": _mlp,
    "mlp+bn": lambda width, act: _mlp(width, act, nn.BatchNorm1d),
    "conv": _conv,
    "conv+bn": lambda width, act: _conv(width, act, nn.BatchNorm2d),
    "transformer": lambda width, _: Transformer(width // 8 * 8),
    "mlp+ln": lambda width, act: _mlp(width, act, nn.LayerNorm),
    "conv+gn": lambda width, act: _conv(width, act, _group_norm),
    "post-ln": lambda width, _: Transformer(width // 8 * 8, post=True),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}


def make_data(network: str, examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a random teacher, classes of equal size."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shape = {"c": (2, 8, 8), "t": (TOKENS, 8), "p": (TOKENS, 8)}.get(network[0], (16,))
    x = torch.randn(examples, *shape, generator=generator)
    flat = x if network[0] == "m" else x.flatten(1)[:, :40]
    first = torch.randn(flat.shape[1], 3, generator=generator)
    score = torch.relu(flat @ first) @ torch.tensor([1.0, -1.0, 0.7]) + (flat @ first)[:, 0]
    y = (score.argsort().argsort() * CLASSES // examples).long()
    return x, y


def named_layers(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all Linear and Conv2d modules."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            found[name] = weight
    return found
