"""Chat templates: how the turns of a conversation become token ids, and which ids are scored.

Each piece (header, question, answer) is tokenised alone. So the ids of a prompt are the beginning
of the ids that the same conversation has in training.

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
    """The text around the messages. <...> is a special token's name, the rest is plain text."""

    default_system: str
    system: str  # the system message stands for {}
    user: str  # before a question
    answer: str  # between question and answer
    end: str  # after an answer; scored
    between_turns: str = ""  # between an answer and the next `user`
    message_prefix: str = ""  # before each message
    image_end: str = "\n"  # after an image's placeholders
    drops_questions: bool = False  # only images and answers are kept


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
Scored = tuple[list[int], list[bool]]  # ids, and which of them are scored


def template_of(tokenizer: Tokenizer, name: str | None) -> Template:
    """The template of that name, None: the tokenizer's own. ValueError for an unknown name."""
    name = name or tokenizer.template
    if name not in TEMPLATES:
        raise ValueError(f"template {name!r}: there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def encode_template(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a template's own text, its special tokens by name."""
    ids = []
    for piece in filter(None, re.split(r"(<[^<>]+>)", text)):
        ids += [tokenizer.special(piece)] if piece[0] == "<" else tokenizer.encode(piece)
    return ids


def prompt_start(
    tokenizer: Tokenizer, form: Template, system: str | None, image_tokens: int
) -> list[int]:
    """The ids before the first question: start token, system message, header, image.

    system: "" for none, None for the template's default.
    """
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    system = (form.default_system if system is None else system).strip()
    if system and not form.drops_questions:
        before, after = form.system.split("{}")
        ids += encode_template(tokenizer, before) + tokenizer.encode(form.message_prefix + system)
        ids += encode_template(tokenizer, after)
    ids += encode_template(tokenizer, form.user)
    if image_tokens:
        ids += tokenizer.encode(form.message_prefix) + [tokenizer.image_id] * image_tokens
        ids += tokenizer.encode(form.image_end)
    return ids


def question_and_answer(
    tokenizer: Tokenizer, form: Template, question: str, answer: str | None, prefix: str
) -> Scored:
    """A question and the header of its answer; then the answer and its end, scored, unless None."""
    ids, answer_ids = [], []
    if not form.drops_questions:
        ids = tokenizer.encode(prefix + question.strip()) + encode_template(tokenizer, form.answer)
    if answer is not None:
        answer_ids = tokenizer.encode(form.message_prefix + answer.strip())
        answer_ids += encode_template(tokenizer, form.end)
    return ids + answer_ids, [False] * len(ids) + [True] * len(answer_ids)


def render(
    tokenizer: Tokenizer,
    turns: list[tuple[str, str]],  # ("user", text), ("assistant", text), ...
    template: str | None = None,  # a key of TEMPLATES, None: the tokenizer's own
    system: str | None = None,  # None: the template's own, "": none
    image_tokens: int = 0,  # placeholders before the first question, in place of its IMAGE
) -> Scored:
    """A conversation as (ids, which of them are scored); a prompt, if the user speaks last.

    Messages are trimmed. ValueError: turns not alternating, unknown template or special token.
    """
    form = template_of(tokenizer, template)
    roles, texts = [role for role, _ in turns], [text for _, text in turns]
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise ValueError(f"turns of {roles}: user and assistant in turn, user first")
    ids = prompt_start(tokenizer, form, system, image_tokens)
    scored = [False] * len(ids)
    for turn in range(0, 1 if form.drops_questions else len(texts), 2):
        question, answer, prefix = texts[turn], (texts + [None])[turn + 1], form.message_prefix
        if turn:
            ids += encode_template(tokenizer, form.between_turns + form.user)
            scored += [False] * (len(ids) - len(scored))
        elif image_tokens:
            question, prefix = question.removeprefix(IMAGE), ""
        more = question_and_answer(tokenizer, form, question, answer, prefix)
        ids, scored = ids + more[0], scored + more[1]
    return ids, scored


def render_independent(
    tokenizer: Tokenizer,
    pairs: list[tuple[str, str]],  # (question, answer); the first question may begin with IMAGE
    template: str | None = None,
    system: str | None = None,
    image_tokens: int = 0,
) -> tuple[list[int], list[Scored]]:
    """Questions that do not see each other: the ids that all of them follow, and each by itself.

    The shared ids and one question's are what `render` makes of this question alone. A template
    that drops questions keeps the first answer only.
    """
    form = template_of(tokenizer, template)
    prefix = "" if image_tokens else form.message_prefix
    shared = prompt_start(tokenizer, form, system, image_tokens)
    kept = pairs[:1] if form.drops_questions else pairs
    return shared, [
        question_and_answer(tokenizer, form, question.removeprefix(IMAGE), answer, prefix)
        for question, answer in kept]
