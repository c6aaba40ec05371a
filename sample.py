"""Ask an IAA model: one question, or a chat that keeps its history. Answers appear as they come.

    python sample.py --image cat.jpg --prompt "What is this?"
    python sample.py --image cat.jpg                            a chat; /help lists its commands

From picture to answer: `Chat.ask` renders the conversation as token ids, `generate` fills the KV
cache with the prompt and the picture, then decodes one token a pass, and `Stream` turns tokens into
text. The workflow may change between turns: an adaptor sees the picture, "text" does not.

Boxes in an answer are fractions of the picture padded to a square. `Answer.boxes` and the drawing
are in the picture's own pixels.

Letters: B batch, T tokens, S tokens so far, V vocabulary, N images, P image tokens.
"""

import argparse
import contextlib
import json
import os
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
from common.files import new_file, one_line
from data import GROUNDING_PROMPT, Box, text_to_boxes
from iaa import IAA, TEXT, load_iaa
from llama import KVCache, attention_mask
from tokenization.templates import render
from tokenization.tokenizer import Stream, Tokenizer

COLOURS = ("#ff2d2d", "#00b050", "#2d7dff", "#ff9900", "#c020d0")  # of boxes, in their order
DRAWN_PX = 448  # a picture whose longer side is less is enlarged before boxes are drawn on it
HELP = """/image PATH      look at another picture; what was said about the one before is forgotten
/workflow NAME   change the workflow, keep the history
/reset           forget the history, keep the picture
/quit            leave (as Ctrl-D does; Ctrl-C stops an answer)
/help            this list"""


# ---------------------------------------------------------------------------------- generation


def sample_token(
    logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]
) -> Tensor:
    """One token a row: logits (B, V) fp32 -> (B,). Temperature 0 takes the most likely one.

    Raises ValueError where logits are not finite: the weights or the dtype are at fault.
    """
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are broken, or they "
                         "overflow in this --dtype")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.cpu()  # generators are the CPU's: a seed draws the same on every device
    sharpened = logits / max(temperature, 1e-30)  # less would overflow fp32, and is as greedy
    probs, order = sharpened.softmax(-1).sort(-1, descending=True)
    probs[probs.cumsum(-1) - probs >= top_p] = 0  # the most likely token always stays
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
    on_token: Callable[[int, int], bool | None] | None = None,  # each (row, token); True: row ends
    cache: KVCache | None = None,  # with the beginning of the one prompt, and room for the rest
) -> list[list[int]]:
    """The new tokens of each prompt, as if it were alone in the batch.

    Shorter prompts are padded on the left. The padding is segment -1, which no other token sees.
    Raises ValueError for an empty prompt, a length beyond the context, or images that do not fit.
    """
    past = 0 if cache is None else cache.length
    unread = [prompt[past:] for prompt in prompts]
    if not all(unread) or not unread or (cache is not None and len(prompts) > 1):
        raise ValueError("one prompt or more with tokens; a cache belongs to a single prompt")
    longest, device = max(map(len, prompts)), model.llama.device
    context = model.llama.config.context
    if longest + max_tokens > context:
        raise ValueError(f"a prompt of {longest} tokens + {max_tokens} new ones exceed "
                         f"the context of {context}")
    if cache is None:
        cache = model.new_cache(len(prompts), longest + max_tokens, workflow)
    pad = int(model.image_token == 0)  # any token but the placeholder
    rows = [[pad] * (longest - past - len(ids)) + ids for ids in unread]
    starts = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)  # (B, 1)
    columns = torch.arange(longest + max_tokens, device=device)
    segments = -(columns < starts).long() if starts.any() else None  # (B, S)
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    answers, running = [[] for _ in prompts], set(range(len(prompts)))
    tokens = torch.tensor(rows, device=device)  # (B, T): the prompts, then one token a pass
    for _ in range(max_tokens):
        end = cache.length + tokens.shape[1]
        positions = (columns[cache.length : end] - starts).clamp(min=0)  # (B, T)
        seen = None if segments is None else segments[:, :end]
        mask = attention_mask(tokens.shape[1], cache.length, seen, device)
        x = model(tokens, workflow, images, positions, mask, cache)  # (B, T, D)
        images = None  # their keys and values are in the cache now
        logits = model.logits(x[:, -1], workflow).float()  # (B, V)
        chosen = sample_token(logits, temperature, top_p, generators)  # (B,)
        for row in sorted(running):
            token = int(chosen[row])
            ended = token in stop
            if not ended:
                answers[row].append(token)
                ended = on_token is not None and on_token(row, token)
            if ended:
                running.discard(row)
        if not running:
            break
        tokens = chosen[:, None].to(device)
    return answers


# ---------------------------------------------------------------------------------- chat


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
class Memory:
    """The KV cache of the last turn, and what it holds."""

    workflow: str
    image: Image.Image | None
    cache: KVCache
    ids: list[int]  # of the cache's tokens; the last ones may be unread


@dataclass
class Chat:
    """A conversation with a model: its history, its picture and its workflow may change."""

    model: IAA
    tokenizer: Tokenizer
    max_tokens: int = 512  # of an answer; fewer where the context ends
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chosen: str | None = None  # workflow; None: by the picture
    image: Image.Image | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)  # ("user", text), ...
    memory: Memory | None = None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        dtype: str = "auto",
        device: str | None = None,
        quantize: str | None = None,  # "int8"
        workflows: list[str] | None = None,  # whose adaptors are loaded; None: all
        **sampling,
    ) -> "Chat":
        """Open the model that train.py left in `folder`. Raises ValueError, FileNotFoundError."""
        from speed.packing import pack  # the weights in the processor's own layout, or as int8

        if not Path(folder, "iaa.json").is_file():
            raise FileNotFoundError(f"{folder}: no model there (no iaa.json); train one with "
                                    "python train.py --config configs/demo.toml, or see README")
        place = choose_device(device)
        name, why = choose_dtype(dtype, place)
        print(f"computing in {name} on {place.type}: {why}", file=sys.stderr)
        model, tokenizer = load_iaa(folder, DTYPES[name], place, workflows)
        pack(model, quantize == "int8")
        return cls(model, Tokenizer.load(tokenizer), **sampling)

    @property
    def workflow(self) -> str:
        """Of the next answer: the chosen one, else "mm" with a picture and "text" without."""
        return self.chosen or (TEXT if self.image is None else "mm")

    def prompt(self, text: str) -> tuple[list[int], Image.Image | None]:
        """The conversation and its new question as token ids, and the picture that it shows."""
        adaptor = self.model.adaptor(self.workflow)
        image = None if adaptor is None else self.image
        form = {"template": None, "system": None} if adaptor is None else adaptor.prompt
        patches = 0 if image is None else self.model.clip.config.patches
        turns = [*self.turns, ("user", text)]
        return render(self.tokenizer, turns, form["template"], form["system"], patches)[0], image

    def reuse_cache(self, ids: list[int], image: Image.Image | None) -> Memory:
        """The last turn's cache, cut to the beginning that it shares with `ids`, or a new one.

        At least the last token stays unread: its logits begin the answer. A picture is read as a
        whole or not at all.
        """
        last, shared = self.memory, 0
        if last is not None and last.workflow == self.workflow and last.image is image:
            most = min(last.cache.length, len(ids) - 1)
            while shared < most and last.ids[shared] == ids[shared]:
                shared += 1
        if not shared or self.model.image_token in ids[shared:]:
            last = self.memory = None  # frees the old cache before a new one is made
            cache, shared = self.model.new_cache(1, 0, self.workflow), 0
            last = self.memory = Memory(self.workflow, image, cache, [])
        last.cache.cut(shared)
        last.ids = list(ids)
        return last

    def ask(self, text: str, on_text: Callable[[str], None] = lambda piece: None) -> Answer:
        """Answer `text`, piece by piece to `on_text`. Both join the history once a token is there.

        Raises ValueError for an unknown workflow, or a prompt that leaves no room in the context.
        """
        workflow, began = self.workflow, time.perf_counter()
        ids, image = self.prompt(text)
        context = self.model.llama.config.context
        new, stream = min(context - len(ids), self.max_tokens), Stream(self.tokenizer, on_text)
        if new < 1:
            raise ValueError(f"the prompt, with history and picture, takes {len(ids)} tokens: "
                             f"the context of {context} leaves no room for an answer")
        memory = self.reuse_cache(ids, image)
        memory.cache.reserve(len(ids) + new, context)
        pixels = None
        if image is not None and memory.cache.length == 0:
            pixels = preprocess(image, self.model.clip.config)[None].to(self.model.llama.device)

        def on_token(row: int, token: int) -> None:
            memory.ids.append(token)
            stream.add(token)

        try:
            generate(self.model, [ids], pixels, workflow, new, self.tokenizer.stop_ids,
                     self.temperature, self.top_p, self.seed + len(self.turns), on_token,
                     memory.cache)
        finally:  # also after Ctrl-C in the middle of an answer
            if stream.times:
                self.turns = [*self.turns, ("user", text), ("assistant", stream.shown)]
        times, boxes = stream.times, boxes_on(image, stream.shown) if image else []
        speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
        first = (times or [time.perf_counter()])[0] - began
        return Answer(workflow, text, stream.shown, boxes, len(times), first, speed)


def boxes_on(image: Image.Image, answer: str) -> list[Box]:
    """The boxes of an answer in pixels, cut at the picture's edges, without those outside it."""
    w, h = image.size
    boxes = [(max(x1, 0.0), max(y1, 0.0), min(x2, w), min(y2, h))
             for x1, y1, x2, y2 in text_to_boxes(answer, w, h)]
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]


def draw_boxes(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """The picture with its boxes (pixels); a small picture is enlarged."""
    scale = max(1, -(-DRAWN_PX // max(image.size)))
    picture = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    pen, line = ImageDraw.Draw(picture), max(3, max(picture.size) // 150)
    for number, box in enumerate(boxes):
        x1, y1, x2, y2 = (round(v * scale) for v in box)
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))  # Pillow draws the last pixel too
        pen.rectangle(corners, outline=COLOURS[number % len(COLOURS)], width=line)
    return picture


# ---------------------------------------------------------------------------------- command line


def answer_aloud(chat: Chat, text: str, boxes: Path | None, as_json: bool = False) -> None:
    """Ask, print the answer as it comes (or JSON at its end), then write its boxes if wanted."""
    answer = chat.ask(text, lambda piece: as_json or print(piece, end="", flush=True))
    fields = {key: value for key, value in asdict(answer).items() if key != "boxes" or value}
    print(json.dumps(fields, ensure_ascii=False) if as_json else "", flush=True)
    if boxes and answer.boxes:
        with new_file(boxes) as new:
            draw_boxes(chat.image, answer.boxes).save(new)
    elif boxes:
        print(f"no box in the answer: {boxes} not written", file=sys.stderr)


def command(chat: Chat, line: str) -> str:
    """Carry out a chat command, but /quit, and return what to say. Raises ValueError, OSError."""
    name, _, argument = line.partition(" ")
    argument = argument.strip().strip("'\"")
    if name == "/image" and argument:
        image = open_image(os.path.expanduser(argument))
        chat.turns = [] if chat.image else chat.turns  # they were about another picture
        chat.image = image
        return f"{argument}: {image.width} x {image.height} pixels; workflow {chat.workflow}"
    if name == "/workflow" and argument:
        chat.model.adaptor(argument)  # raises for an unknown name
        chat.chosen = argument
        return f"workflow {argument}"
    if name == "/reset":
        chat.turns = []
        return "history forgotten"
    return HELP if line == "/help" else f"unknown: {line}\n{HELP}"


def converse(chat: Chat, boxes: Path | None) -> None:
    """Read questions and commands until /quit, the end of input, or Ctrl-C at the prompt."""
    sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 does not end the chat
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its arrow keys; not on every system)
    print("/help lists the commands")
    while True:
        try:
            line = input(f"{chat.workflow}> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if line == "/quit":
            return None
        try:
            if line.startswith("/"):
                print(command(chat, line))
            elif line:
                answer_aloud(chat, line, boxes)
        except KeyboardInterrupt:
            print(" [stopped]")
        except (ValueError, OSError) as error:
            print(error, file=sys.stderr)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises ValueError for what cannot be done, before anything is loaded."""
    example = GROUNDING_PROMPT.format("the red car")
    parser = argparse.ArgumentParser(
        description="Ask an IAA model about a picture; without --prompt, chat.", allow_abbrev=False,
        epilog=f'Grounding takes a whole sentence: --prompt "{example}"')
    add = parser.add_argument
    add("--model", default="runs/demo", help="folder of a run of train.py [%(default)s]")
    add("--image", help="picture to ask about")
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
    add("--quantize", choices=["int8"], help="weights of LLM and adaptors in a fourth of fp32")
    args = parser.parse_args(argv)
    asked, drawn = args.prompt is not None, args.boxes is not None
    for wrong, rule in (
        (args.json and not asked or asked and not args.prompt.strip(),
         "--prompt must not be empty, and --json needs it"),
        (drawn and asked and args.image is None, "--boxes needs --image, the picture to draw on"),
        (drawn and not (args.boxes.suffix in (".png", ".jpg") and args.boxes.parent.is_dir()),
         f"--boxes {args.boxes}: a .png or .jpg file in a folder that exists"),
        (not (args.max_tokens > 0 and 0 <= args.temperature < 1e6 and 0 < args.top_p <= 1
              and 0 <= args.seed < 2**62), "--max-tokens: 1 or more; --temperature: 0 or more; "
         "--top-p: above 0, at most 1; --seed: 0 or more, below 2**62"),
    ):
        if wrong:
            raise ValueError(rule)
    return args


@one_line("sample.py")
def main(argv: list[str] | None = None) -> None:
    """Command line; what a user can cause ends in one line on stderr and exit code 1."""
    args = arguments(argv)
    image = None if args.image is None else open_image(args.image)
    only = args.workflow or (TEXT if image is None else "mm")  # one question needs one adaptor
    chat = Chat.load(args.model, args.dtype, args.device, args.quantize,
                     None if args.prompt is None else [only], max_tokens=args.max_tokens,
                     temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    chat.image, chat.chosen = image, args.workflow
    chat.model.adaptor(chat.workflow)  # raises now where there is none of that name
    if args.prompt is None:
        converse(chat, args.boxes)
    else:
        answer_aloud(chat, args.prompt, args.boxes, args.json)


if __name__ == "__main__":
    main()
