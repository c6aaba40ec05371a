"""Is the text ability kept? A model's workflows against its LLM loaded afresh, on text files.

The paper's claim (Fig. 1, Table 3): IAA's text workflow is the frozen LLM. No logit differs, by no
bit. A LLaVA model has changed: its LLM is trained along (`own_llm`).

Letters: T tokens, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F

from evaluation.answers import Table, percent
from iaa import IAA, TEXT
from sample import generate
from tokenization.tokenizer import Tokenizer

WINDOW = 512  # tokens read at once
PROMPT, ANSWER = 32, 32  # tokens of a window that are continued, and tokens of the continuation


def windows(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Texts as token ids, in pieces, each behind the start token where the LLM has one."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    found = []
    for text in texts:
        ids = tokenizer.encode(text)
        found += [start + ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    return [ids for ids in found if len(ids) > 1]  # one token alone predicts nothing


@torch.inference_mode()
def compare(
    model: IAA,
    base: IAA,  # the LLM loaded afresh
    tokenizer: Tokenizer,
    workflows: list[str],
    texts: list[str],
    answers: int,  # windows whose first tokens are continued, at most
    batch: int,  # of them at once
) -> Table:
    """A row for the base and a row for each workflow, without pictures.

    Columns: the perplexity of the texts, the largest difference of a logit from the base's, whether
    all logits are identical, how many tokens were read, and the share of greedy continuations that
    equal the base's.
    """
    pieces = windows(tokenizer, texts)
    if not pieces:
        raise ValueError("the text files hold no text")
    asked = {"base": (base, TEXT)} | {name: (model, name) for name in workflows}
    loss, gap = dict.fromkeys(asked, 0.0), dict.fromkeys(asked, 0.0)
    identical = dict.fromkeys(asked, "yes")
    for ids in pieces:
        tokens = torch.tensor([ids], device=model.llama.device)  # (1, T)
        expected = None
        for name, (iaa, workflow) in asked.items():
            logits = iaa.logits(iaa(tokens, workflow), workflow)[0].float()  # (T, V)
            expected = logits if expected is None else expected  # the base comes first
            loss[name] += F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum").item()
            gap[name] = max(gap[name], (logits - expected).abs().max().item())
            if not torch.equal(logits, expected):  # nor is NaN equal to NaN
                identical[name] = "NO"
    scored = sum(len(ids) - 1 for ids in pieces)
    table = {name: {"perplexity": math.exp(loss[name] / scored), "logit difference": gap[name],
                    "identical": identical[name], "tokens": scored + len(pieces)}
             for name in asked}
    prompts = [ids[:PROMPT] for ids in pieces if len(ids) >= PROMPT][:answers]
    if prompts:
        said = {name: [ids for i in range(0, len(prompts), batch) for ids in generate(
                    iaa, prompts[i : i + batch], None, workflow, ANSWER)]
                for name, (iaa, workflow) in asked.items()}
        for name, row in table.items():
            equal = percent(a == b for a, b in zip(said[name], said["base"], strict=True))
            row |= {"equal answers, %": equal, "answers": len(prompts)}
    return table
