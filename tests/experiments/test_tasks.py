"""The seq2seq and instruct tasks: batches, metrics, cleaned rows, gradient accumulation, and bfloat16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from experiments.hub import VOCABULARY, toy_suite
from lora_ga.experiments.methods import METHODS
from lora_ga.experiments.suites.cells import Cell, cell_of
from lora_ga.experiments.suites.run import Place, run_cell
from lora_ga.experiments.suites.sources import Sources, whole_file
from lora_ga.experiments.suites.spec import Settings, Suite, load_suite
from lora_ga.experiments.suites.training import accumulate_gradients, autocast, micro_batches
from lora_ga.experiments.tasks import check, prepare, seq2seq
from lora_ga.experiments.tasks.classes import epoch_batches, row_batches
from lora_ga.experiments.tasks.instruct import CLEANERS
from lora_ga.gradients.loss import IGNORED

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def suite_of(name: str, folder: Path) -> Suite:
    return load_suite(str(toy_suite(name, folder, ["lora"])))


@pytest.fixture
def seq2seq_cell(tmp_path: Path) -> Cell:
    return cell_of(suite_of("glue-t5", tmp_path), "sst2", "lora", 1e-3, 0)


@pytest.fixture
def instruct_cell(tmp_path: Path) -> Cell:
    cell = cell_of(suite_of("llama2-math", tmp_path), "math", "lora", 1e-3, 0)
    return replace(cell, task=replace(cell.task, evaluation={}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["seq2seq_cell", "instruct_cell"])
def test_every_method_runs_on_a_seq2seq_and_an_instruct_task(
    method: str, kind: str, sources: Sources, request: pytest.FixtureRequest
) -> None:
    cell = replace(request.getfixturevalue(kind), method=method, learning_rate=1e-2)
    record = run_cell(cell, Place(sources))
    assert record["status"] == "done", record.get("traceback")
    assert (
        record["metrics"]["report"]["loss"] != record["curves"]["report"][0]["loss"]
        or len(record["curves"]["report"]) == 1
    )


def test_a_label_counts_as_right_exactly_if_greedy_decoding_writes_its_word(
    seq2seq_cell: Cell, sources: Sources
) -> None:
    prepared = prepare(seq2seq_cell, sources)
    folder = sources.model(seq2seq_cell.task.model)
    model, tokenizer = T5ForConditionalGeneration.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (batch,) = prepared.splits["report"]
    generated = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2, do_sample=False
    )
    # Every second row has the label that the model writes, so that both outcomes occur.
    labels = generated[:, 1:].clone()
    labels[::2] = (labels[::2] + 1) % len(VOCABULARY)
    with torch.no_grad():
        logits = model(**{**batch, "labels": labels}).logits
    expected = (generated[:, 1:] == labels).all(-1).double().mean().item()
    assert seq2seq.measure([(logits, {"labels": labels})])["accuracy"] == expected == 0.5
    assert tokenizer.decode(batch["labels"][0].clamp_min(0)).split()[0] in seq2seq_cell.task.words


def test_the_losses_equal_those_of_the_model(seq2seq_cell: Cell, instruct_cell: Cell, sources: Sources) -> None:
    for cell in (seq2seq_cell, instruct_cell):
        prepared = prepare(cell, sources)
        for batch in prepared.splits["tune"]:
            output = prepared.base.eval()(**batch)
            assert prepared.loss(output.logits, batch).item() == pytest.approx(output.loss.item(), rel=1e-5)
            assert prepared.measure([(output.logits, batch)])["loss"] == pytest.approx(output.loss.item(), rel=1e-5)


def test_only_the_tokens_of_the_answer_and_its_end_are_learned(instruct_cell: Cell, sources: Sources) -> None:
    prepared = prepare(instruct_cell, sources)
    batch = next(prepared.train_batches)
    tokenizer = AutoTokenizer.from_pretrained(sources.model(instruct_cell.task.model))
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        learned = labels != IGNORED
        assert tokenizer.decode(ids[~learned]).startswith("Q : the")
        text = tokenizer.decode(ids[learned])
        assert text.endswith("2</s>") or text.endswith("2 </s>")
        assert "Q" not in text


@pytest.mark.parametrize(
    ("name", "row", "kept"),
    [
        ("grade_school", {"type": "GSM_SV", "answer": "a\nThe answer is: 2"}, "a"),
        ("grade_school", {"type": "MATH_SV", "answer": "a"}, None),
        ("first_code_block", {"answer": "x ```a``` y ```b```"}, "x ```a```"),
        ("first_code_block", {"answer": "x ```a"}, "x ```a```"),
        ("first_code_block", {"answer": "x"}, None),
        ("no_refusals", {"answer": "As an AI, no"}, None),
        ("no_refusals", {"answer": "yes"}, "yes"),
    ],
)
def test_rows_are_cleaned_as_by_the_papers_authors(name: str, row: dict[str, str], kept: str | None) -> None:
    found = CLEANERS[name](row)
    assert (None if found is None else found["answer"]) == kept


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(instruct_cell: Cell, sources: Sources) -> None:
    gradients, losses = [], []
    for batch_size, steps in ((4, 1), (2, 2), (1, 4)):
        settings = replace(
            instruct_cell.settings, batch_size=batch_size, gradient_accumulation_steps=steps, dtype="float32"
        )
        prepared = prepare(replace(instruct_cell, settings=settings), sources)
        batch = next(prepared.train_batches)
        # The rows get unequal numbers of labels.
        batch["labels"][0, :-3] = IGNORED
        model = prepared.base.requires_grad_(True)
        losses.append(accumulate_gradients(prepared, model, batch, settings, "cpu"))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert len(micro_batches(model, batch, batch_size)) == steps
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["full", "lora", "lora_ga"])
def test_a_bfloat16_base_is_trained_in_float32(
    method: str, instruct_cell: Cell, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def recording_autocast(model: Any, device: str) -> Any:
        seen.append({p.dtype for p in model.parameters() if p.requires_grad})
        return autocast(model, device)

    monkeypatch.setattr("lora_ga.experiments.suites.training.autocast", recording_autocast)
    cell = replace(
        instruct_cell,
        method=method,
        settings=replace(instruct_cell.settings, dtype="bfloat16", gradient_checkpointing=True),
    )
    record = run_cell(cell, Place(sources))
    assert record["status"] == "done", record.get("traceback")
    assert seen[1] == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("seq2seq_cell", {"words": ()}, "words must list what is written for each label"),
        ("seq2seq_cell", {"words": ["negative"]}, "glue:sst2:train: holds the label 1, but words has 1 entries"),
        ("seq2seq_cell", {"input": "{sentence}"}, "input names 'sentence' in braces; columns gives text"),
        ("seq2seq_cell", {"input": "sentence"}, "input is 'sentence'; it must hold one of text in braces"),
        ("seq2seq_cell", {"files": {}}, "files names nothing; it must name train and validation"),
        ("seq2seq_cell", {"columns": {"text": "words", "label": "label"}}, "row 0 has no column 'words' .for text."),
        ("instruct_cell", {"clean": "all"}, "clean is 'all'; it must be one of grade_school, first_code_block"),
        ("instruct_cell", {"files": {}}, "files names nothing; it must name train"),
        ("instruct_cell", {"kind": "sums"}, "kind is 'sums'; the kinds are text, classes, seq2seq, instruct"),
    ],
)
def test_an_invalid_task_is_refused(
    kind: str, changes: dict[str, Any], message: str, sources: Sources, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(request.getfixturevalue(kind).task, **changes), sources)


def test_the_reported_rows_may_come_from_a_file_of_their_own(tmp_path: Path, sources: Sources) -> None:
    cell = cell_of(suite_of("smollm2", tmp_path), "gsm8k", "lora", 1e-3, 0)
    cell = replace(cell, task=replace(cell.task, evaluation={}))
    found = prepare(cell, sources).splits
    # The file has three rows. The tuning rows are taken from the training file.
    assert [len(batch["labels"]) for batch in found["report"]] == [3]
    assert sum(len(batch["labels"]) for batch in found["tune"]) == cell.settings.tune_rows
    with pytest.raises(ValueError, match="files names train, test; it must name train, and may name report"):
        check(replace(cell.task, files={"train": cell.task.files["train"], "test": "x"}), sources)


def test_too_few_rows_are_refused(instruct_cell: Cell, sources: Sources) -> None:
    with pytest.raises(ValueError, match="0 rows are left, but 16 are held out and a batch has 4. Give more rows"):
        prepare(replace(instruct_cell, settings=replace(instruct_cell.settings, length=3)), sources)


def test_the_digest_depends_on_the_input_but_not_on_what_is_only_checked_or_compared(seq2seq_cell: Cell) -> None:
    changes: dict[str, Any] = {"fields": {"model_type": "t5"}, "choose": "loss", "also": ["loss"]}
    alike = replace(seq2seq_cell, task=replace(seq2seq_cell.task, **changes))
    assert alike.digest() == seq2seq_cell.digest()
    assert replace(seq2seq_cell, task=replace(seq2seq_cell.task, input="{text}")).digest() != seq2seq_cell.digest()


def test_a_reference_may_stand_for_some_rows_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"number": {number}}}\n' for number in range(1, 8)))
    sources = Sources(data=str(tmp_path))
    assert sources.rows("data:rows.jsonl#3-5") == [{"number": number} for number in (3, 4, 5)]
    assert sources.rows(f"{file}#7-7") == [{"number": 7}]
    assert sources.rows("data:rows.jsonl#1-7") == sources.rows("data:rows.jsonl")
    for part in ("0-3", "5-4", "3-8"):
        first, last = part.split("-")
        message = f"#{part}: wants the rows {first} to {last}, but there are the rows 1 to 7"
        with pytest.raises(ValueError, match=message):
            sources.rows(f"data:rows.jsonl#{part}")
    assert whole_file("data:rows.jsonl#3-5") == whole_file("data:rows.jsonl") == "data:rows.jsonl"
    assert whole_file("hub:name:train[1:3]") == "hub:name:train[1:3]"


def test_the_rows_of_a_run_follow_its_seed_and_those_of_the_start_a_generator_of_their_own() -> None:
    rows, lengths = list(range(20)), [1 + number % 5 for number in range(20)]
    settings = Settings(batch_size=4, gradient_accumulation_steps=2, samples=6)
    train, start = row_batches(rows, lengths, lambda some: {"ids": torch.tensor(some)}, settings, 4, seed=3)
    drawn = torch.randperm(20, generator=torch.Generator().manual_seed(1003))[:6]
    assert [batch["ids"].tolist() for batch in start] == [drawn[:4].tolist(), drawn[4:].tolist()]
    order = torch.Generator().manual_seed(3)
    wanted = [turn for _ in range(3) for turn in epoch_batches(lengths, 8, order)]
    assert [next(train)["ids"].tolist() for _ in wanted] == wanted
