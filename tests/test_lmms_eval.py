"""lmms-eval asks the model and scores its answers, on a task of our own. Needs lmms-eval."""

import json

import pytest
import torch
from PIL import Image

from evaluation import __main__ as evaluation
from evaluation.answers import answer_batch
from iaa import load_iaa
from tokenization.tokenizer import Tokenizer

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: requirements/lmms-eval.txt")

from evaluation.lmms_eval_model import PictureLM, cut  # noqa: E402

TASK = """
task: shapes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function shapes.pictures
doc_to_text: !function shapes.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6}}
process_results: !function shapes.results
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""
CODE = """
from PIL import Image

def pictures(doc):
    return [Image.open(doc["picture"])] if doc["picture"] else []

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, answers):
    return {"right": float(answers[0] == doc["answer"])}
"""


@pytest.fixture
def world(tmp_path, tiny_run):
    """A tiny run, and a task `shapes` of four questions, one of them without a picture.

    The expected answers are the model's own to all but the last question.
    """
    tiny_run(tmp_path / "run")
    iaa, folder = load_iaa(tmp_path / "run", torch.float32)
    tokenizer, rows = Tokenizer.load(folder), []
    for number, colour in enumerate(("red", "blue", "teal", None)):
        path, question = None, f"question {number}?"
        if colour:
            path = str(tmp_path / f"{colour}.png")
            Image.new("RGB", (40, 20), colour).save(path)
        image = Image.open(path) if path else None
        answer, = answer_batch(iaa, tokenizer, [(question, image)], "mm" if path else "text", 6)
        rows.append({"question": question, "picture": path or "", "answer": answer})
    rows[2]["answer"] = "something else"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "shapes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "shapes.yaml").write_text(TASK.format(data=tasks / "shapes.jsonl"))
    (tasks / "shapes.py").write_text(CODE)
    return tmp_path, rows


def test_a_task_of_our_own(world, capsys, monkeypatch):
    """Each question gets the answer of being asked alone; figure and answers are saved."""
    folder, rows = world
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    evaluation.main(["lmms", "shapes", "--include", str(folder / "tasks"), "--dtype", "fp32",
                     "--model", str(folder / "run"), "--batch", "2"])
    assert "shapes" in capsys.readouterr().out
    saved = folder / "run" / "eval" / "lmms" / "shapes"
    assert json.loads((saved / "scores.json").read_text())["shapes"]["right"] == 0.75
    lines = (saved / "answers.jsonl").read_text().splitlines()
    assert len(lines) == len(rows)
    with pytest.raises(SystemExit, match="no task or group 'nothing'"):
        evaluation.main(["lmms", "nothing", "--include", str(folder / "tasks"), "--dtype", "fp32",
                         "--model", str(folder / "run")])


def test_what_is_not_supported_is_said(world):
    """Likelihoods, rounds and sampling raise; stop texts cut."""
    lm = PictureLM(None, None, 4)
    for method in (lm.loglikelihood, lm.generate_until_multi_round):
        with pytest.raises(ValueError, match="only"):
            method([])
    assert cut(" a. b\nc", ["\n", "."]) == "a" and cut("a b", "b") == "a"
