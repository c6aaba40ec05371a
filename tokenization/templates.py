"""The templates of a conversation: how turns become token ids, and which of them are scored.

Every piece (header, question, answer) is tokenised alone: a prompt's ids begin the ids trained.

Sources: meta-llama/llama3, LLaVA (arXiv 2304.08485), the official IAA release, SmolLM2's template.
"""

import re
from dataclasses import dataclass

from tokenization.tokenizer import Tokenizer

IMAGE = "<image>\n"  # how a row marks its picture, ahead of the first question
CURIOUS_SYSTEM = (  # the official release of IAA, and Vicuna v1
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """How a conversation is spelled: <...> are special tokens by name, the rest is text."""

    default_system: str
    system: str  # around the system message, {}
    user: str  # ahead of a question
    answer: str  # between question and answer
    end: str  # after an answer, scored
    again: str = ""  # between an answer and the next `user`
    space: str = ""  # ahead of each message
    image_end: str = "\n"
    asks: bool = True  # False: questions and system message are thrown away


TEMPLATES = {
    "llama3": Template(
        CURIOUS_SYSTEM,
        system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        answer="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
    ),
    "chatml": Template(
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
        system="<|im_start|>system\n{}<|im_end|>\n",
        user="<|im_start|>user\n",
        answer="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        again="\n",
    ),
    # Spaces stand where the tokenizer of LLaVA puts them, also after </s> and the image.
    "vicuna": Template(CURIOUS_SYSTEM, "{}", " USER:", " ASSISTANT:", "</s>",
                       space=" ", image_end=" \n"),
    # LLaVA's first stage: image, caption, newline.
    "plain": Template("", "", "", "", "\n", image_end="", asks=False),
}
Scored = tuple[list[int], list[bool]]  # ids, and which of them are scored


def spell(tokenizer: Tokenizer, form: str) -> list[int]:
    """Ids of a template's own text, its special tokens by name."""
    ids = []
    for piece in filter(None, re.split(r"(<[^<>]+>)", form)):
        ids += [tokenizer.special(piece)] if piece[0] == "<" else tokenizer.encode(piece)
    return ids


def opening(
    tokenizer: Tokenizer, form: Template, system: str | None, image_tokens: int
) -> list[int]:
    """Ids ahead of the first question: start, system ("" none, None the default), header, image."""
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    system = (form.default_system if system is None else system).strip()
    if system and form.asks:
        before, after = form.system.split("{}")
        ids += spell(tokenizer, before) + tokenizer.encode(form.space + system)
        ids += spell(tokenizer, after)
    ids += spell(tokenizer, form.user)
    if image_tokens:
        ids += tokenizer.encode(form.space) + [tokenizer.image_id] * image_tokens
        ids += tokenizer.encode(form.image_end)
    return ids


def exchange(
    tokenizer: Tokenizer, form: Template, question: str, answer: str | None, space: str
) -> Scored:
    """Question and header of the answer; then, unless None, the answer and its end, scored."""
    ids, words = [], []
    if form.asks:
        ids = tokenizer.encode(space + question.strip()) + spell(tokenizer, form.answer)
    if answer is not None:
        words = tokenizer.encode(form.space + answer.strip()) + spell(tokenizer, form.end)
    return ids + words, [False] * len(ids) + [True] * len(words)


def template_of(tokenizer: Tokenizer, name: str | None) -> Template:
    """The template of that name, None: the tokenizer's own. ValueError for an unknown one."""
    name = name or tokenizer.template
    if name not in TEMPLATES:
        raise ValueError(f"template {name!r}: there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(
    tokenizer: Tokenizer,
    turns: list[tuple[str, str]],  # ("user", text), ("assistant", text), ...
    template: str | None = None,  # a key of TEMPLATES, None: the tokenizer's own
    system: str | None = None,  # None: the template's own, "": none
    image_tokens: int = 0,  # placeholders ahead of the first question, for its IMAGE if any
) -> Scored:
    """A conversation as (ids, which of them are scored); a prompt, if the user speaks last.

    Messages are trimmed. ValueError: turns not alternating, unknown template or special token.
    """
    form = template_of(tokenizer, template)
    roles, texts = [role for role, _ in turns], [text for _, text in turns]
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise ValueError(f"turns of {roles}: user and assistant in turn, user first")
    ids = opening(tokenizer, form, system, image_tokens)
    scored = [False] * len(ids)
    for turn in range(0, len(texts) if form.asks else 1, 2):
        question, answer, space = texts[turn], (texts + [None])[turn + 1], form.space
        if turn:
            ids += spell(tokenizer, form.again + form.user)
            scored += [False] * (len(ids) - len(scored))
        elif image_tokens:
            question, space = question.removeprefix(IMAGE), ""
        more = exchange(tokenizer, form, question, answer, space)
        ids, scored = ids + more[0], scored + more[1]
    return ids, scored
