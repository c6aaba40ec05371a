"""Answers token by token: prompts fill the cache, then each step decodes one token a row.

Letters: B batch, T tokens, D width, V vocabulary, N images, P image tokens.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from iaa import IAA, TEXT
from llama import KVCache, attention_mask


def slots_of(model: IAA, name: str, workflow: str | Sequence[str]) -> list[int]:
    """Which slots of a cache for `workflow` the layers of `name`, one of its own, fill in turn."""
    own, every = model.places(name), model.places(workflow)
    slots, slot = [], 0
    for i in range(model.llama.config.layers):
        slots += [slot, slot + 1] if i in own else [slot]
        slot += 2 if i in every else 1
    return slots


def prefill(
    model: IAA,
    prompts: list[list[int]],
    images: Tensor | None,
    workflow: str | Sequence[str],
    cache: KVCache,
) -> Tensor:
    """Fill a cache up to the longest prompt's end; the logits after each prompt (B, V).

    Prompts of one workflow and length run together, behind what the cache holds; else it must be
    empty. Nothing is computed for padding, the columns before a shorter prompt, which hold zeros
    and are hidden by `attention_mask`.
    """
    names = [workflow] * len(prompts) if isinstance(workflow, str) else workflow
    counts = [0 if name == TEXT else prompt.count(model.image_token) // model.clip.config.patches
              for prompt, name in zip(prompts, names, strict=True)]
    given = 0 if images is None else len(images)
    if sum(counts) != given:
        raise ValueError(f"image placeholders for {sum(counts)} images, given {given}")
    ends, device = list(accumulate(counts)), model.llama.device
    kinds = list(zip(names, map(len, prompts), strict=True))
    longest, logits = max(map(len, prompts)), [None] * len(prompts)
    for name, length in sorted(set(kinds)):
        rows = [row for row, kind in enumerate(kinds) if kind == (name, length)]
        alone = len(rows) == len(prompts)
        part = cache if alone else model.new_cache(len(rows), length, name)
        own = [n for row in rows for n in range(ends[row] - counts[row], ends[row])]
        given = images[own] if images is not None and own else None
        tokens = torch.tensor([prompts[row] for row in rows], device=device)  # (rows, length)
        x = model(tokens, name, given, cache=part, last_only=True)  # (rows, 1, D)
        for row, values in zip(rows, model.logits(x[:, 0], name).float(), strict=True):
            logits[row] = values
        if not alone:
            for slot, data in zip(slots_of(model, name, workflow), part.data, strict=True):
                cache.data[slot][:, rows, :, : longest - length] = 0
                cache.data[slot][:, rows, :, longest - length : longest] = data
            cache.length = longest
    return torch.stack(logits)


@torch.inference_mode()
def generate(
    model: IAA,
    prompts: list[list[int]],  # token ids, each image as P placeholders; lengths may differ
    images: Tensor | None = None,  # as `forward` takes them, but for those in the cache
    workflow: str | Sequence[str] = TEXT,  # of the batch, or of each row
    max_tokens: int = 128,  # new ones, at most
    stop: tuple[int, ...] = (),  # ids that end an answer; not returned
    temperature: float = 0.0,  # 0 = greedy
    top_p: float = 1.0,
    seed: int = 0,  # row r draws from its own stream, seeded with seed + r
    on_token: Callable[[int, int], bool | None] | None = None,  # each (row, token); True: row ends
    cache: KVCache | None = None,  # holds the beginning of the one prompt, has room for the rest
) -> list[list[int]]:
    """The new tokens of each prompt. Raises ValueError where they would exceed the context."""
    if cache is not None and len(prompts) > 1:
        raise ValueError(f"a cache of one prompt's beginning, given with {len(prompts)} prompts")
    unread = [prompt[0 if cache is None else cache.length :] for prompt in prompts]
    if not prompts or not all(unread):
        raise ValueError("no prompt given, or one without tokens")
    longest, device = max(map(len, prompts)), model.llama.device
    context = model.llama.config.context
    if longest + max_tokens > context:
        raise ValueError(f"prompt of {longest} tokens + {max_tokens} new ones exceed "
                         f"the context of {context}")
    rows, ragged = range(len(prompts)), len(set(map(len, prompts))) > 1
    starts = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)  # (B, 1)
    segments = -(torch.arange(longest + max_tokens, device=device) < starts).long()  # (B, S)
    if cache is None:
        cache = model.new_cache(len(prompts), longest + max_tokens, workflow)
    generators = [torch.Generator(device).manual_seed(seed + row) for row in rows]
    answers, open_rows = [[] for _ in rows], set(rows)
    logits = prefill(model, unread, images, workflow, cache)  # (B, V)
    for left in reversed(range(max_tokens)):
        chosen = choose(logits, temperature, top_p, generators)  # (B,)
        tokens = chosen.tolist()
        for row in sorted(open_rows):
            ended = tokens[row] in stop
            if not ended:
                answers[row].append(tokens[row])
                ended = on_token is not None and on_token(row, tokens[row])
            if ended:
                open_rows.discard(row)
        if not open_rows or not left:
            break
        seen = segments[:, : cache.length + 1] if ragged else None  # (B, S)
        mask = attention_mask(1, cache.length, seen, device)
        x = model(chosen[:, None], workflow, None, cache.length - starts, mask, cache)  # (B, 1, D)
        logits = model.logits(x[:, 0], workflow).float()  # (B, V)
    return answers


def choose(
    logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]
) -> Tensor:
    """One token a row: logits (B, V) -> (B,); temperature 0 is greedy, others draw from `top_p`."""
    if temperature == 0:
        return logits.argmax(-1)
    sharpened = logits / max(temperature, 1e-30)  # less would overflow fp32, and is as greedy
    probs, order = sharpened.softmax(-1).sort(-1, descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # the most likely one always stays
    rows = [torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)]
    return order.gather(-1, torch.stack(rows))[:, 0]
