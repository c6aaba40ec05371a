"""Benchmarks with pictures through lmms-eval, whose model this file supplies.

MMBench, MMMU and a hundred more: lmms-eval has their data, prompts and scorers. Its packages
(requirements/lmms-eval.txt) need an environment of their own. It downloads data sets from a model
hub. Where none is reachable, task files of one's own (`--include`) can name local files.
"""

from pathlib import Path

import torch
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image

from evaluation.answers import Record, Table, answer_batch
from iaa import IAA, TEXT
from tokenization.tokenizer import Tokenizer

WORKFLOW = "mm"  # of questions with a picture
MAX_TOKENS = 256  # of an answer, where a task sets no limit


class PictureLM(lmms):
    """A model as lmms-eval calls it: answers to questions about pictures."""

    is_simple = True  # a request is a text and its pictures, not a list of messages
    device = torch.device("cpu")  # of the counts that lmms-eval sends between ranks, over gloo

    def __init__(self, model: IAA, tokenizer: Tokenizer, batch: int):
        super().__init__()
        self.model, self.tokenizer, self.batch = model, tokenizer, batch

    def generate_until(self, requests: list) -> list[str]:
        """Greedy answers, cut ahead of the first of their stop texts. A request without a picture
        is a text-only question; of several pictures the model sees the first."""
        groups: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            text, settings, _, _, _, _ = request.args
            if settings.get("do_sample") and settings.get("temperature", 1) != 0:
                raise ValueError("a task wants sampling: only greedy answers are supported")
            workflow = WORKFLOW if self.picture(request) else TEXT
            groups.setdefault((workflow, settings.get("max_new_tokens", MAX_TOKENS)), []).append(
                number)
        answers = [""] * len(requests)
        for (workflow, max_tokens), numbers in groups.items():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))  # like lengths together
            for first in range(0, len(numbers), self.batch):
                some = numbers[first : first + self.batch]
                asked = [(requests[number].args[0], self.picture(requests[number]))
                         for number in some]
                found = answer_batch(self.model, self.tokenizer, asked, workflow, max_tokens)
                for number, answer in zip(some, found, strict=True):
                    answers[number] = cut(answer, requests[number].args[1].get("until") or ())
        return answers

    def picture(self, request) -> Image.Image | None:
        """The first picture of a request, None where it has none."""
        _, _, doc_to_visual, number, task, split = request.args
        pictures = doc_to_visual(self.task_dict[task][split][number]) or ()
        found = (picture for picture in pictures if isinstance(picture, Image.Image))
        return next((picture.convert("RGB") for picture in found), None)

    def loglikelihood(self, requests: list) -> list:
        """Not supported: raises ValueError."""
        raise ValueError("a task compares likelihoods: only tasks with written answers are "
                         "supported")

    def generate_until_multi_round(self, requests: list) -> list:
        """Not supported: raises ValueError."""
        raise ValueError("a task asks in several rounds: only single questions are supported")


def cut(answer: str, until: str | list[str]) -> str:
    """The answer ahead of the first stop text in it."""
    for stop in [until] if isinstance(until, str) else until:
        answer = answer.split(stop)[0] if stop else answer
    return answer.strip()


def evaluate(
    model: IAA,
    tokenizer: Tokenizer,
    name: str,
    include: Path | None = None,  # a folder of task files, in place of those of lmms-eval
    limit: int | None = None,
    batch: int = 32,
) -> tuple[Table, list[Record]] | None:
    """The figures of a task or group, a row a task, and all samples; None on ranks but the first.

    Raises ValueError for an unknown name.
    """
    manager = TaskManager(include_path=None if include is None else str(include),
                          include_defaults=include is None)
    if name not in manager.all_tasks:
        raise ValueError(f"no task or group {name!r} in {include or 'lmms-eval'}")
    found = simple_evaluate(
        model=PictureLM(model, tokenizer, batch), tasks=[name], task_manager=manager, limit=limit,
        bootstrap_iters=0, distributed_executor_backend="torchrun")
    if found is None:
        return None
    table = {}
    for task, figures in found["results"].items():
        numbers = {metric.split(",")[0]: float(value) for metric, value in figures.items()
                   if "," in metric and "stderr" not in metric and isinstance(value, int | float)}
        if numbers:
            table[task] = numbers
    return table, [sample for samples in found["samples"].values() for sample in samples]
