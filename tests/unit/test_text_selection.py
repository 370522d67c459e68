"""Sequences drawn by score, in loops with models that read text; against transformers' models by themselves."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d2ft_hpc
from d2ft_hpc.errors import ConfigError, PlanError
from d2ft_hpc.families.table import backbone_of, family_of
from d2ft_hpc.metering import meter
from d2ft_hpc.selection import draw_by_score
from d2ft_hpc.selection.batch import batches_of

transformers = pytest.importorskip("transformers", minversion="5.24")

VOCABULARY, TOKENS, SEQUENCES = 40, 32, 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": TOKENS,
    "pad_token_id": 0,
}
BUDGET = 0.6


def llama(kind: str = "LlamaForCausalLM", **options: Any) -> Any:
    """With parameters away from their initial values, in training mode."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.LlamaConfig(**{**SIZES, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


LENGTHS = [TOKENS, 20, 5, TOKENS, 9, 31, 12, 3, TOKENS, 25, 17, 8]


def text(padded: str, seed: int = 0, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Of SEQUENCES sequences. padded: "no", "left" or "right"; "prompts": right, and the first half is not learnt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (SEQUENCES, tokens), generator=generator)
    if padded == "no":
        return {"input_ids": ids, "labels": ids}
    lengths = torch.tensor(LENGTHS).clamp_max(tokens)[:, None]
    places = torch.arange(tokens)
    mask = places >= tokens - lengths if padded == "left" else places < lengths
    labels = ids.where(mask, -100)
    if padded == "prompts":
        labels = labels.where(places >= lengths // 2, -100)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    ids = ids.where(mask, 0)
    return {"input_ids": ids, "attention_mask": mask.long(), "position_ids": positions, "labels": labels}


PADDED = ("no", "left", "right", "prompts")


def scores_alone(model: nn.Module, batch: dict[str, Tensor], score: str) -> Tensor:
    """Of each sequence by itself, without what pads it: the mean over its tokens that the excerpt has and that are
    labelled."""
    length = batch["labels"].shape[1] // 4
    model = copy.deepcopy(model).eval()
    scores = []
    for row in range(len(batch["labels"])):
        labels = batch["labels"][row]
        mask = batch.get("attention_mask", torch.ones_like(batch["labels"]))[row]
        begin, end = (int(place) for place in mask.nonzero()[[0, -1], 0])
        predicts = [place for place in range(begin, end) if labels[place + 1] != -100]
        start = min(max(predicts[0] - length // 2, begin), len(labels) - length)
        read = range(max(start, begin), min(start + length, end + 1))
        with torch.no_grad():
            logits = model(batch["input_ids"][row, read.start : read.stop][None]).logits[0]
        of_tokens = []
        for place in predicts:
            if place in read:
                probabilities = logits[place - read.start].softmax(0)
                target = F.one_hot(labels[place + 1], VOCABULARY)
                of_tokens.append(
                    (probabilities - target).norm()
                    if score == "error"
                    else -probabilities[labels[place + 1]].log()
                )
        scores.append(torch.stack(of_tokens).mean())
    return torch.stack(scores)


@pytest.mark.parametrize("padded", PADDED)
@pytest.mark.parametrize("score", ["error", "loss"])
def test_the_drawn_sequences_follow_from_the_model_s_own_errors(padded: str, score: str) -> None:
    model, batch = llama(), text(padded)
    d2ft = d2ft_hpc.attach(model, BUDGET, planner="samples", seed=5, options={"score": score})
    expected = scores_alone(model, batch, score)
    found = d2ft._new_selection(0).scorer.of_batch([batch])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.std() > 0.003 * expected.mean()
    for draw in range(2):
        chosen = d2ft.choose(batch)
        uniforms = torch.from_numpy(np.random.default_rng((5, draw, 0)).random(SEQUENCES + 1))
        places, _ = draw_by_score(expected, 6, uniform_share=0.25, uniforms=uniforms)
        assert chosen.keys() == batch.keys()
        assert all(torch.equal(chosen[name], batch[name][places]) for name in batch)
    assert model.training


@pytest.mark.parametrize("padded", PADDED)
def test_what_trains_is_the_library_s_own_step_on_the_drawn_sequences(padded: str) -> None:
    dense = llama()
    model = copy.deepcopy(dense)
    d2ft = d2ft_hpc.attach(model, BUDGET, planner="samples", embeddings="trained")
    batch = d2ft.choose(text(padded))
    model(**batch).loss.backward()
    dense(**batch).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), dense.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def train(d2ft: Any, model: Any, steps: int, padded: str = "no", tokens: int = TOKENS) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        model(**d2ft.choose(text(padded, step, tokens))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("embeddings", ["frozen", "trained"])
@pytest.mark.parametrize("budget", [0.3, 0.6, 0.9])
def test_scoring_and_training_together_keep_the_budget(embeddings: Any, budget: float) -> None:
    dense = llama()
    model = copy.deepcopy(dense)
    d2ft = d2ft_hpc.attach(model, budget, planner="samples", embeddings=embeddings)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(dict(model.named_parameters())[name].requires_grad)
    with meter() as metered:
        dense(**text("no")).loss.backward()
    whole = metered.flops
    with meter() as metered, torch.no_grad():
        dense(text("no")["input_ids"][:, : TOKENS // 4])
    count = int((budget - metered.flops / whole) * SEQUENCES)
    assert count >= 2
    share = count / SEQUENCES + metered.flops / whole
    train(d2ft, model, 2)
    assert d2ft.promised_share == pytest.approx(share, rel=1e-9)
    assert d2ft.measured_share == pytest.approx(share, rel=1e-9)
    assert budget - 1 / SEQUENCES < share <= budget
    assert d2ft.report().endswith(
        f"2 steps so far: promised {share:.1%} of the dense compute, measured {share:.1%}"
    )


@pytest.mark.parametrize("tokens", [8, 21])
def test_sequences_of_another_length_are_counted_by_their_tokens(tokens: int) -> None:
    """Attention has another share of them, and a quarter may be no whole number: the budget holds all the same."""
    model = llama()
    dense = copy.deepcopy(model)
    dense.model.embed_tokens.requires_grad_(False)
    with meter() as metered:
        dense(**text("right", tokens=tokens)).loss.backward()
    d2ft = d2ft_hpc.attach(model, BUDGET, planner="samples")
    train(d2ft, model, 2, "right", tokens)
    so_far = d2ft._counter.so_far
    assert so_far.dense_flops == pytest.approx(2 * metered.flops, rel=1e-9)
    assert so_far.planned_flops / so_far.dense_flops == pytest.approx(d2ft.promised_share, rel=1e-9)
    assert so_far.executed_flops / 2 / metered.flops == pytest.approx(d2ft.promised_share, abs=0.02)
    assert so_far.executed_flops / 2 / metered.flops <= BUDGET


def test_an_excerpt_of_little_text_is_what_there_is() -> None:
    """A sequence of nothing to learn scores nothing; one of a token has nothing to give."""
    model = llama()
    d2ft = d2ft_hpc.attach(model, BUDGET, planner="samples")
    batch = text("right")
    batch["labels"][3] = -100
    scores = d2ft._new_selection(0).scorer.of_batch([batch])
    assert scores[3] == 0
    assert (scores > 0).sum() == SEQUENCES - 1
    family = family_of(backbone_of(model))
    for tokens, length in ((1, 1), (3, 1), (8, 2), (11, 2)):
        inputs, targets = family.excerpt(text("no", tokens=tokens))
        assert inputs["input_ids"].shape == targets.shape == (SEQUENCES, length)
    assert d2ft._new_selection(0).scorer.of_batch([text("no", tokens=1)]).tolist() == [0] * SEQUENCES


def test_two_tensors_give_two_and_a_tokenizer_s_batch_a_dict() -> None:
    batch = text("right")
    chosen, pair = (
        d2ft_hpc.attach(llama(), BUDGET, planner="samples").choose(*given)
        for given in ((transformers.BatchEncoding(text("no")),), text("no").values())
    )
    assert type(chosen) is dict
    assert all(torch.equal(one, other) for one, other in zip(pair, chosen.values(), strict=True))
    assert len(pair[0]) == 6 < len(batch["labels"])


def test_adapters_and_modules_of_one_s_own_around_the_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    d2ft = d2ft_hpc.attach(model, BUDGET, planner="samples")
    batch = text("left")
    found = d2ft._new_selection(0).scorer.of_batch([batch])
    torch.testing.assert_close(found, scores_alone(llama(), batch, "error"), rtol=1e-4, atol=1e-6)
    train(d2ft, model, 2, "left")
    assert d2ft.measured_share == pytest.approx(d2ft.promised_share, rel=0.05)


def refused(match: str, *given: Any, model: Any = None) -> None:
    d2ft = d2ft_hpc.attach(llama() if model is None else model, BUDGET, planner="samples")
    with pytest.raises(PlanError, match=match):
        d2ft.choose(*given)


def test_what_cannot_be_drawn_from_is_said() -> None:
    batch = text("right")
    ids, labels = batch["input_ids"], batch["labels"]
    refused("labels of their tokens.*'labels' is missing", {"input_ids": ids})
    refused(r"'labels' is a tensor of shape \[12\]", {"input_ids": ids, "labels": labels[:, 0]})
    refused("a tensor of shape .* alone", ids)
    mask = torch.ones(SEQUENCES, 1, TOKENS, TOKENS)
    refused(
        r"here \[12, 32\]; 'attention_mask' is a tensor of shape \[12, 1, 32, 32\]: leave it out",
        {**batch, "attention_mask": mask},
    )
    refused("'use_cache' is a bool: leave it out", {**batch, "use_cache": False})
    with pytest.raises(
        PlanError, match=r"sequences of input_ids \[32\], .* another of .*\[20\].*same length"
    ):
        batches_of([text("no"), text("no", tokens=20)], are_images=False)
    with pytest.raises(PlanError, match="images and their labels as two tensors"):
        batches_of([{"pixel_values": ids}], are_images=True)
    model = llama()
    d2ft_hpc.attach(model, BUDGET, planner="samples")
    with pytest.raises(PlanError, match=r"call `batch = d2ft\.choose\(batch\)` before the model"):
        model(**batch)
    for kind, why in (
        ("LlamaModel", "LlamaModel gives no logits.*with its head"),
        ("LlamaForSequenceClassification", r"by logits \[sequence, token, word\].*'joint'"),
    ):
        with pytest.raises(PlanError, match=why):
            d2ft_hpc.attach(llama(kind), BUDGET, planner="samples")
    with pytest.raises(PlanError, match=r"^compute_budget=0\.05: scoring 1024 samples.*larger micro-batches"):
        d2ft_hpc.attach(llama(), 0.05, planner="samples")


@pytest.mark.parametrize("option", [{"image_size": 32}, {"weights": "unbiased"}])
def test_options_of_images_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=rf"^options\.{next(iter(option))}=.*it is for images, and LlamaModel"
    ):
        d2ft_hpc.attach(llama(), BUDGET, planner="samples", options=option)
