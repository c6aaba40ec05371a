"""Evaluation: questions in batches are asked alone; official rules; the commands end to end."""

import contextlib
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from processes import processes

from clip import preprocess
from common.files import load_frozen
from data import GROUNDING_PROMPT
from evaluation import __main__ as evaluation
from evaluation import easy_vqa, mme, refcoco, sheet
from evaluation.answers import Question, ask, print_table, sample_questions
from evaluation.text_retention import compare, windows
from iaa import IAA, Adaptor, AdaptorConfig
from llama import Llama
from sample import Chat, generate
from tokenization.templates import IMAGE, render
from tokenization.tokenizer import Tokenizer

SUFFIX = "\nAnswer the question using a single word or phrase."


def picture(path, colour="red"):
    """A file of 40 x 20 pixels."""
    Image.new("RGB", (40, 20), colour).save(path)
    return path


def write_rows(path, rows):
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------------------------- questions


def test_answers_of_a_batch_are_those_asked_alone(tmp_path, tiny_run):
    """Pictures and lengths differ; each question gets the answer of a batch of its own.

    The random weights answer with many different tokens.
    """
    tiny_run(tmp_path / "run")
    chat = Chat.load(tmp_path / "run", "fp32")
    iaa, tokenizer = chat.model, chat.tokenizer
    files = [picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue")]
    texts = ["what?", "is there a red shape in it?", "how many", "a", "where is the triangle", "b?"]
    questions = [Question(str(n), text, files[n % 2], (12, 9)[n == 4], ("mm", "grounding")[n == 4])
                 for n, text in enumerate(texts)]
    got = ask(chat, questions, 4)
    for question, said in zip(questions, got, strict=True):
        form = iaa.adaptors[question.workflow].prompt
        ids, _ = render(tokenizer, [("user", IMAGE + question.text)], form["template"],
                        form["system"], iaa.clip.config.patches)
        pixels = preprocess(Image.open(question.image), iaa.clip.config)[None]
        answer, = generate(iaa, [ids], pixels, question.workflow, question.max_tokens,
                           tokenizer.stop_ids)
        assert said == tokenizer.decode(answer)
    assert len(set(got)) > 3  # they differ: a mix-up would show


def test_a_question_without_its_picture_is_skipped(tmp_path, tiny_run, capsys):
    """The picture is broken, or of another size than its box: said; the others are asked."""
    tiny_run(tmp_path / "run")
    path, broken = picture(tmp_path / "a.png"), tmp_path / "b.png"
    broken.write_bytes(path.read_bytes()[:60])
    facts = {"box": [0, 0, 9, 9], "width": 40}
    questions = [Question("1", "where is it?", path, 3, "grounding", facts | {"height": 30}),
                 Question("2", "where?", path, 3, "grounding", facts | {"height": 20}),
                 Question("3", "what", broken, 3, "grounding")]  # a batch of its own
    first, asked, last = ask(Chat.load(tmp_path / "run", "fp32"), questions, 2)
    assert asked and first is last is None
    told = capsys.readouterr().err.split("\r")
    assert told[1] == (f"skipped 1: {path}: upright it has 40 x 20 pixels, "
                       "its boxes are for 40 x 30\n")
    assert told[2] == "1 of 3 questions answered"
    assert told[3].startswith(f"skipped 3: {broken}: not a readable picture")


def test_a_limit_takes_whole_pictures(tmp_path):
    """At random, the same every time, and never a part of a picture's questions."""
    questions = [Question(key, "?", tmp_path / str(n // 2), 1) for n, key in enumerate("abcdefgh")]
    assert sample_questions(questions, None) == questions
    taken = sample_questions(questions, 3)
    assert len(taken) == 4 and taken == sample_questions(questions, 3) != questions[:4]
    assert all(sum(q.image == t.image for q in taken) == 2 for t in taken)


def test_the_table(capsys):
    """Columns as they first come, counts whole, other numbers rounded, gaps blank."""
    print_table("t", {"a": {"score": 12.345, "asked": 3}, "long": {"score": 1.0, "x": "yes"}})
    assert capsys.readouterr().out.splitlines()[1:] == [
        "t        score     asked         x", "a         12.3         3          ",
        "long       1.0                 yes"]


# ---------------------------------------------------------------------------------- MME


@pytest.fixture
def mme_folder(tmp_path):
    """Both published layouts: folders of pictures and texts, and all in one."""
    root = tmp_path / "MME" / "MME_Benchmark_release_version"
    for subtask in (*mme.PERCEPTION, *mme.COGNITION):
        nested = subtask in ("artwork", "posters")
        texts = root / subtask / ("questions_answers_YN" if nested else "")
        pictures = root / subtask / ("images" if nested else "")
        texts.mkdir(parents=True)
        pictures.mkdir(exist_ok=True)
        picture(pictures / "0001.jpg")
        (texts / "._0001.txt").write_bytes(b"\0\xff")  # as a Mac leaves beside a file
        (texts / "0001.txt").write_text(
            "Is it a café?  Please answer yes or no.\tYes\r\n"
            "Is it a hat? Please answer yes or no.\tNo\n\n", encoding="utf-8")
    return tmp_path / "MME"


def test_mme_questions(mme_folder):
    """14 subtasks; the prompt of the official file, which leaves one of two spaces."""
    questions = mme.read(mme_folder)
    assert len(questions) == 28 and len({q.key for q in questions}) == 28
    first, second = (q for q in questions if q.facts["subtask"] == "artwork")
    assert (first.text, second.text) == ("Is it a café? " + SUFFIX, "Is it a hat?" + SUFFIX)
    assert first.image.parent.name == "images" and first.image.is_file()
    assert first.facts == {"subtask": "artwork", "picture": "0001", "expected": "Yes"}


@pytest.mark.parametrize("damage, message", [
    (lambda root: (root / "count/0001.jpg").unlink(), "in count, picture or text of 0001 is"),
    (lambda root: (root / "count/0001.txt").write_text("Is it?\tYes\n"), "0001.txt: not two lines"),
    (lambda root: (root / "count/0001.txt").write_text("a\tyes\nb\tno\n"), "Yes or No"),
    (lambda root: (root / "count/0001.txt").write_bytes(b"caf\xe9"), "0001.txt: not a text in UTF"),
    (lambda root: (root / "OCR").rename(root / "ocr_"), "in OCR, picture or text of all is"),
])
def test_mme_damaged(mme_folder, damage, message):
    """Half a download, another folder, swapped columns: one line each."""
    damage(mme_folder / "MME_Benchmark_release_version")
    with pytest.raises(ValueError, match=message) as error:
        mme.read(mme_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer, word", [
    ("Yes", "yes"), ("yes.", "yes"), ("No, it is not", "no"), ("NO\n", "no"),
    ("not sure", "no"),  # "no" within the first four characters
    ("a yes", "other"), ("is no", "other"),  # " yes" and "no" come too late
    ("it is no", "other"), ("unknown", "other"), ("", "other"), ("  yes", "other"),
    (" no", "no"), ("yeno", "no"), ("noyes", "no"), ("I no", "no"),
])
def test_mme_reads_four_characters(answer, word):
    """The first four characters of the lower-cased answer hold yes, or no."""
    assert mme.yes_or_no(answer) == word


def test_mme_score():
    """Two pictures, right/right and right/wrong: acc 75, acc+ 50, together 125. Then the sums."""
    def line(subtask, picture, expected, answer):
        return {"subtask": subtask, "picture": picture, "expected": expected, "answer": answer}

    pair = [line("existence", "1", "Yes", "Yes"), line("existence", "1", "No", "no"),
            line("existence", "2", "Yes", "yes"), line("existence", "2", "No", "other words")]
    assert mme.score(pair)["existence"] == {"score": 125.0, "asked": 4}
    more = [line("OCR", "1", "Yes", "Yes"), line("OCR", "1", "No", "No"),
            line("code_reasoning", "1", "Yes", "no"), line("code_reasoning", "1", "No", "no")]
    table = mme.score(more + pair)
    assert table["perception"] == {"score": 325.0, "asked": 6}
    assert table["cognition"] == {"score": 50.0, "asked": 2}
    assert list(table) == ["perception", "cognition", "existence", "OCR", "code_reasoning"]


# ---------------------------------------------------------------------------------- RefCOCO

OFFICIAL = {"sent_id": 34, "img_path": "a.png", "expression": "left mug",
            "bbox": [10.0, 5.0, 30.0, 15.0], "width": 40, "height": 20}
OURS = {"id": "refcocog/test/ref1/sent2", "image": "a.png", "source": "refcocog", "split": "test",
        "width": 40, "height": 20, "boxes": [[0, 0, 9, 9]], "conversations": [
            {"from": "human", "value": "<image>\n" + GROUNDING_PROMPT.format("mug") + "."},
            {"from": "gpt", "value": "[0.0, 0.25, 0.22, 0.48]"}]}


@pytest.fixture
def expressions(tmp_path):
    """A folder with a file of either form (and one of a Mac's), and the pictures' root in it."""
    (tmp_path / "images").mkdir()
    picture(tmp_path / "images" / "a.png")
    for name, row in (("REC_refcoco+_unc_testA", OFFICIAL), ("mine", OURS)):
        write_rows(tmp_path / f"{name}.jsonl", [row])
        write_rows(tmp_path / f"._{name}.jsonl", ["no row"])
    return tmp_path


def test_refcoco_questions(expressions):
    """Set and split from the file's name or the row; the prompt without a final full stop."""
    official, ours = refcoco.read(expressions, expressions / "images")
    assert official.key == "refcoco+/testA/34" and official.workflow == "grounding"
    assert official.text == GROUNDING_PROMPT.format("left mug")
    assert ours.text == GROUNDING_PROMPT.format("mug") and ours.key == OURS["id"]
    assert ours.facts == {"set": "refcocog test", "box": [0, 0, 9, 9], "width": 40, "height": 20}
    rows = [{key: value for key, value in OFFICIAL.items() if key != "sent_id"}]
    unnumbered, = refcoco.read(write_rows(expressions / "shikra.jsonl", rows),
                               expressions / "images")
    assert unnumbered.key == "shikra//1"  # by its line


@pytest.mark.parametrize("row, message", [
    (OFFICIAL | {"bbox": [30, 5, 10, 15]}, "is not x1, y1, x2, y2 in pixels of 40 x 20"),
    (OFFICIAL | {"bbox": [0.1, 0.2, 0.3, 0.4]}, "in pixels"),
    (OFFICIAL | {"bbox": [10, 5, 90, 15]}, "in pixels"), (OFFICIAL | {"bbox": [1, 2, 3]}, "unpack"),
    (OFFICIAL | {"img_path": "../a.png"}, "is not below"),
    (OFFICIAL | {"img_path": "/etc/passwd"}, "is not below"),
    (OFFICIAL | {"img_path": "b.png"}, "does not exist"), (OFFICIAL | {"width": None}, ""),
    (OFFICIAL | {"img_path": None}, ""), ({"expression": "mug"}, "'img_path' is missing"), ([], ""),
    (OURS | {"conversations": OURS["conversations"][:1]}, "human first and gpt last"),
])
def test_refcoco_damaged(expressions, row, message):
    """File and line are named; nothing outside of the root is read."""
    path = write_rows(expressions / "mine.jsonl", [OURS, row])
    with pytest.raises(ValueError, match=f"mine.jsonl:2: .*{message}") as error:
        refcoco.read(path, expressions / "images")
    assert "\n" not in str(error.value)


def test_refcoco_needs_its_pictures_and_whole_lines(expressions):
    """No root, a line cut off, an empty folder."""
    with pytest.raises(ValueError, match="--images"):
        refcoco.read(expressions, None)
    (expressions / "mine.jsonl").write_text(json.dumps(OURS)[:-9])
    with pytest.raises(ValueError, match="mine.jsonl:1: "):
        refcoco.read(expressions / "mine.jsonl", expressions)
    with pytest.raises(FileNotFoundError, match="no .*jsonl"):
        refcoco.read(expressions / "images", expressions)


TRUTH = {"box": [100, 50, 300, 250], "width": 640, "height": 480}
HIT, MISS = "[0.16, 0.2, 0.47, 0.52]", "[0.0, 0.12, 0.1, 0.3]"


@pytest.mark.parametrize("answer, right", [
    (HIT, 1), (HIT.replace(" ", ""), 1), (MISS, 0),
    (f"{MISS}; {HIT}", 1), (f"{MISS}; {MISS}", 0),  # any of several boxes
    (f"{HIT}; what?", 1), (f"{HIT}; ", 1),  # what comes behind a hit is not looked at
    (f"what?; {HIT}", 0),  # a malformed piece ahead of it ends the reading
    (f"The box is {HIT}", 0), (f"{HIT}.", 0), (f"{MISS}; ", 0),
    (f"{MISS};{HIT}", 0),  # joined without a space: one piece
    ('{"bbox": [0.16, 0.2, 0.47, 0.52]}', 0), ("{}", 0), ("", 0), ("[0.16, 0.2, 0.47]", 0),
    ("[a, b, c, d]", 0), ("0.16, 0.2, 0.47, 0.52", 1), ("[0.16, 0.2, 0.47, 0.52, 9]", 1),
    ("[0.47, 0.52, 0.16, 0.2]", 0), ("__import__('os')", 0), ("[1, 1.0, 1, 1]", 0), ("[" * 5000, 0),
])
def test_refcoco_official_rule(answer, right):
    """Any box of the answer counts, unless a piece ahead of it is no box."""
    assert refcoco.official_hit(TRUTH | {"answer": answer}) == bool(right)


def test_refcoco_score():
    """A row for each set and split."""
    records = [TRUTH | {"set": name, "answer": answer} for name, answer in (
        ("refcoco val", f"{MISS}; {HIT}"), ("refcoco val", "?"), ("refcoco testA", HIT))]
    assert refcoco.score(records) == {"refcoco val": {"official": 50.0, "asked": 2},
                                      "refcoco testA": {"official": 100.0, "asked": 1}}


# ---------------------------------------------------------------------------------- easy-VQA


def test_easy_vqa_score():
    """The last word, by kind; the commonest answer; boxes by the first in the text."""
    def line(expected, answer, commonest):
        return {"expected": expected, "answer": answer, "commonest": commonest}

    words = [line("red", "red", "blue"), line("no", "not", "yes"),
             line("It is red, so yes.", "It is blue, so yes.", "yes")]
    boxes = [TRUTH | line(HIT, answer, "") for answer in (f"It is {HIT}.", f"{MISS}; {HIT}")]
    table = easy_vqa.score([*words, *boxes])  # of an answer's boxes the first counts
    assert table["asked"] == {"colour": 1, "yes/no": 2, "all": 3, "boxes, IoU 0.5": 2}
    assert table["commonest answer, %"] == {"colour": 0.0, "yes/no": 50.0,
                                            "all": pytest.approx(100 / 3)}
    assert table["right, %"] == {"colour": 100.0, "yes/no": 50.0, "all": pytest.approx(200 / 3),
                                 "boxes, IoU 0.5": 50.0}
    assert list(table)[-1] == "right, %"  # the line that everybody looks for ends the table


@pytest.fixture
def world(tmp_path, tiny_run):
    """A model in `run`, and four pictures with seven questions and a box each in `data`."""
    data = tmp_path / "data"
    data.mkdir()
    tiny_run(tmp_path / "run")

    def row(number, turns, **extra):
        said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        said[0]["value"] = "<image>\n" + said[0]["value"]
        return {"id": f"x/{number}", "image": f"{number}.png", "workflow": "mm",
                "conversations": said, **extra}

    for number in range(4):
        picture(data / f"{number}.png", ("red", "blue", "teal", "gray")[number])
    asked = [("what?", "red", "is it?", "yes"), ("which", "circle"), ("is", "no", "not?", "no"),
             ("colour", "teal", "shape?", "circle")]
    write_rows(data / "test-questions.jsonl", [row(n, turns) for n, turns in enumerate(asked)])
    write_rows(data / "train-questions.jsonl",
               [row(9, ["q", "blue", "q", "It is red, so yes.", "q", "circle"]),
                row(9, ["q", "It is red, so no.", "q", "It is blue, so no."])])
    box = {"workflow": "grounding", "width": 40, "height": 20, "boxes": [[0, 0, 9, 9]]}
    write_rows(data / "test-boxes.jsonl",
               [row(n, [f"where {n}?", "[0.0, 0.25, 0.22, 0.48]"], id=f"box/{n}", **box)
                for n in range(4)])
    return tmp_path


def test_easy_vqa_questions(world):
    """Each question alone, with the commonest training answer of its kind, and boxes."""
    questions = easy_vqa.read(world / "data")
    assert len(questions) == 11 and len({q.key for q in questions}) == 11
    first = questions[0]
    assert (first.key, first.text, first.workflow) == ("x/0/1", "what?", "mm")
    assert [q.facts["commonest"] for q in questions[:3]] == ["blue", "no", "circle"]
    assert questions[7].workflow == "grounding" and questions[7].facts["box"] == [0, 0, 9, 9]


@pytest.mark.parametrize(("change", "message"), [
    ({"boxes": []}, "list index out of range"),
    ({"conversations": []}, "turns must be of human and gpt"),
    ({"image": "gone.png"}, "does not exist"),
])
def test_a_damaged_row_of_easy_vqa(world, change, message):
    """One line with the file and the line of it."""
    path = world / "data/test-boxes.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps(json.loads(first) | change) + "\n" + "".join(others))
    with pytest.raises(ValueError, match=f"test-boxes.jsonl:1: .*{message}"):
        easy_vqa.read(world / "data")


def go(world, what="easy-vqa", *more):
    """A command on the world's data and model, in fp32: what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluation.main([what, str(world / "data"), "--model", str(world / "run"),
                         "--dtype", "fp32", *more])
    return out.getvalue()


def saved(world):
    """The records on disk."""
    lines = (world / "run/eval/easy-vqa/answers.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_benchmark_end_to_end(world, capsys):
    """Every question once; answers and scores on disk; two ranks write the same, and one table."""
    table, told = go(world, "easy-vqa", "--batch", "3").splitlines(), capsys.readouterr().err
    assert "11 of 11 questions answered" in told and "computing in fp32" in told
    assert table[-1].startswith("right, %") and len(table[-1].split()) == 2 + 5
    records = saved(world)
    assert [r["key"] for r in records] == [q.key for q in easy_vqa.read(world / "data")]
    assert {"key", "image", "prompt", "answer", "expected", "commonest"} == records[0].keys()
    scores = json.loads((world / "run/eval/easy-vqa/scores.json").read_text())
    assert scores["asked"]["all"] == 7 and scores["asked"]["boxes, IoU 0.5"] == 4
    with processes(2, go, world) as (_, result):
        said = dict(result(120) for _ in range(2))
    assert said[0].splitlines() == table and said[1] == "" and saved(world) == records


def test_an_adaptor_that_is_not_there(world):
    """Without grounding its questions are left out; without any adaptor there is nothing to ask."""
    path = world / "run" / "iaa.json"
    index = json.loads(path.read_text()) | {"adaptors": {"mm": "mm"}}
    path.write_text(json.dumps(index))
    assert "boxes" not in go(world) and len(saved(world)) == 7
    path.write_text(json.dumps(index | {"adaptors": {}}))
    with pytest.raises(SystemExit, match="no adaptor named 'mm'"):
        go(world)


def test_no_picture_can_be_read(world):
    """There is nothing to score."""
    for path in (world / "data").glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(SystemExit, match="none of 11 questions could be asked"):
        go(world)


@pytest.mark.parametrize("arguments, message", [
    (("mme", "."), "not MME's folder"), (("refcoco", "."), "--images FOLDER is needed"),
    (("mme", ".", "--limit", "0"), "--limit 0: must be 1"),
    (("mme", ".", "--images", "."), "--images is for refcoco, not for mme"),
    (("easy-vqa", ".", "--workflow", "mm"), "--workflow is for text-retention, lm, lmms, not"),
    (("lmms", ".", "--allow-code-execution"), "--allow-code-execution is for lm, not for lmms"),
    (("easy-vqa", ".", "--model", "nowhere"), "train-questions.jsonl"),
    (("text-retention", "nowhere.txt"), "nowhere.txt"),
])
def test_clear_errors(arguments, message, tmp_path, monkeypatch):
    """One line that names the file or the option."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        evaluation.main(list(arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments", [("lm", "mmlu"), ("mme", ".", "--device", "cpu")])
def test_what_several_ranks_cannot_do(arguments, monkeypatch):
    """Each has a device of its own, and nobody shares out lm's questions."""
    monkeypatch.setattr(evaluation.Ranks, "__enter__", lambda self: SimpleNamespace(world=2))
    with pytest.raises(SystemExit, match="lm and --device are for one process: no torchrun"):
        evaluation.main(list(arguments))


# ---------------------------------------------------------------------------------- the sheet


def test_the_sheet(world):
    """Some questions of each kind, no picture twice; a wrong answer is red, a right one is not."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    path = world / "run" / "answers.png"
    assert go(world, "sheet").strip() == str(path) and path.is_file()
    chosen = sheet.choose(easy_vqa.read(world / "data"))
    assert len({q.image for q in chosen}) == len(chosen) > 2
    question = next(q for q in chosen if q.workflow == "mm")
    expected = question.facts["expected"]
    for answer, text, colour in (("$nonsense", f"$nonsense\nright: {expected}", sheet.RED),
                                 (expected, expected, sheet.GREEN)):
        axis = Figure().subplots()
        sheet.draw_tile(axis, {"image": question.image, "prompt": question.text,
                               "answer": answer, **question.facts})
        assert (axis.xaxis.label.get_text(), axis.xaxis.label.get_color()) == (text, colour)
        assert axis.get_title("left") == question.text


# ---------------------------------------------------------------------------------- text

TEXT = "Some text that is long enough for two windows of the comparison. " * 9


@pytest.fixture
def changed(tiny_base, tmp_path):
    """A tiny model with adaptors: mm, and llava with an LLM of its own, a little changed."""
    llama, clip = tiny_base(tmp_path)
    iaa = IAA(llama, clip, 258)
    for name, config in (("mm", AdaptorConfig((0, 2))),
                         ("llava", AdaptorConfig((), own_embedding=False, own_head=False,
                                                 own_llm=True))):
        iaa.adaptors[name] = Adaptor(config, llama.config, clip.config.width)
        iaa.adaptors[name].init_from_frozen(llama)
    with torch.no_grad():
        for weight in iaa.adaptors["llava"].parameters():
            weight += 0.05 * torch.randn_like(weight)
    base = IAA(load_frozen(Llama, tmp_path / "llama", torch.float32), clip, 258)
    return iaa.eval(), base, Tokenizer.load(tmp_path / "llama")


def test_text_is_kept_and_llava_is_not(changed):
    """The text workflow: exactly zero and every answer; a trained LLM: neither."""
    table = compare(*changed, ["text", "llava"], [TEXT], 8, 1)
    assert table["text"]["logit difference"] == 0.0 and table["text"]["identical"] == "yes"
    assert table["text"]["equal answers, %"] == 100.0 and table["text"]["answers"] == 2
    assert table["text"]["perplexity"] == table["base"]["perplexity"]
    assert table["llava"]["logit difference"] > 0.01 and table["llava"]["identical"] == "NO"
    assert table["llava"]["perplexity"] != table["base"]["perplexity"]
    assert table["llava"]["equal answers, %"] < 100
    assert table["text"]["tokens"] == len(TEXT)


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_one_changed_weight_is_noticed(changed, value):
    """The frozen LLM itself, altered in memory, is not what stands on disk."""
    iaa, *others = changed
    with torch.no_grad():
        iaa.llama.layers[1].ffn.down.weight[0, 0] += value
    assert compare(iaa, *others, ["text"], ["a short text"], 1, 4)["text"]["identical"] == "NO"


def test_perplexity_and_windows(changed):
    """A text of one window by hand; pieces of 512 tokens, each behind the LLM's start token."""
    iaa, _, tokenizer = changed
    ids = torch.tensor(tokenizer.encode("a short text"))
    with torch.no_grad():
        log_probs = iaa.logits(iaa(ids[None])).log_softmax(-1)[0]
    expected = math.exp(-sum(log_probs[i, ids[i + 1]] for i in range(len(ids) - 1))
                        / (len(ids) - 1))
    table = compare(*changed, ["text"], ["a short text"], 4, 4)
    assert table["base"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert "answers" not in table["text"]  # too short to be continued
    assert [len(ids) for ids in windows(tokenizer, ["x" * 600, "y", "zz"])] == [512, 88, 2]
    tokenizer.bos_id = 256
    assert [ids[:2] for ids in windows(tokenizer, ["y", ""])] == [[256, ord("y")]]


def test_text_retention_end_to_end(world, capsys):
    """The line that says it, below a row for each workflow; no text is an error."""
    for name, text in (("data.txt", TEXT), ("empty.txt", "")):
        (world / name).write_text(text)
    given = ["--model", str(world / "run"), "--dtype", "fp32"]
    with pytest.raises(SystemExit, match="no text"):
        evaluation.main(["text-retention", str(world / "empty.txt"), *given])
    evaluation.main(["text-retention", str(world / "data.txt"), *given])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (f"text-only logits identical to the base model: yes ({len(TEXT)} tokens)")
    assert [line.split()[0] for line in said[2:6]] == ["base", "text", "mm", "grounding"]
