"""Chat templates: how the turns of a conversation become token ids, and which ids are scored.

Each piece (header, question, answer) is tokenised alone. So the ids of a prompt are the beginning
of the ids that the same conversation has in training.

Sources: meta-llama/llama3, LLaVA (arXiv 2304.08485), the official IAA release, SmolLM2's template.
"""

import re
from dataclasses import dataclass, replace

from tokenization.tokenizer import Tokenizer

TAG = "<image>"  # stands where a picture is in a question; its letters are never tokenised
IMAGE = TAG + "\n"  # a picture ahead of a question
CURIOUS_SYSTEM = (  # the official release of IAA, and Vicuna v1
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """The text around the messages. <...> is a special token's name, the rest is plain text."""

    default_system: str
    system: str  # the system message replaces {}
    user: str  # before a question
    answer: str  # between question and answer
    end: str  # after an answer; scored
    between_turns: str = ""  # between an answer and the next `user`
    message_prefix: str = ""  # before each message
    image_end: str = "\n"  # after each image that precedes a message's text
    drops_questions: bool = False  # only the first question's images and its answer are kept


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
        between_turns="\n",
    ),
    # Spaces stand where the tokenizer of LLaVA puts them, also after </s> and the image.
    "vicuna": Template(CURIOUS_SYSTEM, "{}", " USER:", " ASSISTANT:", "</s>",
                       message_prefix=" ", image_end=" \n"),
    # LLaVA's first stage: image, caption, newline.
    "plain": Template("", "", "", "", "\n", image_end="", drops_questions=True),
}
TEMPLATES["chatml_bare"] = replace(TEMPLATES["chatml"], default_system="")  # not SmolLM2's
CHATS = [name for name, form in TEMPLATES.items() if not form.drops_questions]


def template_of(tokenizer: Tokenizer, name: str | None) -> Template:
    """The template of that name, None: the tokenizer's own. ValueError for an unknown name."""
    name = name or tokenizer.template
    if name not in TEMPLATES:
        raise ValueError(f"template {name!r}: there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def without_tags(text: str) -> str:
    """The text with a space for each TAG: plain removal could form a new one."""
    return text.replace(TAG, " ")


def encode_template(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a template's own text, its special tokens by name."""
    ids = []
    for piece in filter(None, re.split(r"(<[^<>]+>)", text)):
        ids += [tokenizer.special(piece)] if piece[0] == "<" else tokenizer.encode(piece)
    return ids


def encode_message(tokenizer: Tokenizer, form: Template, text: str, image_tokens: int) -> list[int]:
    """The ids of a message without outer white space, a picture where each TAG stands.

    `image_end` follows each picture at a message's start, as in the official release. A picture
    after text stays where it is, and nothing follows it, as in LLaVA's inference code.
    """
    tags = re.match(rf"(\s*{TAG})*", text)[0]
    picture, prefix, ids = [tokenizer.image_id] * image_tokens, form.message_prefix, []
    if tags:
        ids = (picture + tokenizer.encode(form.image_end)) * tags.count(TAG)
        ids, prefix = tokenizer.encode(prefix) + ids, ""  # the prefix is there now
    for number, piece in enumerate(text[len(tags) :].strip().split(TAG)):
        words = tokenizer.encode(prefix + piece) if piece or not number else []
        ids += (picture if number else []) + words
        prefix = form.message_prefix  # LLaVA tokenises the text behind a picture alone
    return ids


def render(
    tokenizer: Tokenizer,
    turns: list[tuple[str, str]],  # ("user", text), ("assistant", text), ... in turn
    template: str | None = None,  # a key of TEMPLATES, None: the tokenizer's own
    system: str | None = None,  # None: the template's own, "": none
    image_tokens: int = 0,  # placeholders for each TAG of the user; 0: pictures are left out
) -> tuple[list[int], list[bool]]:
    """A conversation as (ids, which of them are scored); a prompt, if the user speaks last.

    A TAG in an answer is left out. ValueError: unknown template or special token.
    """
    form = template_of(tokenizer, template)
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    system = without_tags(form.default_system if system is None else system).strip()
    if system and not form.drops_questions:
        before, after = form.system.split("{}")
        ids += encode_template(tokenizer, before) + tokenizer.encode(form.message_prefix + system)
        ids += encode_template(tokenizer, after)
    scored = [False] * len(ids)
    for turn, (role, text) in enumerate(turns[:2] if form.drops_questions else turns):
        if role == "user":
            ids += encode_template(tokenizer, (form.between_turns if turn else "") + form.user)
            text = TAG * text.count(TAG) if form.drops_questions else text
        if role == "assistant" or not image_tokens:
            text = without_tags(text)
        ids += encode_message(tokenizer, form, text, image_tokens)
        ids += encode_template(tokenizer, form.answer if role == "user" else form.end)
        scored += [role == "assistant"] * (len(ids) - len(scored))
    return ids, scored
