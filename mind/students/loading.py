"""Settings -> a model with its tokenizer, ready to train or to answer. Called by stages.distill and stages.evaluate.

A student is the embedded `smollm2-135m`, a hub id or a local folder. Weights are safetensors only; no code of a repository is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mind import config
from mind.errors import StudentError
from mind.outputs import digest_json, digest_path
from mind.students.embedded import NAME, embedded_student
from mind.students.quiet import quietly

ADAPTER, MODEL, TOKENIZER = "adapter", "model", "tokenizer"
"""Sub-folders of students/V."""

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
HUB_LEFT_OUT = ["original/*", "onnx/*", "consolidated*"]


@dataclass
class LoadedStudent:
    """`identity` names the base weights: equal weights, equal identity."""

    model: Any
    tokenizer: Any
    identity: str


def find_student(settings: config.Student) -> tuple[Path, str]:
    """The folder of the base weights and their identity, without loading them.

    Raises:
        StudentError: not installed, not to be had offline, or not a model folder.
    """
    if settings.name == NAME:
        return embedded_student()
    return find_model(settings.name, settings.revision, setting="student.name", embedded=NAME)


def find_model(name: str, revision: str | None, *, setting: str, embedded: str) -> tuple[Path, str]:
    """A local folder or a hub id -> the folder of its weights (safetensors) and their identity.

    Args:
        setting, embedded: for messages: where the name stands, and what needs no hub.

    Raises:
        StudentError: not to be had offline, or not a model folder.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        _check_folder(local, name)
        return local, f"{local.name}@{_digest_weights(local)[:16]}"
    return _from_hub(name, revision, setting, embedded)


def load_student(settings: config.Student, trained: Path | None = None, device: Any = None) -> LoadedStudent:
    """The base student, or the one that `distill` left in the folder `trained` (its adapter merged into the weights).

    Raises:
        StudentError: what find_student raises, or files that cannot be read as a model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, identity = find_student(settings)
    adapter = trained / ADAPTER if trained and (trained / ADAPTER).is_dir() else None
    weights = trained / MODEL if trained and (trained / MODEL).is_dir() else folder
    names = trained / TOKENIZER if trained and (trained / TOKENIZER).is_dir() else folder
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(names, trust_remote_code=False)
            precision = getattr(torch, settings.dtype)
            model, info = AutoModelForCausalLM.from_pretrained(
                weights, dtype=precision, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            refuse_missing(info["missing_keys"])
            if adapter:
                model = _merged(model, adapter)
    except Exception as error:  # transformers, peft and safetensors raise a dozen kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise StudentError(
            f"cannot load '{settings.name}' from {adapter or weights}: {type(error).__name__}: {first}",
            wanted="a causal language model in safetensors with its tokenizer",
            do=f"delete {trained} and run distill again" if trained else "check student.name, or download the model again",
        ) from error
    if tokenizer.eos_token_id is None:
        raise StudentError(f"the tokenizer of '{settings.name}' has no end token", wanted="an eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedStudent(model.to(device) if device is not None else model, tokenizer, identity)


def refuse_missing(names: Iterable[str]) -> None:
    """Weights that a model folder lacks would be random, and a library's note about it is easily overlooked. Raises ValueError."""
    if missing := sorted(names):
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")


def save_student(student: LoadedStudent, settings: config.Student, folder: Path) -> None:
    """Write what `load_student(trained=folder)` reads: adapter/ or model/, and tokenizer/. Equal students give equal bytes."""
    with quietly():
        if settings.tuning == "lora":
            for adapter in student.model.peft_config.values():
                adapter.base_model_name_or_path = settings.name  # not the folder of this machine's cache
            # no embeddings: they are not trained, and looking whether they were resized asks the hub for the base model
            student.model.save_pretrained(folder / ADAPTER, safe_serialization=True, save_embedding_layers=False)
            (folder / ADAPTER / "README.md").unlink(missing_ok=True)  # an empty model card
            _sort_lists(folder / ADAPTER / "adapter_config.json")
        else:
            import torch

            student.model.to(getattr(torch, settings.dtype)).save_pretrained(folder / MODEL)
        student.tokenizer.save_pretrained(folder / TOKENIZER)


def only_attends(model: Any) -> bool:
    """Whether tokens of one row meet in attention alone, where a mask can part them: layers that convolve or recur carry on past it."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return not model._is_stateful and all(kind.endswith("_attention") and kind != "linear_attention" for kind in kinds)


def add_adapter(model: Any, lora: config.Lora, widening: int = 1) -> Any:
    """`model` with a LoRA adapter that changes nothing yet; `widening` multiplies its rank and keeps its scale."""
    from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    shape = LoraConfig(
        r=widening * lora.r, lora_alpha=widening * lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, shape)


def put_adapter(model: Any, values: Mapping[str, Any]) -> None:
    """Give the adapter of a PEFT model these values."""
    from peft import set_peft_model_state_dict

    unknown = set_peft_model_state_dict(model, dict(values)).unexpected_keys
    if unknown:
        raise StudentError(f"the adapter has matrices that this student lacks, such as {unknown[0]}", do="train it again")


def read_adapter(folder: Path) -> dict[str, Any]:
    """The LoRA matrices that `save_student` wrote to `folder`."""
    from safetensors.torch import load_file

    return load_file(folder / ADAPTER / "adapter_model.safetensors")


def _sort_lists(path: Path) -> None:
    """PEFT writes sets in the order of this process's hash seed."""
    content = json.loads(path.read_text(encoding="utf-8"))
    ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in content.items()}
    path.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _merged(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)


def _from_hub(name: str, revision: str | None, setting: str, embedded: str) -> tuple[Path, str]:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_LEFT_OUT))
    except HFValidationError:
        raise StudentError(f"{setting} '{name}' is no folder and no hub id", wanted=f"'{embedded}', a hub id or a folder") from None
    except (LocalEntryNotFoundError, OSError, RepositoryNotFoundError) as error:
        offline = "offline (HF_HUB_OFFLINE is set) and " if constants.HF_HUB_OFFLINE else ""
        first = str(error).strip().splitlines()[0]
        raise StudentError(
            f"{setting} '{name}': {offline}not in the local cache: {first}",
            wanted=f"the embedded '{embedded}', a hub id that can be reached, or a local folder",
            do=f"go online once, log in for a gated model (hf auth login), or set {setting} to a folder",
        ) from None
    _check_folder(folder, name)
    return folder, f"{name}@{folder.name[:16]}"  # the snapshot's folder is named by its commit


def _check_folder(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise StudentError(f"'{name}': {folder} holds no config.json", wanted="a folder that transformers can load")
    if not any(folder.glob("*.safetensors")):
        raise StudentError(
            f"'{name}': {folder} holds no safetensors",
            wanted="weights in safetensors",
            do="convert them: pickled weights can run code",
        )


def _digest_weights(folder: Path) -> str:
    """sha256 over the files that make a student: weights, configuration and tokenizer."""
    kinds = {".safetensors", ".json", ".jinja", ".model", ".txt"}
    return digest_json({path.name: digest_path(path) for path in sorted(folder.iterdir()) if path.suffix in kinds})
