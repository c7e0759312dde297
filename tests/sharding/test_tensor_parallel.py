"""Models whose products are divided compute what they compute alone, and those that cannot be divided are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

from halos.processes.collectives import full_tensor
from halos.sharding.fsdp_tp import FSDPTP
from halos.sharding.tensor_parallel import check_plan, divide_products, plan_of
from tests import tiny
from tests.fork import run_ranks

DIVIDED = ("llama", "qwen2", "qwen3", "gemma2", "gpt_neox", "phi3")
"""Tied embeddings and biases (qwen2), norms of each head (qwen3), one matrix for queries, keys and values whose outputs
are divided by heads (gpt_neox) or put together first (phi3)."""


def model(architecture: str) -> Any:
    if architecture != "phi3":
        return tiny.exact(tiny.model(architecture, dtype=torch.float64, num_key_value_heads=2))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("phi3", vocab_size=tiny.VOCABULARY, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    return tiny.exact(AutoModelForCausalLM.from_config(config).double().train())


def results(made: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a few sequences, and the gradient of every weight."""
    ids = torch.arange(18).view(2, 9) % tiny.VOCABULARY
    logits = made(input_ids=ids, use_cache=False).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), {name: full_tensor(p.grad) for name, p in made.named_parameters()}


def divided_and_not() -> dict[str, tuple[Any, Any]]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for architecture in DIVIDED:
        made = model(architecture)
        check_plan(made, 2)
        divide_products(made, mesh)
        found[architecture] = (results(made), results(model(architecture)))
    return found


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_compute_what_one_does() -> None:
    for rank in run_ranks(divided_and_not):
        for architecture, ((logits, gradients), (expected, alone)) in rank.items():
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10, msg=architecture)
            assert gradients.keys() == alone.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, alone[name], rtol=1e-8, atol=1e-10, msg=f"{architecture} {name}")
                assert gradient.abs().sum() > 0, name


def frozen_stay_frozen() -> list[str]:
    dist.init_process_group("gloo")
    made = model("qwen3").requires_grad_(False)
    divide_products(made, init_device_mesh("cpu", (2,)))
    return [name for name, p in made.named_parameters() if p.requires_grad]


@pytest.mark.ranks
def test_a_frozen_model_stays_frozen() -> None:
    assert run_ranks(frozen_stay_frozen) == [[], []]


def test_the_plan_speaks_of_the_products_in_decoder_layers_alone() -> None:
    plan = plan_of(tiny.model("llama"))
    assert len(plan) == 2 * 7
    assert plan["model.layers.1.self_attn.o_proj"] == plan["model.layers.0.mlp.down_proj"] == "rowwise"
    assert sum(style == "rowwise" for style in plan.values()) == 4
    assert plan_of(tiny.model("gpt2")) == {}


@pytest.mark.parametrize(
    ("architecture", "overrides", "ranks", "said"),
    [
        ("gpt2", {}, 2, "a tensor-parallel plan, found GPT2LMHeadModel"),
        ("llama", {"num_key_value_heads": 2}, 0, "tensor_parallel_size: expected a whole number from 1 on, found 0"),
        ("llama", {"num_key_value_heads": 2}, 3, "a divisor of the 2 num_attention_heads of LlamaForCausalLM, found 3"),
        ("llama", {"num_key_value_heads": 1}, 2, "a divisor of the 1 num_key_value_heads of LlamaForCausalLM, found 2"),
        (
            "llama",
            {"num_key_value_heads": 2, "intermediate_size": 23},
            2,
            r"a divisor of the 23 out_features of model\.layers\.0\.mlp\.gate_proj in LlamaForCausalLM, found 2",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(architecture: str, overrides: dict[str, Any], ranks: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_plan(tiny.model(architecture, **overrides), ranks)


def test_a_style_that_is_not_understood_is_refused_with_its_place() -> None:
    made = tiny.model("llama", num_key_value_heads=2)
    made._tp_plan = {**made._tp_plan, "model.layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(ValueError, match=r"found packed_colwise for model\.layers\.0\.mlp\.up_proj"):
        check_plan(made, 2)
    made = tiny.model("llama", num_key_value_heads=2)
    made.model.layers[1].mlp.up_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"found colwise for model\.layers\.1\.mlp\.up_proj"):
        check_plan(made, 2)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "2"])
def test_a_size_is_a_whole_number_from_1_on(size: Any) -> None:
    with pytest.raises(ValueError, match=r"strategy\.tensor_parallel_size: expected a whole number from 1 on"):
        FSDPTP(tensor_parallel_size=size)
