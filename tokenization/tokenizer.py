"""Text to token ids and back, over tiktoken or sentencepiece.

- Text is always encoded as ordinary text: a user who types `<|eot_id|>` gets letters, not the
  special token. Templates put special tokens in by name (templates.py).
- A byte-level BPE of any origin runs in tiktoken, which merges by rank in the list of merges.
  Measured on 200,000 random pairs and triples of SmolLM2's tokens: the ids are those of merging by
  the list itself.
- conversion/tokenizer_readers.py makes a Tokenizer from foreign files, once, at conversion.
"""

import base64
import codecs
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import sentencepiece
import tiktoken

from common.files import parse_value, read_json, write_json

CUT = 10_000  # characters of white space at once: a million overflow tiktoken's regex
LONG_SPACE = rf"(?<!\s)(?:\s{{{CUT}}})+"  # looked for only where white space begins
STARTS = ("<|begin_of_text|>", "<s>")  # where a model's files do not say which
STOPS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "</s>", "<|end_of_text|>", "<|endoftext|>")
# Settings in `tokenizer.json`; older files lack the later ones.
FIRST = {"special_tokens": dict[str, int], "template": str, "image_token": str, "pattern": str}
LATER = {"mergeable": int, "words": dict[str, int], "start": str, "stops": list[str]}


class Tokenizer:
    """Text to ids and back. `Tokenizer.load` reads what `save` wrote.

    `encode` is literal: nothing is put in front, and names of special tokens are text. A byte that
    the vocabulary lacks is left out, as by Hugging Face. (SmolLM2 lacks six control characters and
    the lead bytes of unassigned characters.)

    Raises ValueError for a model that tiktoken or sentencepiece refuses, and for an image token
    that does not exist or has another use.
    """

    def __init__(
        self,
        model: dict[bytes, int] | bytes,  # tiktoken: bytes -> id in merge order; or the protobuf
        special_tokens: dict[str, int],
        template: str,  # a key of templates.TEMPLATES
        image_token: str,  # the special token that stands for an image
        pattern: str = "",  # the regex by which tiktoken splits
        mergeable: int | None = None,  # tiktoken: text becomes the first ones only. None: all
        words: dict[str, int] | None = None,  # added ones: one token each, wherever text has them
        start: str | None = None,  # name of the start token, "": none. None: as STARTS
        stops: list[str] | None = None,  # names of the stop tokens. None: as STOPS
    ):
        self.kind = "tiktoken" if isinstance(model, dict) else "sentencepiece"
        self.model, self.special_tokens, self.pattern = model, special_tokens, pattern
        self.template, self.image_token = template, image_token
        self.mergeable = len(model) if mergeable is None else mergeable
        self.words, cuts = words or {}, [LONG_SPACE] if self.kind == "tiktoken" else []
        cuts += map(re.escape, sorted(self.words, key=len, reverse=True))  # the longest first
        self._cut = re.compile(f"({'|'.join(cuts) or '(?!)'})")
        engine = self._start_tiktoken if self.kind == "tiktoken" else self._start_sentencepiece
        # By id; special tokens have no bytes.
        self.token_bytes = engine() | {token: word.encode() for word, token in self.words.items()}
        ids = {*self.token_bytes, *special_tokens.values()}
        if min(ids) < 0:
            raise ValueError(f"token id {min(ids)} is negative")
        self.vocab_size = 1 + max(ids)
        usual = [name for name in STARTS if name in special_tokens]
        self.start = "".join(usual[:1]) if start is None else start
        self.bos_id = self.special(self.start) if self.start else None
        usual = [name for name in STOPS if name in special_tokens]
        self.stops = usual if stops is None else stops
        self.stop_ids = tuple(map(self.special, self.stops))
        self.image_id = self.special(image_token)
        self.pad_id = self.stop_ids[-1] if self.stop_ids else 0
        if self.image_id in (*self.stop_ids, self.bos_id, self.pad_id):
            raise ValueError(f"image token {image_token} has another use: "
                             "choose an unused special token")

    def _start_tiktoken(self) -> dict[int, bytes]:
        """Set `_bpe`, whose tokens are ranks, and `_ids`, rank -> id. Return the bytes of an id."""
        ranks = {word: rank for rank, word in enumerate([*self.model][: self.mergeable])}
        self._ids = [*self.model.values()][: self.mergeable]
        # tiktoken needs a token for each byte. Where the vocabulary has none, one is made up here.
        # Its id is -1, and `encode` drops it.
        for byte in (bytes([value]) for value in range(256)):
            if byte not in ranks:
                ranks[byte] = len(ranks)
                self._ids.append(-1)
        self._bpe = tiktoken.Encoding("", pat_str=self.pattern, mergeable_ranks=ranks,
                                      special_tokens={})
        return {token: word for word, token in self.model.items()}

    def _start_sentencepiece(self) -> dict[int, bytes]:
        """Set `_sp`. Return the bytes of each id."""
        # A space is put before every text unless normalizer_spec.add_dummy_prefix is false. Two
        # protobufs, one behind the other, merge into one: here field 3 (normalizer_spec) of 2
        # bytes, in it field 3 (add_dummy_prefix) = 0.
        model = self.model + b"\x1a\x02\x18\x00"
        try:
            self._sp = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer.model: not of sentencepiece: {error}") from None
        pieces = {token: sp.IdToPiece(token) for token in range(sp.GetPieceSize())}
        first = [pieces.get(token) for token in range(3)]
        if first != [*self.special_tokens][:3] or not sp.IsByte(3):
            raise ValueError("tokenizer.model: another kind of sentencepiece model: "
                             "Llama's has <unk>, <s>, </s>, then bytes")
        words = {token: bytes.fromhex(piece[3:5]) if sp.IsByte(token)  # spelled <0x0A>
                 else piece.replace("\u2581", " ").encode() for token, piece in pieces.items()}
        return words | dict.fromkeys(self.special_tokens.values(), b"")

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer.model` (lines in merge order, or the protobuf)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(self, name) for name in ("kind", *FIRST, *LATER)}
        settings["engine_size"] = len(self.model)
        model = self.model
        if self.kind == "tiktoken":
            lines = (base64.b64encode(word) + b" %d\n" % token for word, token in model.items())
            model = b"".join(lines)
        (folder / "tokenizer.model").write_bytes(model)
        write_json(folder / "tokenizer.json", settings)

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """What `save` wrote. FileNotFoundError, or ValueError for a foreign or damaged file."""
        path, model_path = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer.model"
        settings = read_json(path, kind=str, **FIRST, engine_size=int)
        model = (read_ranks if settings["kind"] == "tiktoken" else Path.read_bytes)(model_path)
        later = {name: parse_value(f"{path}: {name}", settings[name], kind)
                 for name, kind in LATER.items() if name in settings}
        try:
            tokenizer = cls(model, *(settings[name] for name in FIRST), **later)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        found, saved = len(tokenizer.model), settings["engine_size"]
        if found != saved:
            raise ValueError(f"{model_path}: damaged, "
                             f"{saved} entries were saved and {found} are there")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, all of it ordinary. A lone surrogate becomes a question mark."""
        text = text.encode("utf-8", "replace").decode()
        ids = []
        for part in self._cut.split(text):
            if part in self.words:
                ids.append(self.words[part])
            elif self.kind == "sentencepiece":
                ids += self._sp.Encode(part)
            else:
                step = CUT if part.isspace() else len(part) or 1
                pieces = (part[i : i + step] for i in range(0, len(part), step))
                ids += [self._ids[n] for piece in pieces for n in self._bpe.encode_ordinary(piece)]
        return [token for token in ids if token >= 0]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; incomplete UTF-8 becomes U+FFFD; special tokens have no text."""
        words = (self.token_bytes.get(token, b"") for token in ids)
        return b"".join(words).decode("utf-8", "replace")

    def special(self, name: str) -> int:
        """Id of a special token. ValueError where there is none of that name."""
        if name not in self.special_tokens:
            known = list(self.special_tokens)[:20]
            raise ValueError(f"no special token {name!r}; there are {known}")
        return self.special_tokens[name]


def read_ranks(path: Path) -> dict[bytes, int]:
    """tiktoken's file in merge order, lines of base64 and id. ValueError names a broken line."""
    ranks = {}
    if not path.is_file():  # a pipe would block
        raise FileNotFoundError(f"{path}: no such file")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            word, token = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(token)
        except ValueError:
            raise ValueError(f"{path}:{number}: {line[:40]!r} is not 'base64 number'") from None
    return ranks


class Stream:
    """Token ids in, text out, in pieces that add up to the answer without outer white space."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text, self.shown = "", ""

    def add(self, token: int) -> None:
        """Take a token and pass on what is complete: half a character and white space wait."""
        self.text += self.decoder.decode(self.tokenizer.token_bytes.get(token, b""))
        new = self.text.strip()[len(self.shown) :]
        self.shown += new
        if new:
            self.on_text(new)
