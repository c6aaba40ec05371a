"""The text benchmarks of Table 3 through lm-eval, whose model this file supplies.

Its packages are in requirements/lm-eval.txt. lm-eval downloads data sets from a model hub. Where
none is reachable, task files of one's own (`--include`) can name local files.

Letters: B batch, T tokens, D width, V vocabulary.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from evaluation.answers import Record, Table
from iaa import IAA
from sample import generate
from tokenization.templates import template_of
from tokenization.tokenizer import Tokenizer

TASKS = {  # the paper's name -> lm-eval's task and its number of examples
    "mmlu": ("mmlu", 5),
    "c-eval": ("ceval-valid", 5),
    "bbh": ("bbh", None),  # three worked examples are part of the task
    "humaneval": ("humaneval_instruct", 0),
    "math": ("minerva_math", 4),
}
BATCH_TOKENS = 8192
MAX_TOKENS = 256  # of an answer, where a task sets no limit


class WorkflowLM(TemplateLM):
    """A workflow of an IAA model, without pictures, as lm-eval calls a model."""

    def __init__(self, model: IAA, tokenizer: Tokenizer, workflow: str):
        super().__init__()
        self.model, self.workflow, self.words = model, workflow, tokenizer
        self.specials = re.compile("(" + "|".join(map(re.escape, tokenizer.special_tokens)) + ")")

    # -------- text

    @property
    def eot_token_id(self) -> int:
        """What stands ahead of a text that has nothing ahead of it."""
        return self.words.pad_id if self.words.bos_id is None else self.words.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The template's name, for lm-eval's records."""
        return f"iaa-{self.words.template}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Ids; names of special tokens are these tokens. Begins with the LLM's start token."""
        start, special = self.words.bos_id, self.words.special_tokens
        ids = []
        for place, piece in enumerate(self.specials.split(string)):  # names are the odd pieces
            ids += [special[piece]] if place % 2 else self.words.encode(piece)
        if add_special_tokens is not False and start is not None and ids[:1] != [start]:
            ids = [start, *ids]
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text; the last answer is left open if one has begun."""
        form, history = template_of(self.words, None), list(chat_history)
        names = {number: name for name, number in self.words.special_tokens.items()}
        text = names.get(self.words.bos_id, "")
        if history and history[0]["role"] == "system":
            text += form.system.format(form.message_prefix + history.pop(0)["content"].strip())
        for place, turn in enumerate(history):
            content = form.message_prefix + turn["content"].strip()
            if turn["role"] == "user":
                text += (form.between_turns if place else "") + form.user + content + form.answer
            elif place + 1 == len(history) and not add_generation_prompt:
                text += content
            else:
                text += content + form.end
        return text

    # -------- likelihoods

    @torch.inference_mode()
    def log_probs(self, rows: list[tuple[list[int], int]]) -> Iterator[tuple[int, Tensor]]:
        """(index, log-probabilities (n, V)) of the last n next tokens of each (ids, n)."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        while order:
            longest = len(rows[order[-1]][0])
            batch = [order.pop() for _ in order[-max(1, BATCH_TOKENS // longest) :]]
            padded = [rows[i][0] + [0] * (longest - len(rows[i][0])) for i in batch]
            tokens = torch.tensor(padded, device=self.model.llama.device)  # (B, T), padded right
            x = self.model(tokens, self.workflow)  # (B, T, D)
            for row, i in enumerate(batch):
                ids, wanted = rows[i]
                logits = self.model.logits(x[row, len(ids) - wanted : len(ids)], self.workflow)
                yield i, logits.float().log_softmax(-1)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        """Choices of one letter behind the same question are one row: it is read once."""
        context, by_row = self.model.llama.config.context, {}
        for number, (_, before, after) in enumerate(requests):
            ids = (before + after)[-context - 1 :]
            by_row.setdefault((tuple(ids[:-1]), len(after)), []).append((number, ids[-len(after):]))
        rows, results = [(list(ids), n) for ids, n in by_row], [None] * len(requests)
        for i, log_probs in self.log_probs(rows):
            for number, after in by_row[tuple(rows[i][0]), rows[i][1]]:
                wanted = torch.tensor(after, device=log_probs.device)
                total = log_probs.gather(-1, wanted[:, None]).sum().item()
                results[number] = total, bool((log_probs.argmax(-1) == wanted).all())
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Not supported: raises ValueError."""
        raise ValueError("a task wants the likelihood of whole texts: use text-retention")

    # -------- answers

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut ahead of the first of their stop texts."""
        groups, context = {}, self.model.llama.config.context
        for number, request in enumerate(requests):
            text, settings = request.args
            if settings.get("do_sample") and settings.get("temperature", 1) != 0:
                raise ValueError("a task wants sampling: only greedy answers are supported")
            new, until = settings.get("max_gen_toks", MAX_TOKENS), settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            key = (new, tuple(stop for stop in until if stop))  # "" would be in every text
            ids = self.tok_encode(text)[-(context - new) :]
            groups.setdefault(key, []).append((len(ids), number, ids))
        results = [""] * len(requests)
        for (new, until), group in groups.items():
            group.sort()
            while group:
                fitting = max(1, BATCH_TOKENS // (group[-1][0] + new))
                batch = [group.pop() for _ in group[-fitting:]]
                texts = self.answers([ids for _, _, ids in batch], new, until)
                for (_, number, _), text in zip(batch, texts, strict=True):
                    results[number] = text
        return results

    def answers(self, prompts: list[list[int]], new: int, until: tuple[str, ...]) -> list[str]:
        """One batch; an answer ends as soon as it holds a stop text."""
        said = [[] for _ in prompts]

        def ended(row: int, token: int) -> bool:
            said[row].append(token)
            return any(stop in self.words.decode(said[row]) for stop in until)

        generate(self.model, prompts, None, self.workflow, new, self.words.stop_ids, on_token=ended)
        texts = [self.words.decode(ids) for ids in said]
        for stop in until:
            texts = [text.split(stop)[0] for text in texts]
        return texts


def open_tasks(names: list[str], include: Path | None, run_code: bool) -> TaskManager:
    """lm-eval's tasks, or in their place those of the folder `include`, with `names` checked.

    names: keys of TASKS, or tasks and groups. ValueError for any other, or for one that runs code
    where that is not allowed.
    """
    tasks = [TASKS.get(name, (name, None))[0] for name in names]
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    elif any(task.startswith("humaneval") for task in tasks):
        raise ValueError("humaneval runs what the model writes: allow it, --allow-code-execution")
    manager = TaskManager(include_path=None if include is None else str(include),
                          include_defaults=include is None)
    for task in tasks:
        if task not in manager.all_tasks or task in manager.all_tags:
            raise ValueError(f"no task or group {task!r} in {include or 'lm-eval'}")
    return manager


def evaluate(
    model: IAA,
    tokenizer: Tokenizer,
    workflow: str,
    name: str,  # as for `open_tasks`
    manager: TaskManager,
    limit: int | None = None,
    run_code: bool = False,
) -> tuple[Table, list[Record]]:
    """A row with lm-eval's first figure in percent, and all samples.

    Raises ValueError for a group that lm-eval has no figure for as a whole.
    """
    task, shots = TASKS.get(name, (name, None))
    found = simple_evaluate(
        model=WorkflowLM(model, tokenizer, workflow), tasks=[task], num_fewshot=shots,
        limit=limit, task_manager=manager, apply_chat_template=True,
        system_instruction=template_of(tokenizer, None).default_system or None,
        confirm_run_unsafe_code=run_code, bootstrap_iters=0)
    figures = found.get("groups", {}).get(task) or found["results"].get(task, {})
    metrics = [key for key, value in figures.items()
               if "," in key and isinstance(value, float) and "stderr" not in key]
    if not metrics:
        raise ValueError(f"lm-eval has no figure for {name} as a whole: name tasks of it")
    row = {"metric": metrics[0].split(",")[0], "score": 100 * figures[metrics[0]],
           "asked": sum(part["effective"] for part in found["n-samples"].values())}
    return {name: row}, [sample for samples in found["samples"].values() for sample in samples]
