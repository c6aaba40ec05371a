"""lm-eval sees the workflow that plain calls of the model see. Needs lm-eval."""

import json

import pytest
import torch

from evaluation import __main__ as evaluation
from iaa import IAA
from sample import generate
from tokenization.templates import render
from tokenization.tokenizer import Tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: requirements/lm-eval.txt")

from lm_eval.api.instance import Instance  # noqa: E402

from evaluation.lm_eval_model import WorkflowLM, evaluate, open_tasks  # noqa: E402


@pytest.fixture
def parts(tiny_base, tmp_path):
    """A tiny model and its tokenizer, one token a byte."""
    llama, clip = tiny_base(tmp_path / "base")
    return IAA(llama, clip, 258).eval(), Tokenizer.load(tmp_path / "base" / "llama")


@pytest.fixture
def lm(parts):
    """The text workflow as lm-eval calls it."""
    return WorkflowLM(*parts, "text")


def requests(kind, *arguments):
    """Requests as lm-eval makes them."""
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def test_likelihoods(lm):
    """Sums of log-probabilities by a plain pass, whatever is batched with them; and greediness."""
    pairs = [("The sky is", " blue"), ("The sky is", " red"), ("A", "B"), ("", "xy"),
             ("The sky is", "A"), ("The sky is", "B")]
    got = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (before, after), (total, greedy) in zip(pairs, got, strict=True):
        context = list(before.encode()) or [lm.eot_token_id]
        ids = torch.tensor([context + list(after.encode())])
        with torch.no_grad():
            log_probs = lm.model.logits(lm.model(ids))[0].log_softmax(-1)
        places = range(len(context) - 1, ids.shape[1] - 1)
        expected = sum(log_probs[i, ids[0, i + 1]].item() for i in places)
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == all(log_probs[i].argmax() == ids[0, i + 1] for i in places)


def test_answers_stop_and_are_cut(lm):
    """Cut ahead of the stop text, and no token is made once all answers hold one."""
    texts = ["one", "two two", "three three three"]
    free = lm.generate_until(requests("generate_until", *(
        (text, {"until": [], "max_gen_toks": 12}) for text in texts)))
    alone = [generate(lm.model, [list(t.encode())], None, "text", 12, lm.words.stop_ids)[0]
             for t in texts]
    assert free == [lm.words.decode(ids) for ids in alone]
    stop = free[0][1]
    cut = lm.generate_until(requests("generate_until", *(
        (text, {"until": [stop], "max_gen_toks": 12}) for text in texts)))
    assert cut == [text.split(stop)[0] for text in free]
    with pytest.raises(ValueError, match="greedy"):
        lm.generate_until(requests("generate_until", ("x", {"do_sample": True, "temperature": 1})))
    with pytest.raises(ValueError, match="text-retention"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("x",)))


def test_the_chat_form_is_the_models_own(lm):
    """The text of a dialogue gives the ids that `render` gives."""
    turns = [("user", "Hi there"), ("assistant", "Hello."), ("user", "Bye")]
    history = [{"role": "system", "content": "Be brief."}]
    history += [{"role": role, "content": text} for role, text in turns]
    ids, _ = render(lm.words, turns, "chatml", "Be brief.")
    assert lm.tok_encode(lm.apply_chat_template(history)) == ids
    begun = [*history, {"role": "assistant", "content": "See"}]
    text = lm.apply_chat_template(begun, add_generation_prompt=False)
    assert lm.tok_encode(text) == ids + list(b"See")


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks, `sums` and `more`, a group and a tag of both; their rows."""
    rows = {"sums": [{"question": f"{i} + 1?", "choices": [str(i + 1), "no"], "answer": i % 2}
                     for i in range(6)]}
    rows["more"] = [dict(row, answer=0) for row in rows["sums"][:2]]
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, lines in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in lines))
        (folder / f"{name}.yaml").write_text(f"""
task: {name}
tag: both-tagged
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
""")
    both = "group: both\ntask: [sums, more]\n"
    both += "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    (folder / "both.yaml").write_text(both)
    (folder / "bare.yaml").write_text("group: bare\ntask: [sums, more]\n")
    return folder, rows


def right_answers(parts, rows) -> list[bool]:
    """Whether the likelier choice is the right one, by the model alone."""
    lm, found = WorkflowLM(*parts, "text"), []
    for question in rows:
        prompt = lm.apply_chat_template([
            {"role": "system", "content": "You are a helpful AI assistant named SmolLM, "
                                          "trained by Hugging Face"},
            {"role": "user", "content": question["question"]}])
        scores = lm.loglikelihood(requests("loglikelihood", *(
            (prompt, choice) for choice in question["choices"])), disable_tqdm=True)
        found.append(max((0, 1), key=lambda i: scores[i][0]) == question["answer"])
    return found


def test_local_task_files(parts, tasks):
    """lm-eval itself, on tasks and data files of our own, without a network: a task, a group."""
    folder, rows = tasks
    sums, more = (right_answers(parts, rows[name]) for name in ("sums", "more"))
    manager = open_tasks(["sums", "both"], folder, False)
    table, samples = evaluate(*parts, "text", "sums", manager)
    assert table == {"sums": {"metric": "acc", "score": pytest.approx(100 * sum(sums) / 6),
                              "asked": 6}}
    assert len(samples) == 6
    table, _ = evaluate(*parts, "text", "both", manager)
    row = table["both"]
    assert row["score"] == pytest.approx(100 * sum(sums + more) / 8) and row["asked"] == 8
    with pytest.raises(ValueError, match="no figure for bare as a whole"):
        evaluate(*parts, "text", "bare", open_tasks(["bare"], folder, False))


def test_what_cannot_be_asked_is_said_first(tasks):
    """An unknown task, a tag, and code that was not allowed to run."""
    for name in ("nothing", "both-tagged"):
        with pytest.raises(ValueError, match=f"no task or group '{name}'"):
            open_tasks(["sums", name], tasks[0], False)
    with pytest.raises(ValueError, match="--allow-code-execution"):
        open_tasks(["humaneval"], None, False)


def test_the_command(parts, tasks, tmp_path, capsys):
    """`evaluation lm`: figure and answers of each task in a folder of its own."""
    run = tmp_path / "base"  # of `parts`
    index = {"llm": "llama", "vision": "clip", "image_token": 258, "adaptors": {}}
    (run / "iaa.json").write_text(json.dumps(index))
    evaluation.main(["lm", "sums", "more", "--include", str(tasks[0]), "--model", str(run),
                     "--dtype", "fp32"])
    said = capsys.readouterr().out
    assert "sums" in said and "more" in said
    answers = (run / "eval" / "lm" / "sums" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 6 and {"doc", "resps"} <= json.loads(answers[0]).keys()
    assert json.loads((run / "eval" / "lm" / "more" / "scores.json").read_text())["more"]["asked"]
