"""Text on a GPU without waiting for Python: the step that writes one token, recorded once as a CUDA graph and replayed.

A 3-bit weight is read in less time than it takes to launch its kernel from Python. A graph launches a whole step at
once, but it repeats exactly what was recorded: the same shapes at the same addresses, and nothing in between may ask
the host. So the position is a tensor here, the step always looks at the whole cache, and a mask hides what is not
filled yet. Without a GPU the same step runs as it is. It has not been timed on a GPU yet; only experiments/decode.py
uses it.
"""

from typing import Callable

import torch
from torch import Tensor

from llama import KVCache, Llama


class FixedCache(KVCache):
    """A cache, filled so far by `cache`, that takes one token at a time at a position that only the device knows."""

    def __init__(self, cache: KVCache, position: Tensor, seen: Tensor):
        """position: (1,) int64, where the next token goes; seen: (1, max_length) bool, what it sees; both are shared"""
        self.keys, self.values, self.position, self.seen = cache.keys, cache.values, position, seen
        self.length = 0  # so that the model takes the first row of the RoPE tables it is given
        for unfilled in (self.keys[:, :, cache.length :], self.values[:, :, cache.length :]):
            unfilled.zero_()  # a mask does not hide NaN

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """keys, values: (batch, n_kv_heads, 1, head_dim) -> all there is room for, (.., max_length, head_dim)."""
        return self.keys.index_copy_(2, self.position, keys), self.values.index_copy_(2, self.position, values)

    def mask(self, n_new: int) -> Tensor:
        return self.seen


def cuda_graph(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record what a GPU does in a step that ends in a tensor; returns a function that has it done again."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # once as it is: libraries set themselves up when first used
        step()
    torch.cuda.synchronize()

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def fixed_step(
    model: Llama, caches: list[KVCache], rope: tuple[Tensor, Tensor], record: Callable | None = None
) -> Callable[[Tensor], Tensor]:
    """A function that maps the next token of each sequence, (batch, 1), to logits, (batch, 1, vocab_size).

    caches: with the tokens before, and room for those to come; from now on they belong to the function
    rope: the tables of `rope_tables`, as long as the caches
    record: makes a function that repeats a step; by default `cuda_graph` on a GPU and nothing elsewhere"""
    keys, start = caches[0].keys, caches[0].length
    position = torch.tensor([start], device=keys.device)
    seen = (torch.arange(keys.shape[2], device=keys.device) < start)[None]
    token = torch.zeros(len(keys), 1, dtype=torch.int64, device=keys.device)
    fixed = [FixedCache(cache, position, seen) for cache in caches]

    def step() -> Tensor:
        seen.index_fill_(1, position, True)
        logits = model(token, fixed, tuple(table.index_select(0, position) for table in rope))
        position.add_(1)
        return logits

    if record is None and keys.is_cuda:
        record = cuda_graph
    with torch.cuda.device_of(keys):
        replay = record(step) if record else step
    position.fill_(start)  # what recording has left in the caches is written over

    def next_logits(new: Tensor) -> Tensor:
        token.copy_(new)
        return replay().clone()  # the next one may be written to the same place

    return next_logits
