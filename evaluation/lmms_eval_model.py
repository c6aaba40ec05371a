"""Benchmarks with pictures through lmms-eval, whose model this file supplies.

MMBench, MMMU and a hundred more: lmms-eval (requirements/lmms-eval.txt) has their prompts and
scorers, and downloads their data.
"""

import argparse
from dataclasses import replace

import torch
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import Image

from clip import to_rgb
from data import TAG
from evaluation.answers import Prompt, Question, ask, task_question
from iaa import TEXT
from sample import Chat

TASKS = {}  # other names for tasks: there are none


class PictureLM(lmms):
    """A model as lmms-eval calls it: answers to questions about pictures."""

    is_simple = True  # a request is a text and its pictures, not a list of messages
    device = torch.device("cpu")  # of the counts that lmms-eval sends between ranks, over gloo

    def __init__(self, chat: Chat, batch: int):
        super().__init__()
        self.chat, self.batch = chat, batch

    def generate_until(self, requests: list) -> list[str]:
        """Greedy answers, cut ahead of the first of their stop texts. A request without a picture
        is a text-only question."""
        questions = [task_question(
            *request.args[:2], self.chat.workflow if self.pictures(request) else TEXT, request)
            for request in requests]
        answers = ask(self.chat, questions, self.batch, self.prompt)
        return [answer.strip() for answer in answers]

    def prompt(self, chat: Chat, question: Question) -> Prompt:
        """The question with its pictures: ahead of it, unless it has as many tags."""
        pictures, text = self.pictures(question.image), question.text
        if text.count(TAG) != len(pictures):  # MMMU may repeat a tag
            text = text.replace(TAG, "")
        return replace(chat, chosen=question.workflow, images=pictures).prompt(text)

    def pictures(self, request) -> list[Image.Image]:
        """The pictures of a request, in order."""
        _, _, doc_to_visual, number, task, split = request.args
        pictures = doc_to_visual(self.task_dict[task][split][number]) or ()
        return [to_rgb(picture) for picture in pictures if isinstance(picture, Image.Image)]

    def loglikelihood(self, requests: list) -> list:
        """Not supported, nor are several rounds: raises ValueError."""
        raise ValueError("only tasks with one written answer a question are supported")

    generate_until_multi_round = loglikelihood


def evaluate(chat: Chat, name: str, manager: TaskManager, args: argparse.Namespace) -> dict | None:
    """What lmms-eval finds for a task or group; None on ranks but the first."""
    return simple_evaluate(
        model=PictureLM(chat, args.batch), tasks=[name], task_manager=manager, limit=args.limit,
        bootstrap_iters=0, distributed_executor_backend="torchrun")
