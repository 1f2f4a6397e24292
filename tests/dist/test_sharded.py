"""Models sharded over real processes, against one process without DeepSpeed."""

import itertools
import json
from pathlib import Path

import pytest
import tiny
import torch
from objectives import objective_of
from safetensors.torch import load_file, save_file
from started import run_script
from torch.nn import functional
from transformers import AutoModelForCausalLM, MixtralConfig

from post_dist.config.schema import Corpus, Student
from post_dist.data.corpus import build_corpus
from post_dist.data.order import RankBatch
from post_dist.extras import op_cache
from post_dist.models.language_model import LanguageModel
from post_dist.models.load import load_tokenizer, load_whole
from post_dist.models.student import freeze, write_student
from post_dist.runtime.distributed import World
from post_dist.stages.transfer.effect import effect_on_public_text

CPU = torch.device("cpu")
HERE = Path(__file__).parent

LAYOUTS = {
    "all ranks": {},
    "two groups of two": {"shard_group": 2},
    "whole on each": {"shard_group": 1},
    "offloaded": {"offload": "cpu"},
    "on a disk": {"offload": "nvme"},
    "checkpointed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize(
    ("family", "layout"), [("roberta", "all ranks"), *(("llama", layout) for layout in LAYOUTS)]
)
def test_prompt_gradient_through_shards(tmp_path: Path, family: str, layout: str) -> None:
    folder = tiny.write_model(tmp_path / "model", family)
    model = load_whole(folder, "fp32", CPU)
    torch.manual_seed(0)
    tensors = {
        "prompt": torch.randn(5, 32),
        "input_ids": torch.randint(4, 500, (8, 12)),
        "attention_mask": torch.ones(8, 12, dtype=torch.long),
        "answer": torch.full((8,), 11),
    }
    save_file(tensors, tmp_path / "inputs")
    prompt = tensors["prompt"].clone().requires_grad_(True)
    logits = model(tensors["input_ids"], tensors["attention_mask"], prompt, tensors["answer"])
    logits.log_softmax(-1)[:, 7].mean().backward()
    ranks = 4 if layout == "two groups of two" else 2
    settings = LAYOUTS[layout]
    if layout == "on a disk":
        settings = settings | {"nvme_folder": str(tmp_path)}
        if not list(op_cache().glob("async_io/*.so")):
            pytest.skip(
                "DeepSpeed's disk reader is not compiled: run `post-dist doctor --build`, "
                "which takes minutes and needs libaio"
            )
    run_script(
        HERE / "prompt_gradient.py",
        ranks,
        folder,
        tmp_path / "inputs",
        tmp_path / "output",
        json.dumps(settings),
    )
    sharded = load_file(tmp_path / "output")
    errors = [
        float((sharded[name] - prompt.grad).norm() / prompt.grad.norm())
        for name in ("apart", "shared")
    ]
    print(f"relative errors {errors}, share of the parameters on a rank {sharded['share']:.3f}")
    assert max(errors) < 1e-5
    # No collective may end a process before the watchdog does, in whichever group it is.
    has_own_groups = len(sharded["limits_seconds"]) > 1
    assert has_own_groups == (layout != "whole on each"), "DeepSpeed makes groups for shards"
    assert sharded["limits_seconds"].min() > 86_400
    assert sharded["share"] == (1 if layout == "whole on each" else pytest.approx(0.5, abs=0.02))


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("mixtures")
    folders = [tiny.write_model(place / family, family) for family in tiny.MIXTURES]
    return [*folders, tiny.quantize(tiny.write_model(place / "fp8", "deepseek_v3"))]


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_mixture_of_experts_in_shards_is_transformers_own(
    mixtures: list[Path], ranks: int
) -> None:
    run_script(HERE / "mixtures.py", ranks, *mixtures)
    for folder in mixtures:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        prompt = torch.linspace(-1, 1, 3 * 32).view(3, -1).requires_grad_(True)
        tokens = model.get_input_embeddings()(torch.arange(4, 28).view(2, 12))
        inputs = torch.cat([prompt.expand(2, -1, -1), tokens], dim=1)
        expected = model.base_model(inputs_embeds=inputs).last_hidden_state
        expected.sum().backward()
        for rank in range(ranks):
            found = load_file(folder / f"found-{ranks}-{rank}")
            torch.testing.assert_close(found["hidden"], expected.detach(), rtol=0, atol=1e-5)
            torch.testing.assert_close(found["gradient"], prompt.grad, rtol=1e-5, atol=1e-4)


def test_the_head_of_a_sharded_model(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "llama")
    scaled = tiny.write_model(tmp_path / "scaled", "granite")
    run_script(HERE / "sharded_head.py", 2, folder, scaled, tmp_path)
    whole = load_whole(folder, "fp32", CPU)
    expected = whole.head(torch.linspace(-1, 1, whole.width)[None])[:, [7, 3, 7]]
    for rank in range(2):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        assert "a granite changes its logits" in facts["refused"]
        torch.testing.assert_close(torch.tensor(facts["logits"]), expected)


def test_the_effect_of_a_prompt_on_a_sharded_model(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "llama")
    tiny.speak_up(folder)
    run_script(HERE / "public_effect.py", 2, folder, tmp_path)
    whole = load_whole(folder, "fp32", CPU)
    prompt = torch.linspace(-1, 1, 5 * whole.width).view(5, -1)
    world = World(0, 1, 0, "none", CPU)
    expected = effect_on_public_text(whole, objective_of(folder, whole), prompt, world)
    assert expected["changed_answers"] > 0
    for rank in range(2):
        effect = json.loads((tmp_path / f"{rank}.json").read_text())
        assert set(effect) == set(expected)
        for figure, value in expected.items():
            assert effect[figure] == pytest.approx(value, rel=1e-4), figure


def test_no_rank_holds_more_than_its_shard_and_a_layer_while_loading(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=600,
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=704,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(
        tmp_path / "model", max_shard_size="100MB"
    )
    tiny.tokenizer("llama").save_pretrained(tmp_path / "model")
    run_script(HERE / "loading_memory.py", 2, tmp_path / "model", tmp_path)
    whole = load_whole(tmp_path / "model", "fp32", CPU)
    with torch.no_grad():
        expected = whole(torch.arange(4, 12)[None], answer=torch.tensor([7]))[0, :5]
    for rank in range(2):
        facts = json.loads((tmp_path / f"{rank}.json").read_text())
        shard = facts["share"] * facts["model_mib"]
        print(
            f"rank {rank}: peak {facts['peak_mib']:.0f} MiB above the imports, "
            f"{facts['peak_mib'] / shard:.2f} shards of {shard:.0f} MiB"
        )
        assert facts["share"] == pytest.approx(0.5, abs=0.01)
        assert facts["peak_mib"] <= 1.6 * shard + facts["layer_mib"]
        torch.testing.assert_close(torch.tensor(facts["logits"]), expected, rtol=1e-4, atol=1e-4)


STEPS = 5
ACCUMULATION = 2
SEQUENCES = 8
"""In one micro-batch of the plain loop."""
LEARNING_RATE = 2.5e-3


def document_by_document(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the hidden states of packed sequences, where each document is run by itself."""
    hidden = []
    for sequence in ids:
        after_separators = (sequence == 2).nonzero().flatten() + 1
        ends = [0, *after_separators.tolist(), len(sequence)]
        parts = []
        for first, end in itertools.pairwise(ends):
            if first < end:
                parts.append(model(sequence[None, first:end])[0])
        hidden.append(torch.cat(parts))
    return torch.stack(hidden)


def plain_terms(
    student: LanguageModel, teacher: LanguageModel, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the three terms of a micro-batch, with the logits of all positions at once."""
    hidden_s = document_by_document(student, ids)
    hidden_t = document_by_document(teacher, ids).detach()
    log_s = (student.head(hidden_s) / 2).log_softmax(-1)
    log_t = (student.head(hidden_t) / 2).log_softmax(-1)
    ce = 4 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    predictions = student.head(hidden_s)[:, :-1].flatten(0, 1)
    lm = functional.cross_entropy(predictions, ids[:, 1:].flatten())
    cos = 1 - functional.cosine_similarity(hidden_s, hidden_t, dim=-1).mean()
    return ce, lm, cos


def plain_losses(run: Path, frozen: int) -> list[tuple[float, float, float]]:
    """Return the terms of each step of a training loop in plain torch."""
    folder = run.parent.parent / "teacher"
    section = Corpus(path=folder.parent / "long.csv", sequence_length=96, held_out_sequences=8)
    corpus = build_corpus(
        section, load_tokenizer(folder), run / "corpora", 0, World(0, 1, 0, "none", CPU)
    )
    teacher = load_whole(folder, "fp32", CPU)
    start = run / "student"
    start.mkdir()
    write_student(start, folder, (0, 3), load_tokenizer(folder))
    student = load_whole(start, "fp32", CPU)
    freeze(student, Student(layers=(0, 3), frozen_lower_layers=frozen))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        terms = []
        for micro in range(ACCUMULATION):
            first = SEQUENCES * (step * ACCUMULATION + micro)
            ids = corpus.training(RankBatch(list(range(first, first + SEQUENCES)), 1.0))
            ce, lm, cos = plain_terms(student, teacher, ids)
            ((5 * ce + 2 * lm + cos) / ACCUMULATION).backward()
            terms.append([float(ce), float(lm), float(cos)])
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        # The first step already runs at the full rate.
        decay = min(1.0, (STEPS - step) / (STEPS - 1))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * decay
        optimizer.step()
        losses.append(tuple(sum(values) / ACCUMULATION for values in zip(*terms, strict=True)))
    return losses


SMALL_BUFFERS = {"deepspeed.zero_optimization": "{reduce_bucket_size: 5000}"}
"""Gradients then fill ZeRO's two buffers several times."""


@pytest.mark.parametrize(
    ("ranks", "at_most", "frozen", "engine"),
    [
        (2, 4, 0, {"zero_stage": 2, "activation_checkpointing": True} | SMALL_BUFFERS),
        (2, 4, 0, {"zero_stage": 1, "offload_optimizer": True, "offload": "cpu"}),
        (2, 4, 1, {"zero_stage": 3, "offload_optimizer": True, "activation_checkpointing": True}),
        pytest.param(1, 8, 0, {"zero_stage": 1}, marks=pytest.mark.slow),
        pytest.param(2, 4, 0, {"zero_stage": 0}, marks=pytest.mark.slow),
        pytest.param(2, 4, 0, {"zero_stage": 3, "shard_group": 1}, marks=pytest.mark.slow),
        pytest.param(2, 4, 0, {"zero_stage": 2, "offload_optimizer": True}, marks=pytest.mark.slow),
        # 16 sequences among 3 ranks: one of them runs out.
        (3, 4, 1, {"zero_stage": 3}),
        # One pass of the teacher serves two micro-batches.
        (2, 4, 1, {"teacher_micro_batch_size_per_gpu": 8}),
    ],
)
def test_distillation_is_a_plain_loop_s_step_by_step(
    tmp_path: Path, ranks: int, at_most: int, frozen: int, engine: dict
) -> None:
    run = tiny.write_run(tmp_path)
    tiny.write_csv(tmp_path / "long.csv", tiny.sentences(200, 4))
    settings = {
        "student.frozen_lower_layers": frozen,
        "distill.steps": STEPS,
        "distill.batch_size": SEQUENCES * ACCUMULATION,
        "distill.micro_batch_size_per_gpu": at_most,
        "distill.learning_rate": LEARNING_RATE,
        "corpus.sequence_length": 96,
        "corpus.held_out_sequences": 8,
        "corpus.path": "long.csv",
    }
    for name, value in engine.items():
        section = "distill" if name.startswith("teacher") else "engine"
        settings[f"{section}.{name}"] = value
    options = [f"--set={key}={value}" for key, value in settings.items()]
    run_script(HERE / "few_logits.py", ranks, "distill", run, *options)
    (metrics,) = tmp_path.glob("runs/tiny/distill-*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    ours = [5 * line["ce"] + 2 * line["lm"] + line["cos"] for line in lines]
    plain = [
        5 * ce + 2 * lm + cos for ce, lm, cos in plain_losses(tmp_path / "runs" / "tiny", frozen)
    ]
    worst = max(abs(one - other) / other for one, other in zip(ours, plain, strict=True))
    print(f"{ranks} ranks, {engine}: worst relative difference of a step's loss {worst:.2e}")
    assert plain[0] != plain[-1]
    assert worst < 1e-6
