"""Many small networks trained side by side, as stacked tensors.

The papers' longest settings take millions of steps on networks of a few thousand weights, where
PyTorch's own overhead is most of the cost. Networks of one architecture that see the same batches
are held here as one tensor ``[networks, out, in]`` a layer, and stepped by batched products with
the gradients written out. ``tests/test_network_stack.py`` holds them to autograd and the updates to
torch.optim, step for step.

A network is a chain of linear layers W_L···W_1, a bias behind it, and then layers of ReLU, weight
and bias, the last of them the output: f = a ReLU(W_L···W_1 x + b_1) + b_2 is a chain of L and one
such layer; an ordinary ReLU network is a chain of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Inputs that full batches are taken in, so that the activations stay in the processor's cache.
BLOCK = 256


@dataclass(frozen=True)
class Architecture:
    """Layers of a network.

    Attributes:
        inputs: d.
        width: Of every hidden layer.
        chain: L, the linear layers before the first ReLU.
        tail: Layers of ReLU, weight and bias behind them, the output's among them.
        outputs: 1, fitted by squares; or classes, by cross-entropy.
    """

    inputs: int
    width: int
    chain: int
    tail: int = 1
    outputs: int = 1

    def build(self, seed: int) -> nn.Sequential:
        """A network with PyTorch's own initialisation: the chain, then the tail."""
        torch.manual_seed(seed)
        widths = [self.inputs, *[self.width] * self.chain]
        chain = [
            nn.Linear(before, after, bias=layer == self.chain)
            for layer, (before, after) in enumerate(pairwise(widths), start=1)
        ]
        sizes = [*[self.width] * self.tail, self.outputs]
        tail: list[nn.Module] = []
        for before, after in pairwise(sizes):
            tail += [nn.ReLU(), nn.Linear(before, after)]
        return nn.Sequential(nn.Sequential(*chain), nn.Sequential(*tail))


@dataclass(frozen=True)
class Updates:
    """How the stack is stepped, as by torch.optim's SGD or Adam.

    Attributes:
        rate: Learning rate η.
        momentum: μ of SGD, 0 without.
        adam: Adam (its default β and ε) in place of SGD; its decay is coupled, as SGD's is.
    """

    rate: float
    momentum: float = 0.0
    adam: bool = False


class NetworkStack:
    """Networks of one architecture, trained side by side.

    Args:
        networks: As :meth:`Architecture.build` makes them.
        architecture: Theirs.
        decays: λ, one a network.
        updates: The optimizer's settings, the same for all.
        decay_biases: Whether the biases decay as well, as with ``weight_decay=`` for all
            parameters.
    """

    def __init__(
        self,
        networks: Sequence[nn.Sequential],
        architecture: Architecture,
        decays: Sequence[float],
        updates: Updates,
        decay_biases: bool = True,
    ) -> None:
        self.architecture = architecture
        self.updates = updates
        self.count = len(networks)
        states = [list(network.parameters()) for network in networks]
        # one flat buffer, in which each parameter of all networks is a block [networks, ...]
        blocks = [torch.stack([p.detach() for p in same]) for same in zip(*states, strict=True)]
        self._sizes = [block.shape for block in blocks]
        self.values = torch.cat([block.flatten() for block in blocks])
        self.gradients = torch.zeros_like(self.values)
        self._first = torch.zeros_like(self.values)
        self._second = torch.zeros_like(self.values)
        self._scratch = torch.zeros_like(self.values)
        decay = torch.tensor(decays)
        self._decay = torch.cat(
            [
                (decay if block.dim() == 3 or decay_biases else torch.zeros_like(decay))
                .reshape(-1, *[1] * (block.dim() - 1))
                .expand_as(block)
                .flatten()
                for block in blocks
            ]
        )
        self._weights = self._views(self.values)
        self._grads = self._views(self.gradients)
        self._steps = 0

    def _views(self, flat: Tensor) -> tuple[list[Tensor], Tensor, list[tuple[Tensor, Tensor]]]:
        """The chain's weights, its bias and the tail's weights and biases, as columns."""
        views = [
            part.view(size)
            for part, size in zip(
                flat.split([size.numel() for size in self._sizes]), self._sizes, strict=True
            )
        ]
        length = self.architecture.chain
        chain, bias, tail = views[:length], views[length], views[length + 1 :]
        pairs = [(w, b.unsqueeze(2)) for w, b in zip(tail[::2], tail[1::2], strict=True)]
        return chain, bias.unsqueeze(2), pairs

    def network(self, index: int) -> nn.Sequential:
        """One of the networks as modules, with weights of its own."""
        network = self.architecture.build(seed=0)
        with torch.no_grad():
            for parameter, block in zip(
                network.parameters(),
                self.values.split([size.numel() for size in self._sizes]),
                strict=True,
            ):
                parameter.copy_(block.view(self.count, *parameter.shape)[index])
        return network

    def step(self, x: Tensor, y: Tensor, rate: float | None = None) -> None:
        """One step of all networks on one batch.

        Args:
            x: ``[n, d]``.
            y: ``[networks, n]``, or classes ``[n]``.
            rate: Learning rate, if not that of the settings.
        """
        self.differentiate(x, y)
        self._update(self.updates.rate if rate is None else rate)

    def differentiate(self, x: Tensor, y: Tensor) -> None:
        """Write the gradients of all networks' mean loss over a batch, without decay.

        Where the batch is larger than d, the chain's product is formed once and its gradient
        δᵀx, ``[width, d]``, is what runs back through the chain: the same sums in another order.
        """
        chain, bias, _ = self._weights
        grads = self._grads[0]
        count, width, inputs = self.count, self.architecture.width, self.architecture.inputs
        product = inputs < len(x)
        flat_first = chain[0].view(count * width, inputs)
        images = [chain[0] if product else (flat_first @ x.T).view(count, width, -1)]
        for weight in chain[1:]:
            images.append(torch.bmm(weight, images[-1]))
        if product:
            flat_product = images[-1].view(count * width, inputs)
            back = grads[0].view(count * width, inputs)
            for start in range(0, len(x), BLOCK):
                part = x[start : start + BLOCK]
                z = (flat_product @ part.T).view(count, width, -1).add_(bias)
                delta = self._tail(z, y[..., start : start + BLOCK], len(x), first=start == 0)
                back.addmm_(delta.view(count * width, -1), part, beta=float(start > 0))
            back = grads[0]
        else:
            back = self._tail(images[-1] + bias, y, len(x), first=True)
        for layer in range(len(chain) - 1, 0, -1):
            torch.bmm(back, images[layer - 1].transpose(1, 2), out=grads[layer])
            back = torch.bmm(chain[layer].transpose(1, 2), back)
        if product:
            grads[0].copy_(back)
        else:
            torch.mm(back.view(count * width, -1), x, out=grads[0].view(count * width, inputs))

    def _tail(self, z: Tensor, y: Tensor, total: int, first: bool) -> Tensor:
        """δ, the gradient with respect to the chain's outputs; the tail's own are added up."""
        _, bias_grad, tail_grads = self._grads
        _, _, tail = self._weights
        hidden = []
        for weight, bias in tail:
            hidden.append(z.relu_())
            z = torch.baddbmm(bias, weight, hidden[-1])
        if self.architecture.outputs == 1:
            delta = z.sub_(y.unsqueeze(1)).mul_(2 / total)
        else:
            delta = z.softmax(1).sub_(F.one_hot(y, z.shape[1]).T).div_(total)
        keep = 0.0 if first else 1.0
        for index in range(len(tail) - 1, -1, -1):
            weight_grad, grad = tail_grads[index]
            weight_grad.baddbmm_(delta, hidden[index].transpose(1, 2), beta=keep)
            _accumulate(grad, delta, first)
            # hidden values are not negative: their sign is ReLU's derivative
            slope = hidden[index].sign_()
            delta = torch.bmm(tail[index][0].transpose(1, 2), delta).mul_(slope)
        _accumulate(bias_grad, delta, first)
        return delta

    def _update(self, rate: float) -> None:
        """θ ← θ − η u, with u of torch.optim.SGD or Adam for the gradient g + λθ."""
        self._steps += 1
        gradients = self.gradients.addcmul_(self.values, self._decay)
        if self.updates.adam:
            self._first.lerp_(gradients, 0.1)
            self._second.mul_(0.999).addcmul_(gradients, gradients, value=0.001)
            # both moments' bias corrections are put into η and ε
            correction = math.sqrt(1 - 0.999**self._steps)
            scale = torch.sqrt(self._second, out=self._scratch).add_(1e-8 * correction)
            rate *= correction / (1 - 0.9**self._steps)
            self.values.addcdiv_(self._first, scale, value=-rate)
        elif self.updates.momentum:
            self._first.mul_(self.updates.momentum).add_(gradients)
            self.values.add_(self._first, alpha=-rate)
        else:
            self.values.add_(gradients, alpha=-rate)


def _accumulate(grad: Tensor, delta: Tensor, first: bool) -> None:
    """A bias's gradient: δ summed over the batch, added to what was there but at the first."""
    if first:
        torch.sum(delta, 2, keepdim=True, out=grad)
    else:
        grad.add_(delta.sum(2, keepdim=True))
