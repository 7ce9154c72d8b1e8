"""An embedding as a matrix on one-hot inputs. Not registered: its input is no activation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from feature_probe.layers.rules import LinearRule, Shape


class EmbeddingRule(LinearRule):
    """``nn.Embedding``: z = W h with W = weightᵀ and h the one-hot vector of an index.

    WᵀW is then the Gram matrix of the embedding vectors (d_in is the size of the vocabulary, and is
    never formed in full unless ``report.matrix`` is asked for it). Opt-in::

        register_layer_rule(nn.Embedding, EmbeddingRule())

    At ``padding_idx`` h is zero, as the row there has no gradient; the position still is a row of
    the Jacobian, like those that zero padding gives a convolution. Gradients of ``sparse=True`` are
    made dense. Refused by name (:mod:`feature_probe.layers.refusals`): ``max_norm``, which projects
    the weight, and ``scale_grad_by_freq``, whose gradient is not the loss's.
    """

    def matrix(self, module: nn.Module, weight: Tensor) -> Tensor:
        """``weight [vocabulary, d_out]`` as one group ``[1, d_out, vocabulary]``."""
        return weight.mT[None]

    def gradient_matrix(self, module: nn.Module, gradient: Tensor) -> Tensor:
        """The gradient has the weight's layout; a sparse one is made dense."""
        return self.matrix(module, gradient.to_dense() if gradient.is_sparse else gradient)

    def input_gradient_matrix(
        self, module: nn.Module, inputs: Tensor, output_gradient: Tensor
    ) -> Tensor:
        """Adds g of every position to the column of its index."""
        embedding: Any = module
        g = output_gradient.reshape(-1, output_gradient.shape[-1])
        weight = g.new_zeros(embedding.num_embeddings, g.shape[-1])
        weight.index_add_(0, inputs.reshape(-1).long(), g)
        if embedding.padding_idx is not None:
            weight[embedding.padding_idx] = 0.0
        return self.matrix(module, weight)

    def declared_shape(self, module: Any) -> Shape:
        """The shape of W by the sizes of the embedding."""
        return 1, module.embedding_dim, module.num_embeddings
