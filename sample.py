"""Ask an IAA model: one question, or a chat that keeps its history; answers appear as they come.

    python sample.py --image cat.jpg --prompt "What is this?"
    python sample.py --image cat.jpg                            a chat; /help lists its commands

Boxes in an answer are fractions of the picture padded to a square; given here in its own pixels.
"""

import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageDraw

from clip import open_image
from data import GROUNDING_PROMPT, Box
from dialogue import Chat, workflow_of
from common.files import new_file, one_line
from iaa import DTYPES

COLOURS = ("#ff2d2d", "#00b050", "#2d7dff", "#ff9900", "#c020d0")  # of boxes, in their order
DRAWN_PX = 448  # a picture whose longer side is less is enlarged before boxes are drawn on it
HELP = """/image PATH      look at another picture; what was said about the one before is forgotten
/workflow NAME   change the workflow, keep the history
/load NAME DIR   one more adaptor, from its folder, as a workflow of that name
/drop NAME       forget an adaptor, give its memory back
/reset           forget the history, keep the picture
/quit            leave (as Ctrl-D does; Ctrl-C stops an answer)
/help            this list"""


def draw_boxes(image: Image.Image, boxes: list[Box], path: Path) -> None:
    """Write the picture with its boxes, a small one enlarged; the file is whole or absent."""
    scale = max(1, -(-DRAWN_PX // max(image.size)))
    picture = image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    pen, line = ImageDraw.Draw(picture), max(3, max(picture.size) // 150)
    for number, box in enumerate(boxes):
        x1, y1, x2, y2 = (round(v * scale) for v in box)
        corners = (x1, y1, max(x1, x2 - 1), max(y1, y2 - 1))  # Pillow draws the last pixel too
        pen.rectangle(corners, outline=COLOURS[number % len(COLOURS)], width=line)
    with new_file(path) as new:
        picture.save(new)


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
    if name == "/load" and " " in argument:
        name, _, folder = argument.partition(" ")
        chat.load_adaptor(name, os.path.expanduser(folder.strip().strip("'\"")))
        return f"workflow {name} loaded"
    if name == "/drop" and argument:
        chat.drop_adaptor(argument)
        return f"workflow {argument} dropped"
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
        except UnicodeDecodeError as error:
            print(f"not UTF-8: {error}", file=sys.stderr)
            continue
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


@one_line("sample.py")
def main(argv: list[str] | None = None) -> None:
    """Command line; what a user can cause ends in one line on stderr and exit code 1."""
    args = arguments(argv)
    image = None if args.image is None else open_image(args.image)
    dtype = "bf16" if args.quantize else args.dtype
    only = None if args.prompt is None else [workflow_of(args.workflow, image)]
    chat = Chat.load(args.model, DTYPES.get(dtype), args.quantize == "int8", only,
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


if __name__ == "__main__":
    main()
