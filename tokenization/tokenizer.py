"""Text to token ids and back, for every tokenizer that a Llama comes with.

- Text is always encoded as ordinary text: a user who types `<|eot_id|>` gets letters, not the
  special token. Special ids are put in by templates (chat.py), by name.
- Byte-level BPE of any origin runs in tiktoken, by rank in the merge list. (Measured on 200,000
  random pairs and triples of SmolLM2's tokens: the ids are those of merging by the list itself.)

Sources: meta-llama/llama3, SmolLM2's and llama.cpp's files.
"""

import base64
import codecs
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece
import tiktoken

from common.files import read_json

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
GGUF_SPLITS = {
    "llama-bpe": LLAMA3_SPLIT,
    "smollm": DIGITS_SPLIT,
    "gpt-2": GPT2_SPLIT,
    "default": GPT2_SPLIT,
}
LONG_SPACE = re.compile(r"(\s{10000})")  # cut there: a million overflow tiktoken's regex
LLAMA3_TOKENS = 128000  # ahead of the special ones


def llama3_specials(version: str) -> dict[str, int]:
    """Name -> id of the 256 special tokens of Llama 3 ("3"), or of 3.1 and 3.2 ("3.1")."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id",
             9: "eot_id"}
    if version == "3.1":
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    elif version != "3":
        raise ValueError(f"Llama version {version!r}: it is 3, or 3.1 for 3.1 and 3.2")
    reserved = [place for place in range(256) if place not in named]
    named |= {place: f"reserved_special_token_{number}" for number, place in enumerate(reserved)}
    return {f"<|{named[place]}|>": LLAMA3_TOKENS + place for place in range(256)}


def gpt2_bytes() -> dict[str, int]:
    """GPT-2's printable character -> byte: in these a `tokenizer.json` or a GGUF spells tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def merge_order(vocab: dict[str, int], merges: list) -> dict[bytes, int]:
    """Bytes -> id in the order for tiktoken to merge: bytes, the merges, what no merge makes."""
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
    *before, last = [{"use_regex": True} | step for step in steps] or [{}]
    pattern = None
    match before, last:
        case [], {"type": "ByteLevel", "use_regex": True}:
            pattern = GPT2_SPLIT
        case (
            [{"type": "Digits", "individual_digits": True}],
            {"type": "ByteLevel", "use_regex": True},
        ):
            pattern = DIGITS_SPLIT
        case (
            [{"type": "Split", "behavior": "Isolated", "invert": False,
              "pattern": {"Regex": regex}}],
            {"type": "ByteLevel", "use_regex": False},
        ):
            pattern = regex
    unknown = ("unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix",
               "dropout")
    odd = [key for key in unknown if model.get(key)]
    odd += ["normalizer"] if tokenizer_json.get("normalizer") else []
    if not pattern or odd or model.get("type") != "BPE" or last.get("add_prefix_space", True):
        found = [step.get("type") for step in steps]
        raise ValueError(
            f"{model.get('type')} with {odd} after {found}: supported is plain BPE after ByteLevel,"
            " Split (regex, isolated) + ByteLevel or Digits (individual) + ByteLevel,"
            " without prefix space; or sentencepiece in tokenizer.model"
        )
    return pattern


class Tokenizer:
    """Text to ids and back, over tiktoken or sentencepiece; made by a `from_...` method or `load`.

    `encode` is literal: nothing is put in front, names of special tokens are text. A byte that the
    vocabulary lacks (SmolLM2: six control characters, lead bytes of unassigned ones) is left out,
    as by Hugging Face.
    """

    def __init__(
        self,
        engine: dict[bytes, int] | bytes,  # tiktoken's in merge order, or sentencepiece's protobuf
        special_tokens: dict[str, int],
        template: str,  # a key of chat.TEMPLATES
        image_token: str,  # the special token that stands for an image
        pattern: str = "",  # by which tiktoken splits
    ):
        self.kind = "tiktoken" if isinstance(engine, dict) else "sentencepiece"
        self.engine, self.special_tokens, self.pattern = engine, special_tokens, pattern
        self.template, self.image_token = template, image_token
        words = self._start_tiktoken() if self.kind == "tiktoken" else self._start_sentencepiece()
        self.vocab_size = 1 + max(*words, *special_tokens.values())
        # By id; special tokens have no bytes.
        self.token_bytes = [words.get(token, b"") for token in range(self.vocab_size)]
        stops = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "</s>", "<|end_of_text|>",
                 "<|endoftext|>")
        self.bos_id = special_tokens.get("<|begin_of_text|>", special_tokens.get("<s>"))
        self.stop_ids = tuple(special_tokens[name] for name in stops if name in special_tokens)
        self.image_id = self.special(image_token)
        self.pad_id = self.stop_ids[-1] if self.stop_ids else 0
        if self.image_id in (*self.stop_ids, self.bos_id, self.pad_id):
            raise ValueError(f"image token {image_token} has another use: "
                             "choose an unused special token")

    def _start_tiktoken(self) -> dict[int, bytes]:
        ranks = {word: rank for rank, word in enumerate(self.engine)}
        for byte in range(256):
            ranks.setdefault(bytes([byte]), len(ranks))  # tiktoken needs all bytes; -1: dropped
        ids = [*self.engine.values()] + [-1] * (len(ranks) - len(self.engine))
        self._ids = None if ids == list(range(len(ids))) else ids  # rank -> id, None: equal
        try:
            self._bpe = tiktoken.Encoding("", pat_str=self.pattern, mergeable_ranks=ranks,
                                          special_tokens={})
        except Exception as error:  # tiktoken has its own kinds
            raise ValueError(f"tiktoken refuses the split {self.pattern!r}: {error}") from None
        return {token: word for word, token in self.engine.items()}

    def _start_sentencepiece(self) -> dict[int, bytes]:
        # Protobuf merges what comes twice: this sets normalizer_spec.add_dummy_prefix to false.
        model = self.engine + b"\x1a\x02\x18\x00"
        try:
            self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a sentencepiece model: {error}") from None
        pieces = {token: sp.IdToPiece(token) for token in range(sp.GetPieceSize())}
        first = [pieces.get(token) for token in range(3)]
        if first != list(self.special_tokens) or not sp.IsByte(3):
            raise ValueError("another kind of sentencepiece model: "
                             "Llama's has <unk>, <s>, </s>, then bytes")
        words = {token: piece.replace("\u2581", " ").encode() for token, piece in pieces.items()}
        bytewise = [token for token in pieces if sp.IsByte(token)]  # spelled <0x0A>
        words |= {token: bytes.fromhex(pieces[token][3:5]) for token in bytewise}
        return words | dict.fromkeys(self.special_tokens.values(), b"")

    @classmethod
    def from_llama3(cls, path: str | Path, version: str = "3") -> "Tokenizer":
        """Meta's `tokenizer.model` (lines: base64, rank) of Llama "3", or "3.1" (3.2 too)."""
        engine, specials = read_ranks(Path(path)), llama3_specials(version)
        if list(engine.values()) != list(range(LLAMA3_TOKENS)):
            raise ValueError(f"{path}: {len(engine)} tokens: "
                             f"Llama 3 has {LLAMA3_TOKENS}, numbered from 0")
        return cls(engine, specials, *guess_template(specials), LLAMA3_SPLIT)

    @classmethod
    def from_sentencepiece(cls, path: str | Path) -> "Tokenizer":
        """Llama 2's or Vicuna's `tokenizer.model`. Image token: <unk>, which no text makes."""
        return cls(read_bytes(Path(path)), {"<unk>": 0, "<s>": 1, "</s>": 2}, "vicuna", "<unk>")

    @classmethod
    def from_hf(cls, folder: str | Path) -> "Tokenizer":
        """A Hugging Face folder: sentencepiece `tokenizer.model`, else BPE in `tokenizer.json`."""
        path, model_path = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer.model"
        if model_path.is_file() and read_bytes(model_path)[:1] == b"\n":  # protobuf: sentencepiece
            return cls.from_sentencepiece(model_path)
        settings = read_json(path)
        try:
            pattern, model = hf_split(settings), settings["model"]
            specials = {token["content"]: token["id"] for token in settings["added_tokens"]}
            vocab = {token: n for token, n in model["vocab"].items() if token not in specials}
            engine = merge_order(vocab, model["merges"])
            return cls(engine, specials, *guess_template(specials), pattern)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_gguf(cls, fields: dict) -> "Tokenizer":
        """The metadata of a GGUF file, name -> value; of its kinds byte-level BPE ("gpt2")."""
        model = fields.get("tokenizer.ggml.model")
        split = fields.get("tokenizer.ggml.pre", "default")
        if model != "gpt2" or split not in GGUF_SPLITS:
            raise ValueError(
                f"GGUF tokenizer {model!r} split as {split!r}: supported is 'gpt2' split as one of"
                f" {', '.join(GGUF_SPLITS)}; convert the Hugging Face folder instead"
            )
        names = ("tokens", "token_type", "merges")
        tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"] for name in names)
        ids = {token: number for number, token in enumerate(tokens)}
        pairs = zip(tokens, kinds, strict=True)
        specials = {token: ids[token] for token, kind in pairs if kind != 1}  # 1: ordinary
        vocab = {token: number for token, number in ids.items() if token not in specials}
        engine = merge_order(vocab, merges)
        return cls(engine, specials, *guess_template(specials), GGUF_SPLITS[split])

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer.model` (lines in merge order, or the protobuf)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = ("kind", "pattern", "template", "image_token", "special_tokens")
        settings = {name: getattr(self, name) for name in names} | {"engine_size": len(self.engine)}
        model = self.engine
        if self.kind == "tiktoken":
            lines = (base64.b64encode(word) + b" %d\n" % token for word, token in model.items())
            model = b"".join(lines)
        (folder / "tokenizer.model").write_bytes(model)
        text = json.dumps(settings, indent=1) + "\n"
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """What `save` wrote. FileNotFoundError, or ValueError for a foreign or damaged file."""
        path, model_path = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer.model"
        settings = read_json(path, kind=str, special_tokens=dict[str, int], template=str,
                             image_token=str, pattern=str, engine_size=int)
        read = {"tiktoken": read_ranks, "sentencepiece": read_bytes}.get(settings["kind"])
        if read is None:
            raise ValueError(f"{path}: kind = {settings['kind']!r}: tiktoken or sentencepiece")
        names = ("special_tokens", "template", "image_token", "pattern")
        tokenizer = cls(read(model_path), *(settings[name] for name in names))
        found, saved = len(tokenizer.engine), settings["engine_size"]
        if found != saved:
            raise ValueError(f"{model_path}: damaged, "
                             f"{saved} entries were saved and {found} are there")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all of it ordinary. A lone surrogate becomes a question mark."""
        text = text.encode("utf-8", "replace").decode()
        if self.kind == "sentencepiece":
            return self._sp.Encode(text)
        parts = LONG_SPACE.split(text)
        ranks = [rank for part in parts for rank in self._bpe.encode_ordinary(part)]
        if self._ids is None:
            return ranks
        return [self._ids[rank] for rank in ranks if self._ids[rank] >= 0]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of `ids`; special tokens and ids past the vocabulary (a padded head) have none."""
        return b"".join(self.token_bytes[token] for token in ids if 0 <= token < self.vocab_size)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; incomplete UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> Callable[..., str]:
        """A function of the next ids that returns the text now complete; `final=True` ends it."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda *ids, final=False: decoder.decode(self.decode_bytes(ids), final)

    def special(self, name: str) -> int:
        """Id of a special token. ValueError where there is none of that name."""
        if name not in self.special_tokens:
            known = list(self.special_tokens)[:20]
            raise ValueError(f"no special token {name!r}; there are {known}")
        return self.special_tokens[name]


def guess_template(specials: dict[str, int]) -> tuple[str, str]:
    """(template, image token) for these special tokens. ValueError where none can be an image."""
    marks = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml"}
    template = next((name for mark, name in marks.items() if mark in specials), "plain")
    known = ("<|reserved_special_token_44|>", "<empty_output>", "<filename>", "<|image_pad|>")
    for name in known:
        if name in specials:
            return template, name
    raise ValueError(f"no special token for images: {' or '.join(known)} is needed, "
                     f"not {[*specials][:20]}")


def read_bytes(path: Path) -> bytes:
    """The file. FileNotFoundError in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path.read_bytes()


def read_ranks(path: Path) -> dict[bytes, int]:
    """tiktoken's file in merge order, lines of base64 and id. ValueError names a broken line."""
    ranks = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        try:
            word, token = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(token)
        except ValueError:
            raise ValueError(f"{path}:{number}: {line[:40]!r} is not 'base64 number'") from None
    return ranks
