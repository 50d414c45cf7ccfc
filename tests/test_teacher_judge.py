"""Replies as they really are -> verdicts; near-copies; the LLM judge's words; the interview over replies from a table."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mind.config import Config
from mind.params import validate
from mind.records import PERSPECTIVES, Kind, Question
from mind.teacher import llm_judge, mistakes
from mind.teacher.client import Unanswered
from mind.teacher.interview import Interview, Interviewer
from mind.teacher.judge import REASONS, duplicates, shingles, similarity, verdict
from mind.teacher.language import foreign
from mind.teacher.perspectives import perspective_of
from mind.teacher.recorded import starter_corpus
from mind.teacher.replies import DECLINED, MalformedReply, Reply, Request, read_completion

APPLES = Question(id="q", question="Tom has 6 apples and buys 7 more. How many apples are there?", answer="13")
WORK = "Six and seven make thirteen: 6 + 7 = 13."


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    "text",
    [
        f"{WORK}\nThe answer is 13.",
        f"{WORK} The answer is 13.",
        f"{WORK}\n\n**Answer: 13**",
        f"{WORK}\n#### 13",
        f"{WORK}\n$\\boxed{{13}}$",
        f"{WORK}\nTherefore, the final answer is 13 apples.",
        f"{WORK}\n**The answer is 13.**",
        f"<think>Hmm, 6 + 7 = 14? The answer is 14. No.</think>\n{WORK}\nThe answer is 13.",
        f"{WORK}",
    ],
)
def test_right_answers_are_kept_in_every_dress_and_the_answer_line_is_cut(text: str) -> None:
    found = verdict(APPLES, Reply(text))
    assert found.accepted, found
    assert found.text == WORK
    assert found.answer == "13"


@pytest.mark.parametrize(
    ("kind", "choices", "gold", "text"),
    [
        ("choice", ("red", "blue"), "B", "The sky is blue on clear days.\nThe answer is B."),
        ("choice", ("red", "blue"), "B", "The sky is blue on clear days.\nThe answer is (B) blue."),
        ("yesno", (), "no", "A stone is denser than water, so it sinks.\nThe answer is no."),
        ("math", (), r"\frac{1}{2}", "Half of one is one over two.\nThe answer is $\\frac{1}{2}$."),
    ],
)
def test_every_kind_of_answer(kind: Kind, choices: tuple[str, ...], gold: str, text: str) -> None:
    question = Question(id="q", question="Which?", answer=gold, kind=kind, choices=choices)
    found = verdict(question, Reply(text))
    assert found.accepted, found
    assert "answer" not in found.text


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(f"{WORK}\nThe answer is 14."), "wrong: 14 in place of 13"),
        (Reply("Many apples make many apples."), "no answer"),
        (Reply(f"{WORK}", finish="length", completion_tokens=9), "truncated: after 9 tokens"),
        (Reply("<think>6 + 7 = 13, so"), "empty"),
        (Reply(""), "empty"),
        (Reply("The answer is 13."), "empty"),
        (Reply("I'm sorry, but I can't help with that."), "refused: I'm sorry"),
        (Reply("I\u2019m sorry, I cannot assist."), "refused"),
        (Reply(WORK, refusal="not allowed"), "refused: not allowed"),
        (Reply("", finish="content_filter"), "refused"),
        (Reply("", finish=DECLINED, refusal="content_filter: flagged"), "declined: content_filter"),
        (Reply("汤姆有六个苹果,又买了七个苹果,所以现在一共有十三个苹果了。6 + 7 = 13\nThe answer is 13."), "language: Cjk script"),
        (
            Reply("Tom hat 6 Äpfel und kauft noch 7 dazu, das sind mit den ersten nicht weniger als 13.\nThe answer is 13."),
            "language: German",
        ),
    ],
)
def test_what_is_dropped_and_why(reply: Reply, reason: str) -> None:
    found = verdict(APPLES, reply)
    assert not found.accepted
    assert found.reason.startswith(reason), found.reason
    assert found.reason.partition(":")[0] in REASONS


def test_the_whole_starter_corpus_is_accepted_and_every_mistake_is_not() -> None:
    for entry in starter_corpus().entries[::7]:
        question = Question(id=entry.id, question=entry.question, answer=entry.answer)
        for perspective, rationale in entry.rationales.items():
            found = verdict(question, Reply(entry.reply(perspective, wrong=False)))
            assert found.accepted and found.text == rationale, (entry.id, perspective, found)
        assert verdict(question, Reply(entry.reply("planning", wrong=True))).reason.startswith("wrong")
        assert duplicates(entry.rationales, 0.8) == {}


@given(st.text(max_size=200), st.sampled_from(["stop", "length", "content_filter", DECLINED, "tool_calls", ""]), st.text(max_size=20))
@settings(deadline=None, max_examples=150)
def test_no_reply_makes_the_judge_raise(text: str, finish: str, refusal: str) -> None:
    found = verdict(APPLES, Reply(text, finish=finish, refusal=refusal))
    assert found.accepted == (found.reason == "")


# ------------------------------------------------------------- reading the wire


@pytest.mark.parametrize(
    ("message", "text", "reasoning"),
    [
        ({"content": "a"}, "a", ""),
        ({"content": None, "reasoning_content": "deep"}, "", "deep"),
        ({"content": "a", "reasoning": "deep"}, "a", "deep"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]}, "ab", ""),
        ({"content": 7}, "", ""),
        ({"tool_calls": []}, "", ""),
    ],
)
def test_messages_of_many_endpoints(message: dict[str, object], text: str, reasoning: str) -> None:
    reply = read_completion(json.dumps({"choices": [{"message": message}]}).encode(), 100)
    assert (reply.text, reply.reasoning, reply.finish) == (text, reasoning, "stop")
    assert reply.prompt_tokens == 25  # without usage counts: four bytes a token


@given(st.binary(max_size=80) | st.from_regex(rb'\{"choices":\s*\[.{0,40}\]\}'))
@settings(deadline=None, max_examples=150)
def test_nothing_but_a_completion_is_read_as_one(content: bytes) -> None:
    with contextlib.suppress(MalformedReply):
        assert isinstance(read_completion(content, 0), Reply)


@pytest.mark.parametrize("usage", [None, [], {"prompt_tokens": "many"}, {"prompt_tokens": -5, "completion_tokens": True}])
def test_usage_counts_that_make_no_sense_are_estimated(usage: object) -> None:
    body = {"choices": [{"message": {"content": "12345678"}}], "usage": usage}
    reply = read_completion(json.dumps(body).encode(), 40)
    assert (reply.prompt_tokens, reply.completion_tokens) == (10, 2)


# -------------------------------------------------------- languages, near-copies


@pytest.mark.parametrize(
    ("question", "reply", "found"),
    [
        ("How many are there of the 5?", "Let x = 5. Then 2x = 10, x + 5 = 10.", None),  # too few words to tell
        ("Wie viele sind es?", "Es sind 5, denn 2 und 3 sind 5, und das ist nicht mehr und auch nicht weniger.", None),
        ("Сколько было яблок?", "Теперь тринадцать яблок, потому что шесть и семь это тринадцать.", None),
        ("How many apples are there?", "Let λ = 6 and μ = 7, so that λ + μ = 13 is the number of the apples.", None),
        (
            "How many of the apples are there, and which of them is it that is red?",
            "Il y a des pommes et une est rouge, donc la réponse est que les pommes sont dans le panier avec une poire.",
            "French",
        ),
        ("How many apples are there?", "Сначала было шесть яблок, потом стало тринадцать.", "Cyrillic script"),
    ],
)
def test_languages(question: str, reply: str, found: str | None) -> None:
    assert foreign(question, reply) == found


def test_a_copy_in_another_order_of_views_drops_the_later_one() -> None:
    texts = {"planning": WORK, "analogy": "Like 5 and 8 pears: 13.", "socratic": WORK.replace("Six", "Now six")}
    assert duplicates(texts, 0.6) == {"socratic": "planning"}
    assert duplicates(texts, 0.99) == {}


@given(st.text(max_size=60), st.text(max_size=60))
def test_similarity_is_symmetric_bounded_and_one_for_equals(a: str, b: str) -> None:
    one, other = shingles(a), shingles(b)
    assert similarity(one, one) == 1
    assert 0 <= similarity(one, other) == similarity(other, one) <= 1


# ------------------------------------------------------------------- LLM judge


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ('{"why": "fine", "steps": 5, "fidelity": 4}', (5, 4)),
        ('<think>{"steps": 1, "fidelity": 1}</think>```json\n{"why": "ok", "steps": 3, "fidelity": 2}\n```', (3, 2)),
        ('{"steps": 9, "fidelity": 4}', None),
        ('{"steps": "5", "fidelity": 4}', None),
        ("Good work!", None),
        ('{"steps": 5', None),
    ],
)
def test_judgements(text: str, scores: tuple[int, int] | None) -> None:
    found = llm_judge.read(Reply(text))
    assert (found and (found.steps, found.fidelity)) == scores


def test_the_judge_sees_problem_instruction_solution_and_answer() -> None:
    sent = llm_judge.messages(APPLES, "socratic", WORK)
    assert all(part in sent[1]["content"] for part in (APPLES.question, "socratic", WORK, "13"))


# ------------------------------------------------------------------- interview


def interview(
    table: Callable[[str, int, int], Reply],
    opinion: Callable[[str], str] = lambda text: "",
    mistake: Callable[[str], Reply] = lambda text: Reply(""),
    **synthesis: object,
) -> Interview:
    """Interview about APPLES: views from `table(perspective, sample, max_tokens)`, scores and the mistake from functions of the prompt."""

    async def ask(request: Request) -> Reply:
        await asyncio.sleep(0)
        body = request.body
        if mistakes.asked_for(body["messages"]):
            return mistake(body["messages"][1]["content"])
        return table(perspective_of(body["messages"][0]["content"]) or "", request.sample, body["max_tokens"])

    async def ask_judge(request: Request) -> Reply:
        return Reply(opinion(request.body["messages"][1]["content"]), prompt_tokens=7, completion_tokens=3)

    config: Config = validate({"synthesis": synthesis})
    return asyncio.run(Interviewer(config, "here", ask, ask_judge).interview(APPLES))


def right(perspective: str, sample: int = 0, room: int = 0) -> Reply:
    return Reply(f"{starter_corpus().entries[0].rationales[perspective]}\nThe answer is 13.", prompt_tokens=100, completion_tokens=10)


def test_rows_come_in_the_order_of_perspectives_with_their_requests() -> None:
    done = interview(right)
    assert [row.perspective for row in done.rows] == list(PERSPECTIVES)
    assert all(row.accepted and row.attempt == 1 for row in done.rows)
    assert len({row.request for row in done.rows}) == 8
    assert done.used == {"calls": 8, "prompt_tokens": 800, "completion_tokens": 80}


def test_a_rejected_view_is_asked_again_and_every_attempt_is_kept() -> None:
    def table(perspective: str, sample: int, room: int) -> Reply:
        return Reply("It is 9.\nThe answer is 9.") if perspective == "planning" and sample < 2 else right(perspective)

    once, thrice = interview(table), interview(table, max_attempts=4)
    assert [row.reason for row in once.rows if not row.accepted] == ["wrong: 9 in place of 13"]
    assert [(row.attempt, row.accepted) for row in thrice.rows if row.perspective == "planning"] == [(1, False), (2, False), (3, True)]
    assert sum(row.accepted for row in thrice.rows) == 8
    assert [row.perspective for row in thrice.rows] == sorted([row.perspective for row in thrice.rows], key=PERSPECTIVES.index)


def test_a_truncated_reply_gets_more_room_once() -> None:
    rooms: list[int] = []

    def table(perspective: str, sample: int, room: int) -> Reply:
        if perspective == "analogy":
            rooms.append(room)
        cut = perspective == "analogy" and room < 3000
        return Reply("Imagine", finish="length", completion_tokens=room) if cut else right(perspective)

    generous = interview(table, more_room=4.0)
    assert rooms == [1024, 4096]
    assert all(row.accepted for row in generous.rows)
    assert next(row for row in generous.rows if row.perspective == "analogy").completion_tokens == 1024 + 10
    rooms.clear()
    strict = interview(table, more_room=2.0)
    assert rooms == [1024, 2048]
    assert [row.reason for row in strict.rows if not row.accepted] == ["truncated: after 3072 tokens"]
    rooms.clear()
    interview(table, more_room=1.0)
    assert rooms == [1024]


def test_a_view_that_copies_another_is_dropped_and_names_it() -> None:
    done = interview(lambda perspective, sample, room: right("planning" if perspective == "socratic" else perspective))
    assert [(row.perspective, row.reason) for row in done.rows if not row.accepted] == [("socratic", "duplicate: of planning")]
    again = interview(lambda p, sample, room: right("planning" if p == "socratic" and sample == 0 else p), max_attempts=2)
    assert sum(row.accepted for row in again.rows) == 8


def test_the_llm_judge_is_asked_about_accepted_views_only_and_its_scores_stay() -> None:
    def opinion(text: str) -> str:
        return '{"why": "a gap", "steps": 2, "fidelity": 5}' if "planning" in text else '{"why": "", "steps": 5, "fidelity": 4}'

    def table(perspective: str, sample: int, room: int) -> Reply:
        return Reply("Nine.\nThe answer is 9.") if perspective == "intuitive" else right(perspective)

    done = interview(table, opinion, judge="llm")
    assert done.used["judge_calls"] == 7
    dropped = {row.perspective: row.reason for row in done.rows if not row.accepted}
    assert dropped == {"intuitive": "wrong: 9 in place of 13", "planning": "judge: steps 2/5, fidelity 5/5: a gap"}
    assert next(row for row in done.rows if row.perspective == "socratic").scores == {"steps": 5, "fidelity": 4}


def test_a_judge_that_cannot_be_read_is_asked_twice_then_the_view_is_dropped() -> None:
    done = interview(right, lambda text: "Lovely!", judge="llm", perspectives=["socratic"])
    assert done.used["judge_calls"] == 2
    assert [row.reason for row in done.rows] == ["judge: its reply cannot be read"]


# -------------------------------------------------------------------- mistakes


VIEWS = dict(starter_corpus().entries[0].rationales)
SLIP = "Watch it shrink one hand at a time: twelve, eleven, ten, nine. It stands at 9."
SNOWMAN = Question(id="s", question=starter_corpus().entries[0].question, answer="8")


def test_every_mistake_of_the_starter_corpus_is_read_as_one() -> None:
    for entry in starter_corpus().entries:
        question = Question(id=entry.id, question=entry.question, answer=entry.answer)
        reply = Reply(f"{entry.mistaken_view}\n{entry.reply(entry.mistaken_view, wrong=True)}")
        name, found = mistakes.read(reply, question, entry.rationales)
        assert found.accepted, (entry.id, found.reason)
        assert (name, found.text, found.answer) == (entry.mistaken_view, entry.mistake, entry.mistaken_answer)


@pytest.mark.parametrize("first", ["intuitive", "**Intuitive**", "SOLUTION intuitive", "The solution I picked: intuitive.\n"])
def test_the_view_is_named_in_any_wording(first: str) -> None:
    name, found = mistakes.read(Reply(f"<think>which?</think>\n{first}\n{SLIP}\n**The answer is 9.**"), SNOWMAN, VIEWS)
    assert (name, found.text, found.answer, found.accepted) == ("intuitive", SLIP, "9", True)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(f"intuitive\n{VIEWS['intuitive']}\nThe answer is 8."), "right"),
        (Reply(f"{SLIP}\nThe answer is 9."), "no view: the first line names none"),
        (Reply(f"{SLIP}\nIt stands there.\nThe answer is 9."), "no view: the first line names none"),
        (Reply(f"algebraic\n{SLIP}\nThe answer is 9."), "no view"),
        (Reply(f"planning\n{SLIP}\nThe answer is 9."), "no copy: of planning"),
        (Reply("intuitive\nThe sun is hot and the snowman has nine hands left.\nThe answer is 9."), "no copy: of intuitive"),
        (Reply(f"intuitive\n{VIEWS['intuitive']}\nThe answer is 9."), "no copy: the steps of intuitive unchanged"),
        (Reply("intuitive\nWatch it shrink one hand at a time. Who knows where it ends?"), "no answer"),
        (Reply("intuitive"), "empty"),
        (Reply(""), "empty"),
        (Reply(f"intuitive\n{SLIP}", finish="length"), "truncated"),
        (Reply("", refusal="I write no wrong solutions"), "refused"),
        (Reply("I'm sorry, I cannot write wrong solutions.\nThey mislead."), "refused"),
    ],
)
def test_what_is_no_mistake_and_why(reply: Reply, reason: str) -> None:
    name, found = mistakes.read(reply, SNOWMAN, VIEWS)
    assert not found.accepted
    assert found.reason.startswith(reason), found.reason
    assert found.reason.partition(":")[0] in (*REASONS, *mistakes.REASONS)
    assert name in ("", *PERSPECTIVES)


def test_a_mistake_is_asked_for_once_about_the_accepted_views_in_their_order() -> None:
    asked: list[str] = []

    def table(perspective: str, sample: int, room: int) -> Reply:
        return Reply("Nine.\nThe answer is 9.") if perspective == "analogy" and sample == 0 else right(perspective)

    def mistake(prompt: str) -> Reply:
        asked.append(prompt)
        work = starter_corpus().entries[0].rationales["intuitive"]
        return Reply(f"intuitive\n{work.replace('eight', 'nine')}\nThe answer is 9.", prompt_tokens=70, completion_tokens=9)

    done = interview(table, mistake=mistake, mistakes=True, max_attempts=2)
    assert done.mistake and done.mistake.accepted and done.mistake.perspective == "intuitive"
    assert (done.mistake.prompt_tokens, done.mistake.completion_tokens, done.mistake.request != "") == (70, 9, True)
    assert done.used["calls"] == 10
    (prompt,) = asked
    places = [prompt.index(f"SOLUTION {name}\n") for name in PERSPECTIVES]
    assert places == sorted(places)
    assert "The answer is" not in prompt.split("End with this line")[0]
    interview(lambda p, sample, room: Reply("Nine.\nThe answer is 9.") if p == "analogy" else right(p), mistake=mistake, mistakes=True)
    assert "SOLUTION analogy" not in asked[1] and asked[1].count("SOLUTION ") == 7
    nothing = interview(lambda *_: Reply("Nine.\nThe answer is 9."), mistake=mistake, mistakes=True)
    assert nothing.mistake is None and len(asked) == 2
    assert interview(right, mistake=mistake).mistake is None and len(asked) == 2


def test_a_mistake_without_a_reply_becomes_a_row_and_the_views_stand() -> None:
    def mistake(prompt: str) -> Reply:
        raise Unanswered("status 500")

    done = interview(right, mistake=mistake, mistakes=True)
    assert done.mistake and done.mistake.reason == "unanswered: status 500"
    assert (done.used["unanswered"], done.used["calls"], sum(row.accepted for row in done.rows)) == (1, 8, 8)


def test_a_view_without_a_reply_becomes_a_row_and_the_others_stand() -> None:
    def table(perspective: str, sample: int, room: int) -> Reply:
        if perspective == "analogy":
            raise Unanswered("status 500")
        return right(perspective)

    done = interview(table)
    assert [row.reason for row in done.rows if not row.accepted] == ["unanswered: status 500"]
    assert (done.used["unanswered"], done.used["calls"]) == (1, 7)
