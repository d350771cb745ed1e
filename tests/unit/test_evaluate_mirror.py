"""The mirror of the hub's data that packages and the authors' CSV files give: fields as the hub has them."""

import csv
import gzip
import json
import sys
from pathlib import Path

import pytest

from cor_vllm.evaluate.benchmarks import BENCHMARKS, TASK_FILES, load_task, task_manager

FOLDER = Path(__file__).parents[2] / "examples" / "smollm2"


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))  # its scripts import each other as neighbours
    for name in ("mirror", "data", "packages", "facts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import mirror

    return mirror


def test_a_mirror_is_read_by_the_data_library(mirror, tmp_path):
    from datasets import load_dataset

    rows = [{"question": "Which line ends\u2028here?", "answers": ["this", "that"]}]
    mirror.write(tmp_path / "local" / "set", {"one": {"test": rows}, "two": {"test": [], "dev": rows}})
    assert load_dataset(str(tmp_path / "local" / "set"), "one")["test"].to_list() == rows


def test_folders_of_one_name_are_two_data_sets(mirror, tmp_path):
    for name in ("one", "other"):
        targets = {"choices": [name, "wrong"], "labels": [1, 0]}
        rows = [{"question": name, "mc1_targets": targets, "mc2_targets": targets}]
        mirror.write(tmp_path / name / "truthfulqa/truthful_qa", {"multiple_choice": {"validation": rows}})
    for name in ("one", "other"):
        (task,) = load_task(BENCHMARKS["truthfulqa_mc1"], tmp_path / name).values()
        assert [doc["question"] for doc in task.eval_docs] == [name]


def test_every_benchmark_is_a_task_of_the_harness_or_of_this_package():
    assert set(BENCHMARKS) <= set(task_manager(TASK_FILES).all_tasks)


def test_all_subjects_of_a_group_are_read_from_a_local_folder(mirror, tmp_path):
    members = task_manager(TASK_FILES).task_index["mmlu_humanities_tasks"].tags
    subjects = {member.removeprefix("mmlu_") for member in members}
    assert len(subjects) == 13
    row = {"question": "Which?", "choices": list("abcd"), "answer": 1}
    parts = {name: {split: [{**row, "subject": name}] for split in ("test", "dev")} for name in subjects}
    mirror.write(tmp_path / "cais/mmlu", parts)
    tasks = load_task(BENCHMARKS["mmlu_humanities"], tmp_path)
    assert {name: task.eval_docs[0]["subject"] for name, task in tasks.items()} == {
        f"mmlu_{subject}": subject for subject in subjects
    }


def test_truthfulqa_puts_the_right_answers_first(mirror, tmp_path):
    path = tmp_path / "truthfulqa.csv"
    fields = ["Question", "Best Answer", "Correct Answers", "Incorrect Answers"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerow(dict(zip(fields, ["Is it?", "No", "No; It is not;", "Yes; Always"], strict=True)))
    choices, generation = mirror.truthfulqa(path)
    assert choices[0]["mc1_targets"] == {"choices": ["No", "Yes", "Always"], "labels": [1, 0, 0]}
    assert choices[0]["mc2_targets"]["labels"] == [1, 1, 0, 0]
    assert generation[0]["correct_answers"] == ["No", "It is not"]


def test_factor_keeps_its_columns(mirror, tmp_path):
    path = tmp_path / "factor.csv.gz"
    with gzip.open(path, "wt", newline="") as file:
        file.write(",completion,turncated_prefixes\n0,true,prefix\n")
    assert mirror.factor(path) == [{"index": "0", "completion": "true", "turncated_prefixes": "prefix"}]


def question(text: str, answer: str, *aliases: str) -> dict:
    return {"question": text, "answer": {"value": answer, "aliases": [answer, *aliases]}}


def test_wrong_answers_answer_questions_that_begin_alike_and_are_no_alias(mirror):
    rows = [
        question("Who wrote Ulysses?", "Joyce", "James Joyce"),
        question("Who wrote Emma?", "Austen"),
        question("Who wrote Dubliners?", "James Joyce", "Joyce"),
        question("Who wrote Faust?", "Goethe"),
        question("Who wrote Hamlet?", "Shakespeare"),
        question("Which city is it?", "Rome"),
    ]
    items = mirror.trivia_choices(rows)
    assert len(items) == 5, "a question that nothing else begins like has no choices"
    first = next(item for item in items if item["question"] == "Who wrote Ulysses?")
    assert first["answers"][0] == "Joyce"
    assert set(first["answers"][1:]) == {"Austen", "Goethe", "Shakespeare"}
    assert mirror.trivia_choices(rows) == items


def test_facts_are_of_questions_that_no_task_asks(mirror, tmp_path):
    import facts

    asked = [question(f"Who wrote {title}?", author) for title, author in ("ab", "cd", "ef", "gh")]
    rows = [*asked, question("Which city is it?", "Rome")]
    mirror.write(tmp_path / "mandarjoshi/trivia_qa", {"rc.nocontext": {"validation": rows}})
    mirror.write(tmp_path / "local/trivia_choices", {"default": {"test": mirror.trivia_choices(rows)}})
    assert facts.unasked(tmp_path) == [{"question": "Which city is it?", "answer": "Rome"}]


def test_a_line_of_a_mirror_may_hold_any_character(mirror, tmp_path):
    import data

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert data.read_rows(path) == [{"question": "a\u2028b"}]
