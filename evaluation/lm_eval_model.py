"""The text benchmarks of Table 3 through lm-eval, whose model this file supplies.

lm-eval (requirements/lm-eval.txt) has the tasks and scorers, and downloads the data sets.

Letters: T tokens, D width, V vocabulary, n tokens of a continuation.
"""

import argparse
import re

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from evaluation.answers import Prompt, Question, ask, task_question
from sample import Chat
from tokenization.templates import template_of

TASKS = {  # the paper's name -> lm-eval's task and its number of examples
    "mmlu": ("mmlu", 5),
    "c-eval": ("ceval-valid", 5),
    "bbh": ("bbh", None),  # three worked examples are part of the task
    "humaneval": ("humaneval_instruct", 0),
    "math": ("minerva_math", 4),
}


class WorkflowLM(TemplateLM):
    """The chat's workflow, without pictures, as lm-eval calls a model."""

    tokenizer_name = "iaa"  # for lm-eval's records

    def __init__(self, chat: Chat, batch: int):
        super().__init__()
        self.chat, self.batch = chat, batch
        self.model, self.words, self.workflow = chat.model, chat.tokenizer, chat.workflow
        self.context = chat.model.llama.config.context

    @property
    def eot_token_id(self) -> int:
        """What stands ahead of a text that has nothing ahead of it."""
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

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text; where its last turn is an answer, the answer stays open."""
        form, text = template_of(self.words, None), ""
        for turn in chat_history:
            content = form.message_prefix + turn["content"].strip()
            if turn["role"] == "system":
                text += form.system.format(content)
            elif turn["role"] == "user":
                text += form.user + content + form.answer
            elif turn is chat_history[-1]:
                text += content
            else:
                text += content + form.end + form.between_turns
        return text

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        """(log-probability of a continuation, whether it is the greedy one) for each request.

        requests: (texts, ids before, ids of the continuation). Each is a pass of its own: prompts
        with worked examples are so long that a batch would gain little.
        """
        results, row, device = [], None, self.model.llama.device
        for _, before, after in requests:
            ids = (before + after)[-self.context - 1 :]
            if ids[:-1] != row:  # choices of one letter follow the same question: read it once
                row = ids[:-1]
                x = self.model(torch.tensor([row], device=device), self.workflow)  # (1, T, D)
            n = len(after)
            logits = self.model.logits(x[0, -n:], self.workflow)  # (n, V)
            log_probs = logits.float().log_softmax(-1)
            wanted = torch.tensor(ids[-n:], device=device)
            total = log_probs.gather(-1, wanted[:, None]).sum().item()
            results.append((total, bool((log_probs.argmax(-1) == wanted).all())))
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Not supported: raises ValueError."""
        raise ValueError("a task wants the likelihood of whole texts: use text-retention")

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut ahead of the first of their stop texts."""

        def prompt(_: Chat, question: Question) -> Prompt:  # a long one keeps its end
            return self.tok_encode(question.text)[question.max_tokens - self.context :], None

        questions = [task_question(*request.args, self.workflow) for request in requests]
        return ask(self.chat, questions, self.batch, prompt)


def evaluate(chat: Chat, name: str, manager: TaskManager, args: argparse.Namespace) -> dict:
    """What lm-eval finds. name: a key of TASKS, or a task or group of lm-eval."""
    task, shots = TASKS.get(name, (name, None))
    return simple_evaluate(
        model=WorkflowLM(chat, args.batch), tasks=[task], num_fewshot=shots,
        limit=args.limit, task_manager=manager, apply_chat_template=True,
        system_instruction=template_of(chat.tokenizer, None).default_system or None,
        confirm_run_unsafe_code=args.allow_code_execution, bootstrap_iters=0)
