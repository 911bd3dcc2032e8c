"""What the transformer sees of the prompts."""

import dataclasses

import torch


@dataclasses.dataclass
class Condition:
    """B encoded prompts. condition[rows] picks and repeats prompts as a tensor's rows, e.g. condition[[0, 0, 1, 1]]."""

    context: torch.Tensor  # [B, L, D], token embeddings
    pooled: torch.Tensor  # [B, P], one vector for the whole prompt

    def __len__(self):
        return len(self.context)

    def __getitem__(self, rows):
        return Condition(self.context[rows], self.pooled[rows])

    def to(self, *args, **kwargs):
        """As torch.Tensor.to: another device, another dtype."""
        return Condition(self.context.to(*args, **kwargs), self.pooled.to(*args, **kwargs))
