"""Is the text ability kept? A model's workflows, without pictures, against its LLM on text files.

The paper's claim (Fig. 1, Table 3): IAA's text workflow is the frozen LLM. No logit differs, by no
bit. A LLaVA model has changed: its LLM is trained along (`own_llm`).

Letters: B batch, T tokens, V vocabulary.
"""

import argparse
import math
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import Ranks
from common.files import load_frozen
from evaluation.answers import Table, load, print_table, read_text
from iaa import IAA, TEXT, Index
from llama import Llama
from speed.packing import pack
from tokenization.tokenizer import Tokenizer

WINDOW = 512  # tokens read at once
PROMPT, ANSWER = 32, 32  # tokens of a window that are continued, and tokens of the continuation


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """Print the table, then of each LLM, the frozen one last, whether it is still the base's."""
    texts = [read_text(Path(path)) for path in args.data]
    chat = load(args, args.workflow and [args.workflow])
    model, workflows = chat.model, [args.workflow or TEXT]
    workflows += [] if args.workflow else model.adaptors
    base = load_base(model, args.base or args.model / Index.read(args.model).llm, args.quantize)
    table = compare(model, base, windows(chat.tokenizer, texts), workflows, args.limit or 16,
                    args.batch)
    print_table("text", table, ".4g")
    for name in sorted(workflows, key=TEXT.__eq__):
        if name == TEXT or model.adaptors[name].llm is not None:
            what = "text-only logits" if name == TEXT else f"logits of {name} without pictures"
            print(f"{what} identical to the base model: {table[name]['identical']} "
                  f"({table[name]['tokens']} tokens)")


def load_base(model: IAA, folder: Path, quantize: str | None) -> IAA:
    """The LLM in `folder`, in the dtype, on the device and in the layout of the model's.

    Its embedding and head are cut, or padded with zeros, to the model's vocabulary: another size
    may select another kernel, which rounds differently.
    """
    llama, size = model.llama, model.llama.config.vocab_size
    base = load_frozen(Llama, folder, llama.dtype, llama.device)
    for part in filter(None, (base.embedding, base.head)):
        rows = F.pad(part.weight[:size], (0, 0, 0, max(0, size - len(part.weight))))
        part.weight = nn.Parameter(rows)
    pack(base, quantize == "int8")
    return IAA(base, model.clip, model.image_token)


def windows(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Texts as token ids, in pieces, each behind the start token where the LLM has one."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    pieces = [start + ids[i : i + WINDOW] for ids in map(tokenizer.encode, texts)
              for i in range(0, len(ids), WINDOW)]
    pieces = [ids for ids in pieces if len(ids) > 1]  # one token alone predicts nothing
    if not pieces:
        raise ValueError("the text files hold no text")
    return pieces


@torch.inference_mode()
def compare(
    model: IAA,
    base: IAA,  # from `load_base`
    pieces: list[list[int]],  # from `windows`
    workflows: list[str],
    answers: int,  # pieces whose first tokens are continued, at most
    batch: int,  # of them at once
) -> Table:
    """A row for the base and a row for each workflow, without pictures.

    Columns: the perplexity of the texts, the largest difference of a logit from the base's, whether
    all logits are identical, how many tokens were read, and the share of greedy continuations that
    equal the base's. Where one vocabulary is longer (a padded one), its other logits are left out.
    """
    shared = min(iaa.llama.config.vocab_size for iaa in (model, base))
    if max(map(max, pieces)) >= shared:
        raise ValueError(f"the text has token {max(map(max, pieces))}, but {shared} tokens are all "
                         "that the model and --base share: they have different tokenizers")
    asked = {"base": (base, TEXT)} | {name: (model, name) for name in workflows}
    found = {name: [] for name in asked}  # of each piece: loss, largest difference, identical
    for ids in pieces:
        tokens, expected = torch.tensor([ids], device=model.llama.device), None  # (1, T)
        for name, (iaa, workflow) in asked.items():
            logits = iaa.logits(iaa(tokens, workflow), workflow)[0, :, :shared].float()  # (T, V)
            expected = logits if expected is None else expected  # the base comes first
            loss = F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum").item()
            found[name].append((loss, (logits - expected).abs().max().item(),
                                torch.equal(logits, expected)))  # nor is NaN equal to NaN
    prompts = [ids[:PROMPT] for ids in pieces if len(ids) >= PROMPT][:answers]
    read, table = sum(map(len, pieces)), {}
    for name, (iaa, workflow) in asked.items():
        losses, gaps, same = zip(*found[name], strict=True)
        table[name] = {"perplexity": math.exp(sum(losses) / (read - len(pieces))),
                       "logit difference": max(gaps), "identical": "yes" if all(same) else "NO",
                       "tokens": read}
        if prompts:
            said = torch.cat([continue_greedily(iaa, workflow, prompts[n : n + batch], shared)
                              for n in range(0, len(prompts), batch)])
            expected = said if name == "base" else expected
            table[name] |= {"equal answers, %": 100 * fmean((said == expected).all(1).tolist()),
                            "answers": len(prompts)}
    return table


def continue_greedily(iaa: IAA, workflow: str, prompts: list[list[int]], shared: int) -> Tensor:
    """The likeliest of the first `shared` tokens, again and again: (B, ANSWER) of B prompts."""
    cache = iaa.new_cache(len(prompts), PROMPT + ANSWER, workflow)
    tokens, said = torch.tensor(prompts, device=iaa.llama.device), []  # (B, T), then (B, 1)
    for _ in range(ANSWER):
        logits = iaa.logits(iaa(tokens, workflow, cache=cache)[:, -1], workflow)  # (B, V)
        tokens = logits[:, :shared].argmax(-1, keepdim=True)
        said.append(tokens)
    return torch.cat(said, 1)
