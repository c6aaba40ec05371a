"""eval.py: answers are saved as they come, resumed, spread over ranks and scored again alone."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image
from processes import processes

import eval as evaluation
from evaluation.ask import Asker, Question
from evaluation.__main__ import chosen, print_table, read_answers, share

ROOT = Path(evaluation.__file__).parent


@pytest.fixture
def world(tmp_path, tiny_run):
    """A model in `run` and four pictures with seven questions and a box each in `data`."""
    run, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    tiny_run(run)

    def row(number, turns, **extra):
        said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
        said[0]["value"] = "<image>\n" + said[0]["value"]
        return {"id": f"x/{number}", "image": f"{number}.png", "workflow": "mm",
                "conversations": said, **extra}

    for number in range(4):
        Image.new("RGB", (40, 20), ("red", "blue", "teal", "gray")[number]).save(
            data / f"{number}.png")
    asked = [(("what?", "red", "is it?", "yes"), ("which", "circle"), ("is", "no", "not?", "no"),
              ("colour", "teal", "shape?", "circle"))[n] for n in range(4)]
    files = {"test-questions": [row(n, turns) for n, turns in enumerate(asked)],
             "train-questions": [row(9, ["q", "blue", "q", "no", "q", "circle"])],
             "test-boxes": [row(n, ["where?", "x"], id=f"box/{n}", width=40, height=20,
                                boxes=[[0, 0, 9, 9]]) for n in range(4)]}
    for name, rows in files.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def go(monkeypatch, *arguments):
    """eval.py with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
    evaluation.main()


def easy(world, *more):
    """The arguments of a run on the world's data."""
    return ("easy-vqa", world / "data", "--model", world / "run", "--out", world / "out", *more)


def answers(folder):
    """Key -> answer."""
    return {record["key"]: record["answer"] for record in read_answers(folder)}


def test_a_run_saves_and_scores(world, monkeypatch, capsys):
    """Every question once, with what scoring needs; the table; the same again by --rescore."""
    go(monkeypatch, *easy(world))
    printed = capsys.readouterr()
    assert "easy-vqa: 11 of 11" in printed.err
    assert "grounding, IoU 0.5" in printed.out and "commonest answer" in printed.out
    assert len(answers(world / "out")) == 11
    line = json.loads((world / "out" / "answers-0.jsonl").read_text().splitlines()[0])
    assert {"key", "prompt", "answer", "expected", "commonest"} <= line.keys()
    scores = json.loads((world / "out" / "scores.json").read_text())
    assert scores["all"]["asked"] == 7 and scores["grounding, IoU 0.5"]["asked"] == 4
    shutil.rmtree(world / "run"), shutil.rmtree(world / "data")
    (world / "out" / "scores.json").unlink()
    go(monkeypatch, "easy-vqa", "--rescore", "--out", world / "out")
    assert json.loads((world / "out" / "scores.json").read_text()) == scores
    assert capsys.readouterr().out == printed.out


def test_a_killed_run_goes_on(world, monkeypatch, capsys):
    """Stopped after three answers, with half a line on disk: only the rest is asked."""
    go(monkeypatch, *easy(world, "--out", world / "whole"))
    ask = Asker.ask

    def ask_three(self, questions, workflow, max_tokens):
        for number, said in enumerate(ask(self, questions, workflow, max_tokens)):
            if number == 3:
                raise KeyboardInterrupt
            yield said

    monkeypatch.setattr(Asker, "ask", ask_three)
    with pytest.raises(SystemExit, match="goes on"):
        go(monkeypatch, *easy(world))
    assert len(answers(world / "out")) == 3
    with open(world / "out" / "answers-0.jsonl", "a") as file:
        file.write('{"key": "x/0/1", "ans')
    seen = []

    def ask_and_note(self, questions, workflow, max_tokens):
        seen.extend(question.key for question in questions)
        return ask(self, questions, workflow, max_tokens)

    monkeypatch.setattr(Asker, "ask", ask_and_note)
    go(monkeypatch, *easy(world))
    assert len(seen) == 8 and answers(world / "out") == answers(world / "whole")
    go(monkeypatch, *easy(world))
    assert len(seen) == 8  # nothing is left to ask


def as_rank(*arguments) -> tuple[str, str]:
    """eval.py on a rank: what it prints, and what it says on stderr."""
    sys.argv, out, err = ["eval.py", *map(str, arguments)], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        evaluation.main()
    return out.getvalue(), err.getvalue()


def test_two_ranks_share_the_work(world, monkeypatch):
    """On two processes: the answers of one, in two files; one score."""
    go(monkeypatch, *easy(world, "--out", world / "whole"))
    with processes(2, as_rank, *easy(world)) as (_, result):
        said = dict(result(60) for _ in range(2))
    assert "grounding, IoU 0.5" in said[0][0] and said[1][0] == ""
    assert "on rank 0 of 2" in said[0][1] and "on rank" not in said[1][1]
    files = sorted((world / "out").glob("answers-*.jsonl"))
    assert len(files) == 2 and all(len(file.read_text().splitlines()) >= 4 for file in files)
    assert answers(world / "out") == answers(world / "whole")


def test_answers_of_another_run_are_not_mixed(world, monkeypatch):
    """Another model or other questions in the same folder: one line, nothing written."""
    go(monkeypatch, *easy(world))
    before = (world / "out" / "answers-0.jsonl").read_text()
    with pytest.raises(SystemExit, match="was made with another questions, asked: name"):
        go(monkeypatch, *easy(world, "--limit", 1))
    weights = world / "run" / "mm" / "adaptor.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(SystemExit, match="was made with another mm: name"):
        go(monkeypatch, *easy(world))
    assert (world / "out" / "answers-0.jsonl").read_text() == before
    with pytest.raises(SystemExit, match="answers to easy-vqa, not to mme"):
        go(monkeypatch, "mme", "--rescore", "--out", world / "out")


def test_an_adaptor_that_is_not_there(world, monkeypatch, capsys):
    """Without grounding its questions are left out; without any adaptor there is nothing to ask."""
    index = json.loads((world / "run" / "iaa.json").read_text())
    del index["adaptors"]["grounding"]
    (world / "run" / "iaa.json").write_text(json.dumps(index))
    go(monkeypatch, *easy(world))
    assert "grounding" not in capsys.readouterr().out and len(answers(world / "out")) == 7
    (world / "run" / "iaa.json").write_text(json.dumps(index | {"adaptors": {}}))
    with pytest.raises(SystemExit, match="no adaptor named 'mm'"):
        go(monkeypatch, *easy(world))


@pytest.mark.parametrize("arguments, message", [
    (("mme",), "DATA is needed"), (("mme", "nowhere"), "nowhere: no such file"),
    (("mme", ".", "--limit", "0"), "--limit 0"), (("mmmu", "--rescore"), "settings.json: no such"),
    (("easy-vqa", ".", "--model", "nowhere", "--out", "x"), "no such data file"),
])
def test_clear_errors(arguments, message, tmp_path, monkeypatch):
    """One line that names the file or the option."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        go(monkeypatch, *arguments)
    assert "\n" not in str(error.value)


def test_a_damaged_answers_file_is_named(tmp_path):
    """File and line; half a line at the end is a killed run's and no error."""
    (tmp_path / "answers-0.jsonl").write_text('{"key": "1"}\n{"k\n{"key": "2"}\n')
    with pytest.raises(ValueError, match="answers-0.jsonl:2: not an answer"):
        read_answers(tmp_path)
    (tmp_path / "answers-0.jsonl").write_text('{"key": "1"}\n{"k')
    assert read_answers(tmp_path) == [{"key": "1"}]


def some(keys, images):
    """Questions by key and picture."""
    return [Question(key, "?", bytes([image])) for key, image in zip(keys, images, strict=True)]


def test_a_limit_takes_whole_pictures():
    """At random by the seed, the same every time, and never half of a picture's questions."""
    questions = some("abcdefgh", [0, 0, 1, 1, 2, 2, 3, 3])
    assert chosen(questions, None, 0) == questions
    taken = chosen(questions, 3, 0)
    turned = chosen(questions[::-1], 3, 0)
    assert len(taken) == 4 and {q.key for q in turned} == {q.key for q in taken}
    assert all(sum(q.image == t.image for q in taken) == 2 for t in taken)
    assert any(chosen(questions, 3, seed) != taken for seed in range(1, 9))
    with pytest.raises(ValueError, match="question a comes twice"):
        chosen(some("aba", [1, 2, 3]), None, 0)


def test_ranks_get_every_question_once():
    """Parts are disjoint, complete, and hold a picture's questions together."""
    questions = some("abcdefg", [5, 1, 5, 2, 3, 3, 1])
    parts = [share(questions, rank, 3) for rank in range(3)]
    assert sorted(q.key for part in parts for q in part) == list("abcdefg")
    assert [{q.image for q in part} for part in parts] == [{b"\5", b"\3"}, {b"\1"}, {b"\2"}]


def test_the_table(capsys):
    """Columns as they first come, counts whole, other numbers rounded, gaps blank."""
    print_table("t", {"a": {"score": 12.345, "asked": 3}, "long": {"score": 1.0, "IAA-8": 2.0}})
    assert capsys.readouterr().out.splitlines()[1:] == [
        "t        score     asked     IAA-8", "a         12.3         3          ",
        "long       1.0                 2.0"]
