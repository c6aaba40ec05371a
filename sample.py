"""Ask an IAA model: one question, or a chat that keeps its history. Answers appear as they come.

    python sample.py --image cat.jpg --prompt "What is this?"
    python sample.py --image cat.jpg --image dog.jpg            a chat; /help lists its commands

From picture to answer: `Chat.ask` renders the conversation as token ids, `generate` fills the KV
cache with the prompt and the picture, then decodes one token a pass, and `Stream` turns tokens into
text. The workflow may change between turns: an adaptor sees the picture, "text" does not. Each turn
reads the whole conversation anew, because a KV cache fits one workflow only.

Boxes in an answer are fractions of the last picture, padded to a square. `Answer.boxes` are in that
picture's own pixels. The drawing enlarges a small picture.

Letters: B batch, T tokens, S tokens so far (of images: the side), V vocabulary, N images, P tokens
of each.
"""

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from clip import open_image, preprocess
from common.device import CHOICES, DTYPES, choose_device, choose_dtype
from common.files import new_file, one_line, read_json
from data import GROUNDING_PROMPT, Box, text_to_boxes
from iaa import IAA, TEXT, Index, load_iaa
from llama import attention_mask
from tokenization.templates import IMAGE, TAG, render
from tokenization.tokenizer import Stream, Tokenizer

DRAWN_PX = 448  # a smaller picture is enlarged, so that lines do not cover it
HELP = """/image PATH      show a picture with the next question: at its <image>, or before it
/workflow NAME   change the workflow, keep the history
/reset           forget the history and its pictures
/quit            leave (as Ctrl-D does; Ctrl-C stops an answer)
/help            this list"""


def sample_token(
    logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]
) -> Tensor:
    """One token a row: logits (B, V) fp32 -> (B,). Temperature 0 takes the most likely one.

    Raises ValueError where logits are not finite: the weights or the dtype are at fault.
    """
    # logits * 0 is NaN where a logit is inf or NaN. isfinite().all() takes ten times as long.
    if (logits * 0).sum() != 0:
        raise ValueError("the model's logits are not finite: its weights are broken, or they "
                         "overflow in this --dtype")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.cpu()  # generators are the CPU's: a seed draws the same on every device
    sharpened = logits / max(temperature, 1e-30)  # 1e-30: as good as greedy, without overflow
    probs, order = sharpened.softmax(-1).sort(-1, descending=True)
    probs[probs.cumsum(-1) - probs > top_p] = 0  # the most likely token always stays
    drawn = [torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)]
    return order.gather(-1, torch.stack(drawn))[:, 0]


@torch.inference_mode()
def generate(
    model: IAA,
    prompts: list[list[int]],  # token ids, each image as P placeholders; lengths may differ
    images: Tensor | None = None,  # (N, 3, S, S), in the order of their placeholders
    workflow: str = TEXT,
    max_tokens: int = 128,  # new ones, at most
    stop: tuple[int, ...] = (),  # ids that end an answer; not returned
    temperature: float = 0.0,  # 0 = greedy
    top_p: float = 1.0,
    seed: int = 0,  # row r draws from its own stream, seeded with seed + r
    on_token: Callable[[int, int], None] = lambda row, token: None,  # called as tokens come
) -> list[list[int]]:
    """The new tokens of each prompt, as if it were alone in the batch.

    Raises ValueError for an empty prompt, a length beyond the context, or images that do not fit.
    """
    if not prompts or not all(prompts):
        raise ValueError("a prompt is empty, or there is none")
    longest, device = max(map(len, prompts)), model.llama.device
    context = model.llama.config.context
    if longest + max_tokens > context:
        raise ValueError(f"a prompt of {longest} tokens + {max_tokens} new ones exceed "
                         f"the context of {context}")
    cache = model.new_cache(len(prompts), longest + max_tokens, workflow)
    pad = int(model.image_token == 0)  # any id but the placeholder's
    # Padding is on the left, so that all prompts end in the same column.
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    starts = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)  # (B, 1)
    columns = torch.arange(longest + max_tokens, device=device)
    segments = -(columns < starts).long() if starts.any() else None  # (B, S), -1: a pad
    # One generator per row: what a row draws must not depend on its neighbours.
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    answers, running = [[] for _ in prompts], set(range(len(prompts)))
    tokens = torch.tensor(rows, device=device)  # (B, T): the prompts, then one token a pass
    for _ in range(max_tokens):
        end = cache.length + tokens.shape[1]
        positions = (columns[cache.length : end] - starts).clamp(min=0)  # (B, T), pads at 0
        seen = None if segments is None else segments[:, :end]
        mask = attention_mask(tokens.shape[1], cache.length, seen, device)  # hides pads
        x = model(tokens, workflow, images, positions, mask, cache)  # (B, T, D)
        images = None  # the images' keys and values are cached now
        logits = model.logits(x[:, -1], workflow).float()  # (B, V), of the last position only
        chosen = sample_token(logits, temperature, top_p, generators)  # (B,)
        for row in sorted(running):  # a copy: rows that end leave the set within the loop
            token = int(chosen[row])
            if token in stop:
                running.discard(row)
            else:
                answers[row].append(token)
                on_token(row, token)
        if not running:
            break
        tokens = chosen[:, None].to(device)  # also of ended rows: a batch keeps its shape
    return answers


@dataclass(frozen=True)
class Answer:
    """One answer and its speed; `--json` prints these fields."""

    workflow: str
    prompt: str
    answer: str
    boxes: list[Box]  # named in the answer, in pixels, cut at the picture's edges
    tokens: int
    seconds_to_first_token: float
    tokens_per_s: float | None  # from the first token on; None where no second one came


@dataclass
class Chat:
    """A conversation with a model: its history, its pictures and its workflow may change.

    `turns` and `images` are as in a row of data.py: a TAG stands in a question for each picture, in
    their order. Pictures that no turn has yet belong to the next question.
    """

    model: IAA
    tokenizer: Tokenizer
    max_tokens: int = 512  # of an answer; fewer where the context ends
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chosen: str | None = None  # workflow; None: by the pictures
    images: list[Image.Image] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)  # ("user", text), ...

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: str = "auto",
        device: str | None = None,
        quantize: str | None = None,  # "int8"
        workflows: list[str] | None = None,  # whose adaptors are loaded; None: all
        **settings,  # of the chat
    ) -> "Chat":
        """Open the model that train.py left in `folder`. Raises ValueError, FileNotFoundError."""
        from speed.packing import pack  # here: the file's top imports no private operators

        if not Path(folder, "iaa.json").is_file():  # a newcomer's first mistake
            raise FileNotFoundError(f"{folder}: no model there (no iaa.json): bash run.sh demo "
                                    "makes one, or see README")
        place = choose_device(device)
        name, why = choose_dtype(dtype, place)
        print(f"computing in {name} on {place.type}: {why}", file=sys.stderr)
        model, tokenizer = load_iaa(folder, DTYPES[name], place, workflows)
        pack(model, quantize == "int8")  # not int8: another layout for the CPU
        metas = [read_json(Path(folder, path, "config.json"))
                 for name, path in Index.read(folder).adaptors.items() if name in model.adaptors]
        if not quantize and any(m.get("settings", {}).get("frozen_dtype") for m in metas):
            print("an adaptor was trained on the LLM in int8: --quantize int8 loads it so",
                  file=sys.stderr)
        return cls(model, Tokenizer.load(tokenizer), **settings)

    @property
    def workflow(self) -> str:
        """The next answer's workflow: the chosen one, else "mm" with a picture, "text" without."""
        return self.chosen or ("mm" if self.images else TEXT)

    def question(self, text: str) -> tuple[str, str]:
        """The turn ("user", text) with a TAG for each picture that no turn has yet.

        Without a TAG in `text`, the tags are put in front. Raises ValueError where `text` has tags,
        but not one for each new picture, or has any for the workflow "text".
        """
        asked = sum(said.count(TAG) for role, said in self.turns if role == "user")
        new, tags = len(self.images) - asked, text.count(TAG)
        shown = 0 if self.workflow == TEXT else new  # the frozen LLM cannot see
        if tags not in (0, shown):
            raise ValueError(f"{tags} times {TAG} in a question about {shown} new pictures: leave "
                             "it out. To show a picture: --image, or /image in a chat")
        return "user", text if tags else IMAGE * new + text

    def prompt(self, text: str) -> tuple[list[int], Tensor | None]:
        """The conversation with `text` as its last question: its ids, and its pictures' pixels.

        The template is the one that the adaptor was trained with. Pixels are (N, 3, S, S), None
        without pictures and for the workflow "text". ValueError as `question`.
        """
        adaptor, clip = self.model.adaptor(self.workflow), self.model.clip.config
        form = {"template": None, "system": None} if adaptor is None else adaptor.prompt
        images = [] if adaptor is None else self.images
        pixels = [preprocess(image, clip).to(self.model.llama.device) for image in images]
        ids, _ = render(self.tokenizer, [*self.turns, self.question(text)], form["template"],
                        form["system"], clip.patches if images else 0)
        return ids, torch.stack(pixels) if pixels else None

    def ask(self, text: str, on_text: Callable[[str], None] = lambda piece: None) -> Answer:
        """Answer `text`, piece by piece to `on_text`.

        Question and answer join the history once a token has come.

        Raises ValueError for an unknown workflow, or a prompt that leaves no room in the context.
        """
        began, times = time.perf_counter(), []
        (ids, pixels), question = self.prompt(text), self.question(text)
        context = self.model.llama.config.context
        new = min(self.max_tokens, max(1, context - len(ids)))  # at least 1: `generate` then raises
        stream = Stream(self.tokenizer, on_text)

        def on_token(row: int, token: int) -> None:
            times.append(time.perf_counter())
            stream.add(token)

        seed = self.seed + len(self.turns)  # else a question asked twice draws the same answer
        try:
            generate(self.model, [ids], pixels, self.workflow, new, self.tokenizer.stop_ids,
                     self.temperature, self.top_p, seed, on_token)
        finally:  # also after Ctrl-C in the middle of an answer
            if times:
                # The answer may be incomplete. A new list: copies of this chat share the old one.
                self.turns = [*self.turns, question, ("assistant", stream.shown)]
        boxes = [] if pixels is None else boxes_on(self.images[-1], stream.shown)
        speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
        first = (times or [time.perf_counter()])[0] - began
        return Answer(self.workflow, text, stream.shown, boxes, len(times), first, speed)


def boxes_on(image: Image.Image, answer: str) -> list[Box]:
    """The boxes of an answer in pixels, cut at the picture's edges. Those outside are dropped."""
    w, h = image.size  # an answer may reach into the border of the square, where nothing is
    boxes = [(max(x1, 0.0), max(y1, 0.0), min(x2, w), min(y2, h))
             for x1, y1, x2, y2 in text_to_boxes(answer, w, h)]
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]


def draw_boxes(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """The picture with its boxes (pixels); a small picture is enlarged."""
    scale = max(1, -(-DRAWN_PX // max(image.size)))
    picture = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    pen, line = ImageDraw.Draw(picture), max(3, max(picture.size) // 150)
    for box in boxes:
        x1, y1, x2, y2 = (round(v * scale) for v in box)
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))  # Pillow draws the last pixel too
        pen.rectangle(corners, outline="red", width=line)
    return picture


def answer_aloud(chat: Chat, text: str, boxes: Path | None, as_json: bool) -> None:
    """Ask, print the answer as it comes (or JSON at its end), then write its boxes if wanted."""
    # A piece has no line end: without flush the terminal would hold it back.
    answer = chat.ask(text, lambda piece: as_json or print(piece, end="", flush=True))
    fields = {key: value for key, value in asdict(answer).items() if key != "boxes" or value}
    print(json.dumps(fields, ensure_ascii=False) if as_json else "", flush=True)
    if boxes and answer.boxes:
        with new_file(boxes) as new:  # a failed write keeps the old file
            draw_boxes(chat.images[-1], answer.boxes).save(new)
    elif boxes:
        print(f"no box in the answer: {boxes} not written", file=sys.stderr)


def command(chat: Chat, line: str) -> str:
    """Carry out a chat command other than /quit; return what to say. Raises ValueError, OSError."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/image" and argument:
        path = os.path.expanduser(argument)  # no shell has expanded "~"
        if not os.path.exists(path):  # dragged into a terminal, it is quoted as for a shell
            with contextlib.suppress(ValueError):  # an unbalanced quote
                path = os.path.expanduser(" ".join(shlex.split(argument)))
        image = open_image(path)
        chat.images.append(image)
        return f"{argument}: {image.width} x {image.height} pixels; workflow {chat.workflow}"
    if name == "/workflow" and argument:
        chat.model.adaptor(argument)  # raises for an unknown name, before it is chosen
        chat.chosen = argument
        return f"workflow {argument}"
    if name == "/reset":
        chat.turns, chat.images = [], []
        return "history and pictures forgotten"
    return HELP if line == "/help" else f"unknown: {line}\n{HELP}"


def converse(chat: Chat, boxes: Path | None, as_json: bool) -> None:
    """Read questions and commands until /quit, the end of input, or Ctrl-C at the prompt."""
    with contextlib.suppress(AttributeError, ImportError):
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 does not end the chat
        import readline  # noqa: F401  (gives `input` its arrow keys; not on every system)
    said = sys.stderr if as_json else sys.stdout  # with JSON, nothing else is on stdout
    print("/help lists the commands", file=said)
    while True:
        try:
            line = input("" if as_json else f"{chat.workflow}> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print(file=said)
        if line == "/quit":
            return None
        try:
            if line.startswith("/"):
                print(command(chat, line), file=said)
            elif line:
                answer_aloud(chat, line, boxes, as_json)
        except KeyboardInterrupt:
            print(" [stopped]", file=said)
        except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            print(error, file=sys.stderr)  # a mistake does not end the chat


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. ValueError for a number out of range, before anything is loaded."""
    example = GROUNDING_PROMPT.format("the red car")
    parser = argparse.ArgumentParser(  # no abbreviations: a later option may make one ambiguous
        description="Ask an IAA model about a picture; without --prompt, chat.", allow_abbrev=False,
        epilog=f'Grounding takes a whole sentence: --prompt "{example}"')
    add = parser.add_argument
    add("--model", default="runs/demo", help="folder of a run of train.py [%(default)s]")
    add("--image", action="append", default=[], help="picture to ask about; may be repeated")
    add("--prompt", help="question; left out: a chat")
    add("--workflow", help="text, or an adaptor's name [mm with a picture, else text]")
    add("--max-tokens", type=int, default=512, help="of an answer [%(default)s]")
    add("--temperature", type=float, default=0.0, help="0 = the likeliest token [%(default)s]")
    add("--top-p", type=float, default=1.0, help="share of probability to draw from [%(default)s]")
    add("--seed", type=int, default=0, help="of the draw [%(default)s]")
    add("--boxes", type=Path, metavar="OUT.png", help="the picture with the boxes of the answer")
    add("--json", action="store_true", help="one JSON object in place of the text; boxes in pixels")
    add("--dtype", default="auto", help=f"compute in one of {', '.join(CHOICES)} [%(default)s]")
    add("--device", help="cuda, mps, cpu [the first that there is]")
    add("--quantize", choices=["int8"], help="weights of LLM and adaptors, 1 byte each")
    args = parser.parse_args(argv)
    if not (args.max_tokens > 0 and 0 <= args.temperature < 1e6 and 0 < args.top_p <= 1
            and 0 <= args.seed < 2**62):  # also refuses NaN
        raise ValueError("--max-tokens: 1 or more; --temperature: 0 or more; "
                         "--top-p: above 0, at most 1; --seed: 0 or more, below 2**62")
    return args


@one_line("sample.py")
def main(argv: list[str] | None = None) -> None:
    """Command line; what a user can cause ends in one line on stderr and exit code 1."""
    args = arguments(argv)
    images = [open_image(path) for path in args.image]  # before the slow model load
    if args.boxes and args.prompt and not images:
        raise ValueError("--boxes needs --image, the picture to draw on")
    only = args.workflow or ("mm" if images else TEXT)  # one question needs one adaptor
    chat = Chat.load(args.model, args.dtype, args.device, args.quantize,
                     None if args.prompt is None else [only], max_tokens=args.max_tokens,
                     temperature=args.temperature, top_p=args.top_p, seed=args.seed,
                     chosen=args.workflow, images=images)
    chat.model.adaptor(chat.workflow)  # raises now where there is none of that name
    if args.prompt is None:
        converse(chat, args.boxes, args.json)
    else:
        answer_aloud(chat, args.prompt, args.boxes, args.json)


if __name__ == "__main__":
    main()
