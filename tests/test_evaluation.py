"""Evaluation: questions in batches are asked alone; official rules; the commands end to end."""

import contextlib
import io
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import edit, last_line, talk, tiny_base, tiny_run, write_rows
from PIL import Image
from processes import processes

from clip import preprocess
from data import GROUNDING_PROMPT
from evaluation import __main__ as evaluation
from evaluation import easy_vqa, mme, refcoco
from evaluation.answers import ask, sample_questions
from evaluation.text_retention import compare, load_base, windows
from iaa import IAA, Adaptor, AdaptorConfig
from llama import Llama
from sample import Chat, generate
from speed.packing import pack
from tokenization.templates import IMAGE, render
from tokenization.tokenizer import Tokenizer


def picture(path, colour="red"):
    """A file of 40 x 20 pixels."""
    Image.new("RGB", (40, 20), colour).save(path)
    return path


def question(key, prompt, image, max_tokens, workflow="mm", **facts):
    """A question as benchmarks make it."""
    return {"key": key, "prompt": prompt, "image": image, "max_tokens": max_tokens,
            "workflow": workflow, **facts}


def test_answers_of_a_batch_are_those_asked_alone(tmp_path):
    """Pictures and lengths differ; each question gets the answer of a batch of its own."""
    tiny_run(tmp_path / "run")
    chat = Chat.load(tmp_path / "run", "fp32")
    iaa, tokenizer = chat.model, chat.tokenizer
    files = [picture(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue")]
    texts = ["what?", "is there a red shape in it?", "how many", "a", "where is the triangle", "b?"]
    questions = [question(str(n), text, files[n % 2], (12, 9)[n == 4], ("mm", "grounding")[n == 4])
                 for n, text in enumerate(texts)]
    got = ask(chat, questions, 4)
    for n, asked in enumerate(questions):
        form = iaa.adaptors[asked["workflow"]].prompt
        ids, _ = render(tokenizer, [("user", IMAGE + asked["prompt"])], form["template"],
                        form["system"], iaa.clip.config.patches)
        pixels = preprocess(Image.open(asked["image"]), iaa.clip.config)[None]
        answer, = generate(iaa, [ids], pixels, asked["workflow"], asked["max_tokens"],
                           tokenizer.stop_ids)
        assert got[n] == tokenizer.decode(answer)
    assert len(set(got.values())) > 3  # they differ: a mix-up would show


def test_a_question_without_its_picture_is_skipped(tmp_path, capsys):
    """The picture is broken, or not that of its box, or the prompt is too long: said."""
    tiny_run(tmp_path / "run")
    path, broken = picture(tmp_path / "a.png"), tmp_path / "b.png"
    broken.write_bytes(path.read_bytes()[:60])
    questions = [question("1", "where is it?", path, 3, box=[0, 0, 9, 9], width=40, height=30),
                 question("2", "where?", path, 3, box=[0, 0, 9, 9], width=40, height=20),
                 question("3", "what", broken, 3),  # a batch of its own
                 question("4", "word " * 500, path, 3)]
    assert [*ask(Chat.load(tmp_path / "run", "fp32"), questions, 3)] == [1]
    told = capsys.readouterr().err.split("\r")
    assert told[1].startswith("skipped 4: ") and "3 new ones exceed the context" in told[1]
    assert told[2] == (f"skipped 1: {path}: upright it has 40 x 20 pixels, "
                       "its boxes are for 40 x 30\n")
    assert told[3] == "1 of 4 questions answered"
    assert told[4].startswith(f"skipped 3: {broken}: not a readable picture")


def test_a_limit_takes_whole_pictures():
    """At random, the same every time, and never a part of a picture's questions."""
    questions = [question(key, "?", n // 2, 1) for n, key in enumerate("abcdefgh")]
    taken = sample_questions(questions, 3)
    assert [q["key"] for q in taken] == ["e", "f", "a", "b"]


@pytest.fixture
def mme_folder(tmp_path):
    """Both published layouts: folders of pictures and texts, and all in one."""
    root = tmp_path / "MME" / "MME_Benchmark_release_version"
    for subtask in sum(mme.SUBTASKS.values(), ()):
        nested = subtask in ("artwork", "posters")
        texts = root / subtask / ("questions_answers_YN" if nested else "")
        pictures = root / subtask / ("images" if nested else "")
        texts.mkdir(parents=True)
        pictures.mkdir(exist_ok=True)
        picture(pictures / "0001.jpg")
        for beside in (texts, tmp_path / "MME" / "__MACOSX" / subtask):  # as a Mac leaves
            beside.mkdir(parents=True, exist_ok=True)
            (beside / "._0001.txt").write_bytes(b"\0\xff")
        (texts / "0001.txt").write_text(
            "Is it a café?  Please answer yes or no.\tYes\r\n"
            "Is it a hat? Please answer yes or no.\tNo\n \n", encoding="utf-8")
    return root


def test_mme_questions(mme_folder):
    """14 subtasks; the prompt of the official file, which leaves one of two spaces."""
    (mme_folder / "count/0001.txt").write_text("Is it\x85a hat?\tYes\nIs it?\tNo\n", "utf-8")
    questions = mme.read(mme_folder.parent)
    assert len(questions) == 28 and len({q["key"] for q in questions}) == 28
    first, second = (q for q in questions if q["subtask"] == "artwork")
    suffix = "\nAnswer the question using a single word or phrase."
    assert (first["prompt"], second["prompt"]) == ("Is it a café? " + suffix,
                                                   "Is it a hat?" + suffix)
    assert first["image"] == mme_folder / "artwork/images/0001.jpg"
    assert (first["expected"], second["expected"]) == ("Yes", "No")


@pytest.mark.parametrize("damage, message", [
    (lambda root: (root / "count/0001.jpg").unlink(), "in count, picture or text of 0001 is"),
    (lambda root: (root / "count/0001.txt").write_text("Is it?\tYes\n"), "0001.txt: not two lines"),
    (lambda root: (root / "count/0001.txt").write_text("a\tyes\nb\tno\n"), "Yes or No"),
    (lambda root: (root / "count/0001.txt").write_bytes(b"caf\xe9"), "0001.txt: not a text in UTF"),
    (lambda root: (root / "OCR").rename(root / "ocr_"), "in OCR, picture or text of all is")])
def test_mme_damaged(mme_folder, damage, message):
    """Half a download, another folder, swapped columns: one line each."""
    damage(mme_folder)
    with pytest.raises(ValueError, match=message):
        mme.read(mme_folder.parent)


@pytest.mark.parametrize("word, answers", [
    ("yes", ("Yes", "yes.")),
    ("no", ("No, it is not", "NO\n", "not sure", " no", "yeno", "noyes", "I no")),
    ("other", ("a yes", "is no", "it is no", "unknown", "", "  yes")),  # they come too late
])
def test_mme_reads_four_characters(word, answers):
    """The first four characters of the lower-cased answer hold yes, or no."""
    assert {mme.yes_or_no(answer) for answer in answers} == {word}


def test_mme_score():
    """Two pictures, right/right and right/wrong: acc 75, acc+ 50, together 125. Then the sums."""
    def line(subtask, image, expected, answer):
        return {"subtask": subtask, "image": image, "expected": expected, "answer": answer}

    assert mme.score([
        line("OCR", "1", "Yes", "Yes"), line("OCR", "1", "No", "No"),
        line("code_reasoning", "1", "Yes", "no"), line("code_reasoning", "1", "No", "no"),
        line("existence", "1", "Yes", "Yes"), line("existence", "1", "No", "no"),
        line("existence", "2", "Yes", "yes"), line("existence", "2", "No", "other words"),
    ]) == {"perception": {"score": 325.0, "asked": 6}, "existence": {"score": 125.0, "asked": 4},
           "OCR": {"score": 200.0, "asked": 2}, "cognition": {"score": 50.0, "asked": 2},
           "code_reasoning": {"score": 50.0, "asked": 2}}

OFFICIAL = {"sent_id": 34, "img_path": "a.png", "expression": "left mug",
            "bbox": [10.0, 5.0, 30.0, 15.0], "width": 40, "height": 20}
OURS = {"id": "refcocog/test/ref1/sent2", "image": "a.png", "source": "refcocog", "split": "test",
        "width": 40, "height": 20, "boxes": [[0, 0, 9, 9]], "conversations": talk(
            "<image>\n" + GROUNDING_PROMPT.format("mug") + ".", "[0.0, 0.25, 0.22, 0.48]")}


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
    assert official["key"] == "REC_refcoco+_unc_testA/34" and official["workflow"] == "grounding"
    assert official["prompt"] == GROUNDING_PROMPT.format("left mug")
    assert ours == question(
        OURS["id"], GROUNDING_PROMPT.format("mug"), expressions / "images" / "a.png", 128,
        "grounding", set="refcocog test", box=[0, 0, 9, 9], width=40, height=20)
    rows = [{key: value for key, value in OFFICIAL.items() if key != "sent_id"}]
    unnumbered, = refcoco.read(write_rows(expressions / "shikra.jsonl", rows),
                               expressions / "images")
    assert unnumbered["key"] == "shikra/1"  # by its line


@pytest.mark.parametrize("row, message", [
    (OFFICIAL | {"bbox": [30, 5, 10, 15]}, "is not x1, y1, x2, y2 in pixels of 40 x 20"),
    (OFFICIAL | {"bbox": [0.1, 0.2, 0.3, 0.4]}, "in pixels"),
    (OFFICIAL | {"bbox": [1, 2, 3]}, "unpack"),
    (OFFICIAL | {"img_path": "../a.png"}, "is not below"),
    (OFFICIAL | {"img_path": "b.png"}, "does not exist"), (OFFICIAL | {"width": None}, ""),
    ({"expression": "mug"}, "'img_path' is missing"), ([], ""),
    (OURS | {"conversations": OURS["conversations"][:1]}, "human first and gpt last")])
def test_refcoco_damaged(expressions, row, message):
    """File and line are named; nothing outside of the root is read."""
    path = write_rows(expressions / "mine.jsonl", [OURS, row])
    with pytest.raises(ValueError, match=f"mine.jsonl:2: .*{message}") as error:
        refcoco.read(path, expressions / "images")
    assert "\n" not in str(error.value)


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
    records = [TRUTH | {"set": name, "answer": answer} for name in ("val", "val", "testA")]
    records[0]["answer"] = HIT
    assert refcoco.score(records) == {"val": {"official": 50.0 + 50 * right, "asked": 2},
                                      "testA": {"official": 100.0 * right, "asked": 1}}


def test_easy_vqa_score():
    """The last word, by kind; the commonest answer; boxes by the first in the text."""
    def line(expected, answer, commonest):
        return {"expected": expected, "answer": answer, "commonest": commonest}

    words = [line("red", "red", "blue"), line("no", "not", "yes"),
             line("It is red, so yes.", "It is blue, so yes.", "yes"), line("blue", "red", "red")]
    boxes = [TRUTH | line(HIT, answer, "") for answer in (f"It is {HIT}.", f"{MISS}; {HIT}")]
    table = easy_vqa.score([*words, *boxes])  # of an answer's boxes the first counts
    assert table == {
        "asked": {"colour": 2, "yes/no": 2, "all": 4, "boxes, IoU 0.5": 2},
        "commonest answer, %": {"colour": 0.0, "yes/no": 50.0, "all": 25.0},
        "right, %": {"colour": 50.0, "yes/no": 50.0, "all": 50.0, "boxes, IoU 0.5": 50.0}}
    assert list(table)[-1] == "right, %"  # the line that everybody looks for ends the table


@pytest.fixture
def world(tmp_path):
    """A model in `run`, and four pictures with seven questions and a box each in `data`."""
    data = tmp_path / "data"
    data.mkdir()
    tiny_run(tmp_path / "run")

    def row(number, turns, **extra):
        said = talk("<image>\n" + turns[0], *turns[1:])
        return {"id": f"x/{number}", "image": f"{number}.png", "conversations": said, **extra}

    for number in range(4):
        picture(data / f"{number}.png", ("red", "blue", "teal", "gray")[number])
    asked = [("what?", "red", "is it?", "yes"), ("which", "circle"), ("is", "no", "not?", "no"),
             ("colour", "teal", "shape?", "circle")]
    write_rows(data / "test-questions.jsonl", [row(n, turns) for n, turns in enumerate(asked)])
    write_rows(data / "train-questions.jsonl",
               [row(9, ["q", "blue", "q", "It is red, so yes.", "q", "circle"]),
                row(9, ["q", "It is red, so no.", "q", "It is blue, so no."])])
    write_rows(data / "test-boxes.jsonl",
               [row(n, [f"where {n}?", "[0.0, 0.25, 0.22, 0.48]"], id=f"box/{n}", width=40,
                    height=20, boxes=[[0, 0, 9, 9]]) for n in range(4)])
    return tmp_path


def test_easy_vqa_questions(world):
    """Each question alone, with the commonest training answer of its kind, and boxes."""
    questions = easy_vqa.read(world / "data")
    assert len(questions) == 11 and len({q["key"] for q in questions}) == 11
    assert questions[0] == question("x/0/1", "what?", world / "data/0.png", 12, expected="red",
                                    commonest="blue")
    assert [q["commonest"] for q in questions[:3]] == ["blue", "no", "circle"]
    assert questions[7]["workflow"] == "grounding" and questions[7]["box"] == [0, 0, 9, 9]
    first, *others = (world / "data/test-boxes.jsonl").read_text().splitlines()
    write_rows(world / "data/test-boxes.jsonl", [json.loads(first) | {"boxes": []}])
    with pytest.raises(ValueError, match="test-boxes.jsonl:1: list index out of range"):
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
    assert [r["key"] for r in records] == [q["key"] for q in easy_vqa.read(world / "data")]
    assert records[0].keys() == {"key", "workflow", "max_tokens", "image", "prompt", "answer",
                                 "expected", "commonest"}
    scores = json.loads((world / "run/eval/easy-vqa/scores.json").read_text())
    assert scores["asked"]["all"] == 7 and scores["asked"]["boxes, IoU 0.5"] == 4
    with processes(2, go, world) as (_, result):
        said = dict(result(120) for _ in range(2))
    assert said[0].splitlines() == table and said[1] == "" and saved(world) == records


def test_what_cannot_be_asked(world):
    """Boxes without their adaptor are left out; no adaptor, or no picture, is one line."""
    edit(world / "run" / "iaa.json", adaptors={"mm": "mm"})
    assert "boxes" not in go(world) and len(saved(world)) == 7
    for file in (world / "data").glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(SystemExit, match="none of 11 questions could be asked"):
        go(world)


@pytest.mark.parametrize("arguments, message", [
    (("mme", "."), "not MME's folder"), (("refcoco", "."), "--images FOLDER is needed"),
    (("refcoco", ".", "--images", "."), "no .*jsonl"),
    (("mme", ".", "--limit", "0"), "--limit 0: must be 1"),
    (("easy-vqa", ".", "--workflow", "mm"), "easy-vqa takes no --workflow"),
    (("sheet", ".", "--limit", "3"), "sheet takes no --limit"),
    (("easy-vqa", ".", "--model", "nowhere"), "train-questions.jsonl"),
    (("text-retention", "nowhere.txt"), "nowhere.txt")])
def test_clear_errors(arguments, message, tmp_path, monkeypatch):
    """One line that names the file or the option."""
    monkeypatch.chdir(tmp_path)
    assert re.search(message, last_line(evaluation.main, list(arguments)))


@pytest.mark.parametrize("arguments", [("lm", "mmlu"), ("mme", ".", "--device", "cpu")])
def test_what_several_ranks_cannot_do(arguments, monkeypatch):
    """Each has a device of its own, and nobody shares out lm's questions."""
    monkeypatch.setattr(evaluation.Ranks, "__enter__", lambda self: SimpleNamespace(world=2))
    with pytest.raises(SystemExit, match="lm and --device are for one process: no torchrun"):
        evaluation.main(list(arguments))


def test_the_sheet(world):
    """Some questions of each kind; a wrong answer is red, a right one green."""
    path = world / "run" / "answers.png"
    assert go(world, "sheet").strip() == str(path)
    chosen = easy_vqa.choose(easy_vqa.read(world / "data"))
    kinds = [easy_vqa.answer_kind(q["expected"]) for q in chosen]
    assert kinds == ["colour"] * 2 + ["shape"] * 2 + ["yes/no"] * 3 + ["boxes, IoU 0.5"] * 4
    with Image.open(path) as sheet:
        assert sheet.size == (4 * 256, 3 * 324)
    asked = next(q for q in chosen if q["workflow"] == "mm")
    thin = next(q for q in chosen if "box" in q) | {"answer": "[0.5, 0.5, 0.501, 0.9]"}
    assert easy_vqa.draw_tile(thin).size == (256, 324)
    for answer, colour in (("nonsense", easy_vqa.RED), (asked["expected"], easy_vqa.GREEN)):
        tile = easy_vqa.draw_tile(asked | {"answer": answer})
        below = tile.crop((0, 272, 256, 324)).getcolors(10_000)
        rgb = tuple(bytes.fromhex(colour[1:]))
        assert max(below)[1] == (255, 255, 255) and rgb in {found for _, found in below}
        assert tile.getpixel((120, 100)) == Image.open(asked["image"]).getpixel((20, 10))

TEXT = "Some text that is long enough for two windows of the comparison. " * 9


@pytest.fixture
def retention(tmp_path):
    """A function: the table of a model with the tiny base's LLM, after `change` of its weights."""
    def measure(change, text=TEXT, tokens=260):
        folder = tmp_path / f"base-{tokens}"
        llama, clip = tiny_base(folder)
        wide = Llama(replace(llama.config, vocab_size=tokens))
        for name, weight in llama.state_dict().items():
            target = wide.state_dict()[name]
            target[: len(weight)] = weight[: len(target)]
        iaa = IAA(wide, clip, 258)
        for name, config in (("mm", AdaptorConfig((0, 2))), ("llava", AdaptorConfig(
                (), own_embedding=False, own_head=False, own_llm=True))):
            iaa.adaptors[name] = Adaptor(config, wide.config, clip.config.width)
            iaa.adaptors[name].init_from_frozen(wide)
        with torch.no_grad():
            change(iaa.adaptors["llava"].llm, iaa.llama)
        pack(iaa)
        base = load_base(iaa, folder / "llama", None)
        pieces = windows(Tokenizer.load(folder / "llama"), [text])
        return compare(iaa.eval(), base, pieces, ["text", "llava", "mm"], 8, 3)

    return measure


@pytest.mark.parametrize("tokens", [260, 264, 256])  # 264: the model's vocabulary is padded
def test_an_untouched_llm(retention, tokens):
    """Exactly zero, the same bits and every answer, frozen or an adaptor's own; not with layers."""
    table = retention(lambda own, frozen: None, tokens=tokens)
    for name in ("text", "llava"):
        assert table[name] == table["base"]
    row = table["base"]
    assert (row["logit difference"], row["identical"], row["equal answers, %"]) == (0, "yes", 100)
    assert (row["tokens"], row["answers"]) == (585, 2)
    assert table["mm"]["identical"] == "NO"


@pytest.mark.parametrize("change, equal", [
    (lambda own, frozen: own.norm.weight.mul_(1.5), 100.0),  # all logits: the order stays
    (lambda own, frozen: own.head.weight.neg_(), 0.0),  # the likeliest is the least likely
])
def test_a_tuned_llm(retention, change, equal):
    """Its logits, perplexity and answers differ as they should; the frozen one's do not."""
    table = retention(change)
    own, base = table["llava"], table["base"]
    assert own["logit difference"] > 0.5 and own["identical"] == "NO"
    assert own["equal answers, %"] == equal and abs(own["perplexity"] - base["perplexity"]) > 1
    assert table["text"] == base


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_one_changed_weight_is_noticed(retention, value):
    """The frozen LLM itself, altered in memory, is not what stands on disk."""
    table = retention(lambda own, frozen: frozen.layers[1].ffn.down.weight[0, 0].add_(value))
    assert table["text"]["identical"] == "NO" and table["llava"]["identical"] == "yes"


def test_perplexity_and_windows(tmp_path, retention):
    """A text of one window by hand; pieces of 512 tokens, each behind the LLM's start token."""
    llama, _ = tiny_base(tmp_path / "plain")
    ids = torch.tensor([list(b"a short text")])
    with torch.no_grad():
        x = llama(llama.embedding(ids), llama.rope(torch.arange(12)[None], torch.float32))
        loss = torch.nn.functional.cross_entropy(llama.logits(x)[0, :-1], ids[0, 1:])
    row = retention(lambda own, frozen: None, "a short text")["base"]
    assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    tokenizer = Tokenizer.load(tmp_path / "plain/llama")
    assert [len(ids) for ids in windows(tokenizer, ["x" * 600, "y", "zz"])] == [512, 88, 2]
    tokenizer.bos_id = 256
    assert windows(tokenizer, ["y", ""]) == [[256, ord("y")]]
    with pytest.raises(ValueError, match="token 120, but 100 tokens are all that the model and"):
        retention(lambda own, frozen: None, tokens=100)


def test_text_retention_end_to_end(world, capsys):
    """A row for each workflow, then the line that says it: yes, and NO for another base."""
    path, empty = world / "data.txt", world / "empty.txt"
    path.write_text(TEXT)
    empty.write_text("")
    tiny_base(world / "other", layers=2)
    given = ["--model", str(world / "run"), "--dtype", "fp32"]
    with pytest.raises(SystemExit, match="no text"):
        evaluation.main(["text-retention", str(empty), *given])
    capsys.readouterr()
    for base, same in (((), "yes"), (("--base", str(world / "run/llama")), "yes"),
                       (("--base", str(world / "other/llama")), "NO")):
        evaluation.main(["text-retention", str(path), *given, *base])
        said, told = capsys.readouterr()
        assert said.splitlines()[-1] == (
            f"text-only logits identical to the base model: {same} ({len(TEXT)} tokens)")
        rows = [line.split()[0] for line in said.splitlines()[2:6]]
        assert rows == ["base", "text", "mm", "grounding"] and told.count("computing in") == 1
