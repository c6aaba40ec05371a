"""ask.py: questions packed behind one picture are answered as if each were asked alone."""


import pytest
import torch
from PIL import Image

from evaluation.ask import Asker, Question, answer_rows
from tokenization.templates import render
from clip import preprocess
from generate import generate
from iaa import IAA, Adaptor, AdaptorConfig
from tokenization.tokenizer import Tokenizer

SYSTEM = {"mm": {"template": "chatml", "system": "Be brief."}}


@pytest.fixture
def asker(tiny_base, tmp_path):
    """An Asker over a tiny model whose random weights answer with many different tokens."""
    llama, clip = tiny_base(tmp_path / "base")
    tokenizer = Tokenizer.load(tmp_path / "base" / "llama")
    iaa = IAA(llama, clip, tokenizer.image_id)
    iaa.adaptors["mm"] = Adaptor(AdaptorConfig((0, 2)), llama.config, clip.config.width)
    for weight in iaa.adaptors["mm"].parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return Asker(iaa.eval(), tokenizer, SYSTEM, 400)


@pytest.fixture
def pictures(tmp_path):
    """Three files, two of one content."""
    colours = {"a": "red", "b": "blue"}
    for name, colour in colours.items():
        Image.new("RGB", (40, 20), colour).save(tmp_path / f"{name}.png")
    return [tmp_path / "a.png", tmp_path / "b.png", (tmp_path / "a.png").read_bytes()]


def alone(asker, question, max_tokens):
    """The answer of `IAA.generate` to one question in a batch of its own."""
    clip = asker.model.clip.config
    ids, _ = render(asker.tokenizer, [("user", question.text)], "chatml", "Be brief.", clip.patches)
    images = preprocess(question.picture(), clip)[None]
    answer = generate(asker.model, [ids], images, "mm", max_tokens, asker.tokenizer.stop_ids)
    return asker.tokenizer.decode(answer[0]).strip()


def test_packed_answers_are_those_asked_alone(asker, pictures):
    """Several questions a picture, one, and a picture from bytes; each gets its own answer."""
    texts = ["what?", "is there a red shape in it?", "how many", "a", "where is the triangle", "b?"]
    images = [pictures[i] for i in (0, 0, 1, 0, 2, 1)]
    questions = [Question(str(n), t, i) for n, (t, i) in enumerate(zip(texts, images, strict=True))]
    got = dict(asker.ask(questions, "mm", 12))
    assert got == {n: alone(asker, question, 12) for n, question in enumerate(questions)}
    assert len(set(got.values())) > 3  # they differ: a mix-up would show


def test_an_answer_that_ends_leaves_the_others_alone(asker, pictures):
    """With a token that some answers hold as stop, these are cut there and the rest go on."""
    questions = [Question(str(n), text, pictures[0]) for n, text in enumerate(("x", "yes?", "zz"))]
    row, = asker.rows(questions, "mm", 10)
    images = preprocess(questions[0].picture(), asker.model.clip.config)[None]
    free, = answer_rows(asker.model, [row], images, "mm", 10, (), 0)
    stop = free[0][4]
    cut, = answer_rows(asker.model, [row], images, "mm", 10, (stop,), 0)
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert cut == expected and sorted(map(len, free)) == [10, 10, 10] and len(cut[0]) <= 4


def test_rows_hold_a_picture_each_and_fit_a_batch(asker, pictures):
    """One row a picture, in bytes or on disk, and a new one where its questions outgrow a batch."""
    questions = [Question(str(n), "w" * 30, pictures[n % 3]) for n in range(9)]
    rows = asker.rows(questions, "mm", 8)
    assert [len(row.indices) for row in rows] == [3, 3, 3]
    assert sorted(i for row in rows for i in row.indices) == [*range(9)]
    asker.batch_tokens = len(rows[0]) - 1
    assert sorted(len(row.indices) for row in asker.rows(questions, "mm", 8)) == [1] * 3 + [2] * 3
    assert {i for i, _ in asker.ask(questions, "mm", 1)} == {*range(9)}


def test_clear_errors(asker, pictures):
    """A broken picture and a prompt beyond the context name the question."""
    with pytest.raises(ValueError, match="q7: <embedded picture>: not a readable [^0]*$"):
        next(asker.ask([Question("q7", "?", pictures[2][:40])], "mm", 4))
    with pytest.raises(ValueError, match="question q8: .* exceed the context of 400"):
        next(asker.ask([Question("q8", "long" * 100, pictures[0])], "mm", 4))


def test_pads_change_nothing(asker, pictures):
    """Whatever token fills the shorter row; but the image's is refused, not taken for a picture."""
    questions = [Question("0", "a", pictures[0]), Question("1", "where is it?", pictures[1])]
    rows, clip = asker.rows(questions, "mm", 6), asker.model.clip.config
    images = torch.stack([preprocess(questions[r.indices[0]].picture(), clip) for r in rows])

    def answers(pad):
        return answer_rows(asker.model, rows, images, "mm", 6, (), pad)

    assert len(rows[0]) < len(rows[1]) and answers(0) == answers(65) == answers(257)
    with pytest.raises(ValueError, match="image placeholders for 2 images"):
        answers(asker.tokenizer.image_id)
