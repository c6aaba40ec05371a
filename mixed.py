"""Rows of several workflows in one batch: frozen layers run once, adaptors on their own rows.

`Mixed` is to `IAA` one more adaptor, made of others, each in charge of some rows side by side; but
it places no image: `generate.prefill` reads the prompts of each workflow by themselves.

Letters: B batch, T tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from llama import AfterLayer, KVCache, Llama, Rope


def rows_by_name(names: Sequence[str]) -> list[tuple[str, slice]]:
    """(name, its rows) in order. Raises ValueError where rows of one name are apart.

    >>> rows_by_name(["text", "mm", "mm"])
    [('text', slice(0, 1, None)), ('mm', slice(1, 3, None))]
    """
    runs = [(name, len(list(same))) for name, same in groupby(names)]
    if len({name for name, _ in runs}) < len(runs):
        raise ValueError(f"workflows {list(names)}: rows of one workflow must be side by side")
    ends = accumulate((length for _, length in runs), initial=0)
    return [(name, slice(*rows)) for (name, _), rows in zip(runs, pairwise(ends), strict=True)]


class Mixed:
    """Adaptors, and for text none, side by side on the rows of a batch."""

    llm = None

    def __init__(self, parts: list, llama: Llama):  # parts: (adaptor or None, its rows)
        if any(adaptor is not None and adaptor.llm is not None for adaptor, _ in parts):
            raise ValueError("a workflow with an LLM of its own shares no batch with others")
        self.parts, self.llama = parts, llama
        self.places = tuple(sorted({i for a, _ in parts if a for i in a.places}))

    def embedding(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), by each row's own embedding. Raises ValueError for another B."""
        if self.parts[-1][1].stop != len(tokens):
            raise ValueError(f"workflows for {self.parts[-1][1].stop} rows, given {len(tokens)}")
        own = [a.embedding if a and a.embedding else self.llama.embedding for a, _ in self.parts]
        return torch.cat([e(tokens[rows]) for e, (_, rows) in zip(own, self.parts, strict=True)])

    def after_layer(
        self, rope: Rope, mask: Tensor | None, cache: KVCache | None, last_only: bool = False
    ) -> AfterLayer:
        """As `Adaptor.after_layer`; all adaptors that insert at a place share its cache slot."""
        hooks = []
        for adaptor, rows in self.parts:
            cos, sin, seen = (t if t is None or len(t) == 1 else t[rows] for t in (*rope, mask))
            own = None if cache is None else cache.rows(rows)
            hook = None if adaptor is None else adaptor.after_layer((cos, sin), seen, own)
            hooks.append((rows, own, hook))

        def hook(i: int, x_in: Tensor, x_out: Tensor) -> Tensor:
            if i not in self.places:
                return x_out
            y = []
            for rows, own, inner in hooks:
                if own is not None:
                    own.slot = cache.slot
                y.append(inner(i, x_in[rows], x_out[rows]) if inner else x_out[rows])
            if cache is not None:
                cache.slot += 1
            x = torch.cat(y)  # (B, T, D)
            return x[:, -1:] if last_only and i == self.places[-1] else x

        return hook

    def norm(self, x: Tensor) -> Tensor:
        """Nothing: each row's own norm goes with its head."""
        return x

    def head(self, x: Tensor) -> Tensor:
        """Hidden states (B, ..., D) -> logits (B, ..., V), by each row's own norm and head."""
        y = []
        for adaptor, rows in self.parts:
            own = adaptor is not None and adaptor.head is not None
            y.append(adaptor.head(adaptor.norm(x[rows])) if own else self.llama.logits(x[rows]))
        return torch.cat(y)
