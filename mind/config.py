"""Every setting of the line and its bounds: frozen pydantic models, grouped by the stage that reads them.

Options of a method live with that method only, told apart by the tag `method`. mind/params.py reads and writes them as YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mind.errors import ConfigError, nearest
from mind.records import PERSPECTIVES

Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
"""A name that becomes a folder and a key of params.yaml: no slash (it stays in the workspace), no dot (DVC splits keys there)."""


class Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


# ---------------------------------------------------------------- synthesize


class Timeouts(Settings):
    """Seconds for one request to the teacher."""

    connect: PositiveFloat = 10
    read: PositiveFloat = 120
    total: PositiveFloat = 300


class Price(Settings):
    """USD for one million tokens."""

    input: NonNegativeFloat
    output: NonNegativeFloat


class Budget(Settings):
    """What this workspace may spend on the teacher and the judge, over all its runs; none set = no limit."""

    usd: PositiveFloat | None = None
    tokens: PositiveInt | None = None
    requests: PositiveInt | None = None


class Batching(Settings):
    """How `mode: batch` uses the provider's batch endpoint."""

    requests: int = Field(default=50_000, ge=1, le=50_000)  # in one batch file; 50,000 is OpenAI's limit
    poll_seconds: PositiveFloat = 30
    price_factor: Fraction = 0.5  # of the price of a live call


class Endpoint(Settings):
    """One OpenAI-compatible endpoint, and how it is asked. The API key comes from the environment or a Prefect Secret block only."""

    base_url: str = "embedded"
    model: str = Field(default="recorded", min_length=1)
    api_key_env: str = "OPENAI_API_KEY"
    api_key_block: str | None = None  # name of a Prefect Secret block; wins over the environment
    temperature: float | None = Field(default=0.7, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = None  # sent as seed + sample index
    max_tokens: PositiveInt = 1024
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # reasoning models want the second
    extra: dict[str, Any] = {}  # further keys of the request body, for instance {reasoning_effort: low}
    in_flight: PositiveInt = 32  # upper bound; the width in use adapts to what the endpoint takes
    requests_per_minute: PositiveFloat | None = None
    tokens_per_minute: PositiveFloat | None = None
    retries: int = Field(default=6, ge=0)
    timeouts: Timeouts = Timeouts()

    @field_validator("base_url")
    @classmethod
    def _without_secrets(cls, url: str) -> str:
        parts = urlsplit(url)
        if url != "embedded" and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ValueError("wanted 'embedded' or an address like https://host/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("an address with credentials or a query; keys belong in the environment (api_key_env)")
        return url.rstrip("/")

    @field_validator("extra")
    @classmethod
    def _only_further_keys(cls, extra: dict[str, Any]) -> dict[str, Any]:
        own = {"model", "messages", "temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "n", "stream"} & set(extra)
        if own:
            raise ValueError(f"{', '.join(sorted(own))}: set by mind itself; wanted further keys only")
        return extra


class Teacher(Endpoint):
    """Who writes the rationales, what it costs and may cost."""

    mode: Literal["live", "batch"] = "live"
    batch: Batching = Batching()
    prices: dict[str, Price] = {}  # by model, the judge's too
    budget: Budget = Budget()
    embedded_wrong_rate: Fraction = 0.0  # share of views that the embedded teacher gets wrong, so that the judge has work


class LlmJudge(Endpoint):
    """A second model that scores every reply with the right answer, 1 to 5, for sound steps and for fidelity to the perspective."""

    temperature: float | None = Field(default=0.0, ge=0, le=2)
    max_tokens: PositiveInt = 512
    min_steps: int = Field(default=4, ge=1, le=5)
    min_fidelity: int = Field(default=3, ge=1, le=5)


class Synthesis(Settings):
    """Which questions are put to the teacher, from which perspectives, and what becomes of the replies."""

    questions: str = "primer"  # a pool in data/questions, or the path of a JSON Lines file from the workspace
    limit: PositiveInt | None = None
    perspectives: tuple[str, ...] = PERSPECTIVES
    max_attempts: PositiveInt = 1  # how often a rejected view is asked at most
    more_room: float = Field(default=2.0, ge=1)  # a truncated reply is asked again once with max_tokens times this; 1 = never
    near_duplicate: Fraction = 0.8  # a view whose word triples overlap another's by more is dropped; 1 = never
    max_missing: Fraction = 0.0  # share of replies that may stay away when all retries failed
    mistakes: bool = False  # one wrong solution a question, made from an accepted view: what the method `edit` learns from
    judge: Literal["exact", "llm"] = "exact"
    llm_judge: LlmJudge = LlmJudge()

    @field_validator("perspectives")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("empty; wanted at least one perspective")
        if len(set(names)) < len(names):
            raise ValueError("a perspective stands twice")
        for name in names:
            if name not in PERSPECTIVES:
                raise ValueError(f"unknown perspective '{name}'; known: {', '.join(PERSPECTIVES)}")
        return names


# ------------------------------------------------------------------ snapshot


class Snapshot(Settings):
    """Difficulty of a question = 1 - share of its first replies that the judge accepted (method, section 1).

    All questions with difficulty > `easy_below` are kept; of the easier ones a seeded share `easy_keep`.
    """

    easy_below: Fraction = 0.0
    easy_keep: Fraction = 1.0
    min_views: int = Field(default=1, ge=1, le=len(PERSPECTIVES))
    limit: PositiveInt | None = None


# ------------------------------------------------------------------- distill


class Lora(Settings):
    """Low-rank adapters (PEFT) on the linear layers that `targets` names."""

    r: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: Fraction = 0.0
    targets: str | tuple[str, ...] = "all-linear"


class Student(Settings):
    """The model that learns: the embedded `smollm2-135m`, a hub id or a local folder."""

    name: str = "smollm2-135m"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    tuning: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()


class Training(Settings):
    """The one training loop that all methods share.

    A step = `questions_per_step` x `accumulation` questions; `max_tokens` bounds a prompt with one of its views.
    """

    epochs: PositiveInt = 1
    tokens: PositiveInt | None = None  # in place of epochs: so many supervised tokens over all stages, for a table of equal budgets
    learning_rate: PositiveFloat = 3e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.05
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat = 1.0
    questions_per_step: PositiveInt = 1
    accumulation: PositiveInt = 1
    max_tokens: PositiveInt = 2048
    too_long: Literal["refuse", "drop"] = "refuse"
    layout: Literal["packed", "padded"] = "packed"
    gradient_checkpointing: bool = False
    processes: PositiveInt = 1  # on this machine, one a GPU (or on CPUs): they share the questions of a step
    checkpoint_steps: PositiveInt = 50
    log_steps: PositiveInt = 5  # a row of the history is the mean over so many steps


class Base(Settings):
    """The student untouched."""

    method: Literal["base"] = "base"


class MetaNetOptions(Settings):
    """MetaNet, the teaching assistant (method, sections 2 and 3). It lags behind the student by its rate and its accumulation."""

    width: PositiveInt = 128
    heads: PositiveInt = 4
    features: Literal["student", "sbert"] = "student"  # the student's own hidden states, or a frozen sentence encoder's (ablation)
    encoder: str = "all-minilm-l6-v2"  # for sbert: the wheel's, a hub id or a local folder
    learning_rate: PositiveFloat = 1e-4
    accumulation: PositiveInt = 4  # student steps to one MetaNet step
    warmup_epochs: int = Field(default=10, ge=0)  # over the untouched student's losses
    warmup_learning_rate: PositiveFloat = 1e-3

    @model_validator(mode="after")
    def _divides(self) -> MetaNetOptions:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be split over {self.heads} heads; wanted a multiple")
        return self


class Mind(Settings):
    """MIND in full; each ablation is one of these keys (method, sections 2-5)."""

    method: Literal["mind"] = "mind"
    feedback: Literal["target", "answer"] = "target"  # L_k: CE over all of y_k (the paper), or over the answer's tokens only
    inertia: float = Field(default=0.9, ge=0, lt=1)  # mu; 0 = instant loss
    tau: PositiveFloat = 0.2  # temperature of the ListNet objective
    tau_student: PositiveFloat = 0.2  # temperature of the view weights alpha
    beta: Fraction = 0.8  # keep views with s_k >= beta * max(s); 0 = no selection
    consistency: NonNegativeFloat = 0.1  # lambda
    self_attention: bool = True
    refresh: PositiveInt = 1  # all views of a question are run at every R-th visit, only the selected ones between; 1 = the paper
    metanet: MetaNetOptions = MetaNetOptions()


class WithoutFusion(Settings):
    """All views of a question in one step, of uniform weight: no MetaNet, no selection, no consistency."""

    method: Literal["without_fusion"] = "without_fusion"
    views: tuple[Literal[PERSPECTIVES], ...] = Field(default=PERSPECTIVES, min_length=1)  # type: ignore[valid-type]  # only these


class Single(Settings):
    """One perspective only; `copied`: the one that the question's mistaken rationale copies (the first stage of EDIT)."""

    method: Literal["single"] = "single"
    perspective: Literal[(*PERSPECTIVES, "copied")]  # type: ignore[valid-type]
    hold_out: int = Field(default=0, ge=0)  # questions left out, on which `mode` then weighs its experts


class Sbs(Settings):
    """Distilling step by step (Hsieh et al. 2023): predict the answer, and explain it, told apart by a marker."""

    method: Literal["sbs"] = "sbs"
    view: Literal[(*PERSPECTIVES, "all")] = "decomposition"  # type: ignore[valid-type]  # all: a seeded one at every visit
    label_weight: Fraction = 0.5  # a in a * CE(predict) + (1 - a) * CE(explain)
    answers: Literal["predict", "explain"] = "predict"  # which task is asked at evaluation; training is the same


class Mcc(Settings):
    """MCC-KD (Chen et al. 2023): two diverse rationales a step, and symmetric KL between the answers they lead to."""

    method: Literal["mcc"] = "mcc"
    pool: int = Field(default=4, ge=2, le=len(PERSPECTIVES))  # K: the most diverse views of a question, of which each step draws two
    consistency: NonNegativeFloat = 0.01  # a
    temperature: PositiveFloat = 1.0


class Mode(Settings):
    """MoDE-CoTD (Li et al. 2024): one LoRA expert a perspective, then weights for them found without gradients."""

    method: Literal["mode"] = "mode"
    merge: Literal["lorahub", "exact"] = "lorahub"  # A and B merged each by itself (the authors' code), or dW = sum of w_i dW_i
    support: PositiveInt = 5  # training questions held out of all experts, on which the weights are found
    trials: PositiveInt = 40  # mixtures tried
    box: PositiveFloat = 3.0  # |w_i| at most
    l1: NonNegativeFloat = 0.25  # weight of mean |w_i|


class Edit(Settings):
    """EDIT (Dai et al. 2024): fine-tuning, then the key steps that tell a rationale from a mistaken copy of it."""

    method: Literal["edit"] = "edit"
    first: Literal["copied", "all"] = "copied"  # the first stage learns the view that the mistake copies, or all views
    epochs: PositiveInt = 1  # of the second stage
    rate: PositiveFloat = 1 / 40  # learning rate of the second stage / of the first
    alpha: NonNegativeFloat = 1.0  # key tokens of the correct rationale, up
    beta: NonNegativeFloat = 0.025  # key tokens of the mistaken one, down
    gamma: NonNegativeFloat = 0.0  # all other tokens of the correct one
    ceiling: PositiveFloat = 20.0  # tau: a mistaken token this unlikely is pushed no further (nats)


AnyMethod = Annotated[Base | Mind | WithoutFusion | Single | Sbs | Mcc | Mode | Edit, Field(discriminator="method")]
METHODS: tuple[type[Settings], ...] = get_args(get_args(AnyMethod)[0])
METHOD_NAMES = tuple(m.model_fields["method"].default for m in METHODS)


class Variant(Settings):
    """One named row of the comparison: a method with its options, and what it overrides of student and training."""

    method: AnyMethod
    student: dict[str, Any] = {}
    training: dict[str, Any] = {}
    seed: int | None = None  # of its training only: the dataset's is the common one
    repeats: Name | None = None  # the variant of which this one is another seed and nothing else: both are one row of `mind compare`


# ------------------------------------------------------------------ evaluate


class Served(Endpoint):
    """A server that has the student; `{variant}` in `model` stands for the variant's name. `evaluation` says how long and how often."""

    base_url: str
    model: str = Field(min_length=1)
    temperature: float | None = None
    max_tokens: PositiveInt = 256

    @model_validator(mode="after")
    def _asks_as_evaluation_says(self) -> Served:
        if self.base_url == "embedded":
            raise ValueError("base_url: the embedded teacher has no student; wanted an address like http://localhost:8000/v1")
        if twice := self.model_fields_set & {"temperature", "max_tokens"}:
            raise ValueError(f"{' and '.join(sorted(twice))}: wanted evaluation.temperature and evaluation.max_new_tokens instead")
        return self

    def asked(self, variant: str, temperature: float, max_tokens: int) -> Served:
        """The endpoint as it is asked for one variant."""
        return self.model_copy(
            update={"model": self.model.replace("{variant}", variant), "temperature": temperature, "max_tokens": max_tokens}
        )


class Evaluation(Settings):
    """What the student is asked, and how it answers: with its most likely words, until its answer line ends; or several times, by vote."""

    benchmarks: tuple[str, ...] = Field(default=("primer", "choice", "yesno"), min_length=1)
    limit: PositiveInt | None = None  # first N questions of each benchmark
    max_new_tokens: PositiveInt = 256
    batch_tokens: PositiveInt = 16384  # positions held at a time; bounds the memory (0.75 GB for smollm2-135m in float32)
    samples: PositiveInt = 1  # above 1: so many answers are drawn for each question, and the most frequent one counts (self-consistency)
    temperature: float = Field(default=0.7, gt=0, le=2)  # of drawn answers
    backend: Literal["hf", "vllm", "openai"] = "hf"  # decoded here; by vLLM's engine (not in the package); by a server
    endpoint: Served | None = None  # for openai
    processes: PositiveInt = 1  # on this machine, one a GPU (or on CPUs): each decodes its share of the questions

    @model_validator(mode="after")
    def _has_its_endpoint(self) -> Evaluation:
        if self.backend == "openai" and self.endpoint is None:
            raise ValueError("backend 'openai' wants endpoint: {base_url: http://..., model: ...}")
        if self.backend == "openai" and self.processes > 1:
            raise ValueError("backend 'openai' asks from one process; endpoint.in_flight says how many questions at a time")
        return self


class Latent(Settings):
    """Hidden states of held-out rationales, clustered and drawn (method, section 6)."""

    questions: int = Field(default=24, ge=0)  # 0 = skip; else at least 4
    components: int = Field(default=16, ge=2)  # upper bound of the Dirichlet-process mixture
    encoder: str | None = None  # also read what the student itself writes, by `all-minilm-l6-v2`, a hub id or a folder
    pca: int = Field(default=8, ge=2)  # above 8, a few hundred points no longer show eight planted clusters (docs/latent.md)

    @field_validator("questions")
    @classmethod
    def _enough(cls, questions: int) -> int:
        if 0 < questions < 4:
            raise ValueError("too few to tell anything; wanted at least 4, or 0 to skip the analysis")
        return questions


# ----------------------------------------------------------------- the whole


class Parallel(Settings):
    """How the variants share the machines: one after another, in processes of this one, or on a Ray cluster (its extra: `ray`)."""

    engine: Literal["none", "processes", "ray"] = "none"
    processes: PositiveInt = 2  # at once, for engine processes
    address: str | None = None  # of the Ray cluster, on which the workspace is a shared folder; None = one on this machine
    cpus: NonNegativeFloat = 1  # that a stage takes of the cluster
    gpus: NonNegativeFloat = 0


class Run(Settings):
    variants: tuple[Name, ...] = ("base", "mind")
    reference: Name = "base"
    parallel: Parallel = Parallel()
    share: bool = False  # outputs go to DVC's default remote as they are made, and what another machine made comes from there


class Tracking(Settings):
    """Where MLflow keeps the runs: a SQLite file (a relative path counts from the workspace; artifacts lie beside it) or a server."""

    uri: str = "sqlite:///mlflow/mlflow.db"
    experiment: str = Field(default="mind", min_length=1, max_length=500)

    @field_validator("uri")
    @classmethod
    def _store(cls, uri: str) -> str:
        if "@" in uri.partition("://")[2].partition("/")[0]:  # this file and every run's parameters would show them
            raise ValueError("holds credentials; wanted them in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        if not re.match(r"sqlite:///[^?]+$|https?://[^/]", uri):
            raise ValueError("wanted sqlite:///PATH or http(s)://SERVER (other databases stand behind a server)")
        return uri


class Config(Settings):
    """params.yaml as a whole."""

    seed: int = 17
    run: Run = Run()
    teacher: Teacher = Teacher()
    synthesis: Synthesis = Synthesis()
    snapshot: Snapshot = Snapshot()
    student: Student = Student()
    training: Training = Training()
    variants: dict[Name, Variant] = {"base": Variant(method=Base()), "mind": Variant(method=Mind())}
    evaluation: Evaluation = Evaluation()
    latent: Latent = Latent()
    tracking: Tracking = Tracking()

    def variant(self, name: str) -> Resolved:
        """The settings under which variant `name` trains: its own on top of the common ones.

        Raises:
            ConfigError: no variant of that name.
        """
        if name not in self.variants:
            raise ConfigError(
                f"unknown variant '{name}'{nearest(name, self.variants)}",
                wanted=f"one of {', '.join(self.variants)}",
                do="add it under 'variants:' in params.yaml",
            )
        own = self.variants[name]
        return Resolved(
            name=name,
            seed=self.seed if own.seed is None else own.seed,
            repeats=own.repeats,
            method=own.method,
            student=Student.model_validate(merge(self.student.model_dump(), own.student)),
            training=Training.model_validate(merge(self.training.model_dump(), own.training)),
        )


class Resolved(Settings):
    """What one variant trains with: everything `distill` reads of the configuration."""

    name: str
    seed: int
    repeats: str | None = None
    method: AnyMethod
    student: Student
    training: Training


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` laid on top, group by group."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings -> {'training.epochs': 1, ...}, as MLflow params want them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat
