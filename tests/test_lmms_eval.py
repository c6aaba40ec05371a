"""lmms-eval asks the model and scores its answers, on a task of our own. Needs lmms-eval."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import tiny_run, write_rows
from PIL import Image

from evaluation import __main__ as evaluation
from sample import Chat

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: requirements/lmms-eval.txt")

from evaluation.lmms_eval_model import PictureLM  # noqa: E402

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
    return [Image.open(picture) for picture in doc["picture"].split()]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, answers):
    return {"right": float(answers[0] == doc["answer"])}
"""


def test_a_task_of_our_own(tmp_path, capsys, monkeypatch):
    """Answers are those of being asked alone, which are also what is expected, but for one."""
    tiny_run(tmp_path / "run")
    chat, rows = Chat.load(tmp_path / "run", "fp32"), []
    for question in ("red?", "is <image> blue, <image> teal?", "teal?", ""):
        colours = [word for word in ("red", "blue", "teal") if word in question]
        images = [Image.new("RGB", (40, 20), colour) for colour in colours]
        paths = [str(tmp_path / f"{colour}.png") for colour in colours]
        for image, path in zip(images, paths, strict=True):
            image.save(path)
        question = question or "no picture?"
        workflow = "mm" if images else "text"
        alone = replace(chat, chosen=workflow, images=images, max_tokens=6).ask(question)
        rows.append({"question": question, "picture": " ".join(paths), "answer": alone.answer})
    rows[2]["answer"] = "something else"
    data = write_rows(tmp_path / "shapes.jsonl", rows)
    (tmp_path / "shapes.yaml").write_text(TASK.format(data=data))
    (tmp_path / "shapes.py").write_text(CODE)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    given = ["--include", str(tmp_path), "--dtype", "fp32", "--model", str(tmp_path / "run")]
    evaluation.main(["lmms", "shapes", *given, "--batch", "2"])
    assert "shapes" in capsys.readouterr().out
    saved = tmp_path / "run" / "eval" / "lmms" / "shapes"
    assert json.loads((saved / "scores.json").read_text())["shapes"]["right"] == 0.75
    assert len((saved / "answers.jsonl").read_text().splitlines()) == len(rows)
    with pytest.raises(SystemExit, match="no task or group 'nothing'"):
        evaluation.main(["lmms", "nothing", *given])


def test_what_is_not_supported_is_said():
    """Likelihoods and rounds raise; so does a film, which "text" would answer blind."""
    lm = PictureLM(None, 4)
    for method in (lm.loglikelihood, lm.generate_until_multi_round):
        with pytest.raises(ValueError, match="only"):
            method([])
    lm.task_dict = {"t": {"test": [{}]}}
    request = SimpleNamespace(args=("what?", {}, lambda doc: ["clip.mp4"], 0, "t", "test"))
    with pytest.raises(ValueError, match="only pictures are supported.*clip.mp4"):
        lm.workflow_of(request)
