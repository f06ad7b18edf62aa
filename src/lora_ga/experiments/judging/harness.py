"""GSM8K, HumanEval and MBPP by lm-evaluation-harness, with local rows and with the prompt of the training.

The harness generates the answers and computes the metric. The tasks are defined here, because the harness's
definitions read from the hub and use another prompt. The harness gets the model object, so that full fine-tuning and
every adapter are evaluated by the same code.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_ga.experiments.suites.sources import Sources, select_columns
from lora_ga.experiments.suites.spec import Task

ALLOW = "HF_ALLOW_CODE_EVAL"  # the name that the `evaluate` library and the harness know
SECONDS = 10.0  # time limit of a program
KEYS = ("by", "test", "rows", "tokens", "batch")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def number_of(text: str) -> float | None:
    """The answer in a text: the number after "####", or else the last number."""
    marked = text.split("####")[1:2] or [text]
    found = NUMBER.findall(marked[0])
    return float((found[0] if len(text.split("####")) > 1 else found[-1]).replace(",", "")) if found else None


def right_number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the model's number equals the reference's."""
    said = number_of(results[0])
    return {"gsm8k": float(said is not None and said == number_of(doc["answer"]))}


def code_of(text: str) -> str:
    """The first code block; the whole text if there is none."""
    found = re.search(r"```(?:\w*\n)?(.*?)(?:```|\Z)", text, flags=re.DOTALL)
    return found[1] if found else text


def lines_of(value: Any) -> Any:
    """A column as text for a template: a list becomes lines, and every line ends in the same way."""
    text = "\n".join(value) if isinstance(value, list) else value
    return text.replace("\r\n", "\n") if isinstance(text, str) else text


def completed(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the model's completion of a function passes HumanEval's tests."""
    code = code_of(results[0])
    whole = code if f"def {doc['entry_point']}" in code else doc["prompt"] + code
    # The answer may need the imports of the prompt, such as "from typing import List".
    program = f"{doc['prompt'].split('def ')[0]}\n{whole}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"humaneval": float(runs(program))}


def asserted(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the model's program passes all of MBPP's assertions."""
    parts = (doc["test_setup_code"], code_of(results[0]), doc["test_list"])
    return {"mbpp": float(runs("\n".join(map(lines_of, parts))))}


def runs(program: str) -> bool:
    """Whether a program ends without an error; it runs in a separate process with an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
                check=False,
                cwd=folder,
                env={"PATH": os.defpath},
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


# Test → the columns of its rows, the column with the question, the metric, whether programs are run.
TESTS: dict[str, tuple[Sequence[str], str, Callable[[Mapping[str, Any], Sequence[str]], dict[str, float]], bool]] = {
    "gsm8k": (("question", "answer"), "question", right_number, False),
    "humaneval": (("prompt", "test", "entry_point"), "prompt", completed, True),
    "mbpp": (("text", "test_list", "test_setup_code"), "text", asserted, True),
}


def check_test(task: Task) -> None:
    """Checks that the evaluation names a test and its rows, and nothing unknown.

    Args:
        task: The task.

    Raises:
        ValueError: It does not.
    """
    test = task.evaluation.get("test")
    if test not in TESTS:
        raise ValueError(f"evaluation: test is {test!r}; it must be one of {', '.join(TESTS)}.")
    unknown = sorted(set(task.evaluation) - set(KEYS))
    if unknown or "rows" not in task.evaluation:
        raise ValueError(f"evaluation: gives {', '.join(task.evaluation)}; it takes {', '.join(KEYS)}, and needs rows.")


def check_rows(task: Task, sources: Sources) -> list[str]:
    """Checks that the rows of the test have its columns.

    Args:
        task: The task.
        sources: Resolves the reference to the rows.

    Returns:
        One text about the rows.

    Raises:
        ValueError: The rows are missing, or a column is.
    """
    test, reference = task.evaluation["test"], task.evaluation["rows"]
    columns = TESTS[test][0]
    if sources.is_out_of_reach(reference):
        return [f"{test} {reference} (columns {', '.join(columns)}; not checked)"]
    return [f"{test} {reference} ({len(rows_of(task, sources))} rows; columns {', '.join(columns)})"]


def rows_of(task: Task, sources: Sources) -> list[dict[str, Any]]:
    """The rows of a test."""
    columns, reference = TESTS[task.evaluation["test"]][0], task.evaluation["rows"]
    return select_columns(sources.rows(reference), {column: column for column in columns}, reference)


def prompt_of(task: Task, row: Mapping[str, Any]) -> str:
    """The prompt of a row of a test, made as in the training.

    Args:
        task: The task. The first of its columns that the template names is the question; the test has the others under
            their own names.
        row: The row.

    Returns:
        The prompt.
    """
    question, *others = (meaning for meaning in task.columns if f"{{{meaning}}}" in task.input)
    values = {question: row[TESTS[task.evaluation["test"]][1]], **{each: row[task.columns[each]] for each in others}}
    return task.input.format(**{meaning: lines_of(value) for meaning, value in values.items()})


def check(task: Task, sources: Sources) -> list[str]:
    """Checks the rows, the installation of the harness, and the permission to run programs.

    Args:
        task: The task.
        sources: Resolves the references to models and files.

    Returns:
        One text for each thing that was found.

    Raises:
        ValueError: Something is missing, or not allowed.
    """
    check_test(task)
    test = task.evaluation["test"]
    if sources.use_hub:
        if importlib.util.find_spec("lm_eval") is None:
            raise ValueError(
                'evaluation: lm-evaluation-harness is not installed. Run pip install -e ".[eval]" in a checkout of '
                "LoRA-GA (it is not on PyPI yet)."
            )
        if TESTS[test][3] and os.environ.get(ALLOW) != "1":
            raise ValueError(
                f"evaluation: {test} runs programs that a model wrote. Use a machine where they can do no harm, "
                f"and allow it by {ALLOW}=1."
            )
    return check_rows(task, sources)


def preflight(task: Task, sources: Sources) -> None:
    """Checks again in the process that runs the cell."""
    check(task, sources)


def test_config(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The harness's configuration of a test: greedy decoding, no examples in the prompt.

    Args:
        task: The task; its input is the prompt.
        rows: The rows of the test.

    Returns:
        The configuration.
    """
    import datasets

    test = task.evaluation["test"]
    return {
        "task": test,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(list(map(dict, rows)))},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": lambda doc: prompt_of(task, doc),
        "doc_to_target": "",
        "process_results": TESTS[test][2],
        "metric_list": [{"metric": test, "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": task.evaluation.get("tokens", 512)},
        "num_fewshot": 0,
        "metadata": {},
    }


def run(model: Any, tokenizer: Any, task: Task, sources: Sources, seed: int) -> dict[str, float]:
    """Generates answers and computes the metric.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        task: The task.
        sources: Resolves the reference to the rows.
        seed: Not used: decoding is greedy.

    Returns:
        The share of right answers, under the test's name.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    test, rows = task.evaluation["test"], rows_of(task, sources)
    batch = task.evaluation.get("batch", 8)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device))
    found = lm_eval.simple_evaluate(wrapped, tasks=[test_config(task, rows)], bootstrap_iters=0, log_samples=False)
    return {test: round(float(found["results"][test][f"{test},none"]), 6)}
