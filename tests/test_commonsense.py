"""The eight commonsense sets: LLM-Adapters' evaluator and lm-evaluation-harness's wording."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from elastune.errors import BadData, BadRecipe
from elastune.tasks import get_task, normalise
from elastune.tasks.commonsense_rows import ANSWER, ENDING, OPTION, SOLUTION, TRUTH, Question
from elastune.tasks.sources import Row, read_rows

FILES = {
    "boolq": "boolq",
    "piqa": "piqa",
    "siqa": "social_i_qa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "openbookqa": "openbookqa",
}
CHOICES = {"boolq": {2}, "piqa": {2}, "siqa": {3}, "hellaswag": {4}, "winogrande": {2}}
CHOICES |= {"arc_easy": {3, 4, 5}, "arc_challenge": {3, 4, 5}, "openbookqa": {4}}

#: What the evaluator of LLM-Adapters looks for; the first of all that it finds counts.
EVALUATOR = {
    "boolq": "true|false",
    "piqa": "solution1|solution2",
    "siqa": "answer1|answer2|answer3|answer4|answer5",
    "hellaswag": "ending1|ending2|ending3|ending4",
    "winogrande": "option1|option2",
}
EVALUATOR |= dict.fromkeys(("arc_easy", "arc_challenge", "openbookqa"), EVALUATOR["siqa"])

ARC = {"text": ["sand", "ice", "clay"], "label": ["A", "B", "C"]}
DOCS = {
    "boolq": {"question": "is ice water", "passage": "Ice is water.", "answer": True, "label": 1},
    "piqa": {"goal": "Cool it.", "sol1": "Use ice. ", "sol2": "Use fire.", "label": 1},
    "siqa": {
        "context": "Al fell.",
        "question": "What now?",
        "answerA": "up",
        "answerB": "down",
        "answerC": "out",
        "label": "3",
    },
    "hellaswag": {
        "ctx_a": "A man sits [step] here.",
        "ctx_b": "he",
        "ctx": "A man sits [step] here. he",
        "activity_label": "Roof",
        "endings": ["is up.", "[title] goes [substeps] off.", "sings.", "ends."],
        "label": "1",
    },
    "winogrande": {
        "sentence": "The cup fit the box as _ was small.",
        "option1": "the cup",
        "option2": "the box",
        "answer": "1",
    },
    "arc_easy": {"question": "What melts?", "choices": ARC, "answerKey": "B"},
    "openbookqa": {"question_stem": "What melts is", "choices": ARC, "answerKey": " B"},
}
DOCS["arc_challenge"] = DOCS["arc_easy"]


@pytest.fixture
def hub(monkeypatch):
    """Let every hub data set hold the one document of ``DOCS``; return what was asked for."""
    datasets = pytest.importorskip("datasets")
    asked = {}

    def of(name):
        def load(repo, subset, split):
            asked[name] = (repo, subset, split)
            return [DOCS[name]]

        monkeypatch.setattr(datasets, "load_dataset", load)
        return asked

    return of


# local rows


@pytest.mark.parametrize("name", FILES)
def test_every_row_parses_into_its_choices_and_back(data_dir, name):
    task = get_task(name, data_dir=data_dir, by="likelihood")
    rows = read_rows(data_dir / "commonsense_eval" / f"{FILES[name]}.jsonl.gz")
    examples = task.report_examples()
    assert len(rows) == len(examples) == (500 if name == "openbookqa" else 1000)
    assert {len(e.choices) for e in examples} == CHOICES[name]
    for row, example in zip(rows, examples, strict=True):
        question = task.wording.read(row)
        assert task.wording.write(question) == row.values["instruction"]
        names = task.wording.answers(len(question.choices))
        assert names[question.gold] == row.values["answer"]
        assert example.gold == question.gold < len(example.choices)
        assert all(choice[0] == " " and choice.strip() for choice in example.choices)
        assert example.key == row.values["instruction"]
    assert len({e.gold for e in examples}) >= min(CHOICES[name])


def test_parsed_endings_equal_those_that_the_rows_hold_apart(data_dir):
    for row in read_rows(data_dir / "commonsense_eval" / "hellaswag.jsonl.gz"):
        values = row.values
        parsed = ENDING.read(row)
        assert parsed == Question(values["ctx"], tuple(values["endings"]), values["label"])


@pytest.mark.parametrize("name", FILES)
def test_generated_answers_are_judged_as_by_llm_adapters(data_dir, name):
    task = get_task(name, data_dir=data_dir)
    for example in task.report_examples():
        assert task.is_correct(example.completion, example)
        assert example.completion == f"the correct answer is {example.answer}"
    alternatives = EVALUATOR[name].split("|")
    texts = [f"the correct answer is {a}" for a in alternatives]
    texts += [f"I say {a} and not {b}." for a in alternatives for b in alternatives]
    texts += ["", "Answer1 True Option1 Ending1", f"un{alternatives[0]}", "answer 1", "answer6"]
    texts += [f"{alternatives[-1]}9 or so", f"no idea\n### Instruction:\n{alternatives[0]}"]
    for text in texts:
        found = re.findall(EVALUATOR[name], text.split("### Instruction")[0].strip())
        assert task.extract(text) == (found[0] if found else None)


@pytest.mark.parametrize("name", FILES)
def test_generation_stops_as_soon_as_the_answer_stands_and_no_text_changes_it(name):
    task = get_task(name)
    answer = task.wording.answers(2)[1]
    text = f"the correct answer is {answer}. But {task.wording.answers(2)[0]} is not."
    stops = [i for i in range(len(text) + 1) if task.is_finished(text[:i])]
    assert text[: stops[0]].endswith(answer)
    assert {task.extract(text[:i]) for i in stops} == {answer}
    assert not task.is_finished("the correct answer is ")
    assert task.max_new_tokens == 32


def test_prompt_is_the_alpaca_prompt_of_the_instruction(data_dir):
    example = get_task("piqa", data_dir=data_dir).report_examples()[0]
    assert example.prompt.endswith("solution1/solution2\n\n### Response:\n")
    assert "### Instruction:\nPlease choose the correct solution" in example.prompt


def test_notes_say_what_the_local_rows_lack(data_dir):
    notes = {name: get_task(name, data_dir=data_dir).notes for name in FILES}
    assert notes["openbookqa"] == ""
    assert notes["piqa"] == "report split has 1000 of the 1838 published rows"
    by_likelihood = {n: get_task(n, data_dir=data_dir, by="likelihood").notes for n in FILES}
    assert "lack their activity label" in by_likelihood["hellaswag"]
    assert "without their passage" in by_likelihood["boolq"]
    assert "passage" not in notes["boolq"]
    assert get_task("piqa").notes == ""


def test_instruct_rows_in_a_test_set_are_dropped(data_dir):
    task = get_task("commonsense_instruct", data_dir=data_dir)
    train = task.train_examples()
    tested = {
        normalise(e.key) for n in FILES for e in get_task(n, data_dir=data_dir).report_examples()
    }
    assert 14_900 < len(train) < 15_000  # one row differs from a test row by its blanks alone
    assert not tested & {normalise(e.key) for e in train}
    assert [e.key for e in train if not task.is_correct(e.completion, e)] == []
    with pytest.raises(BadData, match="report on boolq"):
        task.report_examples()
    with pytest.raises(BadData, match="train on commonsense_instruct"):
        get_task("boolq", data_dir=data_dir).train_examples()


def row(instruction, answer="answer1"):
    return Row({"instruction": instruction, "answer": answer}, "test.jsonl line 3")


@pytest.mark.parametrize(
    ("instruction", "answer", "message"),
    [
        ("Choose: x\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2", "answer1", "line"),
        (ANSWER.lead + "x\n\nAnswer1: a Answer2: b", "answer1", "must start with"),
        (ANSWER.lead + "x\n\nAnswer1: a\n\nAnswer format: answer1/answer2", "answer1", "list 2"),
        (
            ANSWER.lead + "x\n\nAnswer1: a Answer2: b Answer2: c\n\nAnswer format: answer1/answer2",
            "answer1",
            "each once",
        ),
        (
            ANSWER.lead + "x\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer3",
            "answer1",
            "must start with",
        ),
        (
            ANSWER.lead + "x\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
            "answer3",
            "answer 'answer3' is not one of answer1, answer2",
        ),
    ],
)
def test_rows_that_do_not_parse_are_named(instruction, answer, message):
    with pytest.raises(BadData, match=message) as caught:
        ANSWER.read(row(instruction, answer))
    assert "test.jsonl line 3" in str(caught.value)


@pytest.mark.parametrize("wording", [ANSWER, SOLUTION, ENDING, OPTION])
def test_blanks_of_a_choice_survive_the_instruction(wording):
    question = Question("Which: one? ", ("a: b ", " c", "d\ne"), 2)
    assert wording.read(row(wording.write(question), wording.answers(3)[2])) == question


def test_true_and_false_are_answers_without_choices():
    question = Question("is it?", ("true", "false"), 1)
    text = TRUTH.write(question)
    assert text.endswith("question: is it?\n\nAnswer format: true/false")
    assert TRUTH.read(row(text, "false")) == question


# hub rows


#: lm-evaluation-harness's files: folder and task.
HARNESS = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "siqa": "siqa/siqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


def harness_file(path):
    lm_eval = pytest.importorskip("lm_eval")
    yaml = pytest.importorskip("yaml")
    text = (Path(lm_eval.__file__).parent / "tasks" / path).read_text(encoding="utf-8")
    return yaml.safe_load(text)


@pytest.mark.parametrize("name", HARNESS)
def test_likelihood_is_worded_as_in_the_harness(hub, name):
    jinja2 = pytest.importorskip("jinja2")
    config = harness_file(HARNESS[name])
    hub(name)
    (example,) = get_task(name, by="likelihood").report_examples()

    def rendered(template):
        if template in DOCS[name]:
            return DOCS[name][template]
        return jinja2.Template(template).render(**DOCS[name])

    assert example.prompt == rendered(config["doc_to_text"])
    choices = config["doc_to_choice"]
    if isinstance(choices, str):
        compiled = jinja2.Environment().compile_expression(choices.strip("{}"))
        choices = compiled(**DOCS[name])
    assert sorted(example.choices) == sorted(f" {choice}" for choice in choices)
    gold = int(rendered(config["doc_to_target"]))
    assert example.choices[example.gold] == f" {choices[gold]}"


def test_hellaswag_is_cleaned_as_in_the_harness(hub):
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    hub("hellaswag")
    task = get_task("hellaswag", by="likelihood")
    (example,) = task.report_examples()
    assert example.prompt == utils.preprocess("Roof: A man sits [step] here. He")
    expected = tuple(" " + utils.preprocess(ending) for ending in DOCS["hellaswag"]["endings"])
    assert example.choices == expected
    assert (example.gold, example.scored_from) == (1, None)
    (generated,) = get_task("hellaswag").report_examples()
    assert "sentence: Roof: A man sits [step] here. he\n\nEnding1: is up." in generated.key


def test_winogrande_scores_the_end_after_either_option_as_the_harness_does(hub):
    utils = pytest.importorskip("lm_eval.tasks.winogrande.preprocess_winogrande")
    hub("winogrande")
    (example,) = get_task("winogrande:likelihood").report_examples()
    doc = DOCS["winogrande"]
    befores, scored = [], []
    for choice, start in zip(example.choices, example.scored_from, strict=True):
        befores.append(example.prompt + choice[:start])
        scored.append(choice[start:])
    assert befores == utils.doc_to_choice(doc)
    assert scored == [f" {utils.doc_to_target(doc)}"] * 2
    assert example.gold == utils.doc_to_text(doc)
    # What training teaches does not start with a blank that the prompt already ends in.
    assert example.prompt[-1] != " "
    assert example.completion == " the cup was small."


def test_winogrande_blank_may_come_first_and_must_be_there(tmp_path):
    folder = tmp_path / "commonsense_eval"
    folder.mkdir()
    lines = []
    for sentence in ("_ was small.", "He was small."):
        question = Question(sentence, ("Al", "Bo"), 0)
        values = {"instruction": OPTION.write(question), "answer": "option1"}
        lines.append(json.dumps(values) + "\n")
    path = folder / "winogrande.jsonl"
    path.write_text(lines[0], encoding="utf-8")
    (example,) = get_task("winogrande", data_dir=tmp_path, by="likelihood").report_examples()
    assert (example.prompt, example.choices) == ("", ("Al was small.", "Bo was small."))
    assert example.scored_from == (2, 2)
    path.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(BadData, match=r"'He was small\.' has no blank"):
        get_task("winogrande", data_dir=tmp_path, by="likelihood").report_examples()


@pytest.mark.parametrize("name", FILES)
def test_hub_rows_get_the_instruction_of_the_local_rows(hub, name):
    asked = hub(name)
    task = get_task(name)
    (example,) = task.report_examples()
    question = task.wording.read(Row({"instruction": example.key, "answer": example.answer}, "x"))
    assert task.wording.answers(9)[question.gold] == example.answer
    assert task.is_correct(example.completion, example)
    (by_likelihood,) = get_task(name, by="likelihood").report_examples()
    assert by_likelihood.gold == question.gold
    assert by_likelihood.key == example.key
    split = "test" if name.startswith(("arc", "openbook")) else "validation"
    assert asked[name][2] == split
    assert task.train_examples() == [example]
    assert asked[name][2] == "train"


@pytest.mark.parametrize(
    ("name", "field", "hidden"),
    [("hellaswag", "label", ""), ("winogrande", "answer", ""), ("arc_easy", "answerKey", "")],
)
def test_hub_rows_without_gold_are_refused(hub, monkeypatch, name, field, hidden):
    monkeypatch.setitem(DOCS, name, DOCS[name] | {field: hidden})
    hub(name)
    with pytest.raises(BadData, match="use a split with gold answers"):
        get_task(name).report_examples()


# the two ways


def test_way_of_scoring_decides_kind_name_and_metrics():
    written, chosen = get_task("piqa"), get_task("piqa", by="likelihood")
    assert (written.kind, chosen.kind) == ("generation", "multiple-choice")
    assert (written.name, chosen.name) == ("piqa", "piqa:likelihood")
    assert [m.name for m in written.metrics] == ["accuracy"]
    assert [m.name for m in chosen.metrics] == ["accuracy", "accuracy_norm"]
    assert get_task("piqa:likelihood").kind == "multiple-choice"
    assert get_task("piqa:generation").kind == "generation"


def test_mistakes_in_the_way_of_scoring_are_explained():
    with pytest.raises(BadRecipe, match="did you mean 'likelihood'"):
        get_task("piqa", by="likelyhood")
    with pytest.raises(BadRecipe, match="allowed: one of generation, likelihood"):
        get_task("piqa:test")
    with pytest.raises(BadRecipe, match="'likelihood' and 'generation'"):
        get_task("piqa:likelihood", by="generation")
    with pytest.raises(BadRecipe, match="takes no template"):
        get_task("piqa:likelihood", template="qa")


def test_missing_files_name_the_way_out(tmp_path):
    with pytest.raises(BadData, match=r"finds no file ARC-Easy\.jsonl\.gz"):
        get_task("arc_easy", data_dir=tmp_path).report_examples()
    with pytest.raises(BadData, match=r"has no commonsense_instruct/train\.jsonl\.gz"):
        get_task("commonsense_instruct", data_dir=tmp_path).train_examples()
    with pytest.raises(BadData, match="no known source on the hub"):
        get_task("commonsense_instruct").train_examples()
