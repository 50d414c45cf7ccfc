"""A student small enough for every test: random weights, two layers, a byte-level tokenizer. No network, no files of this machine.

folder = tiny.save(tmp_path / "student")            # loads with config.Student(name=str(folder))
student = tiny.load()                               # a LoadedStudent in memory
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma2Config, GemmaConfig, Lfm2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.auto import AutoModelForCausalLM

from mind.records import PERSPECTIVES, Example, MistakenView
from mind.students.loading import LoadedStudent

END = "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHAPE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "lfm2": partial(Lfm2Config, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
}
"""Gemma 2 caps its logits and slides its attention window in every other layer; LFM2 convolves where others attend."""


def tokenizer() -> Any:
    """A token is a byte, plus three marks; ChatML like the embedded student."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|im_start|>", eos_token=END, pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    return fast


def model(architecture: str = "llama", seed: int = 0, **shape: Any) -> Any:
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(CONFIGS[architecture](**{**SHAPE, **shape}))
    with torch.no_grad():
        for parameter in made.parameters():  # the usual 0.02 makes a student that is sure of nothing and hardly sees its context
            if parameter.ndim > 1:
                parameter.mul_(8)
    return made.eval()


def load(architecture: str = "llama", seed: int = 0) -> LoadedStudent:
    return LoadedStudent(model(architecture, seed), tokenizer(), f"tiny-{architecture}-{seed}")


def save(folder: Path, architecture: str = "llama", seed: int = 0) -> Path:
    """A model folder that `load_student` reads."""
    model(architecture, seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def examples(count: int, views: int = len(PERSPECTIVES)) -> list[Example]:
    """Sums with a short rationale of another length for every perspective, and a wrong copy of one."""
    made = []
    for i in range(count):
        a, b = 2 + i % 7, 1 + (3 * i) % 5
        texts = {name: f"{a} + {b} = {a + b}. " + "So it is. " * k for k, name in enumerate(PERSPECTIVES[:views])}
        copied = list(texts)[i % views]
        wrong = MistakenView(perspective=copied, text=texts[copied].replace(f"= {a + b}.", f"= {a + b + 1}."), answer=str(a + b + 1))
        asked = f"What is {a} plus {b}?"
        made.append(Example(id=f"sum-{i}", question=asked, answer=str(a + b), difficulty=0.5, views=texts, mistake=wrong))
    return made
