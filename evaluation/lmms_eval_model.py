"""Benchmarks with pictures through lmms-eval, whose model this file supplies.

MMBench, MMMU and a hundred more: lmms-eval (requirements/lmms-eval.txt) has their prompts and
scorers, and downloads their data.
"""

import argparse
from dataclasses import replace

import torch
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate  # noqa: F401  (for __main__.py)
from lmms_eval.tasks import TaskManager  # noqa: F401
from PIL import Image

from clip import to_rgb
from data import TAG
from evaluation.answers import GreedyModel, Prompt, Record
from iaa import TEXT
from sample import Chat


class PictureLM(GreedyModel, lmms):
    """A model as lmms-eval calls it: answers to questions about pictures.

    A request without a picture is a text-only question.
    """

    is_simple = True  # a request is a text and its pictures, not a list of messages
    device = torch.device("cpu")  # of the counts that lmms-eval sends between ranks, over gloo

    def generate_until(self, requests: list) -> list[str]:
        """As of both harnesses, without outer white space."""
        return [answer.strip() for answer in super().generate_until(requests)]

    def workflow_of(self, request) -> str:
        """The chat's workflow, or "text" without a picture."""
        return self.chat.workflow if self.pictures(request) else TEXT

    def pictures(self, request) -> list[Image.Image]:
        """The pictures of a request, in order."""
        _, _, doc_to_visual, number, task, split = request.args
        pictures = doc_to_visual(self.task_dict[task][split][number]) or ()
        if other := [what for what in pictures if not isinstance(what, Image.Image)]:
            raise ValueError(f"only pictures are supported, no video or sound: {other[0]}")
        return [to_rgb(picture) for picture in pictures]

    def prompt(self, chat: Chat, question: Record) -> Prompt:
        """The question with its pictures: ahead of it, unless it has as many tags."""
        pictures, text = self.pictures(question["request"]), question["prompt"]
        if question["workflow"] == TEXT or text.count(TAG) != len(pictures):  # MMMU may repeat tags
            text = text.replace(TAG, "")
        return replace(chat, chosen=question["workflow"], images=pictures).prompt(text)

    def loglikelihood(self, requests: list) -> list:
        """Not supported, nor are several rounds: raises ValueError."""
        raise ValueError("only tasks with one written answer a question are supported")

    generate_until_multi_round = loglikelihood


def settings(chat: Chat, args: argparse.Namespace) -> dict:
    """What `simple_evaluate` takes for this model."""
    # Files for a benchmark's server go to `output_path`; lmms-eval then reads the other too.
    files = argparse.Namespace(output_path=str(args.model / "eval/lmms"), process_with_media=True)
    return {"model": PictureLM(chat, args.batch), "distributed_executor_backend": "torchrun",
            "cli_args": files}
