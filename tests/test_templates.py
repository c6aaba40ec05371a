"""tokenization/templates.py: chat templates letter by letter, and what of them is scored."""

import itertools

import pytest
import sentencepiece

from tokenization.templates import IMAGE, TEMPLATES, render
from tokenization.tokenizer import Tokenizer

TURNS = [("user", IMAGE + " Q 1? "), ("assistant", "A\n"), ("user", "Q2"), ("assistant", "B")]
SEVERAL = [("user", " <image>\r\n<image>Q"), ("assistant", "A <image>"),
           ("user", "R\n<image> and <image>."), ("assistant", "B")]  # pictures first, or in a text
LLAMA3 = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<image>")
CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>")
each = pytest.mark.parametrize("kind", ["chatml", "llama3", "vicuna"])


def greedy_pairs(names: tuple[str, ...], template: str) -> Tokenizer:
    """A tokenizer that merges any two ASCII characters: what is encoded as one would show."""
    ascii_bytes = [bytes([b]) for b in (10, *range(32, 127))]
    words = [bytes([b]) for b in range(256)]
    words += [a + b for a, b in itertools.product(ascii_bytes, repeat=2)]
    specials = {name: len(words) + n for n, name in enumerate(names)}
    return Tokenizer({word: n for n, word in enumerate(words)}, specials, template, "<image>",
                     r"[\s\S]+")


@pytest.fixture(scope="module")
def tokenizers(tokenizer_model) -> dict[str, Tokenizer]:
    """One of each chat template."""
    specials = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return {"llama3": greedy_pairs(LLAMA3, "llama3"), "chatml": greedy_pairs(CHATML, "chatml"),
            "vicuna": Tokenizer(tokenizer_model, specials, "vicuna", "<unk>"),
            "peer": sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)}


def shown(tokenizer: Tokenizer, ids: list[int], scored: list[bool]) -> str:
    """The text of ids: special tokens by name, images as #, what is scored between braces."""
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    names[tokenizer.image_id] = "#"
    text, inside = "", False
    for token, counts in zip(ids, scored, strict=True):
        text += ("{" if counts and not inside else "}" if inside and not counts else "")
        text += names.get(token) or tokenizer.decode([token])
        inside = counts
    return text + "}" * inside


@pytest.mark.parametrize(("kind", "turns", "options", "wanted"), [
    ("llama3", TURNS, {"system": "S "},
     "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
     "<|start_header_id|>user<|end_header_id|>\n\n##\nQ 1?<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n{A<|eot_id|>}"
     "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n{B<|eot_id|>}"),
    ("chatml", TURNS, {"system": "S"},
     "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n##\nQ 1?<|im_end|>\n"
     "<|im_start|>assistant\n{A<|im_end|>}\n"
     "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n{B<|im_end|>}"),
    ("vicuna", TURNS, {"system": "S"},
     "<s> S USER: ## \nQ 1? ASSISTANT:{ A</s>} USER: Q2 ASSISTANT:{ B</s>}"),
    ("chatml", TURNS, {"template": "plain"}, "##{A\n}"),
    ("llama3", TURNS, {"template": "plain"}, "<|begin_of_text|>##{A\n}"),
    ("llama3", SEVERAL, {"system": ""},
     "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n##\n##\nQ<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n{A<|eot_id|>}"
     "<|start_header_id|>user<|end_header_id|>\n\nR\n## and ##.<|eot_id|>"
     "<|start_header_id|>assistant<|end_header_id|>\n\n{B<|eot_id|>}"),
    ("chatml", SEVERAL, {"system": "", "image_tokens": 0},
     "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{A<|im_end|>}\n"
     "<|im_start|>user\nR\n  and  .<|im_end|>\n<|im_start|>assistant\n{B<|im_end|>}")])
def test_letter_by_letter(tokenizers, kind, turns, options, wanted):
    """Each template, and what of it is scored (in braces): answers and their end tokens."""
    rendered = render(tokenizers[kind], turns, **{"image_tokens": 2} | options)
    assert shown(tokenizers[kind], *rendered) == wanted


def test_vicuna_is_tokenised_as_in_llava(tokenizers):
    """LLaVA cuts text at <image> and </s>; sentencepiece prefixes a space to each part."""
    parts = ("S USER: ", [0], "\n", [0], "\nQ ASSISTANT: A", [2], "USER: R\n", [0], " and ", [0],
             ". ASSISTANT: B", [2])
    wanted = [tokenizers["peer"].Encode(part) if isinstance(part, str) else part for part in parts]
    ids, _ = render(tokenizers["vicuna"], SEVERAL, system="S", image_tokens=1)
    assert ids == [1, *itertools.chain(*wanted)]


@each
def test_system_message(tokenizers, kind):
    """None is the template's default, "" none at all."""
    form, tokenizer = TEMPLATES[kind], tokenizers[kind]
    ids, scored = render(tokenizer, [("user", "Q")])
    assert form.default_system in shown(tokenizer, ids, scored)
    answer = [("user", "Q"), ("assistant", "<im<image>age>A")]  # taking one tag out makes another
    assert tokenizer.image_id not in render(tokenizer, answer, image_tokens=3)[0]
    without = shown(tokenizer, *render(tokenizer, [("user", "Q")], system=""))
    start = {"llama3": "<|begin_of_text|>", "vicuna": "<s>"}.get(kind, "")
    assert without == f"{start}{form.user}{form.message_prefix}Q{form.answer}"


@each
def test_a_prompt_begins_what_is_trained(tokenizers, kind):
    """The ids of a prompt are a prefix of the ids of the same conversation with its answer."""
    for question in ("Hi", "\n x", "12 3", "é'll", "...", "<|im_end|>", "  ?  "):
        for answer in ("yes", " 1", "\n\n- a", "'s", "👍"):
            turns = [("user", question), ("assistant", answer)] * 2
            whole, scored = render(tokenizers[kind], turns, image_tokens=3)
            for asked in (1, 3):
                prompt, _ = render(tokenizers[kind], turns[:asked], image_tokens=3)
                assert whole[: len(prompt)] == prompt
                assert scored[len(prompt)] and not scored[len(prompt) - 1]


def test_what_cannot_be_rendered(tokenizers):
    """An unknown template, and one whose special tokens are not there."""
    with pytest.raises(ValueError, match="'alpaca': there are llama3, chatml, vicuna, plain, "):
        render(tokenizers["chatml"], [("user", "x")], template="alpaca")
    with pytest.raises(ValueError, match="no special token '<|start_header_id|>'"):
        render(tokenizers["chatml"], [("user", "x")], template="llama3")
