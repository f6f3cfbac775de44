"""Lion (arXiv:2302.06675) as an optimizer of arriero: `ARRIERO_PLUGINS=optimizer arriero pretrain R --optim.name lion`.

The folder of this file must be on PYTHONPATH. Lion wants a rate 3 to 10 times lower than AdamW's, and a weight decay
as much higher. Embedding and head get half of the rate here, to show a table of parameter groups.
"""

import torch

from arriero.train.config import OPTIMIZERS
from arriero.train.optim import MATRICES, VECTORS, Optimizer, ParameterGroup, Update

VOCABULARY = ParameterGroup(lambda name, shape: name in ("model.embed_tokens.weight", "lm_head.weight"), lr=0.5)


class Lion(Optimizer):
    """The sign of an interpolated momentum; `optim.betas` are Lion's beta1 and beta2."""

    state_names = ("momentum",)  # saved with each checkpoint, and cut as the parameters are
    groups = (VOCABULARY, MATRICES, VECTORS)  # the first that contains a parameter applies

    def update(self, u: Update) -> None:
        """One update of a group."""
        beta1, beta2 = self.config.betas
        for parameter, gradient, momentum in zip(u.parameters, u.gradients, u.states["momentum"], strict=True):
            direction = torch.lerp(gradient, momentum, beta1).sign_()
            parameter.mul_(1 - u.lr * u.weight_decay).add_(direction, alpha=-u.lr)
            momentum.lerp_(gradient, 1 - beta2)


OPTIMIZERS.register("lion", Lion)
