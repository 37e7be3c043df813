"""Rows with a question and an answer: which of the formats they are, what is asked, and what is refused."""

import pytest

from mars_jax.data.formats.base import FaultError
from mars_jax.data.formats.registry import draft

LETTER = "Answer with the option's letter from the given choices directly."
ASKED = {"image": "a.png", "question": "What is it?"}
LISTED = "What is it?\nOptions: A: a cat, B: a dog, C: a cow, D: a pig"


def asked(row):
    """Format, question and answer of a row, and its options."""
    made = draft(row)
    return made.format, made.turns[0].text, made.turns[1].text, "".join(made.options)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Where is the lesion?", "answer": "left lung"},
        {"question": "Is it normal?", "answer": "yes", "category": "chest"},
        {"question": "What is written there?", "answer": "B"},
        {"question": "What is written there?", "answer": "E", "l2_category": "text"},
        {"question": "What is it?", "answer": "a cat", "l2_category": "animals"},
        {"question": "Which one?\n(A) cat\n(B) dog\n(C) cow\n(D) pig\n(E) ant", "answer": "E"},
        {"question": "Is A. or B. right?", "answer": "both"},
        {"question": "What is it?", "answer": "a cat", "choices": None, "options": [], "A": None},
    ],
)
def test_open_questions_were_taken_for_mmstar(row):
    assert asked({"image": "a.png", **row}) == ("vqa", f"<image>\n{row['question']}", row["answer"], "")


@pytest.mark.parametrize(
    ("question", "answer", "more", "options"),
    [
        (LISTED, "C", {}, "ABCD"),
        (LISTED, "C", {"l2_category": "image scene"}, "ABCD"),
        ("Which?\n(A) cat\n(B) dog", "B", {}, "AB"),
        ("Which?\nA. cat\nB. dog\nC. cow", "A", {}, "ABC"),
        ("Which part of the picture?", " D", {"l2_category": "image scene"}, "ABCD"),
    ],
)
def test_mmstar_is_recognised_by_its_letter_and_its_options(question, answer, more, options):
    row = {"image": "a.png", "question": question, "answer": answer, **more}
    assert asked(row) == ("mmstar", f"<image>\n{question}\n{LETTER}", answer.strip(), options)


def test_option_columns_were_dropped():
    row = ASKED | {"hint": "It lives in water.", "A": "fish", "B": "bird", "C": "nan", "D": None, "answer": "B"}
    question = f"<image>\nIt lives in water.\nWhat is it?\nA. fish\nB. bird\n{LETTER}"
    assert asked(row) == ("mmbench", question, "B", "AB")
    assert asked(row | {"hint": "nan", "C": "cat"}) == (
        "mmbench",
        f"<image>\nWhat is it?\nA. fish\nB. bird\nC. cat\n{LETTER}",
        "B",
        "ABC",
    )


@pytest.mark.parametrize("column", ["choices", "options"])
@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["red", "blue"], "blue"),
        (["red", "blue"], "B"),
        (["red", "blue"], "(B)"),
        (["red", "blue"], "B."),
        (["A. red", "B. blue"], "B"),
        (["A. red", "B. blue"], "B. blue"),
        (["(A) red", "(B) blue"], "B"),
    ],
)
def test_a_list_of_options_was_dropped(column, options, answer):
    row = ASKED | {column: options, "answer": answer}
    assert asked(row) == ("choices", f"<image>\nWhat is it?\nA. red\nB. blue\n{LETTER}", "B", "AB")


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"answer": ["red", "dark red"]}, r"'answer' is \['red', 'dark red'\] \(list\); a text is expected"),
        ({"answer": 3}, r"'answer' is 3 \(number\); a text is expected"),
        ({"answer": 0.5}, r"'answer' is 0.5 \(number\); a text is expected"),
        ({"answer": True}, r"'answer' is True \(boolean\); a text is expected"),
        ({"answer": None}, r"'answer' is None \(null\); a text is expected"),
        ({"answer": float("nan")}, r"'answer' is nan \(number\); a text is expected"),
        ({"answer": {"text": "red"}}, r"'answer' is \{'text': 'red'\} \(object\); a text is expected"),
        ({"answer": " "}, "'answer' is empty; a text is expected"),
        ({"answer": "A", "question": None}, r"'question' is None \(null\); a text is expected"),
        ({"answer": "A", "question": ["what?"]}, r"'question' is \['what\?'\] \(list\); a text is expected"),
        ({"answers": ["red", "dark red"]}, r"'answers' is \['red', 'dark red'\], and there is no 'answer': one answer"),
        ({"answer": None, "answers": ["red"]}, r"'answers' is \['red'\], and there is no 'answer'"),
        ({"answer": "red", "hint": "It is warm."}, "'hint' is 'It is warm.': only 'question' is asked"),
        ({"answer": "red", "context": "A painting."}, "'context' is 'A painting.': only 'question' is asked"),
        ({"answer": "red", "option_a": "red"}, "'option_a' is 'red': options are read from 'choices' or 'options'"),
        ({"answer": "red", "choice1": "red"}, "'choice1' is 'red': options are read from"),
        ({"answer": "red", "candidates": ["red"]}, r"'candidates' is \['red'\]: options are read from"),
        ({"answer": "A", "options": "['red', 'blue']"}, r"'options' is \"\['red', 'blue'\]\"; a list of 2 to 26 texts"),
        ({"answer": "A", "options": {"A": "red", "B": "blue"}}, r"'options' is \{'A': 'red', 'B': 'blue'\}; a list of"),
        ({"answer": "A", "options": ["red"]}, r"'options' is \['red'\]; a list of 2 to 26 texts is expected"),
        ({"answer": "A", "options": ["red", 2]}, r"'options' is \['red', 2\]; every option must be a text"),
        ({"answer": "A", "options": ["red", None]}, r"'options' is \['red', None\]; every option must be a text"),
        ({"answer": "A", "choices": ["x"] * 27}, r"'choices' is \['x', .*\]; a list of 2 to 26 texts is expected"),
        ({"answer": "A", "choices": ["a", "b"], "options": ["c", "d"]}, "the row has 'choices' and 'options'"),
        ({"answer": "C", "options": ["red", "blue"]}, "'answer' is 'C', none of the 2 options; a letter A to B or the"),
        ({"answer": "green", "options": ["red", "blue"]}, "'answer' is 'green', none of the 2 options"),
        ({"answer": "A", "options": ["B", "A"]}, "'answer' is 'A', more than one of the 2 options"),
        ({"answer": "red", "options": ["red", "red"]}, "'answer' is 'red', more than one of the 2 options"),
        ({"answer": 1, "options": ["red", "blue"]}, r"'answer' is 1 \(number\); a letter A to B or the text of one of"),
        ({"answer": None, "options": ["red", "blue"]}, r"'answer' is None \(null\); a letter A to B"),
        ({"answer": ["A", "B"], "A": "red", "B": "blue"}, r"'answer' is \['A', 'B'\] \(list\); a letter A to B"),
        ({"answer": "AB", "A": "red", "B": "blue"}, "'answer' is 'AB', none of the 2 options"),
        ({"answer": "A", "A": "red", "C": "blue"}, "the row has the options A, C; two or more from A on without a gap"),
        ({"answer": "A", "A": "red"}, "the row has the options A; two or more from A on without a gap"),
        ({"answer": "A", "A": 1, "B": 2}, r"^'A' is 1 \(number\); a text is expected"),
        ({"answer": "A", "A": "red", "B": " "}, "'B' is empty; a text is expected"),
        ({"answer": "A", "A": "A. red", "B": "B.  "}, "option B is empty. Write its text"),
        ({"answer": "A", "options": ["red", " "]}, r"'options' is \['red', ' '\]; every option must be a text"),
        ({"answer": "A", "options": ["A. red", "B.  "]}, "option B is empty. Write its text"),
        ({"answer": 0, "choices": ["A. red", "B.  "]}, "option B is empty. Write its text"),
        (
            {"answer": "A", "AA": "x", **dict.fromkeys("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "x")},
            "more than 26 options, A to Z",
        ),
        ({"answer": 0, "choices": ["red", "blue"], "hint": ["x"]}, r"'hint' is \['x'\] \(list\); a text is expected"),
        ({"answer": 0, "choices": ["red", 2]}, r"'choices' is \['red', 2\]; every option must be a text"),
        ({"answer": 0.0, "choices": ["red", "blue"]}, "'answer' is 0.0; the number of one of the 2 choices, from 0"),
    ],
)
def test_what_a_question_could_not_be_read_from_was_read_all_the_same(row, text):
    with pytest.raises(FaultError, match=text):
        draft(ASKED | row)


def test_a_question_that_places_its_picture_gets_no_second_placeholder():
    row = {"image": "a.png", "question": "Is <image> a cat?", "answer": "yes"}
    assert asked(row) == ("vqa", "Is <image> a cat?", "yes", "")


def test_a_listed_question_of_a_million_characters_is_recognised_at_once():
    row = {"image": "a.png", "question": "A: x " * 200_000, "answer": "A"}
    assert draft(row).format == "vqa"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"query": "what?", "response": "red"}, r"'query' and 'response' \(ms-swift\) is not read. Write"),
        ({"instruction": "what?", "input": "", "output": "red"}, r"'instruction' and 'output' \(Alpaca\) is not read"),
        ({"prompt": [], "completion": "red"}, "the row has no conversation"),
        ({"prompt": "what?", "completion": "red"}, r"'prompt' and 'completion' \(TRL\) is not read"),
        ({"texts": [{"user": "what?", "assistant": "red"}]}, r"'texts' \(the_cauldron\) is not read"),
        ({"conversation": [{"from": "human"}]}, "The column is called 'conversations' here. Rename it"),
        ({"question": "what?"}, "It has a 'question' but no 'answer'"),
        ({"text": "a red square"}, "A text alone has no question"),
        ({"query": "what?", "response": "red", "history": [["q", "a"]]}, "'history' is .*: earlier turns are not read"),
        ({"prompt": "what?", "chosen": "red", "rejected": "blue"}, "'chosen' is 'red': pairs and labels of preference"),
    ],
)
def test_rows_of_other_tools_were_refused_because_conversations_is_none(row, text):
    with pytest.raises(FaultError, match=text):
        draft({"images": ["a.png"], **row})


def test_more_than_26_options_in_a_line_ended_in_a_traceback():
    line = " ".join(f"({letter}) x" for letter in [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA"])
    turns = [{"from": "human", "value": f"Which?\nOptions: {line}"}, {"from": "gpt", "value": "B"}]
    with pytest.raises(FaultError, match=r"more than 26 options, \(A\) to \(Z\)"):
        draft({"conversations": turns})
    all_letters = line.removesuffix(" (AA) x")
    turns[0]["value"] = f"Which?\nOptions: {all_letters} (A) again"
    assert "".join(draft({"conversations": turns}).options) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@pytest.mark.parametrize(
    "more", [{}, {"choices": ["red", "blue"], "answer": "red"}, {"A": "red", "B": "blue", "answer": "A"}]
)
@pytest.mark.parametrize("key", ["passage", "instruction", "background"])
def test_a_text_beside_the_question_was_not_asked(key, more):
    with pytest.raises(FaultError, match=f"'{key}' is 'It swims.': only 'question' is asked, with its options"):
        draft({"image": "a.png", "question": "what?", "answer": "red", **more, key: "It swims."})


@pytest.mark.parametrize("key", ["multiple_choices", "answer_options", "distractors", "distractor1", "wrong_answers"])
def test_options_under_another_name_were_not_asked(key):
    with pytest.raises(FaultError, match="options are read from 'choices' or 'options', as a list"):
        draft({"image": "a.png", "question": "what?", "answer": "red", key: ["blue", "green"]})


@pytest.mark.parametrize("answer", ["B", "(B)", "blue", "B. blue", "B) blue"])
@pytest.mark.parametrize("style", ["{}. {}", "{}: {}", "{}) {}", "({}) {}", "{1}"])
def test_letters_of_options_in_columns_were_asked_twice_and_their_answers_refused(style, answer):
    texts = {letter: style.format(letter, colour) for letter, colour in (("A", "red"), ("B", "blue"))}
    question = f"<image>\nWhat is it?\nA. red\nB. blue\n{LETTER}"
    assert asked(ASKED | texts | {"answer": answer}) == ("mmbench", question, "B", "AB")
    assert asked(ASKED | {"options": [*texts.values()], "answer": answer}) == ("choices", question, "B", "AB")
    assert asked(ASKED | {"choices": [*texts.values()], "answer": 1}) == ("scienceqa", question, "B", "AB")


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"choices": ["red", "blue"], "answer": 1}, "options"),
        ({"A": "red", "B": "blue", "answer": "A"}, "options"),
        ({"A": "red", "B": "blue", "answer": "A"}, "choices"),
        ({"question": LISTED, "answer": "B"}, "options"),
        ({"question": LISTED, "answer": "B"}, "choices"),
    ],
)
def test_a_second_list_of_options_was_refused_with_the_advice_to_give_one(row, key):
    row = ASKED | row | {key: ["green", "grey"]}
    with pytest.raises(
        FaultError, match=rf"^{key!r} is \['green', 'grey'\]: the options of this row are read from else"
    ):
        draft(row)


@pytest.mark.parametrize("key", ["Options", "CHOICES", "optionA", "option_b", "choice 3", "options_1", "distractor_2"])
def test_options_under_a_name_like_the_right_one_are_refused_with_it(key):
    with pytest.raises(FaultError, match=rf"^'{key}' is 'x': options are read from 'choices' or 'options', as a list"):
        draft(ASKED | {"answer": "red", key: "x"})


def test_a_hint_of_mmstar_was_not_asked():
    with pytest.raises(
        FaultError, match=r"^'hint' is 'It barks\.': only 'question' is asked, with its options\. Write"
    ):
        draft({"image": "a.png", "question": LISTED, "answer": "B", "hint": "It barks."})


@pytest.mark.parametrize("nothing", ["nan", " ", "", None, float("nan"), "None", "null", "[]"])
@pytest.mark.parametrize(
    "row",
    [
        {"answer": "red"},
        {"answer": "B", "question": LISTED},
        {"answer": "A", "A": "red", "B": "blue"},
        {"answer": "red", "options": ["red", "blue"]},
        {"answer": 0, "choices": ["red", "blue"]},
    ],
)
def test_an_empty_hint_was_asked_or_refused(row, nothing):
    made = draft(ASKED | row | {"hint": nothing})
    assert made == draft(ASKED | row)
    assert ("context", "text") not in made.tags
