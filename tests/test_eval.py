"""eval.py: counting, the commonest answer, the text check that must be able to say no."""

import io
import json

import pytest
import torch
from PIL import Image

import eval as scoring
from ask import Asker
from chat import Tokenizer
from data import GROUNDING_PROMPT
from eval import easy_vqa, text_identical
from iaa import IAA, Adaptor, AdaptorConfig


@pytest.fixture
def data(tmp_path):
    """Two held-out pictures with three questions, four training questions."""
    Image.new("RGB", (40, 20), "white").save(tmp_path / "a.png")

    def row(turns, **extra):
        said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        said[0]["value"] = "<image>\n" + said[0]["value"]
        return {"id": "x", "image": "a.png", "workflow": "mm", "conversations": said, **extra}

    files = {
        "test-questions": [row(["q1", "red", "q2", "yes"]), row(["q3", "circle"])],
        "train-questions": [row(["q1", "blue", "q2", "no", "q3", "circle"]), row(["q", "no"])],
        "test-boxes": [row([GROUNDING_PROMPT.format("it"), "x"], width=40, height=20,
                           boxes=[[10, 0, 30, 20]])],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


@pytest.fixture
def model(tiny_base, tmp_path):
    """A tiny model with the adaptors mm and grounding, its tokenizer and the LLM's folder."""
    llama, clip = tiny_base(tmp_path / "base")
    llm = tmp_path / "base" / "llama"
    tokenizer = Tokenizer.load(llm)
    iaa = IAA(llama, clip, tokenizer.image_id)
    for name in ("mm", "grounding"):
        iaa.adaptors[name] = Adaptor(AdaptorConfig((0, 2)), llama.config, clip.config.width)
        iaa.adaptors[name].copy_frozen(llama)
    return iaa, tokenizer, llm


def test_counts_and_commonest_answers(data, model, monkeypatch):
    """Right answers are counted by kind, boxes by IoU, beside the commonest training answer."""
    iaa, tokenizer, _ = model
    answers = {"q1": "red", "q2": "no", "q3": "circle.",
               GROUNDING_PROMPT.format("it"): "[0.25, 0.25, 0.75, 0.75]"}

    def ask(self, questions, workflow, max_tokens):
        yield from enumerate(answers[question.text] for question in questions)

    monkeypatch.setattr(Asker, "ask", ask)
    out = io.StringIO()
    result = easy_vqa(data, Asker(iaa, tokenizer, {}, 4), 1000, 0, out)
    assert result["right"] == {"colour": 1, "yes/no": 0, "shape": 0}
    assert result["total"] == {"colour": 1, "yes/no": 1, "shape": 1}
    assert result["commonest"] == {"shape": 1}  # circle; blue and no are wrong here
    assert result["grounding"] == {"hits": 1, "total": 1}
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(lines) == 4 and lines[-1]["iou"] == 1.0


def test_text_check_says_yes_and_no(model):
    """Identical with adaptors loaded; one changed frozen weight is noticed."""
    iaa, tokenizer, llm = model
    text = "Some text that is long enough for two windows of the check. " * 3
    assert text_identical(iaa, llm, text, tokenizer, length=100) == (True, len(text))
    with torch.no_grad():
        iaa.llama.layers[1].ffn.down.weight[0, 0] += 0.5
    assert text_identical(iaa, llm, text, tokenizer, length=100)[0] is False


@pytest.mark.parametrize("answer, kind", [("yes", "yes/no"), ("triangle", "shape"),
                                          ("teal", "colour")])
def test_kinds(answer, kind):
    """The table's row of an answer."""
    assert scoring.question_kind(answer) == kind
