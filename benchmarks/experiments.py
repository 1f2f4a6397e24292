"""What `utility.py` measures: named settings that change `reviews.yaml`.

Names of experiments are keys of the committed results, so they stay as they are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EPSILONS = (8, 4, 1)
UPPER_BOUND = "upper bound"
WITH_MORE = ", more of everything"
"""End of the names of experiments with the settings `MORE`."""

PUBLIC_TEXTS: dict[str, list[str]] = {
    "IMDb": [],
    "tweets": ["public_task.name=tweets", "public_task.path=../demo/tweets.csv"],
}
"""What each public text changes in the run file."""

TWO_CORES = ["tune.steps=300", "transfer.steps=100"]
"""What two cores have time for, in place of the run file's settings."""
LARGE_PLAN = ["privacy.expected_batch_size=512", "privacy.steps=200"]
MORE = [
    "corpus.max_tokens=3000000",
    "distill.steps=800",
    "distill.batch_size=64",
    "distill.micro_batch_size_per_gpu=64",
    "public_task.max_rows=4000",
    "tune.steps=1000",
    "tune.micro_batch_size_per_gpu=256",
    "transfer.steps=400",
    "transfer.proxy_lambda=1",
    "transfer.learning_rate=3.0e-3",
    "evaluate.batch_size=128",
    *LARGE_PLAN,
]
"""What a GPU has time for."""
VALIDATION = ["evaluate.baselines=[]", "evaluate.split=validation"]
CLASS_BIAS = ["tune.class_bias=true"]
NO_FROZEN_LAYER = ["student.frozen_lower_layers=0"]

PUBLISHED = {
    "transfer.objective": "published",
    "transfer.scores": "vocabulary",
    "transfer.match_class_shares": "false",
    "transfer.trained_share": "0",
    "transfer.temperature": "2",
    "transfer.schedule": "constant",
}
"""The published loss and start."""
OPTIONS: dict[str, dict[str, str]] = {
    "ours": {},
    "ours + 300 steps of transfer, 100 instead": {"transfer.steps": "300"},
    "ours + 2,000 public texts, 640 instead": {"public_task.max_rows": "2000"},
    "ours + 300 steps and 2,000 public texts": {
        "transfer.steps": "300",
        "public_task.max_rows": "2000",
    },
    "ours + 180 steps of distillation, 60 instead": {"distill.steps": "180"},
    "ours + 180 steps of distillation, lambda 1": {
        "distill.steps": "180",
        "transfer.proxy_lambda": "1",
    },
    "ours + 180 steps of distillation, lambda 1, 0.3 of the rate": {
        "distill.steps": "180",
        "transfer.proxy_lambda": "1",
        "transfer.learning_rate": "3.0e-3",
    },
    "published": PUBLISHED,
    "published + class scores": PUBLISHED | {"transfer.scores": "classes"},
    "published + proxy": PUBLISHED | {"transfer.objective": "proxy"},
    "published + start from the tuned prompt": PUBLISHED | {"transfer.trained_share": "1"},
    "published + cosine": PUBLISHED | {"transfer.schedule": "cosine"},
    "ours - class scores": {
        "transfer.scores": "vocabulary",
        "transfer.match_class_shares": "false",
    },
    "ours - proxy": {
        "transfer.objective": "published",
        "transfer.match_class_shares": "false",
    },
    "ours - matched class shares": {"transfer.match_class_shares": "false"},
    "ours - start from the tuned prompt": {"transfer.trained_share": "0"},
    "ours - half the start": {"transfer.trained_share": "0.5"},
    "ours - cosine": {"transfer.schedule": "constant"},
    "ours - lambda 2, 1 instead": {"transfer.proxy_lambda": "1"},
    "ours - documents kept apart": {"corpus.separate_documents": "false"},
    "ours + a bias per class": {"tune.class_bias": "true"},
    "ours - 300 steps of tuning, 100 instead": {"tune.steps": "100"},
}
"""Each option of the transfer added to the published one, and taken away from ours."""
ALPHAS = ("0", "0.25", "0.5", "0.75", "1", "auto")

PRIVATE_EPSILONS = (8, 1)
PRIVATE = {
    "ours": [],
    "5 tokens": ["tune.num_virtual_tokens=5"],
    "2 tokens": ["tune.num_virtual_tokens=2"],
    "C 0.1": ["privacy.max_grad_norm=0.1"],
    "C 3": ["privacy.max_grad_norm=3"],
    "half the rate": ["privacy.learning_rate=0.01"],
    "a quarter of the rate": ["privacy.learning_rate=0.005"],
    "batches of 128, half the steps": ["privacy.expected_batch_size=128", "privacy.steps=40"],
    "no bias": ["tune.class_bias=false"],
}
"""Settings of private tuning with about the same number of gradients."""
CLIPPING = {
    "C 0.3": ["privacy.max_grad_norm=0.3"],
    "C 1": [],
    "C 3": ["privacy.max_grad_norm=3"],
    "C adapted, from 0.3": ["privacy.max_grad_norm=0.3", "privacy.clip_quantile=0.5"],
    "C adapted, from 3": ["privacy.max_grad_norm=3", "privacy.clip_quantile=0.5"],
}
"""Fixed clipping norms, and the norm that follows the median of the gradient norms.

`clipping` measures them with a prompt and with a head."""
HEAD = [
    r'public_task.template="Review: {text}\nSentiment:"',
    "public_task.labels={0: [negative], 1: [positive]}",
    "public_task.max_length=64",
    "warm_start={init_text: Predict if the sentiment of this text is positive or negative}",
    "tune.adapter=head",
    "tune.steps=400",
    "tune.batch_size=512",
    "tune.learning_rate=4",
    "privacy.steps=400",
    "privacy.expected_batch_size=512",
    "privacy.learning_rate=null",
    "transfer.objective=ensemble",
    "transfer.proxy_lambda=1",
    "evaluate.baselines=[]",
]
"""A linear head behind a public prompt, in place of a tuned prompt."""
HEAD_EPSILONS = (8, 1)
LORA_ON_THE_LLM = ["transfer.adapter=lora", "transfer.learning_rate=2.0e-3"]
"""A LoRA on the LLM in place of its prompt."""
HEAD_ON_THE_LLM = [
    "transfer.adapter=head",
    "transfer.proxy_lambda=2",
    "public_task.max_rows=4000",
]
"""A head on the LLM in place of its prompt. It has time for all public texts."""
FEW_GRADIENTS = ["privacy.steps=80", "privacy.expected_batch_size=64"]
"""As many gradients as a prompt gets. A head has more, because its gradients cost nothing."""
LORA = ["tune={adapter: lora}", "privacy.learning_rate=1.0e-3", *FEW_GRADIENTS]
"""A LoRA in place of the head."""
PREFIX = ["tune={adapter: prefix}", "privacy.learning_rate=1.0e-3", *FEW_GRADIENTS]
"""A prefix in place of the head. It starts from the public prompt."""
FAST_LORA = [*LORA, "privacy.learning_rate=4.0e-3"]
ADAPTERS = {
    "LoRA": LORA,
    "LoRA, four times the rate": FAST_LORA,
    "prefix": PREFIX,
    "prefix, ten times the rate": [*PREFIX, "privacy.learning_rate=1.0e-2"],
}
FEW_EXAMPLES = [
    "private_task.max_rows=500",
    "privacy.declared_examples=500",
    "privacy.expected_batch_size=250",
]
HEAD_SETTINGS = {
    "1 layer": ["warm_start.head_layers=1"],
    "4 layers": [],
    "4 layers, rate 1": ["privacy.learning_rate=1"],
    "4 layers, hardly a warm start": ["warm_start.steps=1"],
    "4 layers, 500 examples": FEW_EXAMPLES,
    "4 layers, 500 examples, rate 1": [*FEW_EXAMPLES, "privacy.learning_rate=1"],
}
"""How many layers a head reads, the prompt in front of it, and its rate. Without a rate, it follows
from the plan's noise."""


def task_settings(private: str, public: str, template: str, words: Sequence[str]) -> list[str]:
    """Return the settings of a task whose labels are their own words.

    Args:
        private: name and path of the labeled texts, as YAML.
        public: the same of the public texts.
        template: what the model reads.
        words: the labels.
    """
    labels = ", ".join(f"{word}: [{word}]" for word in words)
    common = f'template: "{template}", labels: {{{labels}}}, max_length: 64'
    return [
        f"private_task={{{private}, visibility: private, {common}}}",
        f"public_task={{{public}, visibility: public, max_rows: 640, {common}}}",
    ]


TASKS = {
    "tweets": [
        *task_settings(
            "name: tweets, path: ../demo/tweets.csv",
            "name: product reviews, path: ../demo/products.csv",
            r"Tweet: {text}\nSentiment:",
            ("negative", "neutral", "positive"),
        ),
        "privacy.declared_examples=3300",
        "privacy.expected_batch_size=330",
    ],
    "genres": [
        *task_settings(
            "name: genres, path: ../demo/genres.csv",
            "name: other texts, path: ../demo/public_genres.csv",
            r"Text: {text}\nTopic:",
            ("news", "religion", "hobbies", "government", "science"),
        ),
        "privacy.declared_examples=4800",
        "privacy.expected_batch_size=480",
    ],
}
"""A head on tasks that no setting was chosen on. About 80% of the rows are declared, and a batch
has a tenth of that."""
GRADIENTS = {
    "256 x 80": ["privacy.expected_batch_size=256"],
    "256 x 200": ["privacy.expected_batch_size=256", "privacy.steps=200"],
    "512 x 200": LARGE_PLAN,
    "512 x 200, half the rate": [*LARGE_PLAN, "privacy.learning_rate=0.01"],
    "512 x 200, 5 tokens": [*LARGE_PLAN, "tune.num_virtual_tokens=5"],
    "512 x 200, C 0.3": [*LARGE_PLAN, "privacy.max_grad_norm=0.3"],
    "512 x 200, no bias": [*LARGE_PLAN, "tune.class_bias=false"],
}
"""Settings with more gradients, by expected batch size x steps. `reviews.yaml` has 64 x 80."""

STUDENT_LAYERS = {
    "4 of 30": [0, 1, 28, 29],
    "8 of 30": [0, 1, 2, 3, 26, 27, 28, 29],
    "13 of 30": [*range(12), 29],
    "18 of 30": [*range(17), 29],
}
_MORE_DISTILLATION = ["corpus.max_tokens=3000000", "distill.steps=600"]
SMALLER_STUDENTS = {
    "9 of 30 layers": [
        f"student.layers={[0, 2, 4, 6, 8, 10, 13, 16, 29]}",
        *NO_FROZEN_LAYER,
        *_MORE_DISTILLATION,
    ],
    "9 of 30 layers, 7 of them frozen": [
        f"student.layers={[*range(8), 29]}",
        "student.frozen_lower_layers=7",
        *_MORE_DISTILLATION,
    ],
    "13 of 30 layers, 12 of them frozen": [
        f"student.layers={[*range(12), 29]}",
        "student.frozen_lower_layers=12",
    ],
    "16 of 30 layers, 15 of them frozen": [f"student.layers={[*range(15), 29]}"],
}
"""Fewer layers than in the other experiments. With 9 of them, ten times the distillation."""
DISTILL_STEPS = (60, 180, 600, 2400)
TOKENS_PER_DISTILL_STEP = 1024


@dataclass(frozen=True)
class Experiment:
    """One measurement.

    Attributes:
        name: name in the results.
        settings: what it changes in the run file, as `KEY=VALUE`.
        epsilon: target epsilon, where the measurement is of one private model on the student alone.
        untuned: whether the measurement is of the student without a prompt.
    """

    name: str
    settings: list[str]
    epsilon: int | None = None
    untuned: bool = False


def experiments(part: str, seed: int) -> list[Experiment]:
    """Return the experiments of a part of `utility.py`.

    Args:
        part: one of `PARTS`.
        seed: seed of the runs.
    """
    seeded = [*TWO_CORES, f"seed={seed}"]
    return PARTS[part](seeded)


def _table(seeded: list[str]) -> list[Experiment]:
    rows = [f"evaluate.private_rows={list(EPSILONS)}", "evaluate.baselines=[published transfer]"]
    return [
        Experiment(f"table, public {name}", [*seeded, *CLASS_BIAS, *rows, *changes])
        for name, changes in PUBLIC_TEXTS.items()
    ]


def _head(seeded: list[str]) -> list[Experiment]:
    rows = f"evaluate.private_rows={list(HEAD_EPSILONS)}"
    return [
        Experiment("head", [*seeded, *HEAD, rows]),
        Experiment("head, LoRA on the LLM", [*seeded, *HEAD, rows, *LORA_ON_THE_LLM]),
        Experiment("head, head on the LLM", [*seeded, *HEAD, rows, *HEAD_ON_THE_LLM]),
    ]


def _tasks(seeded: list[str]) -> list[Experiment]:
    rows = f"evaluate.private_rows={list(HEAD_EPSILONS)}"
    found = []
    for name, task in TASKS.items():
        settings = [*seeded, *HEAD, "warm_start={}", *task, rows]
        found.append(Experiment(f"head, {name}", settings))
        found.append(Experiment(f"head, {name}, head on the LLM", [*settings, *HEAD_ON_THE_LLM]))
    return found


def _owner(seeded: list[str]) -> list[Experiment]:
    alone = ["warm_start=null", "tune.init_text=null", "tune.num_virtual_tokens=1"]
    found = []
    adapters = {"head": [], "LoRA": LORA, "LoRA, four times the rate": FAST_LORA}
    for adapter, changes in adapters.items():
        for name, task in {"reviews": [], **TASKS}.items():
            for epsilon in HEAD_EPSILONS:
                title = f"{adapter}, the owner alone, {name}, epsilon {epsilon}"
                settings = [*seeded, *HEAD, *task, *changes, *alone]
                found.append(Experiment(title, settings, epsilon))
    return found


def _untuned(seeded: list[str]) -> list[Experiment]:
    return [
        Experiment(f"the student without a prompt, {name}", [*seeded, *HEAD, *task], untuned=True)
        for name, task in {"reviews": [], **TASKS}.items()
    ]


def _upper_bound(seeded: list[str]) -> list[Experiment]:
    baseline = "evaluate.baselines=[full prompt tuning]"
    return [Experiment(UPPER_BOUND, [*seeded, *CLASS_BIAS, baseline])]


def _options(seeded: list[str]) -> list[Experiment]:
    return [
        Experiment(f"option, {name}", [*seeded, *VALIDATION, *_settings(changes)])
        for name, changes in OPTIONS.items()
    ]


def _alphas(seeded: list[str]) -> list[Experiment]:
    published = _settings(PUBLISHED | {"transfer.scores": "classes"})
    return [
        Experiment(f"alpha {alpha}", [*seeded, *VALIDATION, *published, f"transfer.alpha={alpha}"])
        for alpha in ALPHAS
    ]


def _private(seeded: list[str]) -> list[Experiment]:
    return _private_tuning([*seeded, *CLASS_BIAS], PRIVATE)


def _clipping(seeded: list[str]) -> list[Experiment]:
    of_head = {f"head, {name}": changes for name, changes in CLIPPING.items()}
    prompts = _private_tuning([*seeded, *CLASS_BIAS], CLIPPING)
    return [*_private_tuning([*seeded, *HEAD], of_head), *prompts]


def _states(seeded: list[str]) -> list[Experiment]:
    of_head = {f"head, {name}": changes for name, changes in HEAD_SETTINGS.items()}
    return _private_tuning([*seeded, *HEAD], of_head)


def _gradients(seeded: list[str]) -> list[Experiment]:
    return _private_tuning([*seeded, *CLASS_BIAS], GRADIENTS)


def _private_tuning(common: list[str], variants: Mapping[str, list[str]]) -> list[Experiment]:
    found = []
    for epsilon in PRIVATE_EPSILONS:
        for name, changes in variants.items():
            settings = [*common, *VALIDATION, *changes]
            found.append(Experiment(f"private, {name}, epsilon {epsilon}", settings, epsilon))
    return found


def _adapters(seeded: list[str]) -> list[Experiment]:
    return _private_tuning([*seeded, *HEAD], ADAPTERS)


def _moved(seeded: list[str]) -> list[Experiment]:
    found = []
    for name, adapter in {"LoRA": LORA, "prefix": PREFIX}.items():
        for epsilon in HEAD_EPSILONS:
            private = ["privacy.enabled=true", f"privacy.target_epsilon={epsilon}"]
            settings = [*seeded, *HEAD, *adapter, *HEAD_ON_THE_LLM, *private]
            found.append(Experiment(f"{name}, head on the LLM, epsilon {epsilon}", settings))
    return found


def _curve(seeded: list[str]) -> list[Experiment]:
    common = [*seeded, *VALIDATION, *NO_FROZEN_LAYER, "corpus.max_tokens=3000000"]
    found = []
    for layers_name, layers in STUDENT_LAYERS.items():
        for steps in DISTILL_STEPS:
            name = f"curve, {layers_name}, {TOKENS_PER_DISTILL_STEP * steps} tokens"
            settings = [*common, f"student.layers={layers}", f"distill.steps={steps}"]
            found.append(Experiment(name, settings))
    return found


def _smaller(seeded: list[str]) -> list[Experiment]:
    rows = f"evaluate.private_rows={list(HEAD_EPSILONS)}"
    common = [*seeded, *HEAD, rows, *HEAD_ON_THE_LLM]
    return [
        Experiment(f"head, head on the LLM, {name}", [*common, *changes])
        for name, changes in SMALLER_STUDENTS.items()
    ]


def _more(seeded: list[str]) -> list[Experiment]:
    option = [*seeded, *CLASS_BIAS, *VALIDATION]
    table = _table(seeded)[0]
    smaller = [Experiment("option", option), *_upper_bound(seeded), table]
    found = [Experiment(each.name + WITH_MORE, each.settings + MORE) for each in smaller]
    unfrozen = [*option, *MORE, *NO_FROZEN_LAYER]
    found.append(Experiment(f"option{WITH_MORE}, no layer frozen", unfrozen))
    return found


def _settings(changes: Mapping[str, str]) -> Sequence[str]:
    return [f"{key}={value}" for key, value in changes.items()]


PARTS = {
    "table": _table,
    "head": _head,
    "tasks": _tasks,
    "owner": _owner,
    "untuned": _untuned,
    "upper": _upper_bound,
    "private": _private,
    "clipping": _clipping,
    "states": _states,
    "gradients": _gradients,
    "adapters": _adapters,
    "moved": _moved,
    "options": _options,
    "alpha": _alphas,
    "curve": _curve,
    "smaller": _smaller,
    "more": _more,
}
"""How the experiments of each part follow from the settings with a seed."""
