"""Foreign tokenizers -> `Tokenizer`: Meta's files, Hugging Face folders, sentencepiece, GGUF.

A byte-level BPE becomes a table of bytes in merge order and the regex by which text is split.
Other kinds are refused, never approximated. What the files state of start and stop tokens, added
words and chat template is used; each choice is printed with its origin.

Sources: meta-llama/llama3, Hugging Face tokenizers (tokenizer.json), llama.cpp (GGUF metadata).
"""

import re
from pathlib import Path
from typing import NamedTuple

from common.files import read_json
from conversion.checkpoint_readers import reading
from tokenization.templates import CHATS, render
from tokenization.tokenizer import STARTS, STOPS, Tokenizer, read_ranks

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
GGUF_SPLITS = {"llama-bpe": LLAMA3_SPLIT, "llama3": LLAMA3_SPLIT, "llama-v3": LLAMA3_SPLIT,
               "smollm": DIGITS_SPLIT, "gpt-2": GPT2_SPLIT}
# GPT-2's printable character -> byte: in these a `tokenizer.json` or a GGUF spells tokens.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
GPT2_BYTES = {chr(b): b for b in PRINTABLE} | {chr(256 + n): b for n, b in enumerate(OTHERS)}
LLAMA3_TOKENS = 128000  # ahead of the special ones
TEMPLATE_MARKS = {"chatml": ("<|im_start|>", "<|im_end|>"), "vicuna": ("USER:", "ASSISTANT:"),
                  "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}
# A mark and an unusual role ("<|start_header_id|>GPT4 User"), or Vicuna's roles in another form.
FOREIGN_ROLE = re.compile(
    r"<\|(?:start_header_id|im_start)\|>(?!['\"{]|system|user|assistant|ipython|tool)"
    r"|\[INST\]|(?:\\n|\n|# ?)(?:USER|ASSISTANT):|(?:USER|ASSISTANT):(?:\\n|\n)")
# The first that exists stands for an image: no text makes it.
IMAGE_TOKENS = ("<|reserved_special_token_44|>", "<empty_output>", "<filename>", "<|image_pad|>",
                "<unk>")
# Text never becomes these, even where a file says that they are ordinary words.
CONTROL = {*STARTS, *STOPS, *IMAGE_TOKENS, *TEMPLATE_MARKS["chatml"], *TEMPLATE_MARKS["llama3"],
           "<|python_tag|>"}


Added = list[tuple[str, int, bool]]  # tokens beside the model's own: name, id, special


class Stated(NamedTuple):
    """What the source or the user states of a tokenizer. Tokens are names or ids."""

    template: str | None = None  # of CHATS, that the user names
    jinja: str | None = None  # the model's own template
    start: str | int | None = None
    adds_start: bool | None = None
    stops: tuple[str | int | None, ...] = ()
    image: int | None = None  # a LLaVA's placeholder


def choose_template(
    stated: Stated, specials: dict[str, int], stops: list[str]
) -> tuple[str, str]:
    """One of CHATS, and how it is known: its marks stand in the model's own template.

    Without a template, special tokens are the marks; else </s> means Vicuna's. Raises ValueError
    unless exactly one fits. The model's own is Jinja, which is code: it is not run.
    """
    if stated.template:
        return stated.template, "as --template says"
    jinja = re.sub(r"(['\"])\s*\+\s*\1", "", stated.jinja or "")  # 'a' + 'b' is one text
    jinja = jinja.replace("eos_token", " ".join(stops)).replace(
        "['role'].upper() + ': '", "USER:")  # so it is spelled in llava-hf/llava-1.5-7b-hf
    found = [template for template, marks in TEMPLATE_MARKS.items()
             if all(mark in (jinja or specials) for mark in marks)]
    if set(re.findall(r"<\|\w+\|>", jinja)) - CONTROL or FOREIGN_ROLE.search(jinja):
        found = []  # a mark that none of ours has, or a role
    if found == ["chatml"] and "named SmolLM" not in jinja:  # its message is not theirs
        found = ["chatml_bare"]
    if len(found) == 1:
        return found[0], "read from chat_template" if stated.jinja else "assumed by special tokens"
    if found or stated.jinja or "</s>" not in specials:
        raise ValueError(f"chat template not recognised, {' and '.join(found) or 'none'} would "
                         f"fit: --template {' or '.join(CHATS)} is needed")
    return "vicuna", "assumed"


def build_tokenizer(
    model: dict[bytes, int] | bytes, added: Added, stated: Stated, pattern: str = "",
    mergeable: int | None = None,
) -> Tokenizer:
    """A tokenizer with what is stated, and else with what is usual of its kind. Prints which.

    Raises ValueError where the template, or a special token that is needed, is not there.
    """
    names = {id: name for name, id, _ in added}
    # transformers states ids by default, which may be those of ordinary text: they are dropped.
    image, start, *stops = (names.get(token) if isinstance(token, int) else token
                            for token in (stated.image, stated.start, *stated.stops))
    stops = [name for name in stops if name]
    control = CONTROL.union([start, image], stops)
    specials = {name: id for name, id, special in added if special or name in control}
    words = {name: id for name, id, _ in added if name and name not in specials}
    template, known_by = choose_template(stated, specials, stops)
    images = [name for name in (image, *IMAGE_TOKENS) if name in specials]
    if not images:
        raise ValueError(f"no special token for images: {' or '.join(IMAGE_TOKENS)} is needed")
    # A template with bos_token keeps the start token. ChatML's models often state a mark of the
    # template or the stop token as start, which is no start.
    if "bos_token" not in (stated.jinja or "") and (
            stated.adds_start is False or start in (*TEMPLATE_MARKS["chatml"], *stops)):
        start = ""
    all_stops = [*dict.fromkeys([name for name in STOPS if name in specials] + stops)]
    tokenizer = Tokenizer(model, specials, template, images[0], pattern, mergeable, words, start,
                          all_stops)
    render(tokenizer, [("user", ""), ("assistant", "")])  # raises where a special token is missing
    said = ", ".join(f"{name} {'read' if name in stops else 'assumed'}" for name in all_stops)
    print(f"chat template: {template}, {known_by}")
    print(f"start token: {tokenizer.start or 'none'}, {'assumed' if start is None else 'read'}")
    print(f"stop tokens: {said or 'none'}")
    return tokenizer


def read_sentencepiece(path: Path, added: Added, stated: Stated) -> Tokenizer | None:
    """Llama 2's or Vicuna's `tokenizer.model`; None where there is none, or Llama 3's in base64."""
    if not path.is_file() or (model := path.read_bytes())[:1] != b"\n":
        return None
    own = [("<unk>", 0, True), ("<s>", 1, True), ("</s>", 2, True)]
    return build_tokenizer(model, own + [token for token in added if token[1] > 2], stated)


def read_meta_tokenizer(path: Path, version: str, template: str | None = None) -> Tokenizer:
    """Meta's `tokenizer.model`, of Llama 2, of Llama 3 ("3"), or of 3.1 and 3.2 ("3.1")."""
    stated = Stated(template)
    if tokenizer := read_sentencepiece(path, [], stated):
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
    added = [(f"<|{named[place]}|>", LLAMA3_TOKENS + place, True) for place in range(256)]
    return build_tokenizer(model, added, stated, LLAMA3_SPLIT)


def build_bpe(
    vocab: dict[str, int], merges: list, whole_words: bool, added: Added, stated: Stated,
    pattern: str,
) -> Tokenizer:
    """A byte-level BPE: single bytes, then what the merges make, then the rest of `vocab`.

    whole_words: text may also become words of the rest, which no merge makes.
    """
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    made = dict.fromkeys([*GPT2_BYTES, *("".join(pair) for pair in pairs)])
    # Some name a token of text, such as "!", as the special token for padding: it stays text.
    added = [(name, id, special) for name, id, special in added
             if not (special and name in made and vocab.get(name) == id)]
    names = {name for name, _, _ in added}
    order = [token for token in made | vocab if token in vocab and token not in names]
    mergeable = None if whole_words else sum(token in made for token in order)
    model = {bytes(GPT2_BYTES[c] for c in token): vocab[token] for token in order}
    return build_tokenizer(model, added, stated, pattern, mergeable)


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
                return rf"{pattern}|(?:(?!{pattern})[\s\S])+"  # tiktoken drops what does not match
    raise ValueError(f"{model.get('type')}: supported is plain BPE after ByteLevel, Split and "
                     f"ByteLevel or Digits and ByteLevel, without {', '.join(odd)}, prefix space; "
                     "a Llama 2 or Vicuna needs its tokenizer.model of sentencepiece")


def read_hf_tokenizer(folder: Path, template: str | None = None) -> Tokenizer:
    """A Hugging Face folder: sentencepiece `tokenizer.model`, else BPE in `tokenizer.json`."""
    path = folder / "tokenizer.json"
    with reading(path if path.is_file() else folder / "tokenizer_config.json"):
        content, said, ends, config, added, of_pictures = (
            read_json(folder / name) if (folder / name).is_file() else {}
            for name in (path.name, "tokenizer_config.json", "generation_config.json",
                         "config.json", "added_tokens.json", "chat_template.json"))
        records = content.get("added_tokens") or [
            *({"content": name, "id": number} for name, number in added.items()),
            *({"id": int(number)} | token
              for number, token in said.get("added_tokens_decoder", {}).items())]
        odd = [token["content"] for token in records
               if not (token.get("special") or token["content"] in CONTROL)
               and any(map(token.get, ("lstrip", "rstrip", "single_word")))]
        if odd:
            raise ValueError(f"added word {odd[0]!r}: lstrip, rstrip and single_word are not "
                             "supported")
        file, jinja = folder / "chat_template.jinja", (said | of_pictures).get("chat_template")
        if isinstance(jinja, list):  # several, by name
            jinja = {one["name"]: one["template"] for one in jinja}.get("default")
        if file.is_file():
            jinja = file.read_text(encoding="utf-8")
        start, stop = (token["content"] if isinstance(token, dict) else token
                       for token in (said.get("bos_token"), said.get("eos_token")))
        ends = config.get("text_config", {}) | config | ends
        if start is None:  # null: the files say that there is none
            start = "" if "bos_token" in said else ends.get("bos_token_id")
        more = ends.get("eos_token_id")
        stated = Stated(template, jinja, start, said.get("add_bos_token"),
                        (stop, *(more if isinstance(more, list) else [more])),
                        config.get("image_token_index", config.get("image_token_id")))
        added = [(token["content"], token["id"], token.get("special", False)) for token in records]
        if tokenizer := read_sentencepiece(folder / "tokenizer.model", added, stated):
            return tokenizer
        if not content:
            raise FileNotFoundError(f"{path}: no such file, nor a sentencepiece tokenizer.model")
        pattern, model = hf_split(content), content["model"]
        return build_bpe(model["vocab"], model["merges"], model.get("ignore_merges", False), added,
                         stated, pattern)


def read_gguf_tokenizer(path: Path, fields: dict, template: str | None = None) -> Tokenizer:
    """The byte-level BPE in the metadata of a GGUF file, name -> value.

    Of a sentencepiece model ("llama") parts are missing: `tokenizer.model` beside it is read.
    """
    fields = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    kind, split = fields.get("model"), fields.get("pre")
    stops = tuple(fields.get(f"{name}_token_id") for name in ("eos", "eot", "eom"))
    stated = Stated(template, fields.get("tokenizer.chat_template"), fields.get("bos_token_id"),
                    fields.get("add_bos_token"), stops)
    tokens = fields.get("tokens", [])
    kinds = fields.get("token_type") or [1] * len(tokens)
    # 1 is a token of the model, 6 one of its bytes, 4 an added word.
    added = [(token, number, kind != 4) for number, (token, kind)
             in enumerate(zip(tokens, kinds, strict=True)) if kind not in (1, 6)]
    beside = path.with_name("tokenizer.model")
    if kind == "llama" and (tokenizer := read_sentencepiece(beside, added, stated)):
        if any(tokenizer.token_bytes.get(number) != token.replace("\u2581", " ").encode()
               for number, token in enumerate(tokens) if kinds[number] == 1):
            raise ValueError(f"{beside} has other tokens than this file")
        return tokenizer
    if kind != "gpt2" or split not in GGUF_SPLITS:
        raise ValueError(f"tokenizer {kind!r} split as {split!r}, not 'gpt2' split as "
                         f"{' or '.join(GGUF_SPLITS)}, nor 'llama' with its tokenizer.model "
                         "beside the file; convert the Hugging Face folder instead")
    ids = {token: number for number, token in enumerate(tokens)}
    whole_words = GGUF_SPLITS[split] == LLAMA3_SPLIT  # as in llama.cpp
    return build_bpe(ids, fields["merges"], whole_words, added, stated, GGUF_SPLITS[split])
