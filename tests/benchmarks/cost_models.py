"""The models whose training step is the unit of every figure in the cost benchmark."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
#: Different batches that a loop goes through, over and over.
_BATCHES = 4


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[n, s, width]`` to the same."""
        n, s, width = x.shape
        mixed = self.qkv(self.before(x)).view(n, s, 3, self.heads, width // self.heads)
        q, k, v = mixed.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, s, width))
        return x + self.mlp(self.between(x))


class Gpt(nn.Module):
    """GPT-2 without dropout, the head tied to the embedding where asked."""

    def __init__(
        self, layers: int, width: int, heads: int, vocabulary: int, tokens: int, *, tied: bool
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers ``[n, s]`` to ``[n, s, vocabulary]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.words(tokens) + self.places(positions)
        out: Tensor = self.head(self.norm(self.blocks(hidden)))
        return out


def _mlp() -> nn.Module:
    widths = (784, 1024, 1024, 1024, 1024, 1024)
    hidden = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*hidden), nn.Linear(widths[-1], 10))


def _torchvision(name: str) -> nn.Module:
    import torchvision  # noqa: PLC0415  (only where it is installed)

    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def _timm(name: str, size: int) -> nn.Module:
    import timm  # noqa: PLC0415  (only where it is installed)

    model: nn.Module = timm.create_model(name, img_size=size)
    return model


def _vectors(count: int, features: int, classes: int) -> Batch:
    return torch.randn(count, features), torch.randint(classes, (count,))


def _images(count: int, size: int) -> Batch:
    return torch.randn(count, 3, size, size), torch.randint(1000, (count,))


def _text(count: int, tokens: int, vocabulary: int) -> Batch:
    drawn = torch.randint(vocabulary, (count, tokens + 1))
    return drawn[:, :-1], drawn[:, 1:]


@dataclass(frozen=True)
class Recipe:
    """How a model and its batches are made.

    Attributes:
        title: What it is, in words.
        make: Makes the model.
        draw: Draws a batch.
        effort: Rounds of the interleaved measurement.
        needs_cuda: Trained on CUDA under bfloat16 autocast; else in float32 on the CPU.
    """

    title: str
    make: Callable[[], nn.Module]
    draw: Callable[[], Batch]
    effort: int
    needs_cuda: bool = False


MODELS: Mapping[str, Recipe] = {
    "mlp": Recipe("MLP 784-5x1024-10, batch 64", _mlp, lambda: _vectors(64, 784, 10), 10),
    "resnet18": Recipe(
        "resnet18, 64 px, batch 32", lambda: _torchvision("resnet18"), lambda: _images(32, 64), 7
    ),
    "vit_tiny": Recipe(
        "vit_tiny, 96 px, batch 32",
        lambda: _timm("vit_tiny_patch16_224", 96),
        lambda: _images(32, 96),
        6,
    ),
    "gpt": Recipe(
        "GPT 6x384, 128 tokens, batch 8",
        lambda: Gpt(6, 384, 6, 256, 128, tied=False),
        lambda: _text(8, 128, 256),
        6,
    ),
    "resnet50": Recipe(
        "resnet50, 224 px, batch 128, bf16",
        lambda: _torchvision("resnet50"),
        lambda: _images(128, 224),
        10,
        needs_cuda=True,
    ),
    "vit_base": Recipe(
        "vit_base, 224 px, batch 128, bf16",
        lambda: _timm("vit_base_patch16_224", 224),
        lambda: _images(128, 224),
        10,
        needs_cuda=True,
    ),
    "gpt2": Recipe(
        "GPT-2 124M, 1024 tokens, batch 8, bf16",
        lambda: Gpt(12, 768, 12, 50257, 1024, tied=True),
        lambda: _text(8, 1024, 50257),
        10,
        needs_cuda=True,
    ),
}
#: For tests, and for the cost of an idle probe.
SMALL: Mapping[str, Recipe] = {
    "tiny": Recipe("Linear 8-8", lambda: nn.Linear(8, 8), lambda: _vectors(4, 8, 8), 40),
    "small": Recipe(
        "MLP 256-2x256-10, batch 512",
        lambda: nn.Sequential(
            nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        ),
        lambda: _vectors(512, 256, 10),
        10,
    ),
    "wide": Recipe(
        "MLP 512-3x512, batch 1024",
        lambda: nn.Sequential(*[nn.Linear(512, 512) for _ in range(3)]),
        lambda: _vectors(1024, 512, 512),
        10,
    ),
}


class Training:
    """A model, its SGD and its batches: the loop of every mode.

    Args:
        given: A recipe, or the name of one in :data:`MODELS` or :data:`SMALL`.
    """

    def __init__(self, given: str | Recipe) -> None:
        recipe = given if isinstance(given, Recipe) else (MODELS | SMALL)[given]
        torch.manual_seed(0)
        self.device = torch.device("cuda" if recipe.needs_cuda else "cpu")
        self.model = recipe.make().to(self.device)
        drawn = [recipe.draw() for _ in range(_BATCHES)]
        self.batches = [(x.to(self.device), y.to(self.device)) for x, y in drawn]
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4
        )
        self._bf16 = recipe.needs_cuda
        self._steps = 0

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all parameters."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def step(self) -> None:
        """One training step, as a user's loop has it."""
        x, y = self.batches[self._steps % _BATCHES]
        self._steps += 1
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            out = self.model(x)
            loss = F.cross_entropy(out.flatten(0, -2), y.flatten())
        loss.backward()
        self.optimizer.step()
