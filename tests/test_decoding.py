"""Decoding: the answers of `transformers.generate`, however the batch is cut, and an end where the answer line ends."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, MistralConfig
from transformers.models.auto import AutoModelForCausalLM

from mind.students import decoding
from mind.students.decoding import Completion, generate
from tests import tiny

TOKENS = 24
WHOLE = 100_000  # batch_tokens that hold every prompt at a time


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def prompts(count: int, shared: int = 5, seed: int = 3) -> list[list[int]]:
    """Token ids of 6 to 60, the first `shared` alike."""
    draw = random.Random(seed)
    first = [draw.randrange(256) for _ in range(shared)]
    return [first + [draw.randrange(256) for _ in range(draw.randrange(1, 55))] for _ in range(count)]


def ending(model: Any) -> Any:
    """The model with such end tokens that its answers end at many lengths."""
    model.generation_config = GenerationConfig(eos_token_id=[257, *range(0, 256, 16)], pad_token_id=258)
    return model


def one_by_one(model: Any, tokenizer: Any, ids: list[list[int]]) -> list[Completion]:
    """The oracle: `transformers.generate`, a prompt at a time, without padding or a shared cache."""
    done = []
    for prompt in ids:
        output = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=TOKENS, do_sample=False)
        written = output[0, len(prompt) :].tolist()
        done.append(Completion(tokenizer.decode(written, skip_special_tokens=True), len(written)))
    return done


def sliding() -> Any:
    torch.manual_seed(1)
    shape = {**tiny.SHAPE, "sliding_window": 16}
    return AutoModelForCausalLM.from_config(MistralConfig(**shape), attn_implementation="sdpa").eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma", "lfm2"])
def test_equals_transformers(architecture: str, tokenizer: Any) -> None:
    model = ending(tiny.model(architecture))
    ids = prompts(8)
    expected = one_by_one(model, tokenizer, ids)
    assert len({done.tokens for done in expected}) > 1  # rows leave the batch at different times
    assert generate(model, tokenizer, ids, max_new_tokens=TOKENS, batch_tokens=WHOLE) == expected


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_independent_of_the_batch(rows: int, tokenizer: Any) -> None:
    model = ending(tiny.model())
    ids = prompts(11)
    whole = generate(model, tokenizer, ids, max_new_tokens=TOKENS, batch_tokens=WHOLE)
    longest = max(map(len, ids)) + TOKENS
    assert generate(model, tokenizer, ids, max_new_tokens=TOKENS, batch_tokens=rows * longest) == whole
    assert [generate(model, tokenizer, [one], max_new_tokens=TOKENS, batch_tokens=1)[0] for one in ids[:4]] == whole[:4]


@pytest.mark.parametrize("shared", [0, 1, 30])
def test_independent_of_what_prompts_share(shared: int, tokenizer: Any) -> None:
    model = ending(tiny.model())
    ids = prompts(6, shared)
    assert generate(model, tokenizer, ids, max_new_tokens=TOKENS, batch_tokens=WHOLE) == one_by_one(model, tokenizer, ids)


def test_equal_and_nested_and_one_token_prompts(tokenizer: Any) -> None:
    model = ending(tiny.model())
    ids = [[7, 8, 9], [7, 8, 9], [7, 8], [7]]
    assert generate(model, tokenizer, ids, max_new_tokens=TOKENS, batch_tokens=WHOLE) == one_by_one(model, tokenizer, ids)


@pytest.mark.parametrize("batch_tokens", [1, 250, WHOLE])
def test_sliding_windows_go_the_plain_way(batch_tokens: int, tokenizer: Any) -> None:
    model = ending(sliding())
    ids = prompts(7)
    assert not decoding._attends_to_all(model.config, 60)
    assert generate(model, tokenizer, ids, max_new_tokens=TOKENS, batch_tokens=batch_tokens) == one_by_one(model, tokenizer, ids)


def test_long_prompts_do_not_thin_the_batch_of_short_ones() -> None:
    ids = [[1] * length for length in (20, 300, 30, 250, 25)]
    assert decoding._of_like_length(ids, 10) == [[1, 3], [2, 4, 0]]


def test_each_answer_is_reported_once(tokenizer: Any) -> None:
    seen: dict[int, Completion] = {}

    def on_done(index: int, done: Completion) -> None:
        assert index not in seen
        seen[index] = done

    ids = prompts(9)
    result = generate(ending(tiny.model()), tokenizer, ids, max_new_tokens=TOKENS, batch_tokens=300, on_done=on_done)
    assert [seen[index] for index in range(len(ids))] == result


@pytest.mark.parametrize("make", [lambda: ending(tiny.model()), lambda: ending(sliding())])
def test_what_is_under_way_is_told_at_every_step(make: Any, tokenizer: Any) -> None:
    told: list[float] = []
    done = generate(make(), tokenizer, prompts(6), max_new_tokens=TOKENS, batch_tokens=WHOLE, on_step=told.append)
    assert told[0] <= 6 / TOKENS and max(told) <= 6
    assert len(told) >= max(completion.tokens for completion in done)


def test_nothing_asked_nothing_answered(tokenizer: Any) -> None:
    assert generate(tiny.model(), tokenizer, [], max_new_tokens=TOKENS, batch_tokens=WHOLE) == []


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("3 + 4 = 7.\nThe answer is 7.\n", True),
        ("**The answer is: yes**\n", True),
        ("So the answer is the sum of 3 and 4.\n", False),  # reasoning
        ("The answer is 7.", False),  # 7.5 may follow
        ("The answer is:\n", False),  # it stands on the next line
        ("The answer is <yes>.\n", True),
        ("The answer is: $5$.\n", True),
        ("**The answer is:**\n", False),  # it stands below, here and in the next three
        ("The answer is \\[\n", False),
        ("The answer is: $$\n", False),
        ("The answer is found as follows:\n", False),
        ("The answer is not clear yet.\n", False),
        ("The answer is: <letter>.\n", False),
        ("The answer is <letter>.\n", False),  # the instruction said again
        ("3 + 4 = 7.\n", False),
    ],
)
def test_an_answer_line_ends_the_row_when_its_line_ends(text: str, ended: bool, tokenizer: Any) -> None:
    ends = decoding._Endings(tiny.model(), tokenizer, max_new_tokens=500)
    assert ends(tokenizer(text)["input_ids"]) is ended


def test_what_another_engine_wrote_beyond_its_answer_is_cut_off() -> None:
    assert decoding.until_answered("3 + 2 = 5.\nThe answer is 5.\n\nQuestion: and 9?\nThe answer is 9.") == "3 + 2 = 5.\nThe answer is 5.\n"
    assert decoding.until_answered("The answer is 5.") == "The answer is 5."


@pytest.mark.parametrize("window", [None, 16])
def test_a_student_that_goes_on_is_stopped_after_its_answer(window: int | None, tokenizer: Any) -> None:
    """A student that learnt by heart to go on after its answer line: what follows the line is neither written nor paid for."""
    model = sliding() if window else tiny.model()
    wanted = {"a": "The answer is 5.\n", "b": "Let us see. The answer is 12.\n"}
    ids = {name: tokenizer(f"{name}: ")["input_ids"] for name in wanted}
    rows = [ids[name] + tokenizer(text + "And so it goes on")["input_ids"] for name, text in wanted.items()]
    width = max(map(len, rows))
    batch = torch.tensor([row + [258] * (width - len(row)) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        loss = model(batch, labels=batch.where(batch != 258, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    done = generate(model, tokenizer, list(ids.values()), max_new_tokens=60, batch_tokens=WHOLE)
    assert [(one.text, one.tokens) for one in done] == [(text, len(text)) for text in wanted.values()]
    for one, answer in zip(done, ("5", "12"), strict=True):  # a token is a character here
        row = tokenizer(f"{'a' if answer == '5' else 'b'}: {one.text}")["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        first = len(row) - len(answer) - 2
        expected = sum(float(logs[place - 1, row[place]]) for place in range(first, first + len(answer)))
        assert one.confidence == pytest.approx(math.exp(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 12.\n", "12"),
        ("Answer is: yes", "yes"),
        ("The answer is 3.\nNo, the answer is 4.5.\nSo", "4.5"),
        ("The answer is B.\nThe answer is <letter>.", "B"),
    ],
)
def test_confidence_is_of_the_last_stated_answer_alone(text: str, answer: str, tokenizer: Any) -> None:
    start = text.rindex(answer)
    logs = [-0.5 if start <= place < start + len(answer) else -9.0 for place in range(len(text))]
    found = decoding._confidence(tokenizer, text, tokenizer(text)["input_ids"], logs)
    assert found == pytest.approx(math.exp(-0.5 * len(answer)))


@pytest.mark.parametrize("text", ["42", "The answer is", "The answer is .\n"])
def test_without_a_stated_answer_there_is_no_confidence(text: str, tokenizer: Any) -> None:
    assert decoding._confidence(tokenizer, text, tokenizer(text)["input_ids"], [-1.0] * len(text)) is None


# ------------------------------------------------------------------ sampling


def drawn(ids: list[list[int]], tokenizer: Any, model: Any, batch_tokens: int = WHOLE, temperature: float = 1.0) -> list[str]:
    done = generate(model, tokenizer, ids, max_new_tokens=TOKENS, batch_tokens=batch_tokens, temperature=temperature, seeds=range(len(ids)))
    return [one.text for one in done]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_drawn_answer_depends_on_its_seed_and_on_nothing_beside_it(rows: int, tokenizer: Any) -> None:
    model, ids = ending(tiny.model()), prompts(7)
    whole = drawn(ids, tokenizer, model)
    assert drawn(ids, tokenizer, model, rows * (max(map(len, ids)) + TOKENS)) == whole
    assert whole != drawn(ids[::-1], tokenizer, model)[::-1]  # other seeds


def test_both_ways_of_decoding_draw_the_same(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = ending(tiny.model()), prompts(5)
    ours = drawn(ids, tokenizer, model)
    monkeypatch.setattr(decoding, "_attends_to_all", lambda settings, columns: False)
    assert drawn(ids, tokenizer, model) == ours


def test_near_zero_temperature_is_greedy(tokenizer: Any) -> None:
    model, ids = ending(tiny.model()), prompts(4)
    greedy = generate(model, tokenizer, ids, max_new_tokens=TOKENS, batch_tokens=WHOLE)
    assert drawn(ids, tokenizer, model, temperature=1e-6) == [one.text for one in greedy]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    draws = 4000
    tokens, logs = decoding._Picker(2.0, range(draws))(logits.expand(draws, -1), range(draws))
    shares = torch.bincount(torch.tensor(tokens), minlength=4) / draws
    assert (shares - (logits[0] / 2).softmax(-1)).abs().max() < 0.03 and shares[2] == 0
    assert logs[0] == pytest.approx(float(logits[0].log_softmax(-1)[tokens[0]]))  # of temperature 1
