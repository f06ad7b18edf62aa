"""What the published suites name, at toy size: a hub folder, a data folder, tiny models with random weights."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from lora_ga.experiments.suites.spec import available

NOUNS = ["cat", "dog", "tree", "house", "river", "stone", "bird", "boat"]
PAIRS = [f"the {a} sees the {b}" for a in NOUNS for b in NOUNS]
LABELS = ["negative", "positive", "entailment", "neutral", "contradiction", "not_entailment", "different", "equivalent"]
SPECIAL = ["[PAD]", "[UNK]", "</s>", "[CLS]", "[SEP]"]
VOCABULARY = [*SPECIAL, "the", "sees", *NOUNS, *LABELS, "acceptable", "unacceptable", "result", ":", "Q", "A", "1", "2"]
SIZES = {"vocab_size": len(VOCABULARY)}
SETTINGS = {"batch_size": 4, "length": 40, "rank": 2, "samples": 8, "tune_rows": 8, "report_rows": 8, "train_rows": 40}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes a jsonl file, compressed if its name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def save_tokenizer(folder: Path, template: str | None = None) -> None:
    """Saves a tokenizer with one token for each word of `VOCABULARY`."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    if template is not None:
        special = [(token, VOCABULARY.index(token)) for token in SPECIAL[2:]]
        pair = f"{template} $B:1 [SEP]:1" if "[SEP]" in template else None
        words.post_processor = TemplateProcessing(single=template, pair=pair, special_tokens=special)
    names = {"unk_token": "[UNK]", "eos_token": "</s>", "pad_token": "[PAD]"}
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names).save_pretrained(folder)


def save_llama(folder: Path) -> None:
    """Saves a Llama of one layer and width 16, with its tokenizer."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**SIZES, **shape, max_position_embeddings=512, eos_token_id=2)).save_pretrained(folder)
    save_tokenizer(folder)


def write_hub(folder: Path) -> None:
    """Writes the models and data sets of all `hub:` names, in folders as `hf download` makes them."""
    set_seed(0)
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**SIZES, **t5, decoder_start_token_id=0, eos_token_id=2)).save_pretrained(
        folder / "google-t5/t5-base"
    )
    save_tokenizer(folder / "google-t5/t5-base", "$A </s>")
    save_llama(folder / "meta-llama/Llama-2-7b-hf")
    columns = {"mnli": ("premise", "hypothesis"), "qnli": ("question", "sentence"), "mrpc": ("sentence1", "sentence2")}
    configurations = []
    for name in ("mnli", "sst2", "cola", "qnli", "mrpc"):
        first, second = columns.get(name, ("sentence", None))
        rows = [
            {first: text, **({second: PAIRS[-i]} if second else {}), "label": i % (3 if name == "mnli" else 2)}
            for i, text in enumerate(PAIRS)
        ]
        split = "validation_matched" if name == "mnli" else "validation"
        write(folder / f"nyu-mll/glue/{name}/train.jsonl", rows)
        write(folder / f"nyu-mll/glue/{name}/{split}.jsonl", rows[::3])
        files = [{"split": each, "path": f"{name}/{each}.jsonl"} for each in ("train", split)]
        configurations.append({"config_name": name, "data_files": files})
    card(folder / "nyu-mll/glue", configurations)
    solved = [{"query": f"{text} ?", "response": f"{text} #### 2\nThe answer is: 2"} for text in PAIRS]
    math = [{**row, "type": ("GSM_Rephrased", "MATH_SV")[i % 8 == 0]} for i, row in enumerate(solved)]
    write(folder / "meta-math/MetaMathQA/train.jsonl", math)
    code = [{"query": text, "answer": f"so ```python\n{text}``` and more"} for text in PAIRS]
    write(folder / "m-a-p/CodeFeedback-Filtered-Instruction/train.jsonl", code)
    chat = [{"instruction": text, "output": text if i % 8 else "Sorry"} for i, text in enumerate(PAIRS)]
    write(folder / "silk-road/Wizard-LM-Chinese-instruct-evol/train.jsonl", chat)
    write(folder / "openai/gsm8k/main/test.jsonl", [{"question": text, "answer": "#### 2"} for text in PAIRS[:3]])
    card(
        folder / "openai/gsm8k",
        [{"config_name": "main", "data_files": [{"split": "test", "path": "main/test.jsonl"}]}],
    )
    task = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}
    write(folder / "openai/openai_humaneval/test.jsonl", [task] * 2)


def card(folder: Path, configurations: list[dict[str, Any]]) -> None:
    """Writes a data set's README, which lists its configurations."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configurations})}---\n")


def write_data(folder: Path) -> None:
    """Writes the files of all `data:` names, and a tiny BERT in place of the packaged model."""
    set_seed(0)
    for name in ("stories260k", "babyllama105"):
        save_llama(folder / "models" / name)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(**SIZES, **shape)).bert.save_pretrained(folder / "bert")
    save_tokenizer(folder / "bert", "[CLS] $A [SEP]")
    (folder / "data/text").mkdir(parents=True)
    (folder / "data/text/tinyshakespeare.txt").write_text(" . ".join(PAIRS * 20))
    for name in ("cola", "mrpc", "sst2", "qnli", "mnli"):
        rows = [{"text": text, "text_pair": PAIRS[-i], "label": i % 2} for i, text in enumerate(PAIRS)]
        write(folder / f"data/glue/{name}/train.jsonl", rows)
        write(folder / f"data/glue/{name}/validation.jsonl", rows[::3])
    solved = [{"question": f"{text} ?", "answer": f"{text} #### 2"} for text in PAIRS]
    write(folder / "data/gsm8k/train.jsonl", solved)
    write(folder / "data/gsm8k/test.jsonl", solved[:3])
    tests = {"test_setup_code": "", "test_list": ["assert one() == 1", "assert one() > 0"]}
    programs = [{"text": text, "code": f"{text}\r\n{text}", **tests} for text in PAIRS]
    write(folder / "data/mbpp/mbpp.jsonl", (programs * 974)[:974])
    bench = folder / "data/mt_bench"
    turns = ["the cat ?", "the dog ?"]
    write(
        bench / "question.jsonl",
        [
            {"question_id": 81, "category": "writing", "turns": turns},
            {"question_id": 101, "category": "math", "turns": turns},
        ],
    )
    write(bench / "reference_gpt-4.jsonl", [{"question_id": 101, "choices": [{"turns": ["one", "two"]}]}])
    once = {"single-v1": "{question} {answer}", "single-math-v1": "{question} {ref_answer_1} {answer}"}
    twice = {
        "single-v1-multi-turn": "{question_1} {answer_1} {question_2} {answer_2}",
        "single-math-v1-multi-turn": "{ref_answer_1} {answer_1} {ref_answer_2} {answer_2}",
    }
    prompts = [
        {"name": name, "system_prompt": "judge", "prompt_template": text} for name, text in {**once, **twice}.items()
    ]
    write(bench / "judge_prompts.jsonl", prompts)


def toy_suite(name: str, folder: Path, labels: Sequence[str], **changes: Any) -> Path:
    """Writes a published suite at toy size: the same tasks, columns, prompts and methods, but few rows and steps.

    Args:
        name: The suite's name.
        folder: The folder for the file.
        labels: The variants to keep.
        **changes: Other values for keys of the suite.

    Returns:
        The suite's file.
    """
    suite = yaml.safe_load(available()[name].read_text(encoding="utf-8"))
    suite["settings"] |= SETTINGS | {"steps": 3, "eval_steps": 3}
    if "gradient_accumulation_steps" in suite["settings"]:
        suite["settings"] |= {"batch_size": 1, "gradient_accumulation_steps": 4}
    suite["methods"] = {label: suite["methods"][label] for label in labels}
    for task in suite["tasks"].values():
        task["model"] = re.sub("^package:.*", "data:bert", task["model"])
        task["model"] = re.sub("^gguf:.*", "data:models/stories260k", task["model"])
        task["fields"] = {}
        task["settings"] = {"head_rate": 0.01} if task["kind"] == "classes" else {}
        if task.get("clean") == "lines":  # its prompts have the tests in them
            task["settings"] = {"length": 80}
        if "rows" in task.get("evaluation", {}):
            task["evaluation"]["rows"] = re.sub("#.*", "#11-13", task["evaluation"]["rows"])
        if "tokens" in task.get("evaluation", {}):
            task["evaluation"]["tokens"] = 6
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(suite | {"seeds": 2} | changes, sort_keys=False, allow_unicode=True))
    return path
