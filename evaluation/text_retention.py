"""Is the text ability kept? A model's workflows against its LLM loaded afresh, on text files.

The paper's claim (Fig. 1, Table 3): IAA's text workflow is the frozen LLM, a difference of zero;
a LLaVA model, whose LLM is trained along (`own_llm`), has changed.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from generate import generate
from iaa import IAA, TEXT
from evaluation.scoring import Table
from storage import load_base
from tokenization.tokenizer import Tokenizer

WINDOW = 512  # tokens read at once
PROMPT, ANSWER = 32, 32  # tokens of a window that are continued, and of its continuation


def windows(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Texts as token ids, in pieces, each behind the start token where the LLM has one."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found = []
    for text in texts:
        ids = tokenizer.encode(text)
        found += [start + ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    return [ids for ids in found if len(ids) > 1]  # one token alone predicts nothing


def greedy(model: IAA, workflow: str, prompts: list[list[int]]) -> list[list[int]]:
    """Continuations of prompts of one length, some at a time."""
    answers = []
    for first in range(0, len(prompts), 16):
        answers += generate(model, prompts[first : first + 16], None, workflow, ANSWER)
    return answers


@torch.inference_mode()
def logits_of(model: IAA, workflow: str, ids: list[int]) -> Tensor:
    """(T, V) fp32."""
    tokens = torch.tensor([ids], device=model.llama.device)
    return model.logits(model(tokens, workflow), workflow)[0].float()


def surprise(logits: Tensor, ids: list[int]) -> float:
    """Sum of the cross-entropy of a window's tokens behind its first; logits (T, V)."""
    following = torch.tensor(ids[1:], device=logits.device)
    return F.cross_entropy(logits[:-1], following, reduction="sum").item()


def perplexity(model: IAA, tokenizer: Tokenizer, text: str) -> float:
    """Of the text workflow on a text, window by window."""
    pieces = windows(tokenizer, [text])
    total = sum(surprise(logits_of(model, TEXT, ids), ids) for ids in pieces)
    return math.exp(total / sum(len(ids) - 1 for ids in pieces))


def compare(
    model: IAA,
    llm: Path,  # the folder that the model's frozen LLM came from
    workflows: list[str],
    texts: list[str],
    answers: int,  # windows whose first tokens are continued, at most
) -> Table:
    """A row for the base and for each workflow, without pictures.

    Columns: the largest difference of a logit from the base's, the perplexity of the texts, the
    share of greedy continuations that are the base's (in percent), and how much was read.
    """
    pieces = windows(Tokenizer.load(llm), texts)
    if not pieces:
        raise ValueError("the text files hold no text")
    frozen, _ = load_base(llm, model.llama.dtype, str(model.llama.device))
    base = IAA(frozen, model.clip, model.image_token)
    difference = dict.fromkeys(workflows, 0.0)
    loss = dict.fromkeys(["base", *workflows], 0.0)
    for ids in pieces:
        expected = logits_of(base, TEXT, ids)  # (T, V)
        loss["base"] += surprise(expected, ids)
        for workflow in workflows:
            logits = logits_of(model, workflow, ids)
            gap = (logits - expected).abs().max().item()
            difference[workflow] = max(difference[workflow], gap)
            loss[workflow] += surprise(logits, ids)
    scored = sum(len(ids) - 1 for ids in pieces)
    prompts = [ids[:PROMPT] for ids in pieces if len(ids) >= PROMPT][:answers]
    wanted = greedy(base, TEXT, prompts)
    table = {"base": {"perplexity": math.exp(loss["base"] / scored)}}
    for workflow in workflows:
        table[workflow] = {
            "perplexity": math.exp(loss[workflow] / scored),
            "logit difference": difference[workflow],
            "tokens": scored + len(pieces),
        }
        if prompts:
            pairs = zip(greedy(model, workflow, prompts), wanted, strict=True)
            equal = sum(said == base_said for said, base_said in pairs)
            table[workflow] |= {"equal answers, %": 100 * equal / len(prompts),
                                "answers": len(prompts)}
    return table
