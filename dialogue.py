"""A dialogue with a model: history, picture and workflow; adaptors come and go while it runs.

It may change workflow between turns: the picture's placeholder stands in the first user turn under
an adaptor and leaves it under "text", as in the official interleaved script. A turn reads only what
the one before has not read, or said, under the same workflow about the same picture.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tokenization.templates import render
from clip import preprocess
from data import Box, text_to_boxes
from generate import generate
from iaa import IAA, TEXT
from llama import KVCache
from speed.packing import pack
from storage import add_adaptor, load_iaa
from tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """One answer, and how fast it came; the fields are those of `--json`."""

    workflow: str
    prompt: str
    answer: str
    boxes: list[Box]  # that the answer names, in pixels, cut at the picture's edges
    tokens: int
    seconds_to_first_token: float
    tokens_per_s: float | None  # from the first token on; None where no second one came


class Stream:
    """Token ids in, text out: pieces that add up to the trimmed answer; no character is split."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]):
        self.decode, self.on_text = tokenizer.stream(), on_text
        self.text, self.shown = "", ""
        self.times: list[float] = []  # of each token

    def add(self, token: int) -> None:
        """Take a token, pass on what is settled: white space and half a character wait."""
        self.times.append(time.perf_counter())
        self.text += self.decode(token)
        new = self.text.strip()[len(self.shown) :]
        self.shown += new
        if new:
            self.on_text(new)


def workflow_of(chosen: str | None, image: Image.Image | None) -> str:
    """The workflow of an answer: the chosen one, else "mm" with a picture and "text" without."""
    return chosen or (TEXT if image is None else "mm")


@dataclass
class Memory:
    """The cache of the last turn, and whose it is."""

    workflow: str
    images: Tensor | None  # the very tensor that `Chat.features` returned
    cache: KVCache
    ids: list[int] = field(default_factory=list)  # of the cache's tokens, and maybe more behind


@dataclass
class Chat:
    """A dialogue with a model: its history, picture and workflow, and how answers are drawn."""

    model: IAA
    tokenizer: Tokenizer
    prompts: dict[str, dict]  # of each adaptor: {"template", "system"}
    base: dict[str, str]  # SHA-256 of the frozen models, for which an adaptor was trained
    int8: bool = False
    max_tokens: int = 512  # of an answer; fewer where the context ends
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chosen: str | None = None  # workflow, see `workflow_of`
    image: Image.Image | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)  # ("user", text), ...
    seen: tuple[bytes, Tensor] | None = None  # digest of the last picture, and its features
    memory: Memory | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        int8: bool = False,
        workflows: list[str] | None = None,  # whose adaptors are loaded; None: all
        **sampling,
    ) -> "Chat":
        """Open what train.py left in `folder`, on the GPU where there is one, packed for speed."""
        if not Path(folder, "iaa.json").is_file():
            raise FileNotFoundError(f"{folder}: no model there (no iaa.json); train one with "
                                    "python train.py --config configs/demo.toml, or see README")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, info = load_iaa(folder, dtype, device, workflows)
        pack(model, int8)
        tokenizer = Tokenizer.load(info["llm"])
        return cls(model, tokenizer, info["prompts"], info["base"], int8, **sampling)

    def load_adaptor(self, name: str, folder: str) -> None:
        """One more workflow while the chat runs. Raises ValueError, OSError."""
        dtype = self.model.llama.dtype
        self.prompts[name] = add_adaptor(self.model, name, folder, self.base, dtype)
        pack(self.model, self.int8)

    def drop_adaptor(self, name: str) -> None:
        """Forget a workflow. Raises ValueError where there is none of that name."""
        if self.model.adaptor(name) is None:
            raise ValueError(f"{name} is the frozen LLM: it stays")
        del self.model.adaptors[name], self.prompts[name]
        self.chosen = None if self.chosen == name else self.chosen
        self.memory = None  # another adaptor may get this name

    @property
    def workflow(self) -> str:
        """The workflow of the next answer."""
        return workflow_of(self.chosen, self.image)

    @torch.inference_mode()
    def features(self, image: Image.Image) -> Tensor:
        """What the vision tower makes of a picture, once while it stays: (1, P, D_vision)."""
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if self.seen is None or self.seen[0] != key:
            images = preprocess(image, self.model.clip.config)[None]  # (1, 3, S, S)
            self.seen = key, self.model.clip(images.to(self.model.llama.device))
        return self.seen[1]

    def recall(self, workflow: str, images: Tensor | None, ids: list[int]) -> Memory:
        """The last turn's memory, cut to what it shares with the prompt `ids`, or a new one.

        Left to be read: the last token, whose logits begin the answer; a picture as a whole.
        """
        last, shared = self.memory, 0
        if last is not None and last.workflow == workflow and last.images is images:
            most = min(last.cache.length, len(ids) - 1)
            while shared < most and last.ids[shared] == ids[shared]:
                shared += 1
        if not shared or self.model.image_token in ids[shared:]:
            last = self.memory = None  # its memory is free before as much is taken again
            last = self.memory = Memory(workflow, images, self.model.new_cache(1, 0, workflow))
            shared = 0
        last.cache.cut(shared)
        last.ids = list(ids)
        return last

    def ask(self, text: str, on_text: Callable[[str], None] = lambda piece: None) -> Answer:
        """Answer `text`, piece by piece to `on_text`; both join the history once a token is there.

        Raises ValueError for an unknown workflow, or a prompt that leaves no room in the context.
        """
        workflow, began = self.workflow, time.perf_counter()
        frozen = self.model.adaptor(workflow) is None
        form = {"template": None, "system": None} if frozen else self.prompts[workflow]
        image = None if frozen else self.image
        turns = [*self.turns, ("user", text)]
        clip = self.model.clip.config
        patches = clip.patches if image else 0
        ids, _ = render(self.tokenizer, turns, form["template"], form["system"], patches)
        room = self.model.llama.config.context - len(ids)
        if room < 1:
            raise ValueError(f"the prompt, with history and picture, takes {len(ids)} tokens: "
                             f"the context of {room + len(ids)} leaves no room for an answer")
        new, stream = min(room, self.max_tokens), Stream(self.tokenizer, on_text)
        images = self.features(image) if image else None
        memory = self.recall(workflow, images, ids)
        memory.cache.reserve(len(ids) + new, self.model.llama.config.context)

        def heard(row: int, token: int) -> None:
            memory.ids.append(token)
            stream.add(token)

        try:
            generate(self.model, [ids], None if memory.cache.length else images, workflow, new,
                     self.tokenizer.stop_ids, self.temperature, self.top_p,
                     self.seed + len(self.turns), heard, cache=memory.cache)
        finally:
            self.turns = [*turns, ("assistant", stream.shown)] if stream.times else self.turns
        times = stream.times or [time.perf_counter()]
        speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
        boxes = boxes_on(image, stream.shown) if image and clip.aspect == "pad" else []
        return Answer(workflow, text, stream.shown, boxes, len(stream.times), times[0] - began,
                      speed)


def boxes_on(image: Image.Image, answer: str) -> list[Box]:
    """An answer's boxes, in pixels, cut at the picture's edges; one wholly beside it is none."""
    edges = (*image.size, *image.size)
    boxes = [tuple(min(max(v, 0.0), edge) for v, edge in zip(box, edges, strict=True))
             for box in text_to_boxes(answer, *image.size)]
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]
