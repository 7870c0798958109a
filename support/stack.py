"""Faster text: layers that multiply the same x become one layer, their bit-planes stacked row below row.

q, k and v of a block all multiply the same x, and so do gate and up. No row of bit-planes knows of another, so they are
one layer with more rows: x is prepared once, and a block is four products instead of seven. That is time won where
starting a product takes as long as the product itself: in a small model, or on a GPU.

    model = stack_layers(checkpoint.model())  # generates the same text
"""

import torch
from torch import Tensor, nn

from kernel import TILE, BCQLinear
from llama import Llama


class StackedLinear(BCQLinear):
    """Several layers of one input as one; its product is cut into theirs."""

    def __init__(self, layers: list[BCQLinear]):
        first, sizes = layers[0], [layer.out_features for layer in layers]
        super().__init__(first.in_features, sum(sizes), first.n_bits, first.group_size)
        self.sizes = sizes
        self.bit_planes = torch.cat([layer.bit_planes for layer in layers], dim=1)  # (n_bits, out/32, in/32, 32)
        self.alpha = torch.cat([layer.alpha for layer in layers], dim=1)  # (n_bits, out/32, in/group_size, 32)
        self.shift = torch.cat([layer.shift for layer in layers], dim=0)  # (out/32, in/group_size, 32)
        if first.bias is not None:
            self.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (..., in_features) -> one (..., out_features) for each of the layers."""
        return super().forward(x).split(self.sizes, dim=-1)


def can_stack(layers: list[nn.Module]) -> bool:
    """Whether these are bit-planes of one kind, with no padding between them."""
    if not all(isinstance(layer, BCQLinear) and layer.out_features % TILE == 0 for layer in layers):
        return False
    kinds = {(layer.n_bits, layer.group_size, layer.bias is None) for layer in layers}
    return len(kinds) == 1


def stack_layers(model: Llama) -> Llama:
    """Stack what can be stacked in each block of a model, in place; for reading only, its layers lose their names."""
    for block in model.model.layers:
        for part, name, members in (
            (block.self_attn, "qkv", ("q_proj", "k_proj", "v_proj")),
            (block.mlp, "gate_up", ("gate_proj", "up_proj")),
        ):
            layers = [getattr(part, member, None) for member in members]  # None: stacked already
            if can_stack(layers):
                setattr(part, name, StackedLinear(layers))
                for member in members:
                    delattr(part, member)
    return model
