"""A trained model's answers are scored by their numbers, by running programs, or by a judge, which may fail."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM

from experiments.hub import toy_suite
from lora_ga.experiments.judging import greedy, judge
from lora_ga.experiments.judging import harness as by_harness
from lora_ga.experiments.methods import METHODS, load_method
from lora_ga.experiments.records.store import Store
from lora_ga.experiments.suites import trained
from lora_ga.experiments.suites.cells import Cell, cell_of
from lora_ga.experiments.suites.grid import run_grid
from lora_ga.experiments.suites.run import Place, build_inputs, run_cell
from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import Task, load_suite
from lora_ga.experiments.suites.training import Curves, Loop, keep_in_float32, train
from lora_ga.experiments.tasks import check, instruct, prepare
from toys import data_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]
HARNESS = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.parametrize(
    ("text", "number"),
    [("5 apples, so #### 1,234 and 7", 1234.0), ("so it is $3.50.", 3.5), ("first 2, then -3", -3.0), ("none", None)],
)
def test_the_answer_is_the_marked_number_or_else_the_last_one(text: str, number: float | None) -> None:
    assert by_harness.number_of(text) == number


def test_an_answer_is_right_only_if_its_number_equals_the_reference() -> None:
    doc = {"answer": "so\n#### 18"}
    assert by_harness.right_number(doc, ["it is 18"]) == {"gsm8k": 1.0}
    assert by_harness.right_number(doc, ["it is 19"]) == {"gsm8k": 0.0}
    assert by_harness.right_number({"answer": "x"}, ["no idea"]) == {"gsm8k": 0.0}


DOC = {
    "prompt": "from typing import List\n\n\ndef last(x: List[int]) -> int:\n",
    "test": "def check(f):\n    assert f([1, 2]) == 2\n",
    "entry_point": "last",
}


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("    return x[-1]\n", 1.0),
        ("Here:\n```python\ndef last(x: List[int]) -> int:\n    return x[-1]\n```\nGood.", 1.0),
        ("    return x[0]\n", 0.0),
        ("    return ][\n", 0.0),
        ("    while True: pass\n", 0.0),
        ("    import os\n    return x[-1] if 'OPENAI_API_KEY' not in os.environ else 0\n", 1.0),
    ],
)
def test_a_program_counts_only_if_it_passes_the_tests(
    program: str, passed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_harness, "SECONDS", 2.0)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert by_harness.completed(DOC, [program]) == {"humaneval": passed}


@pytest.mark.parametrize(
    ("answer", "passed"),
    [
        ("def last(x):\r\n    return x[-1]", 1.0),
        ("Here:\n```python\ndef last(x):\n    return max(x, key=SIZES.get)\n```", 1.0),
        ("def last(x):\n    return x[1]", 0.0),  # only the second assertion fails
        ("def first(x):\n    return x[-1]", 0.0),
        ("def last(x):\n    while True: pass", 0.0),
    ],
)
def test_an_mbpp_program_counts_only_if_it_passes_every_assertion(
    answer: str, passed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_harness, "SECONDS", 2.0)
    doc = {
        "text": "Write a function that returns the last number.",
        "test_setup_code": "SIZES = {1: 1, 2: 2, 3: 3}",
        "test_list": ["assert last([1, 2]) == 2", "assert last([1, 2, 3]) == 3"],
    }
    assert by_harness.asserted(doc, [answer]) == {"mbpp": passed}


def test_mbpp_is_asked_as_it_was_trained_with_its_tests(sources: Sources, tmp_path: Path) -> None:
    task = load_suite(str(toy_suite("smollm2", tmp_path, ["lora"]))).tasks["mbpp"]
    doc = by_harness.rows_of(task, sources)[0]
    asked = by_harness.prompt_of(task, doc)
    assert "\nThe code must pass these tests:\nassert one() == 1\nassert one() > 0<|im_end|>" in asked
    raw = sources.rows(task.files["report"])[0]
    row = instruct.CLEANERS[task.clean]({meaning: raw[column] for meaning, column in task.columns.items()})
    assert row is not None
    assert task.input.format(**row) == asked
    assert "\r" not in row["answer"]
    with pytest.raises(ValueError, match="mbpp runs programs; it needs by: harness"):
        check(replace(task, evaluation={**task.evaluation, "by": "greedy"}), sources)


def test_the_references_of_mbpp_pass_their_own_assertions() -> None:
    rows = Sources(data=str(data_folder())).rows("data:data/mbpp/mbpp.jsonl#11-50")
    assert rows[0]["task_id"] == 11
    assert [by_harness.asserted(row, [row["code"]])["mbpp"] for row in rows] == [1.0] * 40


@pytest.fixture
def chat(sources: Sources, tmp_path: Path) -> Cell:
    """A cell whose answers a judge rates."""
    suite = load_suite(str(toy_suite("llama2-chat", tmp_path, ["lora"])))
    return cell_of(suite, "chat", "lora", 1e-3, 0)


def test_every_turn_is_rated_and_the_mean_is_reported(chat: Cell, sources: Sources, judge_server: Any) -> None:
    # The first answer is for the question that tries the judge.
    judge_server.answers = [(200, f"well. Rating: [[{value}]]") for value in (9, 1, 2, 8, 10)]
    record = run_cell(chat, Place(sources))
    assert record["status"] == "done", record
    found = record["metrics"]["report"]
    assert (found["mt_bench"], found["first_turn"], found["second_turn"]) == (5.25, 4.5, 6.0)
    _, first, _, third, fourth = judge_server.asked
    assert {asked["model"] for asked in judge_server.asked} == {"gpt-4"}
    assert first["messages"][1]["content"].startswith("the cat ?")
    # A question of mathematics is sent with its reference answer.
    assert third["messages"][1]["content"].startswith("the cat ? one ")
    assert re.match(r"one .* two ", fourth["messages"][1]["content"])


FAILURES = [
    ((200, "I like it."), r"gives no rating from 1 to 10 as \[\[rating\]\], but answers 'I like it.'"),
    ((200, "Rating: [[11]]"), "gives no rating from 1 to 10"),
    ((200, b"<html>"), "answers, but not as a chat completion"),
    ((200, b"[]"), "answers, but not as a chat completion"),
    ((401, b"no such key"), "HTTP 401 Unauthorized: no such key"),
    ((0, ""), "no answer within 0.2 s"),
]


@pytest.mark.parametrize(("answer", "reason"), FAILURES)
def test_a_failing_judge_ends_the_cell_before_training_after_few_tries(
    chat: Cell, sources: Sources, judge_server: Any, answer: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "SECONDS", 0.2)
    judge_server.answers = [answer]
    record = run_cell(chat, Place(sources))
    assert record["status"] == "failed"
    assert re.search(f"JudgeError: a question to try the judge: .*{reason}", record["reason"])
    assert record["reason"].endswith("(3 tries). Fix the endpoint, then run again with --retry.")
    assert record["curves"]["training"] == []
    assert len(judge_server.asked) <= judge.TRIES


def test_a_judge_that_fails_after_training_ends_the_cell_with_the_question_and_the_reason(
    chat: Cell, sources: Sources, judge_server: Any
) -> None:
    judge_server.answers = [(200, "[[5]]"), (200, "[[5]]"), (200, "no more ratings")]
    record = run_cell(chat, Place(sources))
    assert record["status"] == "failed"
    assert re.search("JudgeError: question 81, second turn: .*but answers 'no more ratings'", record["reason"])
    assert len(record["curves"]["training"]) == 3
    assert len(judge_server.asked) == 2 + judge.TRIES


def test_a_judge_that_fails_once_is_asked_again(chat: Cell, sources: Sources, judge_server: Any) -> None:
    judge_server.answers = [(500, b""), (200, "hm"), (200, "[[9]]"), (500, b""), (200, "[[4]]")]
    assert run_cell(chat, Place(sources))["metrics"]["report"]["mt_bench"] == 4.0


def test_a_judge_without_an_address_or_out_of_reach_is_reported(
    chat: Cell, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "PAUSE", 0.0)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    record = run_cell(chat, Place(sources))
    assert "the judge named by OPENAI_BASE_URL: cannot be reached" in record["reason"]
    assert "127.0.0.1" not in json.dumps(record)
    monkeypatch.delenv("OPENAI_BASE_URL")
    record = run_cell(chat, Place(sources))
    assert "none is named. Set OPENAI_BASE_URL" in record["reason"]
    # Found before training, not after it.
    assert record["curves"]["training"] == []


@pytest.mark.parametrize("body", [b'{"error": {"message": "wrong key: sk-secret"}}', b"wrong key: sk-secret"])
def test_the_key_is_sent_to_the_judge_and_never_recorded(
    chat: Cell, sources: Sources, judge_server: Any, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    judge_server.answers = [(401, body)]
    record = run_cell(chat, Place(sources))
    assert "HTTP 401 Unauthorized: " in record["reason"]
    assert "wrong key: [key]" in record["reason"]
    assert "sk-secret" not in json.dumps(record)
    assert {headers["authorization"] for headers in judge_server.headers} == {"Bearer sk-secret"}
    monkeypatch.delenv("OPENAI_API_KEY")
    judge_server.headers.clear()
    run_cell(chat, Place(sources))
    assert all("authorization" not in headers for headers in judge_server.headers)
    assert len(judge_server.headers) == judge.TRIES


def test_a_missing_client_of_the_judge_is_refused_with_the_extra_to_install(
    tasks: dict[str, Task], sources: Sources, judge_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'client of the judge is not installed. Run pip install -e "\.\[eval\]"'):
        check(tasks["chat"], sources)
    assert check(tasks["chat"], replace(sources, use_hub=False))


def fail_to_train(*_: Any) -> None:
    raise AssertionError("trained again")


def test_after_a_failed_judge_the_saved_model_is_judged_without_training_again(
    sources: Sources, tmp_path: Path, judge_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_ga.experiments.suites.cells.MOST_RATES", 3)
    suite = load_suite(str(toy_suite("llama2-chat", tmp_path, ["lora"], seeds=1, paper_rate=None)))
    lines = [("chat", "lora")]
    with Store(tmp_path / "runs").locked() as store:
        place = Place(sources, commit="abc", unjudged=str(store.unjudged()))
        judge_server.answers = [*[(200, "[[5]]")] * 3, (200, "no more ratings")]
        failed = run_grid(suite, lines, store, place, workers=0)
        asked = judge_server.asked[1:3]
        assert {record["status"] for record in failed.values()} == {"failed"}
        # The first cell was trained. The later ones tried the judge before training, and stopped.
        (digest,) = [name for name, record in failed.items() if record["curves"]["training"]]
        assert [path.name for path in store.unjudged().iterdir()] == [digest]
        judge_server.answers = [(200, "[[7]]")]
        judge_server.asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr("lora_ga.experiments.suites.run.train", fail_to_train)
            run_grid(suite, lines, store, replace(place, commit="def"), workers=0)
        found = store.records()[digest]
        # The same model gives the same answers.
        assert judge_server.asked[1:3] == asked
        assert not store.unjudged().exists()
        records = run_grid(suite, lines, store, place, workers=0, retry=True)
    assert {record["status"] for record in records.values()} == {"done"}
    assert found["status"] == "done", found
    assert found["attempt"] == 2
    assert found["metrics"]["report"]["mt_bench"] == 7.0
    assert found["curves"] == failed[digest]["curves"]
    assert (found["commit"], found["judged"]["commit"]) == ("abc", "def")
    assert set(found["seconds"]) == {"load", "start", "train", "evaluate", "total"}
    assert found["seconds"]["total"] > sum(found["seconds"][part] for part in ("load", "start", "train"))
    assert set(found["metrics"]["tune"]) == {"loss"}


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_is_restored_exactly(method: str, chat: Cell, sources: Sources, tmp_path: Path) -> None:
    cell = replace(chat, method=method, learning_rate=1e-2, options={}, settings=replace(chat.settings, steps=10))
    cell = replace(cell, task=replace(cell.task, evaluation={}))
    expected = torch.empty(0)
    for again in (False, True):
        prepared = prepare(cell, sources)
        base, inputs = trained.fingerprints(prepared.base), build_inputs(cell, prepared)
        torch.manual_seed(cell.seed)
        model = load_method(method).build(inputs)
        batch = prepared.splits["report"][0]
        if again:
            keep_in_float32(model)
            assert trained.restore(tmp_path / "saved", model) == {"loss": 1.5}
        else:
            train(Loop(prepared, load_method(method), model, inputs, cell.settings, "cpu", Curves()))
            trained.save(tmp_path / "saved", model, base, {"loss": 1.5})
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        if again:
            assert torch.equal(logits, expected)
        expected = logits
    # A method that does not change the base does not save it.
    changes_base = method in {"full", "pissa", "olora", "peft_lora_ga"}
    assert (
        any(re.search(r"mlp\.(?!.*lora_).*weight$", name) for name in saved_names(tmp_path / "saved")) == changes_base
    )


def saved_names(folder: Path) -> list[str]:
    with safe_open(folder / trained.TENSORS, "pt") as file:
        return list(file.keys())


def test_a_saved_model_that_does_not_fit_or_is_damaged_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    trained.save(tmp_path / "saved", model, {}, {})
    with pytest.raises(ValueError, match="the saved model and the one that was built differ in 0.bias, 0.weight, bias"):
        trained.restore(tmp_path / "saved", torch.nn.Sequential(model))
    with pytest.raises(
        ValueError, match="(?s)the trained model cannot be loaded .*Remove this folder to train it again"
    ):
        trained.restore(tmp_path / "saved", torch.nn.Linear(3, 2))
    (tmp_path / "saved" / trained.TENSORS).write_bytes(b"1234")
    with pytest.raises(
        ValueError, match="(?s)the trained model cannot be loaded .*Remove this folder to train it again"
    ):
        trained.restore(tmp_path / "saved", model)


def test_a_model_whose_saving_was_interrupted_is_trained_again(
    chat: Cell, sources: Sources, judge_server: Any, tmp_path: Path
) -> None:
    place = Place(sources, unjudged=str(tmp_path))
    folder = place.unjudged_folder(chat)
    assert folder is not None
    folder.mkdir()
    (folder / trained.TENSORS).write_bytes(b"1234")
    record = run_cell(chat, place)
    assert record["status"] == "done", record["reason"]
    # The model is kept until its record is in a store.
    assert trained.is_saved(folder)


@pytest.fixture
def tasks(sources: Sources, tmp_path: Path) -> dict[str, Task]:
    """Task name → task, of the three suites that score answers."""
    names = ("llama2-math", "llama2-code", "llama2-chat")
    suites = [load_suite(str(toy_suite(name, tmp_path, ["lora"]))) for name in names]
    return {name: task for suite in suites for name, task in suite.tasks.items()}


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("math", {"by": "eye"}, "evaluation: by is 'eye'; it must be one of harness, greedy, judge"),
        ("math", {"test": "mmlu"}, "evaluation: test is 'mmlu'; it must be one of gsm8k, humaneval"),
        ("math", {"shots": 5}, "evaluation: gives by, test, rows, tokens, batch, shots; it takes by, test"),
        ("chat", {"shots": 5}, "evaluation: gives by, model, .*shots; it takes by, model, questions"),
        ("chat", {"prompts": "data:data/mt_bench/question.jsonl"}, "question.jsonl: row 0 has no name, system_prompt"),
        ("chat", {"questions": "data:nothing.jsonl"}, "data:nothing.jsonl: wanted at .*, but it is not there"),
        ("math", {"rows": "hub:meta-math/MetaMathQA:train"}, "row 0 has no column 'question'"),
    ],
)
def test_an_invalid_evaluation_is_refused_before_anything_runs(
    task: str, changes: dict[str, Any], message: str, tasks: dict[str, Task], sources: Sources
) -> None:
    wrong = replace(tasks[task], evaluation={**tasks[task].evaluation, **changes})
    with pytest.raises(ValueError, match=message):
        check(wrong, replace(sources, use_hub=False))


@pytest.mark.skipif(HARNESS, reason="lm-evaluation-harness is installed")
def test_a_missing_harness_is_refused_with_the_extra_to_install(tasks: dict[str, Task], sources: Sources) -> None:
    with pytest.raises(ValueError, match=r'not installed. Run pip install -e "\.\[eval\]"'):
        check(tasks["math"], sources)
    assert any("3 rows" in found for found in check(tasks["math"], replace(sources, use_hub=False)))


def test_greedy_answers_in_batches_are_those_of_each_prompt_alone(sources: Sources, tmp_path: Path) -> None:
    task = load_suite(str(toy_suite("smollm2", tmp_path, ["lora"]))).tasks["gsm8k"]
    folder = sources.model(task.model)
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    prompts = ["the cat", "the dog sees the tree ?", "the bird sees", "Q : the river sees the stone 1 2 1"]
    alone = [judge.answer(model, tokenizer, prompt, 0.0, 6) for prompt in prompts]
    assert greedy.greedy_answers(model, tokenizer, prompts, 6, batch=3) == alone
    assert len(set(alone)) > 1
    said = iter(["#### 2", "it is 3", "2"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "greedy_answers", lambda *_: list(said))
        assert greedy.run(model, tokenizer, task, sources, 0) == {"gsm8k": pytest.approx(2 / 3, abs=1e-6)}
    with pytest.raises(ValueError, match="humaneval runs programs; it needs by: harness"):
        check(replace(task, evaluation={**task.evaluation, "test": "humaneval"}), sources)


def test_programs_run_only_if_the_environment_allows_it(
    tasks: dict[str, Task], sources: Sources, harness: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    with pytest.raises(ValueError, match="humaneval runs programs that a model wrote.*HF_ALLOW_CODE_EVAL=1"):
        check(tasks["code"], sources)


@pytest.mark.skipif(not HARNESS, reason="install the extra 'eval' to run this test with lm-evaluation-harness itself")
@pytest.mark.parametrize("name", ["math", "code"])
def test_the_real_harness_scores_the_models_answers(
    name: str, tasks: dict[str, Task], sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    task = tasks[name]
    folder = sources.model(task.model)
    base, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    seen: list[str] = []
    test = task.evaluation["test"]
    columns, question, _, programs = by_harness.TESTS[test]

    def judged(doc: Any, results: Any) -> dict[str, float]:
        seen.append(doc[question])
        assert isinstance(results[0], str)
        return {test: float(len(seen) == 1)}

    monkeypatch.setitem(by_harness.TESTS, test, (columns, question, judged, programs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = by_harness.run(model, tokenizer, task, sources, 0)
    assert len(seen) == len(sources.rows(task.evaluation["rows"]))
    assert found == {test: pytest.approx(1 / len(seen), abs=1e-6)}
