"""Ask an IAA model: one question, or a chat that keeps its history; answers appear as they come.

    python sample.py --image cat.jpg --prompt "What is this?"
    python sample.py --image cat.jpg                            a chat; /help lists its commands

- A dialogue may change workflow between turns: the picture's placeholder stands in the first user
  turn under an adaptor and leaves it under "text", as in the official interleaved script.
- Boxes in an answer are fractions of the picture padded to a square; given here in its own pixels.
"""

import argparse
import contextlib
import hashlib
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

from chat import Tokenizer, render
from clip import open_image, preprocess
from data import GROUNDING_PROMPT, Box, text_to_boxes
from generate import generate
from iaa import DTYPES, IAA, TEXT
from packing import pack
from storage import load_iaa

COLOURS = ("#ff2d2d", "#00b050", "#2d7dff", "#ff9900", "#c020d0")  # of boxes, in their order
DRAWN_PX = 448  # a picture whose longer side is less is enlarged before boxes are drawn on it
HELP = """/image PATH      look at another picture; what was said about the one before is forgotten
/workflow NAME   change the workflow, keep the history
/reset           forget the history, keep the picture
/quit            leave (as Ctrl-D does; Ctrl-C stops an answer)
/help            this list"""


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


@dataclass
class Chat:
    """A dialogue with a model: its history, picture and workflow, and how answers are drawn."""

    model: IAA
    tokenizer: Tokenizer
    prompts: dict[str, dict]  # of each adaptor: {"template", "system"}
    max_tokens: int = 512  # of an answer; fewer where the context ends
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chosen: str | None = None  # workflow; None: "mm" with a picture, "text" without
    image: Image.Image | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)  # ("user", text), ...
    seen: dict[bytes, Tensor] = field(default_factory=dict)  # digest of a picture -> its features

    @classmethod
    def load(
        cls, folder: str | Path, dtype: torch.dtype | None = None, int8: bool = False, **sampling
    ) -> "Chat":
        """Open what train.py left in `folder`, on the GPU where there is one, packed for speed."""
        if not Path(folder, "iaa.json").is_file():
            raise FileNotFoundError(f"{folder}: no model there (no iaa.json); train one with "
                                    "python train.py --config configs/demo.toml, or see README")
        model, info = load_iaa(folder, dtype, "cuda" if torch.cuda.is_available() else "cpu")
        pack(model, int8)
        return cls(model, Tokenizer.load(info["llm"]), info["prompts"], **sampling)

    @property
    def workflow(self) -> str:
        """The workflow of the next answer."""
        return self.chosen or (TEXT if self.image is None else "mm")

    @torch.inference_mode()
    def features(self, image: Image.Image) -> Tensor:
        """What the vision tower makes of a picture, once for equal pixels: (1, P, D_vision)."""
        key = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if key not in self.seen:
            device = self.model.llama.embedding.weight.device
            images = preprocess(image, self.model.clip.config)[None].to(device)  # (1, 3, S, S)
            self.seen[key] = self.model.clip(images)
        return self.seen[key]

    def ask(self, text: str, on_text: Callable[[str], None] = lambda piece: None) -> Answer:
        """Answer `text`, piece by piece to `on_text`; both join the history, even cut by Ctrl-C.

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
        images = self.features(image) if image else None
        stream = Stream(self.tokenizer, on_text)
        try:
            generate(self.model, [ids], images, workflow, min(room, self.max_tokens),
                     self.tokenizer.stop_ids, self.temperature, self.top_p,
                     self.seed + len(self.turns), lambda row, token: stream.add(token))
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


def draw_boxes(image: Image.Image, boxes: list[Box], path: Path) -> None:
    """Write the picture with its boxes, a small one enlarged; the file is whole or absent."""
    scale = max(1, -(-DRAWN_PX // max(image.size)))
    picture = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    pen, line = ImageDraw.Draw(picture), max(3, max(picture.size) // 150)
    for number, box in enumerate(boxes):
        x1, y1, x2, y2 = (round(v * scale) for v in box)
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))  # Pillow draws the last pixel too
        pen.rectangle(corners, outline=COLOURS[number % len(COLOURS)], width=line)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        picture.save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def answer_aloud(chat: Chat, text: str, boxes: Path | None, as_json: bool = False) -> None:
    """Ask, print the answer as it comes (or JSON at its end), then draw its boxes if wanted."""
    answer = chat.ask(text, lambda piece: as_json or print(piece, end="", flush=True))
    fields = {key: value for key, value in asdict(answer).items() if key != "boxes" or value}
    print(json.dumps(fields, ensure_ascii=False) if as_json else "", flush=True)
    if boxes and answer.boxes:
        draw_boxes(chat.image, answer.boxes, boxes)
    elif boxes:
        print(f"no box in the answer: {boxes} not written", file=sys.stderr)


def command(chat: Chat, line: str) -> str:
    """Carry out a chat command, but /quit, and return what to say. Raises ValueError, OSError."""
    name, _, argument = line.partition(" ")
    argument = argument.strip().strip("'\"")
    if name == "/image" and argument:
        image = open_image(os.path.expanduser(argument))  # leaves an unknown ~user as it is
        chat.turns = [] if chat.image else chat.turns  # they were about another picture
        chat.image = image
        return f"{argument}: {image.width} x {image.height} pixels; workflow {chat.workflow}"
    if name == "/workflow" and argument:
        chat.model.adaptor(argument)
        chat.chosen = argument
        return f"workflow {argument}"
    if name == "/reset":
        chat.turns = []
        return "history forgotten"
    return HELP if line == "/help" else f"unknown: {line}\n{HELP}"


def converse(chat: Chat, boxes: Path | None) -> None:
    """Read questions and commands until /quit, the end of input, or Ctrl-C at the prompt."""
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
    add("--dtype", choices=DTYPES, help="compute in this [as the weights are stored]")
    add("--quantize", choices=["int8"], help="weights of LLM and adaptors in half the memory")
    args = parser.parse_args(argv)
    asked, drawn = args.prompt is not None, args.boxes is not None
    for wrong, rule in (
        (args.json and not asked, "--json needs --prompt"),
        (asked and not args.prompt.strip(), "--prompt is empty"),
        (drawn and asked and args.image is None, "--boxes needs --image, the picture to draw on"),
        (drawn and args.boxes.suffix not in (".png", ".jpg"),
         f"--boxes {args.boxes}: write .png or .jpg"),
        (drawn and not args.boxes.parent.is_dir(), f"--boxes {args.boxes}: no such folder"),
        (args.quantize and args.dtype == "fp32", "--quantize int8 computes in bf16: not fp32"),
        (args.max_tokens < 1, f"--max-tokens {args.max_tokens}: must be 1 or more"),
        (not 0 <= args.temperature < 1e6, f"--temperature {args.temperature}: must be 0 or more"),
        (not 0 < args.top_p <= 1, f"--top-p {args.top_p}: must be above 0, and 1 at most"),
        (not 0 <= args.seed < 2**62, f"--seed {args.seed}: must be 0 or more, and below 2**62"),
    ):
        if wrong:
            raise ValueError(rule)
    return args


def main(argv: list[str] | None = None) -> None:
    """Command line; what a user can cause ends in one line on stderr and exit code 1."""
    try:
        args = arguments(argv)
        image = None if args.image is None else open_image(args.image)
        dtype = "bf16" if args.quantize else args.dtype
        chat = Chat.load(args.model, DTYPES.get(dtype), args.quantize == "int8",
                         max_tokens=args.max_tokens, temperature=args.temperature,
                         top_p=args.top_p, seed=args.seed)
        chat.image, chat.chosen = image, args.workflow
        chat.model.adaptor(chat.workflow)  # says so now where there is none of that name
        if args.boxes and chat.model.clip.config.aspect != "pad":
            raise ValueError("--boxes: the vision tower of this model crops pictures "
                             '(aspect = "crop"), so its answers place no box on them')
        if args.prompt is None:
            converse(chat, args.boxes)
        else:
            answer_aloud(chat, args.prompt, args.boxes, args.json)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        sys.exit("\nsample.py: stopped")


if __name__ == "__main__":
    main()
