"""MT-Bench: two turns of answers, each rated from 1 to 10 by a model behind an OpenAI-compatible endpoint.

Zheng and others, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", 2023. Questions, reference answers and the
judge's prompts are files in FastChat's format. The endpoint is `OPENAI_BASE_URL`, its key `OPENAI_API_KEY`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import torch

from lora_ga.experiments.suites.sources import Sources
from lora_ga.experiments.suites.spec import Task

ENDPOINT, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
KEYS = ("by", "model", "questions", "references", "prompts", "tokens")
TRIES, SECONDS, PAUSE = 3, 120.0, 2.0  # requests for one rating; how long each may take; how long between them
RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
# From FastChat: the categories whose prompt shows a reference answer, and the sampling temperatures.
WITH_REFERENCE = {"math", "reasoning", "coding", "arena-hard-200"}
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
PROMPTS = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")


class JudgeError(RuntimeError):
    """The judge cannot be reached, or gives no usable answer."""


def files(task: Task, sources: Sources) -> tuple[list[dict[str, Any]], dict[int, list[str]], dict[str, Any]]:
    """Reads the questions, the reference answers and the prompts.

    Args:
        task: The task.
        sources: Resolves the references to models and files.

    Returns:
        The questions, the references by question, the prompts by name.

    Raises:
        ValueError: A field is missing, or a reference that is needed.
    """
    given = {name: sources.rows(task.evaluation[name]) for name in ("questions", "references", "prompts")}
    wanted = {
        "questions": ("question_id", "category", "turns"),
        "references": ("question_id", "choices"),
        "prompts": ("name", "system_prompt", "prompt_template"),
    }
    for name, rows in given.items():
        for number, row in enumerate(rows):
            lacking = [field for field in wanted[name] if field not in row]
            if lacking:
                raise ValueError(f"{task.evaluation[name]}: row {number} has no {', '.join(lacking)}.")
    references = {row["question_id"]: row["choices"][0]["turns"] for row in given["references"]}
    prompts = {row["name"]: row for row in given["prompts"]}
    lost = [name for name in PROMPTS if name not in prompts]
    if lost:
        raise ValueError(f"{task.evaluation['prompts']}: has no prompt named {', '.join(lost)}.")
    for row in given["questions"]:
        if row["category"] in WITH_REFERENCE and row["question_id"] not in references:
            raise ValueError(
                f"{task.evaluation['references']}: has no answer to question {row['question_id']} ({row['category']})."
            )
    return given["questions"], references, prompts


def check(task: Task, sources: Sources) -> list[str]:
    """Checks the files, and the endpoint if cells are going to run.

    Args:
        task: The task.
        sources: Resolves the references to models and files.

    Returns:
        One text for each thing that was found.

    Raises:
        ValueError: Something is missing.
    """
    unknown = sorted(set(task.evaluation) - set(KEYS))
    missing = [name for name in ("model", "questions", "references", "prompts") if name not in task.evaluation]
    if unknown or missing:
        raise ValueError(f"evaluation: gives {', '.join(task.evaluation)}; it takes {', '.join(KEYS)}.")
    questions, references, _ = files(task, sources)
    if sources.use_hub and not os.environ.get(ENDPOINT):
        raise ValueError(
            f"evaluation: the judge {task.evaluation['model']} needs an OpenAI-compatible endpoint, but none is "
            f"named. Set {ENDPOINT} (as https://api.openai.com/v1), and {KEY} if it wants a key."
        )
    if sources.use_hub and importlib.util.find_spec("openai") is None:
        raise ValueError(
            'evaluation: the client of the judge is not installed. Run pip install -e ".[eval]" in a checkout of '
            "LoRA-GA (it is not on PyPI yet)."
        )
    return [f"MT-Bench ({len(questions)} questions, {len(references)} references, judge {task.evaluation['model']})"]


def preflight(task: Task, sources: Sources) -> None:
    """Checks again in the process that runs the cell, and asks for one rating, to find errors before the training."""
    check(task, sources)
    prompt = files(task, sources)[2]["single-v1"]
    rating(
        task.evaluation["model"], prompt, {"question": "What is 1 + 1?", "answer": "2"}, "a question to try the judge"
    )


def ask(model: str, prompt: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Sends one request to the judge.

    Args:
        model: The judge's name at the endpoint.
        prompt: A row of the prompts.
        words: The values for the placeholders of its template.

    Returns:
        The judge's answer.

    Raises:
        JudgeError: There is no answer, or it is not a chat completion. Neither the key nor the address is ever part of
            the message, which goes into a record.
    """
    import openai

    key, address = os.environ.get(KEY), os.environ[ENDPOINT]
    messages: list[Any] = [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**words)},
    ]
    client = openai.OpenAI(
        base_url=address,
        api_key=key or "none",
        timeout=SECONDS,
        max_retries=0,  # `rating` tries again, also after an answer without a rating
    )
    try:
        with client:
            # The raw answer: the client takes a completion whose content type is not JSON for plain text.
            answer = client.chat.completions.with_raw_response.create(
                model=model,
                messages=messages,
                temperature=0,
                max_tokens=2048,
                extra_headers={} if key else {"Authorization": openai.Omit()},
            )
            return str(json.loads(answer.http_response.text)["choices"][0]["message"]["content"])
    except openai.APITimeoutError:
        reason = f"no answer within {SECONDS:g} s"
    except openai.APIStatusError as error:
        found = error.response
        reason = f"HTTP {found.status_code} {found.reason_phrase}: {found.text[:300]}"
    except openai.APIConnectionError as error:
        reason = f"cannot be reached ({error.__cause__ or error})"
    except (openai.OpenAIError, ValueError, KeyError, IndexError, TypeError) as error:
        reason = f"answers, but not as a chat completion ({type(error).__name__}: {error})"
    # Raised here, so that the traceback in the record does not show the client's error: a server may repeat the key.
    for secret, shown in ((key, "[key]"), (address, "[address]"), (urlsplit(address).netloc, "[address]")):
        reason = reason.replace(secret, shown) if secret else reason
    raise JudgeError(f"the judge named by {ENDPOINT}: {reason}")


def rating(model: str, prompt: Mapping[str, Any], words: Mapping[str, str], about: str) -> float:
    """Asks the judge for a rating, several times if needed.

    Args:
        model: The judge's name.
        prompt: A row of the prompts.
        words: The values for the placeholders of its template.
        about: What is rated, for the message.

    Returns:
        The rating, from 1 to 10.

    Raises:
        JudgeError: There is no rating after `TRIES` requests.
    """
    reason = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE)
        try:
            said = ask(model, prompt, words)
        except JudgeError as error:
            reason = str(error)
            continue
        found = RATING.search(said)
        if found and 1 <= float(found[1]) <= 10:
            return float(found[1])
        reason = f"the judge gives no rating from 1 to 10 as [[rating]], but answers {said[-200:]!r}"
    raise JudgeError(f"{about}: {reason} ({TRIES} tries). Fix the endpoint, then run again with --retry.")


def answer(model: Any, tokenizer: Any, text: str, temperature: float, tokens: int) -> str:
    """Generates the model's answer to a text."""
    given = tokenizer(text, return_tensors="pt").to(model.device)
    given.pop("token_type_ids", None)
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.no_grad():
        written = model.generate(
            **given, **how, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id
        )
    return tokenizer.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def conversation(model: Any, tokenizer: Any, task: Task, question: Mapping[str, Any], seed: int) -> list[str]:
    """Answers the two turns of a question; the second prompt contains the first turn. One seed for each question."""
    place = next(meaning for meaning in task.columns if f"{{{meaning}}}" in task.input)
    temperature, tokens = TEMPERATURES.get(question["category"], 0.0), task.evaluation.get("tokens", 1024)
    torch.manual_seed(1000 * seed + question["question_id"])
    text, answers = "", []
    for turn in question["turns"]:
        text += task.input.format(**{place: turn})
        answers.append(answer(model, tokenizer, text, temperature, tokens))
        text += answers[-1] + "\n\n"
    return answers


def run(model: Any, tokenizer: Any, task: Task, sources: Sources, seed: int) -> dict[str, float]:
    """Answers all questions and has every turn rated.

    Args:
        model: The trained model.
        tokenizer: Its tokenizer.
        task: The task.
        sources: Resolves the references to the files.
        seed: Seed of sampled answers.

    Returns:
        "mt_bench", the mean rating of all turns, and that of each turn.
    """
    questions, references, prompts = files(task, sources)
    judge = task.evaluation["model"]
    ratings: dict[str, list[float]] = {"first_turn": [], "second_turn": []}
    for question in questions:
        answers = conversation(model, tokenizer, task, question, seed)
        known = references.get(question["question_id"], ["", ""])
        kind = "single-math-v1" if question["category"] in WITH_REFERENCE else "single-v1"
        words = {"question": question["turns"][0], "answer": answers[0]}
        for number, turn in enumerate(question["turns"], 1):
            words |= {f"question_{number}": turn, f"answer_{number}": answers[number - 1]}
            words[f"ref_answer_{number}"] = known[number - 1]
        for name, ending in (("first_turn", ""), ("second_turn", "-multi-turn")):
            about = f"question {question['question_id']}, {name.replace('_', ' ')}"
            ratings[name].append(rating(judge, prompts[kind + ending], words, about))
    means = {name: round(statistics.fmean(values), 6) for name, values in ratings.items()}
    return {"mt_bench": round(statistics.fmean(ratings["first_turn"] + ratings["second_turn"]), 6), **means}
