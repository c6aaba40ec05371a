"""lm-eval sees the workflow that plain calls of the model see. Needs lm-eval."""

import json

import pytest
import torch
from conftest import tiny_run, write_rows

from evaluation import __main__ as evaluation
from sample import Chat, generate
from tokenization.templates import render

pytest.importorskip("lm_eval", reason="lm-eval is not installed: requirements/lm-eval.txt")

from lm_eval.api.instance import Instance  # noqa: E402

from evaluation.lm_eval_model import WorkflowLM  # noqa: E402

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
GROUP = """
group: both
task: [sums, more]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture
def lm(tmp_path):
    """The text workflow of a tiny model, one token a byte, as lm-eval calls it."""
    tiny_run(tmp_path / "run")
    return WorkflowLM(Chat.load(tmp_path / "run", "fp32"), 2)


def requests(kind, *arguments):
    """Requests as lm-eval makes them."""
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def test_likelihoods(lm):
    """Sums of log-probabilities by a plain pass, whatever was asked before; and greediness."""
    pairs = [("The sky is", " blue"), ("The sky is", " red"), ("A", "B"), ("", "xy"),
             ("The sky is", "A"), ("The sky is", "B")]
    got = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (before, after), (total, greedy) in zip(pairs, got, strict=True):
        context = list(before.encode()) or [lm.eot_token_id]
        ids = torch.tensor([context + list(after.encode())])
        with torch.no_grad():
            log_probs = lm.chat.model.logits(lm.chat.model(ids))[0].log_softmax(-1)
        places = range(len(context) - 1, ids.shape[1] - 1)
        expected = sum(log_probs[i, ids[0, i + 1]].item() for i in places)
        assert total == pytest.approx(expected, abs=1e-4)
        assert greedy == all(log_probs[i].argmax() == ids[0, i + 1] for i in places)
    with pytest.raises(ValueError, match="text-retention"):
        lm.loglikelihood_rolling(requests("loglikelihood_rolling", ("x",)))


def test_answers_are_cut(lm):
    """Each as if it were asked alone, cut ahead of the stop text."""
    texts = ["one", "two two", "three three three"]

    def asked(until):
        settings = {"until": until, "max_gen_toks": 12}
        return lm.generate_until(requests("generate_until", *((text, settings) for text in texts)))

    free = asked([])
    assert free == [lm.words.decode(generate(lm.chat.model, [list(text.encode())], max_tokens=12,
                                             stop=lm.words.stop_ids)[0]) for text in texts]
    stop = free[0][1]
    assert asked(stop) == asked([stop]) == [text.split(stop)[0] for text in free]
    with pytest.raises(ValueError, match="greedy"):
        lm.generate_until(requests("generate_until", ("x", {"do_sample": True, "temperature": 1})))


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


def is_right(lm, row) -> bool:
    """Whether the likelier choice is the right one, by the model alone."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    prompt = lm.apply_chat_template([{"role": "system", "content": system},
                                     {"role": "user", "content": row["question"]}])
    pairs = [(prompt, choice) for choice in row["choices"]]
    scores = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    return (scores[1][0] > scores[0][0]) == row["answer"]


def test_the_command(lm, tmp_path, capsys):
    """lm-eval itself on local tasks, without a network: figures and answers of a task, a group."""
    rows = {"sums": [{"question": f"{i} + 1?", "choices": [str(i + 1), "no"], "answer": i % 2}
                     for i in range(6)]}
    rows["more"] = [row | {"answer": 0} for row in rows["sums"][:2]]
    right = {name: [is_right(lm, row) for row in lines] for name, lines in rows.items()}
    for name, lines in rows.items():
        data = write_rows(tmp_path / f"{name}.jsonl", lines)
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data))
    (tmp_path / "both.yaml").write_text(GROUP)
    given = ["--include", str(tmp_path), "--model", str(tmp_path / "run"), "--dtype", "fp32"]
    evaluation.main(["lm", "sums", "both", *given])
    assert "sums" in capsys.readouterr().out
    saved = tmp_path / "run" / "eval" / "lm"
    answers = (saved / "sums" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == 6 and {"doc", "resps"} <= json.loads(answers[0]).keys()
    scores = {name: json.loads((saved / name / "scores.json").read_text())[name]["acc"]
              for name in ("sums", "both")}
    assert scores == pytest.approx({"sums": sum(right["sums"]) / 6,
                                    "both": sum(right["sums"] + right["more"]) / 8})
    for tasks, message in ((["sums", "nothing"], "no task or group 'nothing'"),
                           (["humaneval"], "--allow-code-execution")):  # before anything is asked
        with pytest.raises(SystemExit, match=message):
            evaluation.main(["lm", *tasks, *given])
