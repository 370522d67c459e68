"""transformers' Llama, Qwen2 and Qwen3 under plans; against their own modules with masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import d2ft_hpc
from d2ft_hpc.errors import ConfigError, PlanError
from d2ft_hpc.execution.attach import attach
from d2ft_hpc.execution.gradients import Reduction
from d2ft_hpc.families import transformers_decoder
from d2ft_hpc.families.table import backbone_of, family_of
from d2ft_hpc.metering import measure_costs, meter
from d2ft_hpc.model.subnets import ParameterClass, SubnetMap
from d2ft_hpc.planning.plan import SkipPlan
from tests.masked import assert_close, loss_and_gradients, masked_blocks, planned, random_rows
from tests.reference import FULL, SHORTCUT
from tests.subnet_checks import assert_fisher_is_of_own_gradients, assert_heads_own_whole_parameters

transformers = pytest.importorskip("transformers", minversion="5.24")

DEPTH, GROUPS, VOCABULARY, TOKENS = 3, 3, 40, 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 6,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": TOKENS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**options: Any) -> nn.Module:
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **options}))
    return model


def llama_with_biases(**options: Any) -> nn.Module:
    return llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **options)


def qwen2(**options: Any) -> nn.Module:
    model: nn.Module = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**SIZES, **options}))
    return model


def qwen2_with_windows(**options: Any) -> nn.Module:
    return qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1, **options)


def qwen3(**options: Any) -> nn.Module:
    """Whose heads together are wider than what they read."""
    config = transformers.Qwen3Config(**{**SIZES, "head_dim": 16, "tie_word_embeddings": True, **options})
    model: nn.Module = transformers.Qwen3ForCausalLM(config)
    return model


KINDS: dict[str, Callable[..., nn.Module]] = {
    "Llama": llama,
    "Llama with biases, tied": llama_with_biases,
    "Qwen2": qwen2,
    "Qwen2 with windows": qwen2_with_windows,
    "Qwen3, tied": qwen3,
}
ROWS = random_rows(DEPTH, GROUPS)
OUTS = ("self_attn.o_proj", "mlp.down_proj")


def tiny(kind: str, **options: Any) -> nn.Module:
    """With parameters away from their initial values, in training mode."""
    torch.manual_seed(0)
    model = KINDS[kind](**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def text(
    seed: int, *, padded: str | None = None, samples: int = 4, tokens: int = TOKENS
) -> dict[str, Tensor]:
    """padded: "left" or "right": a sequence of each batch is shorter than the others."""
    ids = torch.randint(3, VOCABULARY, (samples, tokens), generator=torch.Generator().manual_seed(seed))
    if padded is None:
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[1, slice(5) if padded == "left" else slice(-5, None)] = 0
    return {
        "input_ids": ids.where(mask.bool(), 0),
        "attention_mask": mask,
        "labels": ids.where(mask.bool(), -100),
    }


def assert_as_masked(
    model: Any, reference: Any, row: np.ndarray, batch: dict[str, Tensor], *, only: str = ""
) -> None:
    """only: of the parameters' names, which are compared. reference: has no executor."""
    found = loss_and_gradients(model, model(**batch).loss)
    backbone = backbone_of(reference)
    with masked_blocks(family_of(backbone).blocks(backbone), OUTS, row):
        expected = loss_and_gradients(reference, reference(**batch).loss)
    assert_close(found, expected, lambda name: only in name, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [None, "left", pytest.param("right", marks=pytest.mark.full)])
def test_gradients_equal_the_library_s_modules_with_masks(kind: str, padded: str | None) -> None:
    for name, row in ROWS.items():
        reference = tiny(kind).double()
        model = copy.deepcopy(reference)
        planned(model, row)
        assert_as_masked(model, reference, row, text(len(name), padded=padded))


@pytest.mark.parametrize("kind", KINDS)
def test_eager_attention_is_the_library_s(kind: str) -> None:
    reference = tiny(kind, attn_implementation="eager").double()
    model = copy.deepcopy(reference)
    planned(model, ROWS["random 1"])
    # transformers' own gives NaN in float64 where a token sees no other, as those before the text.
    padded = None if "windows" in kind else "right"
    assert_as_masked(model, reference, ROWS["random 1"], text(1, padded=padded))


@pytest.mark.parametrize("kind", KINDS)
def test_all_full_is_the_library_s_model_bit_for_bit(kind: str) -> None:
    dense: Any = tiny(kind, attn_implementation="eager")
    model: Any = copy.deepcopy(dense)
    planned(model, np.full((DEPTH, GROUPS), FULL, np.uint8))
    batch = text(1, padded="right")
    loss, gradients = loss_and_gradients(model, model(**batch).loss)
    expected_loss, expected = loss_and_gradients(dense, dense(**batch).loss)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
    asked = {"output_hidden_states": True, "output_attentions": True}
    for mode in (True, False):
        found, plain = (each.train(mode)(**batch, **asked) for each in (model, dense))
        for name, length in (("hidden_states", DEPTH + 1), ("attentions", DEPTH)):
            assert len(found[name]) == len(plain[name]) == length
            assert all(torch.equal(one, other) for one, other in zip(found[name], plain[name], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_the_blocks_has_its_heads_or_none(kind: str) -> None:
    model = backbone_of(tiny(kind))
    subnets = SubnetMap.of(model)
    assert subnets.shape == (DEPTH, GROUPS)
    assert_heads_own_whole_parameters(model, subnets)
    classes = {name: subnets.classify(name) for name, _ in model.named_parameters()}
    shared = {name.split(".", 2)[2] for name, found in classes.items() if found is ParameterClass.SHARED}
    assert all("norm" in name or name in ("self_attn.o_proj.bias", "mlp.down_proj.bias") for name in shared)
    below = {name for name, found in classes.items() if found is ParameterClass.EMBEDDING}
    assert below == {"embed_tokens.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_those_of_the_library_s_model_and_its_head(kind: str) -> None:
    dense: Any = tiny(kind)
    model = copy.deepcopy(dense)
    executor = attach(model, embeddings="trained")
    costs = measure_costs(backbone_of(model), executor, (TOKENS,), whole=model)
    with meter() as metered:
        dense(torch.zeros(1, TOKENS, dtype=torch.long)).logits.sum().backward()
    assert costs.dense_flops == metered.flops
    assert costs.outside_flops == 3 * 2 * TOKENS * 48 * VOCABULARY
    assert 0.25 < costs.forward_share < 0.4


def test_fisher_information_of_the_language_model_s_loss() -> None:
    model: Any = tiny("Qwen3, tied")
    subnets = attach(model, embeddings="trained").subnets
    backbone = backbone_of(model)
    assert_fisher_is_of_own_gradients(backbone, subnets, lambda: model(**text(2, padded="right")).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_train_by_head(kind: str) -> None:
    peft = pytest.importorskip("peft")
    row = ROWS["random 1"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules="all-linear", task_type="CAUSAL_LM")
    reference = peft.get_peft_model(tiny(kind), config).double()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = copy.deepcopy(reference)
    planned(model, row)
    assert_as_masked(model, reference, row, text(1), only="lora_")


@pytest.mark.parametrize("reduction", [Reduction.AFTER_BACKWARD, Reduction.EVERY_MICRO_BATCH])
def test_blocks_that_checkpoint_themselves_compute_the_same(reduction: Reduction) -> None:
    row = ROWS["a block skipped"]
    reference = tiny("Qwen3, tied").double()
    model: Any = copy.deepcopy(reference)
    planned(model, row).bind(lambda: 0, reduction)
    model.activation_checkpointing_enable()
    runs: list[int] = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    assert_as_masked(model, reference, row, text(1, padded="left"))
    assert len(runs) == 2  # forward, and again in the backward


@pytest.mark.parametrize("is_training", [False, True])
def test_generation_stays_as_it_is(is_training: bool) -> None:
    dense: Any = tiny("Llama", max_position_embeddings=64)
    model: Any = copy.deepcopy(dense)
    planned(model, ROWS["a block skipped"])
    prompt = text(1)["input_ids"]
    options = {"max_new_tokens": 20, "do_sample": False}
    found, expected = (each.train(is_training).generate(prompt, **options) for each in (model, dense))
    assert torch.equal(found, expected)
    assert found.shape[1] > TOKENS


def test_what_skipped_heads_cannot_give_is_refused() -> None:
    model: Any = tiny("Llama", attn_implementation="eager")
    planned(model, np.full((DEPTH, GROUPS), SHORTCUT, np.uint8))
    with pytest.raises(PlanError, match=r"output_attentions=True"):
        model(**text(1), output_attentions=True)
    cache = model.eval()(text(1)["input_ids"], use_cache=True).cache
    with pytest.raises(PlanError, match=r"goes on from a cache"):
        model.train()(text(2, tokens=3)["input_ids"], cache=cache)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({}, "planner='tokens'"),
        ({"planner": "joint", "token_budget": 0.8}, "token_budget=0.8"),
    ],
)
def test_plans_for_images_are_refused(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^{key}: it is for images, and LlamaModel reads text: .*'samples'.*'joint'",
    ):
        d2ft_hpc.attach(tiny("Llama"), **settings)
    grids = np.full((1, 2), 4, np.uint16)
    plan = SkipPlan(np.full((1, DEPTH, GROUPS), FULL, np.uint8), replicas=1, grids=grids)
    with pytest.raises(PlanError, match="scales images, and the model reads text"):
        attach(tiny("Llama")).activate(plan, replica=0)


class Loop:
    """A loop that somebody wrote, with what d2ft adds."""

    def __init__(self, model: Any, **settings: Any) -> None:
        self.model = model
        self.d2ft = d2ft_hpc.attach(model, compute_budget=0.6, planner="joint", micro_batches=2, **settings)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step(self, seed: int, **options: Any) -> None:
        for slot in range(2):
            (self.model(**text(10 * seed + slot, **options)).loss / 2).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("adapted", [False, True])
def test_a_loop_keeps_what_its_plan_promises(adapted: bool) -> None:
    model = tiny("Llama", intermediate_size=96)
    if adapted:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    loop = Loop(model)
    loop.step(0)
    loop.step(1)
    assert loop.d2ft.plan is not None
    assert not loop.d2ft.plan.is_dense
    assert loop.d2ft.promised_share == pytest.approx(0.6, abs=0.06)
    # The factors that heads share run whole.
    off = 0.05 if adapted else 1e-9
    assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=off)


def test_shorter_sequences_are_counted_by_their_tokens() -> None:
    loop = Loop(tiny("Llama", intermediate_size=96))
    loop.step(0, tokens=8)
    loop.step(1, tokens=8)
    # Attention has a smaller share.
    assert loop.d2ft.measured_share == pytest.approx(loop.d2ft.promised_share, rel=0.02)


def test_texts_longer_than_what_is_counted_have_more_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_decoder, "MOST_COUNTED_TOKENS", 4)
    model = tiny("Llama", intermediate_size=96)
    dense: Any = copy.deepcopy(model)
    dense.model.embed_tokens.requires_grad_(False)
    with meter() as metered:
        dense(**text(0)).loss.backward()
    loop = Loop(model)
    loop.step(0)
    loop.step(1)
    micro_batches = 4
    assert loop.d2ft._counter.so_far.dense_flops == pytest.approx(micro_batches * metered.flops, rel=1e-9)


def test_attention_has_the_same_share_without_memory() -> None:
    shares = []
    for model in (tiny("Llama", intermediate_size=96), tiny("Llama", intermediate_size=96).to("meta")):
        costs = measure_costs(model.model, attach(model.model), (TOKENS,), whole=model)
        shares.append(costs.share_by_square)
    assert shares[0] > 0
    assert shares[1] == pytest.approx(shares[0], rel=1e-9)


def test_tied_embeddings_are_frozen_with_those_below() -> None:
    tied: Any = Loop(tiny("Qwen3, tied")).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert not tied.lm_head.weight.requires_grad
    apart: Any = Loop(tiny("Qwen2")).model
    assert apart.lm_head.weight.requires_grad
    assert not apart.model.embed_tokens.weight.requires_grad
    assert Loop(tiny("Qwen3, tied"), embeddings="trained").model.lm_head.weight.requires_grad


def test_what_was_trained_is_read_by_the_library_alone(tmp_path: Path) -> None:
    loop = Loop(tiny("Qwen3, tied"), embeddings="trained")
    loop.step(0)
    loop.step(1)
    loop.model.save_pretrained(tmp_path)
    plain = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == loop.model.state_dict().keys()
    ids = text(3)["input_ids"]
    assert torch.equal(plain.eval()(ids).logits, loop.model.eval()(ids).logits)


def test_classifiers_of_sequences_follow_plans() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_labels=5)
    reference: Any = transformers.LlamaForSequenceClassification(config).double().train()
    model = copy.deepcopy(reference)
    planned(model, ROWS["random 2"])
    batch = {**text(1, padded="right"), "labels": torch.arange(4)}
    assert_as_masked(model, reference, ROWS["random 2"], batch)
