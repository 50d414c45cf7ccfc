"""Encoding is exact, and the packed layout equals the padded oracle: values and gradients, on several architectures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch.nn.functional import cross_entropy

from mind import config
from mind.prompts import student_ids, student_prompt
from mind.students.loading import add_adapter
from mind.training import layout
from mind.training.adapter import FusedLinear, fuse
from mind.training.attention import Span, blocks
from mind.training.layout import Encoded, Group, Outputs, encode, encode_example, packed, padded
from mind.training.loop import make_tunable
from tests import tiny

ARCHITECTURES = list(tiny.CONFIGS)


def questions(count: int = 3) -> list[Encoded]:
    """With 8, 3 and 1 views of very different lengths."""
    made = tiny.examples(count)
    views = [dict(list(example.views.items())[: (8, 3, 1)[i % 3]]) for i, example in enumerate(made)]
    views[0]["socratic"] = "Why? " * 40
    tokenizer = tiny.tokenizer()
    return [encode_example(tokenizer, example, own, i) for i, (example, own) in enumerate(zip(made, views, strict=True))]


def adapted(architecture: str) -> torch.nn.Module:
    """With LoRA whose B is not zero: at its start every adapter is the base and too much would hold."""
    model = make_tunable(tiny.model(architecture), config.Student(), config.Training())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


# ---------------------------------------------------------------- encoding


def test_a_response_is_rationale_answer_line_and_end() -> None:
    tokenizer = tiny.tokenizer()
    prompt, response = encode(tokenizer, "What is 2 plus 2?", "  2 + 2 = 4. ", "4")
    assert list(prompt) == student_ids(tokenizer, "What is 2 plus 2?")
    assert tokenizer.decode(list(response.ids)) == "2 + 2 = 4.\nThe answer is 4." + tiny.END
    start, end = response.answer
    assert tokenizer.decode(list(response.ids[start:end])) == "4"


@pytest.mark.parametrize("answer", ["27", "-3.5", "B", "yes", "\\frac{1}{2}"])
def test_all_views_share_the_ids_of_the_answer(answer: str) -> None:
    tokenizer = tiny.tokenizer()
    responses = [encode(tokenizer, "?", body, answer)[1] for body in ("short", "a much longer one\nin two lines", "x.")]
    spans = {response.ids[slice(*response.answer)] for response in responses}
    tails = {response.ids[response.answer[0] :] for response in responses}
    assert len(spans) == len(tails) == 1
    assert tokenizer.decode(list(spans.pop())).strip() == answer


def test_the_prompt_is_the_one_of_the_evaluation() -> None:
    example, tokenizer = tiny.examples(1)[0], tiny.tokenizer()
    encoded = encode_example(tokenizer, example, example.views, 0)
    assert list(encoded.prompt) == student_ids(tokenizer, student_prompt(example.question, example.kind))


def test_without_a_chat_template_the_prompt_ends_where_any_answer_may_begin() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    assert tokenizer.decode(student_ids(tokenizer, "What is 2 plus 2?")) == "Question: What is 2 plus 2?\nAnswer:\n"


def test_views_that_are_too_long_are_dropped_alone() -> None:
    question = questions()[0]
    limit = question.longest - 1
    kept = question.up_to(limit)
    assert set(question.views) - set(kept.views) == {"socratic"}
    assert kept.longest <= limit
    assert question.up_to(question.longest) == question


# ------------------------------------------------------------------- parity


def both(model: torch.nn.Module, groups: Sequence[Group]) -> list[tuple[Outputs, torch.Tensor]]:
    """Outputs and gradient of an uneven weighting of all losses, for each layout."""
    results = []
    for run in (packed, padded):
        model.zero_grad()
        outputs = run(model, groups)
        weights = torch.linspace(0.1, 1, len(outputs.answers))
        answers = sum(outputs.answer_logprobs([view])[0, :, view].sum() for view in range(len(outputs.answers)))
        ((weights * outputs.ce()).sum() + 0.01 * answers).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((outputs, gradient))
    return results


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_padded(architecture: str) -> None:
    (fast, fast_gradient), (slow, slow_gradient) = both(adapted(architecture), [question.group() for question in questions()])
    torch.testing.assert_close(fast.ce(), slow.ce(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast.nll, slow.nll, atol=1e-4, rtol=1e-5)
    assert fast.mask.equal(slow.mask)
    for view in range(len(fast.answers)):
        torch.testing.assert_close(fast.answer_logprobs([view]), slow.answer_logprobs([view]), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(fast.view_features, slow.view_features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast.prompt_features, slow.prompt_features, atol=1e-5, rtol=1e-4)
    assert float((fast_gradient - slow_gradient).norm() / slow_gradient.norm()) < 1e-5


@pytest.mark.parametrize("run", [packed, padded])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_view_has_the_loss_that_the_model_itself_gives_it(architecture: str, run: Callable[..., Outputs]) -> None:
    model, question = tiny.model(architecture), questions()[0]
    outputs = run(model, [question.group()])
    for row, response in enumerate(question.views.values()):
        ids = torch.tensor([[*question.prompt, *response.ids]])
        with torch.no_grad():
            logits = model(ids).logits[0]
        start, length = len(question.prompt), len(response.ids)
        expected = cross_entropy(logits[start - 1 : -1].float(), ids[0, start:], reduction="none")
        torch.testing.assert_close(outputs.nll[row, :length].detach(), expected, atol=1e-4, rtol=1e-5)
        s, e = (start + place for place in response.answer)
        torch.testing.assert_close(
            outputs.answer_logprobs([row])[0].detach(), torch.log_softmax(logits[s - 1 : e - 1].float(), dim=-1), atol=1e-4, rtol=1e-5
        )


def test_a_view_does_not_see_the_others() -> None:
    model, question = tiny.model(), questions()[0]
    whole = packed(model, [question.group()]).ce()
    alone = torch.cat([packed(model, [question.group([name])]).ce() for name in question.views])
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)


def test_questions_of_a_batch_do_not_see_each_other() -> None:
    model, own = tiny.model(), questions()
    together = packed(model, [question.group() for question in own])
    alone = [packed(model, [question.group()]) for question in own]
    torch.testing.assert_close(together.ce(), torch.cat([outputs.ce() for outputs in alone]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.prompt_features, torch.cat([o.prompt_features for o in alone]), atol=1e-5, rtol=1e-4)


def test_part_is_a_pass_over_those_views_alone() -> None:
    model, own = tiny.model(), questions()
    part = packed(model, [question.group() for question in own]).part([1], [8, 9, 10])
    alone = packed(model, [own[1].group()])
    torch.testing.assert_close(part.ce(), alone.ce(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.answer_logprobs([2]), alone.answer_logprobs([2]), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(part.view_features, alone.view_features, atol=1e-5, rtol=1e-4)


def test_features_carry_no_gradient() -> None:
    outputs = packed(adapted("llama"), [questions()[0].group()])
    assert outputs.nll.requires_grad
    assert not outputs.view_features.requires_grad and not outputs.prompt_features.requires_grad


def test_logits_exist_at_supervised_positions_only_and_never_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own, rows, model = questions(), [], adapted("llama")
    groups = [question.group() for question in own]
    whole = packed(model, groups)
    monkeypatch.setattr(layout, "LOGITS", 10 * tiny.SHAPE["vocab_size"])
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    parts = packed(model, groups)
    assert sum(rows) == sum(len(view.ids) for question in own for view in question.views.values()) == int(parts.mask.sum())
    assert max(rows) == 10
    torch.testing.assert_close(parts.nll, whole.nll, atol=1e-6, rtol=1e-6)


def test_lengths_that_differ_a_hundredfold_are_exact_and_not_all_padded_to_the_longest() -> None:
    made, tokenizer = tiny.examples(2), tiny.tokenizer()
    views = [{"intuitive": "x", "planning": "long " * 120, "socratic": "short."}, {"analogy": "y" * 30}]
    own = [encode_example(tokenizer, example, texts, i) for i, (example, texts) in enumerate(zip(made, views, strict=True))]
    groups = [question.group() for question in own]
    (fast, fast_gradient), (slow, slow_gradient) = both(adapted("llama"), groups)
    torch.testing.assert_close(fast.ce(), slow.ce(), atol=1e-5, rtol=1e-5)
    assert float((fast_gradient - slow_gradient).norm() / slow_gradient.norm()) < 1e-5
    row = layout._pack(groups)
    made_blocks = blocks([Span(p.start, len(p)) for p in row.prompts], row.views, torch.device("cpu"), torch.float32)
    computed = sum(batch.mask.numel() for batch in made_blocks.batches)
    assert len(made_blocks.batches) > 1 and computed < 1.5 * sum(
        v.length * (v.length + len(p)) for p, own in zip(row.prompts, row.views, strict=True) for v in own
    )


def test_what_an_attention_without_blocks_is_given_fails_and_does_not_mix_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    packed(model, [questions()[0].group()])
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(layout, "understands", lambda model: True)
    with pytest.raises(RuntimeError):
        packed(model, [questions()[0].group()])


def test_a_student_in_blocks_still_attends_as_usual_elsewhere() -> None:
    plain, used = tiny.model(), tiny.model()
    packed(used, [questions()[0].group()])
    ids, mask = torch.randint(256, (2, 9)), torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    torch.testing.assert_close(used(ids, attention_mask=mask).logits[:, :6], plain(ids, attention_mask=mask).logits[:, :6])
    assert used.config._attn_implementation != plain.config._attn_implementation
    assert used.config.to_dict() == plain.config.to_dict()


# ------------------------------------------------------------------ adapters


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # the second has biases
def test_a_fused_adapter_is_peft_s_adapter(architecture: str) -> None:
    groups, results = [question.group() for question in questions()], []
    for fused in (True, False):
        model = adapted(architecture)
        for layer in model.modules():
            if isinstance(layer, FusedLinear) and not fused:
                layer.__class__ = FusedLinear.__base__
        assert any(isinstance(layer, FusedLinear) for layer in model.modules()) is fused
        outputs = packed(model, groups)
        outputs.ce().sum().backward()
        results.append((outputs.ce(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
        with model.disable_adapter():
            results[-1] += (packed(model, groups).ce(),)
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-5)
    assert float((results[0][1] - results[1][1]).norm() / results[1][1].norm()) < 1e-5
    torch.testing.assert_close(results[0][2], results[1][2])


def test_adapters_with_dropout_or_of_another_precision_stay_peft_s() -> None:
    for lora, dtype in ((config.Lora(dropout=0.1), torch.float32), (config.Lora(), torch.bfloat16)):
        model = add_adapter(tiny.model().to(dtype), lora)
        fuse(model)
        assert not any(isinstance(layer, FusedLinear) for layer in model.modules())
