"""Prompts, sources and the judging of answers; real data where it is there."""

from __future__ import annotations

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
from tiny_llama import tiny_tokenizer

from elastune.errors import BadData, BadRecipe
from elastune.metrics import METRICS
from elastune.tasks import TASKS, get_task, normalise
from elastune.tasks.sources import hub_rows, read_rows

MATHS = ["gsm8k", "aqua", "addsub", "multiarith", "singleeq", "svamp", "mawps"]


@pytest.mark.parametrize("name", MATHS)
def test_test_set_loads_and_its_gold_answers_parse(data_dir, name):
    sizes = {"gsm8k": 1319, "aqua": 254, "addsub": 395, "multiarith": 600}
    sizes |= {"singleeq": 508, "svamp": 1000, "mawps": 238}
    task = get_task(name, data_dir=data_dir)
    examples = task.report_examples()
    assert len(examples) == sizes[name]
    for example in examples:
        assert task.is_correct(f"So it is.\nThe answer is {example.answer}.", example)
        assert task.is_correct(f"I get {example.answer}", example)
        assert not task.is_correct("The answer is 918273.5.", example)


@pytest.mark.parametrize("name", ["gsm8k", "math_instruct"])
def test_every_gold_rationale_extracts_to_its_gold_answer(data_dir, name):
    task = get_task(name, data_dir=data_dir)
    examples = task.train_examples()
    if name == "gsm8k":
        examples += task.report_examples()
    assert [e.key for e in examples if not task.is_correct(e.completion, e)] == []
    assert not any("<<" in e.completion or "####" in e.completion for e in examples)


def test_generation_never_stops_before_a_gold_rationale_is_answered(data_dir):
    task = get_task("gsm8k", data_dir=data_dir)
    for example in task.report_examples()[:300]:
        text = example.completion + "\n\nNow"
        cut = next(text[:i] for i in range(len(text) + 1) if task.is_finished(text[:i]))
        assert task.is_correct(cut, example)


def test_no_instruction_question_is_in_a_test_set(data_dir):
    trained = {
        normalise(e.key) for e in get_task("math_instruct", data_dir=data_dir).train_examples()
    }
    for name in MATHS:
        for example in get_task(name, data_dir=data_dir).report_examples():
            assert normalise(example.key) not in trained


def test_alpaca_prompt_is_the_published_one(data_dir):
    example = get_task("addsub", data_dir=data_dir).report_examples()[0]
    assert example.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{example.key}\n\n### Response:\n"
    )


def test_splits_that_do_not_exist_name_those_that_do(data_dir):
    with pytest.raises(BadData, match="train on gsm8k or math_instruct"):
        get_task("svamp", data_dir=data_dir).train_examples()
    with pytest.raises(BadData, match="report on gsm8k"):
        get_task("math_instruct", data_dir=data_dir).report_examples()
    with pytest.raises(BadData, match="give data_dir"):
        get_task("addsub").report_examples()


def test_wikitext_pieces_join_to_the_text(data_dir):
    task = get_task("wikitext2", data_dir=data_dir)
    with gzip.open(data_dir / "wikitext2" / "test.txt.gz", "rt", encoding="utf-8") as file:
        assert "".join(e.completion for e in task.report_examples()) == file.read()
    assert not {e.key for e in task.train_examples()} & {e.key for e in task.report_examples()}


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("How many,  apples?", "how many apples", True),
        ("well-known case", "wellknown case", True),
        ("Calculate 5 - 3.", "Calculate 5-3", True),
        ("Calculate 5 - 3.", "Calculate 5 + 3.", False),
        ("2 * (3 + 4)", "2 + (3 * 4)", False),
    ],
)
def test_normalised_questions_ignore_punctuation_but_not_arithmetic(left, right, same):
    assert (normalise(left) == normalise(right)) == same


def test_mistakes_in_names_are_answered_with_the_nearest():
    with pytest.raises(BadRecipe, match="did you mean 'gsm8k'"):
        get_task("gsm8")
    with pytest.raises(BadRecipe, match="did you mean 'alpaca'"):
        get_task("gsm8k", template="alpacca")
    with pytest.raises(BadRecipe, match="did you mean 'max_new_tokens'"):
        get_task("gsm8k", max_new_token=3)
    with pytest.raises(BadRecipe, match="takes no argument"):
        get_task("gsm8k:main")
    with pytest.raises(BadRecipe, match="at least 2"):
        get_task("wikitext2", window=1)


def test_every_task_says_what_it_measures():
    for task in TASKS.values():
        assert task.name
        assert all(METRICS[metric.name] is metric for metric in task.metrics)
        assert task.__doc__


# reasoning-gym


def test_gym_problems_are_distinct_repeatable_and_solved_by_their_gold():
    task = get_task("reasoning_gym:chain_sum", size=60, report_size=40, max_terms=2, max_digits=1)
    train, report = task.train_examples(), task.report_examples()
    keys = [normalise(e.key) for e in train + report]
    assert len(keys) == len(set(keys)) == 100
    assert all(task.is_correct(e.completion, e) for e in train + report)
    again = get_task("reasoning_gym:chain_sum", size=60, report_size=40, max_terms=2, max_digits=1)
    assert again.train_examples() == train
    other = get_task(
        "reasoning_gym:chain_sum", size=60, seed=7, report_size=40, max_terms=2, max_digits=1
    )
    assert other.train_examples() != train
    assert other.report_examples() == report


def test_gym_answers_are_judged_by_the_package():
    task = get_task("reasoning_gym:chain_sum", size=3, report_size=3)
    example = task.report_examples()[0]
    assert example.prompt == f"Question: {example.key}\nAnswer:"
    assert example.completion == f" {example.answer}"
    assert task.is_correct(f" The answer is {example.answer}.\nQuestion: what", example)
    assert not task.is_correct(f" {example.answer}0", example)
    assert not task.is_correct("", example)
    assert task.is_finished(f" {example.answer}\n")
    assert not task.is_finished(f" {example.answer}")


def test_small_gym_data_set_keeps_its_splits_apart_and_says_it_is_small(caplog):
    task = get_task("reasoning_gym:count_bits", size=500, report_size=5, min_n=1, max_n=20)
    train, report = task.train_examples(), task.report_examples()
    assert len(report) == 5
    assert 5 < len(train) <= 15
    assert f"{len(train)} of the 500 problems" in caplog.text
    assert not {e.key for e in train} & {e.key for e in report}


def test_gym_mistakes_are_explained(monkeypatch):
    with pytest.raises(BadRecipe, match="did you mean 'chain_sum'"):
        get_task("reasoning_gym:chain_sums")
    with pytest.raises(BadRecipe, match="did you mean 'max_terms'"):
        get_task("reasoning_gym:chain_sum", max_term=3)
    with pytest.raises(BadRecipe, match="max_terms must be"):
        get_task("reasoning_gym:chain_sum", min_terms=5, max_terms=2)
    with pytest.raises(BadRecipe, match="cannot draw problems"):
        get_task("reasoning_gym:aiw", task_types=["siblings"]).report_examples()
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(BadData, match=r"pip install 'elastune\[reasoning\]'"):
        get_task("reasoning_gym:chain_sum")


# data of one's own


def write(path, rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
def test_rows_are_read_from_every_format(tmp_path, name):
    rows = [{"prompt": "a\u2028b", "completion": "ü"}, {"prompt": "c", "completion": "d"}]
    content = [json.dumps(rows)] if "jsonl" not in name else rows
    path = write(tmp_path / name, content)
    assert [row.values for row in read_rows(path)] == rows


def test_own_questions_are_held_out_by_their_text(tmp_path):
    rows = [{"question": f"what is {i}", "reply": str(i)} for i in range(200)]
    path = write(tmp_path / "own.jsonl", rows + rows[:50])
    fields = {"prompt": "question", "completion": "reply"}
    task = get_task(str(path), fields=fields, template="qa", holdout=0.2)
    train, report = task.train_examples(), task.report_examples()
    assert len(train) + len(report) == 250
    assert 20 < len(report) < 90
    assert not {e.key for e in train} & {e.key for e in report}
    assert train[0].prompt.startswith("Question: what is")
    assert task.is_correct(f" {report[0].answer}\nmore", report[0])


def test_match_number_judges_own_data_as_maths(tmp_path):
    row = {"prompt": "q", "completion": "2 + 2 = 4\nThe answer is 4.", "answer": "4.0"}
    path = write(tmp_path / "own.jsonl", [row])
    task = get_task(f"custom:{path}", match="number", report=str(path))
    example = task.report_examples()[0]
    assert task.is_correct(example.completion, example)
    assert task.is_finished("The answer is 4.\n")
    assert not task.is_finished("2 + 2 = 4\n")


def test_labels_become_words(tmp_path):
    path = write(tmp_path / "own.jsonl", [{"text": "good film", "label": 1}])
    task = get_task(str(path), labels=["negative", "positive"], report=str(path))
    example = task.report_examples()[0]
    assert example.completion == example.answer == "positive"
    assert task.is_correct("Positive\n", example)
    with pytest.raises(BadData, match=r"line 1: label 1 has no word"):
        get_task(str(path), labels={"0": "negative"}).train_examples()


CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_last_assistant_turn_of_a_chat_is_the_completion(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    turns = [("system", "be brief"), ("user", "2 + 2?"), ("assistant", "4")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write(tmp_path / "chat.jsonl", [{"messages": messages}])
    task = get_task(str(path), tokenizer=tokenizer, report=str(path))
    example = task.report_examples()[0]
    assert example.prompt == "<s>[system]be brief[user]2 + 2?[assistant]"
    assert (example.completion, example.answer) == ("4", "4")
    with pytest.raises(BadRecipe, match=r"line 1 .*needs a tokenizer with a chat template"):
        get_task(str(path)).train_examples()
    bad = write(tmp_path / "bad.jsonl", [{"messages": messages[:2]}])
    with pytest.raises(BadData, match="last message has role 'user'"):
        get_task(str(bad), tokenizer=tokenizer).train_examples()


def test_prompt_and_completion_of_messages_are_the_same_chat(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    user = {"role": "user", "content": "2 + 2?"}
    answer = {"role": "assistant", "content": "4"}
    one = write(tmp_path / "one.jsonl", [{"messages": [user, answer]}])
    two = write(tmp_path / "two.jsonl", [{"prompt": [user], "completion": [answer]}])
    found = [get_task(str(p), tokenizer=tokenizer, holdout=0).train_examples() for p in (one, two)]
    assert found[0] == found[1]
    bad = write(tmp_path / "bad.jsonl", [{"prompt": [user], "completion": "4"}])
    with pytest.raises(BadData, match=r"completion must be a list of \{role, content\}"):
        get_task(str(bad), tokenizer=tokenizer).train_examples()


def test_chats_of_share_gpt_and_contents_in_parts_are_the_same_chat(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    texts = ["be brief", "2 + 2?", "4"]
    spellings = {
        "messages": ("role", "content", ["system", "user", "assistant"], texts),
        "conversations": ("from", "value", ["system", "human", "gpt"], texts),
        "parts": (
            *("role", "content", ["system", "user", "assistant"]),
            [[{"type": "text", "text": text}] for text in texts],
        ),
    }
    found = []
    for name, (who, what, roles, contents) in spellings.items():
        turns = [{who: r, what: c} for r, c in zip(roles, contents, strict=True)]
        column = "messages" if name == "parts" else name
        path = write(tmp_path / f"{name}.jsonl", [{column: turns}])
        found.append(get_task(str(path), tokenizer=tokenizer, holdout=0).train_examples())
    assert found[0] == found[1] == found[2]
    assert found[0][0].prompt == "<s>[system]be brief[user]2 + 2?[assistant]"


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
    ],
    ids=["tool call", "image"],
)
def test_turns_that_are_no_text_are_refused_with_the_row(tmp_path, turn):
    turns = [turn, {"role": "assistant", "content": "4"}]
    path = write(tmp_path / "bad.jsonl", [{"messages": turns}])
    with pytest.raises(BadData, match=r"bad\.jsonl line 1: messages must be .* as text") as caught:
        get_task(str(path), tokenizer=tiny_tokenizer()).train_examples()
    assert "tool calls" in caught.value.try_


def test_running_text_is_sent_to_the_task_that_takes_it(tmp_path):
    path = write(tmp_path / "text.jsonl", [{"text": "once upon a time"}])
    with pytest.raises(BadData, match="'text' without 'label'") as refused:
        get_task(str(path)).train_examples()
    assert "perplexity:" in str(refused.value.try_)
    task = get_task(f"perplexity:{path}", train=str(path))
    assert [example.completion.strip() for example in task.train_examples()] == ["once upon a time"]


def test_chat_template_applies_to_any_task_and_bos_is_not_doubled(data_dir):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    task = get_task("addsub", data_dir=data_dir, template="chat", tokenizer=tokenizer)
    example = task.report_examples()[0]
    assert example.prompt == f"<s>[user]{example.key}[assistant]"

    class AddsBos:
        chat_template, bos_token, bos_token_id = CHAT, "<s>", 1
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str) -> SimpleNamespace:
            return SimpleNamespace(input_ids=[1])

    task = get_task("addsub", data_dir=data_dir, template="chat", tokenizer=AddsBos())
    assert task.report_examples()[0].prompt == f"[user]{example.key}[assistant]"
    with pytest.raises(BadRecipe, match="none was given"):
        get_task("addsub", template="chat")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}, {"promt": "a"}],
            r"line 2 has no field 'prompt'.*'pr",
        ),
        ([{"prompt": "a", "completion": "b"}, "", "{oops"], r"line 3 is not valid JSON"),
        (["[1, 2]"], r"item 1 is a int"),
        (["3"], r"line 1 is a int"),
        (["[{}, \n{]"], r"line 2 is not valid JSON"),
        (["", " "], r"holds no rows"),
        ([{"prompt": None, "completion": "b"}], r"field 'prompt' is None"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, rows, message):
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(BadData, match=message) as caught:
        get_task(str(path)).train_examples()
    assert "bad.jsonl" in str(caught.value)


def test_missing_and_damaged_files_are_bad_data(tmp_path):
    write(tmp_path / "train.jsonl", [{}])
    with pytest.raises(BadData, match=r"did you mean 'train\.jsonl'"):
        get_task(str(tmp_path / "trian.jsonl")).train_examples()
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(BadData, match="cannot be read"):
        read_rows(tmp_path / "bad.jsonl.gz")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(BadData, match="UTF-8"):
        get_task(str(tmp_path / "latin.txt")).report_examples()


def test_hub_data_sets_map_to_examples(monkeypatch):
    fake = {
        "openai/gsm8k": {"question": "q ", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        "deepmind/aqua_rat": {"question": "Find x", "options": ["A)1", "B)2"], "correct": "B"},
        "ChilleD/SVAMP": {"Body": "He has 3", "Question": "How many?", "Answer": "3"},
        "me/mine": {"prompt": "p", "completion": "c"},
    }
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, subset, split: [fake[repo]])
    example = get_task("gsm8k").report_examples()[0]
    assert (example.key, example.completion) == ("q", "1 + 1 = 2\nThe answer is 2.")
    assert get_task("aqua").report_examples()[0].key == "Find x Answer Choices: (A) 1 (B) 2"
    assert get_task("svamp").report_examples()[0].key == "He has 3. How many?"
    assert get_task("custom:hub:me/mine", holdout=0.0).train_examples()[0].completion == "c"


def test_missing_packages_and_hub_failures_name_the_way_out(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fails(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(BadData, match=r"openai/gsm8k .*offline[\s\S]*data_dir"):
        get_task("gsm8k").report_examples()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadData, match=r"pip install 'elastune\[data\]'"):
        hub_rows("a/b", split="train")
