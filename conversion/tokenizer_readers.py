"""Foreign tokenizers -> `Tokenizer`: Meta's files, Hugging Face folders, sentencepiece, GGUF.

A byte-level BPE becomes a table of bytes in merge order and the regex by which text is split.
Other kinds are refused, never approximated. Special tokens are kept by name; they tell the chat
template, unless the model's own template does, and which token can stand for an image.

Sources: meta-llama/llama3, Hugging Face tokenizers (tokenizer.json), llama.cpp (GGUF metadata).
"""

from pathlib import Path

from common.files import read_json
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
        raise ValueError(f"no special token for images: {' or '.join(IMAGE_TOKENS)} is needed, "
                         f"not {[*special_tokens][:20]}")
    return Tokenizer(model, special_tokens, template, images[0], pattern)


def read_sentencepiece(path: Path) -> Tokenizer:
    """Llama 2's or Vicuna's `tokenizer.model`. Image token: <unk>, which no text makes."""
    return Tokenizer(path.read_bytes(), {"<unk>": 0, "<s>": 1, "</s>": 2}, "vicuna", "<unk>")


def is_sentencepiece(path: Path) -> bool:
    """Whether a `tokenizer.model` is a sentencepiece protobuf. Llama 3's is lines of base64."""
    return path.read_bytes()[:1] == b"\n"


def llama3_specials(version: str) -> dict[str, int]:
    """Name -> id of the 256 special tokens of Llama 3 ("3"), or of 3.1 and 3.2 ("3.1")."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id",
             9: "eot_id"}
    if version == "3.1":
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    reserved = [place for place in range(256) if place not in named]
    named |= {place: f"reserved_special_token_{number}" for number, place in enumerate(reserved)}
    return {f"<|{named[place]}|>": LLAMA3_TOKENS + place for place in range(256)}


def read_meta_tokenizer(path: Path, version: str) -> Tokenizer:
    """Meta's `tokenizer.model`: sentencepiece, or lines (base64, rank) of Llama 3.

    version: "3", or "3.1" for 3.1 and 3.2; it names the special tokens, which no file of Meta's
    does.
    """
    if is_sentencepiece(path):
        return read_sentencepiece(path)
    model = read_ranks(path)
    if list(model.values()) != list(range(LLAMA3_TOKENS)):
        raise ValueError(f"{path}: {len(model)} tokens: "
                         f"Llama 3 has {LLAMA3_TOKENS}, numbered from 0")
    return build_tokenizer(model, llama3_specials(version), LLAMA3_SPLIT)


def gpt2_bytes() -> dict[str, int]:
    """GPT-2's printable character -> byte: in these a `tokenizer.json` or a GGUF spells tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def merge_order(vocab: dict[str, int], merges: list) -> dict[bytes, int]:
    """Token bytes -> id, in merge order: single bytes first, then the merges, then the rest."""
    table = gpt2_bytes()
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    order = [*table, *("".join(pair) for pair in pairs), *vocab]
    try:
        return {bytes(table[c] for c in token): vocab[token] for token in order if token in vocab}
    except KeyError as error:
        raise ValueError(f"not a byte-level BPE: a token holds {error}") from None


def hf_split(tokenizer_json: dict) -> str:
    """The regex by which a Hugging Face byte-level BPE splits. ValueError for another kind."""
    model, pre = tokenizer_json.get("model") or {}, tokenizer_json.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    match [{"use_regex": True} | step for step in steps]:
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            pattern = GPT2_SPLIT
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            pattern = DIGITS_SPLIT
        case [{"type": "Split", "behavior": "Isolated", "invert": False,
               "pattern": {"Regex": pattern}},
              {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}]:
            pass  # the pattern is that of the file
        case _:
            pattern = None
    odd = [key for key in ("unk_token", "byte_fallback", "continuing_subword_prefix",
                           "end_of_word_suffix", "dropout") if model.get(key)]
    odd += ["normalizer"] if tokenizer_json.get("normalizer") else []
    if not pattern or odd or model.get("type") != "BPE":
        found = [step.get("type") for step in steps]
        raise ValueError(
            f"{model.get('type')} with {odd} after {found}: supported is plain BPE after ByteLevel,"
            " Split (regex, isolated) + ByteLevel or Digits (individual) + ByteLevel,"
            " without prefix space; or sentencepiece in tokenizer.model")
    return pattern


def read_hf_tokenizer(folder: Path) -> Tokenizer:
    """A Hugging Face folder: sentencepiece `tokenizer.model`, else BPE in `tokenizer.json`."""
    path, model_path = folder / "tokenizer.json", folder / "tokenizer.model"
    if model_path.is_file() and is_sentencepiece(model_path):
        return read_sentencepiece(model_path)
    tokenizer, config = read_json(path), folder / "tokenizer_config.json"
    chat_template = read_json(config).get("chat_template") if config.is_file() else None
    try:
        pattern, model = hf_split(tokenizer), tokenizer["model"]
        specials = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        vocab = {token: n for token, n in model["vocab"].items() if token not in specials}
        return build_tokenizer(merge_order(vocab, model["merges"]), specials, pattern,
                               str(chat_template))  # one template, or a list of named ones
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def read_gguf_tokenizer(path: Path, fields: dict) -> Tokenizer:
    """The tokenizer in the metadata of a GGUF file, name -> value.

    A byte-level BPE ("gpt2") is there as a whole. Of a sentencepiece model ("llama") parts are
    missing: it is read from `tokenizer.model` beside the file.
    """
    kind, split = (fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind == "llama":
        beside = path.with_name("tokenizer.model")
        if not beside.is_file():
            raise FileNotFoundError(f"{beside}: no such file; take the model's own from its "
                                    "Hugging Face folder, as a GGUF of Llama 2 or Vicuna lacks it")
        return read_sentencepiece(beside)
    if kind != "gpt2" or split not in GGUF_SPLITS:
        raise ValueError(
            f"{path}: tokenizer {kind!r} split as {split!r} (tokenizer.ggml.pre): supported is "
            f"'gpt2' split as one of {', '.join(GGUF_SPLITS)}; "
            "convert the Hugging Face folder instead")
    names = ("tokens", "token_type", "merges")
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"] for name in names)
    ids = {token: number for number, token in enumerate(tokens)}
    pairs = zip(tokens, kinds, strict=True)
    specials = {token: ids[token] for token, kind in pairs if kind != 1}  # 1: ordinary
    vocab = {token: number for token, number in ids.items() if token not in specials}
    return build_tokenizer(merge_order(vocab, merges), specials, GGUF_SPLITS[split],
                           fields.get("tokenizer.chat_template", ""))
