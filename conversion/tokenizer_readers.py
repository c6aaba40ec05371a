"""Foreign tokenizers -> `Tokenizer`: Meta's files, Hugging Face folders, sentencepiece, GGUF.

A byte-level BPE becomes a table of bytes in merge order and the regex by which text is split.
Other kinds are refused, never approximated.

Sources: meta-llama/llama3, Hugging Face tokenizers (tokenizer.json), llama.cpp (GGUF metadata).
"""

from pathlib import Path

from common.files import read_json
from conversion.checkpoint_readers import reading
from tokenization.tokenizer import Tokenizer, read_ranks

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each digit alone, and GPT-2's split of what lies between: a digit ends white space ahead of it.
DIGITS_SPLIT = (
    r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?=\p{N})|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_SPLITS = {"llama-bpe": LLAMA3_SPLIT, "smollm": DIGITS_SPLIT, "gpt-2": GPT2_SPLIT}
# GPT-2's printable character -> byte: in these a `tokenizer.json` or a GGUF spells tokens.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
GPT2_BYTES = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(OTHERS)}
LLAMA3_TOKENS = 128000  # ahead of the special ones
TEMPLATE_MARKS = {"<|im_start|>": "chatml", "<|start_header_id|>": "llama3"}
IMAGE_TOKENS = ("<|reserved_special_token_44|>", "<empty_output>", "<filename>", "<|image_pad|>")


def build_tokenizer(
    model: dict[bytes, int], special_tokens: dict[str, int], pattern: str, chat_template: str = ""
) -> Tokenizer:
    """A tokenizer whose chat template and image token are recognised.

    The template is the one whose mark stands in chat_template, the model's own in Jinja, if that
    is known, else among the special tokens. Raises ValueError where none can stand for an image.
    """
    marks = [mark for mark in TEMPLATE_MARKS if mark in chat_template]
    marks += [mark for mark in reversed(TEMPLATE_MARKS) if mark in special_tokens]
    template = TEMPLATE_MARKS[marks[0]] if marks else "plain"
    images = [name for name in IMAGE_TOKENS if name in special_tokens]
    if not images:
        raise ValueError(f"no special token for images: {' or '.join(IMAGE_TOKENS)} is needed")
    return Tokenizer(model, special_tokens, template, images[0], pattern)


def read_sentencepiece(path: Path) -> Tokenizer | None:
    """Llama 2's or Vicuna's `tokenizer.model`; None where there is none, or Llama 3's in base64."""
    if not path.is_file() or (model := path.read_bytes())[:1] != b"\n":
        return None
    # No text makes <unk>, so it can stand for an image.
    return Tokenizer(model, {"<unk>": 0, "<s>": 1, "</s>": 2}, "vicuna", "<unk>")


def read_meta_tokenizer(path: Path, version: str) -> Tokenizer:
    """Meta's `tokenizer.model`, of Llama 2, of Llama 3 ("3"), or of 3.1 and 3.2 ("3.1")."""
    if tokenizer := read_sentencepiece(path):
        return tokenizer
    model = read_ranks(path)
    if [*model.values()] != [*range(LLAMA3_TOKENS)]:
        raise ValueError(f"{path}: {len(model)} tokens: Llama 3 has {LLAMA3_TOKENS}, from 0 on")
    # The names of the special tokens are in no file of Meta's. Those without a use are numbered.
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id",
             9: "eot_id"}
    if version == "3.1":
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    unnamed = [place for place in range(256) if place not in named]
    named |= {place: f"reserved_special_token_{number}" for number, place in enumerate(unnamed)}
    specials = {f"<|{named[place]}|>": LLAMA3_TOKENS + place for place in range(256)}
    return build_tokenizer(model, specials, LLAMA3_SPLIT)


def merge_order(vocab: dict[str, int], specials: dict, merges: list) -> dict[bytes, int]:
    """Bytes of ordinary tokens -> id, in merge order: single bytes, then the merges, the rest."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    order = [*GPT2_BYTES, *("".join(pair) for pair in pairs), *vocab]
    return {bytes(GPT2_BYTES[c] for c in token): vocab[token] for token in order
            if token in vocab and token not in specials}


def hf_split(tokenizer: dict) -> str:
    """The regex by which a `tokenizer.json` splits text. ValueError for all but byte-level BPE."""
    model, pre = tokenizer.get("model") or {}, tokenizer.get("pre_tokenizer") or {}
    odd = ("unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix",
           "dropout", "normalizer")
    if model.get("type") == "BPE" and not any({**tokenizer, **model}.get(key) for key in odd):
        match [{"use_regex": True} | step for step in pre.get("pretokenizers", [pre])]:
            case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
                return GPT2_SPLIT
            case [{"type": "Digits", "individual_digits": True},
                  {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
                return DIGITS_SPLIT
            case [{"type": "Split", "behavior": "Isolated", "invert": False,
                   "pattern": {"Regex": pattern}},
                  {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]:
                return pattern
    raise ValueError(f"{model.get('type')}: supported is plain BPE after ByteLevel, Split and "
                     f"ByteLevel or Digits and ByteLevel, without {', '.join(odd)}, prefix space")


def read_hf_tokenizer(folder: Path) -> Tokenizer:
    """A Hugging Face folder: sentencepiece `tokenizer.model`, else BPE in `tokenizer.json`."""
    if tokenizer := read_sentencepiece(folder / "tokenizer.model"):
        return tokenizer
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content = read_json(path)
    template = read_json(config).get("chat_template") if config.is_file() else None
    with reading(path):
        pattern, model = hf_split(content), content["model"]
        specials = {token["content"]: token["id"] for token in content["added_tokens"]}
        ranked = merge_order(model["vocab"], specials, model["merges"])
        return build_tokenizer(ranked, specials, pattern, str(template))  # or a list of them


def read_gguf_tokenizer(path: Path, fields: dict) -> Tokenizer:
    """The byte-level BPE in the metadata of a GGUF file, name -> value.

    Of a sentencepiece model ("llama") parts are missing: `tokenizer.model` beside it is read.
    """
    kind, split = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    beside = path.with_name("tokenizer.model")
    if kind == "llama" and (tokenizer := read_sentencepiece(beside)):
        return tokenizer
    if kind != "gpt2" or split not in GGUF_SPLITS:
        raise ValueError(f"{path}: tokenizer {kind!r} split as {split!r}, not 'gpt2' split as "
                         f"{' or '.join(GGUF_SPLITS)}, nor 'llama' with its tokenizer.model beside "
                         "the file; convert the Hugging Face folder instead")
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"]
                             for name in ("tokens", "token_type", "merges"))
    ids = {token: number for number, token in enumerate(tokens)}
    specials = {token: ids[token] for token, kind in zip(tokens, kinds, strict=True) if kind != 1}
    template = fields.get("tokenizer.chat_template", "")
    return build_tokenizer(merge_order(ids, specials, merges), specials, GGUF_SPLITS[split],
                           template)
