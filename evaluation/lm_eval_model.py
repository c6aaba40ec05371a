"""The text benchmarks of Table 3 through lm-eval, whose model this file supplies.

lm-eval (requirements/lm-eval.txt) has the tasks and scorers, and downloads the data sets.

Letters: T tokens, D width, V vocabulary, n tokens of a continuation.
"""

import argparse
import re

import torch
from lm_eval import simple_evaluate  # noqa: F401  (for __main__.py)
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager  # noqa: F401

from evaluation.answers import GreedyModel, Prompt, Record
from sample import Chat
from tokenization.templates import template_of


class WorkflowLM(GreedyModel, TemplateLM):
    """The chat's workflow, without pictures, as lm-eval calls a model."""

    tokenizer_name = "iaa"  # for lm-eval's records

    def __init__(self, chat: Chat, batch: int):
        super().__init__(chat, batch)
        self.words, self.context = chat.tokenizer, chat.model.llama.config.context

    @property
    def eot_token_id(self) -> int:
        """The id that stands for an empty context: the start token, else the pad."""
        return self.words.pad_id if self.words.bos_id is None else self.words.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Ids; names of special tokens are these tokens. Begins with the LLM's start token."""
        starts = add_special_tokens is not False and self.words.bos_id is not None
        ids = [self.words.bos_id] if starts else []
        names = "|".join(map(re.escape, self.words.special_tokens))
        for place, piece in enumerate(re.split(f"({names})", string)):  # names are the odd pieces
            ids += [self.words.special(piece)] if place % 2 else self.words.encode(piece)
        return ids

    def prompt(self, chat: Chat, question: Record) -> Prompt:
        """The ids of a text; a long one keeps its end."""
        return self.tok_encode(question["prompt"])[question["max_tokens"] - self.context :], None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text; where its last turn is an answer, the answer stays open."""
        form, texts = template_of(self.words, None), []
        for turn in chat_history:
            content = form.message_prefix + turn["content"].strip()
            texts.append({"system": form.system.format(content),
                          "user": form.user + content + form.answer,
                          "assistant": content + form.end + form.between_turns}[turn["role"]])
        if turn["role"] == "assistant":
            texts[-1] = content
        return "".join(texts)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        """(log-probability of a continuation, whether it is the greedy one) for each request.

        requests: (texts, ids before, ids of the continuation). Each is a pass of its own: prompts
        with worked examples are so long that a batch would gain little.
        """
        results, row, model, workflow = [], None, self.chat.model, self.chat.workflow
        for _, before, after in requests:
            ids = torch.tensor((before + after)[-self.context - 1 :], device=model.llama.device)
            if row is None or not torch.equal(ids[:-1], row):  # choices of one letter: read it once
                row = ids[:-1]
                x = model(row[None], workflow)  # (1, T, D)
            n = len(after)
            log_probs = model.logits(x[0, -n:], workflow).float().log_softmax(-1)  # (n, V)
            total = log_probs.gather(-1, ids[-n:, None]).sum().item()
            results.append((total, torch.equal(log_probs.argmax(-1), ids[-n:])))
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Not supported: raises ValueError."""
        raise ValueError("a task wants the likelihood of whole texts: use text-retention")


def settings(chat: Chat, args: argparse.Namespace) -> dict:
    """What `simple_evaluate` takes for this model."""
    return {"model": WorkflowLM(chat, args.batch), "apply_chat_template": True,
            "system_instruction": template_of(chat.tokenizer, None).default_system or None,
            "confirm_run_unsafe_code": args.allow_code_execution}
