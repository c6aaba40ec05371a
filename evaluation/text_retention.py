"""Is the text ability kept? A model's workflows against its LLM loaded afresh, on text files.

The paper's claim (Fig. 1, Table 3): IAA's text workflow is the frozen LLM. No logit differs, by no
bit. A LLaVA model has changed: its LLM is trained along (`own_llm`).

Letters: T tokens, V vocabulary.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.answers import Table
from iaa import IAA, TEXT
from llama import Llama
from sample import generate
from tokenization.tokenizer import Tokenizer

WINDOW = 512  # tokens read at once
PROMPT, ANSWER = 32, 32  # tokens of a window that are continued, and tokens of the continuation
BATCH = 16  # continuations at once


def windows(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Texts as token ids, in pieces, each behind the start token where the LLM has one."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found = []
    for text in texts:
        ids = tokenizer.encode(text)
        found += [start + ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    return [ids for ids in found if len(ids) > 1]  # one token alone predicts nothing


def greedy(model: IAA, workflow: str, prompts: list[list[int]]) -> list[list[int]]:
    """The greedy continuations of prompts."""
    return [ids for first in range(0, len(prompts), BATCH) for ids in generate(
        model, prompts[first : first + BATCH], None, workflow, ANSWER)]


@torch.inference_mode()
def logits_of(model: IAA, workflow: str, ids: list[int]) -> Tensor:
    """The logits of a window, (T, V) fp32."""
    tokens = torch.tensor([ids], device=model.llama.device)  # (1, T)
    return model.logits(model(tokens, workflow), workflow)[0].float()


def negative_log_likelihood(logits: Tensor, ids: list[int]) -> float:
    """The sum over a window's tokens but the first; logits (T, V)."""
    following = torch.tensor(ids[1:], device=logits.device)
    return F.cross_entropy(logits[:-1], following, reduction="sum").item()


def compare(
    model: IAA,
    llm: Path,  # the folder that the model's frozen LLM came from
    workflows: list[str],
    texts: list[str],
    answers: int,  # windows whose first tokens are continued, at most
) -> Table:
    """A row for the base and a row for each workflow, without pictures.

    Columns: the perplexity of the texts, the largest difference of a logit from the base's, whether
    all logits are identical, how many tokens were read, and the share of greedy continuations that
    equal the base's.
    """
    pieces = windows(Tokenizer.load(llm), texts)
    if not pieces:
        raise ValueError("the text files hold no text")
    frozen = Llama.load(llm, model.llama.dtype, model.llama.device)
    base = IAA(frozen, model.clip, model.image_token)
    difference, identical = dict.fromkeys(workflows, 0.0), dict.fromkeys(workflows, True)
    loss = dict.fromkeys(["base", *workflows], 0.0)
    for ids in pieces:
        expected = logits_of(base, TEXT, ids)  # (T, V)
        loss["base"] += negative_log_likelihood(expected, ids)
        for workflow in workflows:
            logits = logits_of(model, workflow, ids)
            gap = (logits - expected).abs().max().item()
            difference[workflow] = max(difference[workflow], gap)
            identical[workflow] &= torch.equal(logits, expected)  # False for NaN, too
            loss[workflow] += negative_log_likelihood(logits, ids)
    scored = sum(len(ids) - 1 for ids in pieces)
    prompts = [ids[:PROMPT] for ids in pieces if len(ids) >= PROMPT][:answers]
    wanted = greedy(base, TEXT, prompts)
    table = {"base": {"perplexity": math.exp(loss["base"] / scored)}}
    for workflow in workflows:
        table[workflow] = {"perplexity": math.exp(loss[workflow] / scored),
                           "logit difference": difference[workflow],
                           "identical": "yes" if identical[workflow] else "NO",
                           "tokens": scored + len(pieces)}
        if prompts:
            pairs = zip(greedy(model, workflow, prompts), wanted, strict=True)
            equal = sum(said == base_said for said, base_said in pairs)
            table[workflow] |= {"equal answers, %": 100 * equal / len(prompts),
                                "answers": len(prompts)}
    return table
