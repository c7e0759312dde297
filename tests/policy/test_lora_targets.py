"""Which layers LoRA adapts, mixtures of experts included, and what it says of the others."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halos.data.batches.collate import collate
from halos.policy.adapters import POLICY, adapter_parameters, effective_state, merge_adapter, save_adapter
from halos.policy.backbone import Backbone
from halos.policy.logprobs.completions import completion_logprobs
from halos.policy.lora import LoRA
from halos.policy.lora_targets import find_targets, left_out
from halos.policy.reference.cache import model_key
from tests import architectures, tiny

peft = pytest.importorskip("peft")
BATCH = collate(tiny.rows(5, branches=2, seed=3), packing=True)
MIXTURES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "granitemoe", "jetmoe"]


def adapted(name: str, **options: Any) -> Any:
    model = architectures.model(name)
    LoRA(enabled=True, **options).attach(model, base="some/model")
    return model


def shaken(name: str, **options: Any) -> Any:
    """As if it had been trained: no B is zero."""
    model = adapted(name, **options)
    architectures.shift(model, 0.1)
    return model


def changed_by_merging(model: Any) -> set[str]:
    """Names of the weights, as they are without adapters, that the adapters change."""
    before = {name.replace(".base_layer", ""): weight.clone() for name, weight in model.named_parameters()}
    merge_adapter(model)
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_default_trains_all_linear_layers_and_experts_but_no_router(name: str) -> None:
    plain = architectures.model(name)
    matrices = {
        name
        for name, parameter in plain.named_parameters()
        if parameter.ndim > 1 and not name.endswith("_bias") and not any(word in name for word in ("router", "embed"))
    }
    expected = {name for name in matrices if "lm_head" not in name and not name.endswith("mlp.gate.weight")}
    assert changed_by_merging(shaken(name)) == expected
    assert find_targets(plain, None) == find_targets(plain, "all-linear")


def test_a_layer_whose_weight_a_kernel_reads_gets_no_adapter() -> None:
    assert {name.rpartition(".")[2] for name in find_targets(architectures.model("mamba"), None).layers} == {"in_proj"}
    jamba = {name.rpartition("mamba.")[2] for name in find_targets(architectures.model("jamba"), None).layers}
    assert "x_proj" in jamba
    assert "dt_proj" not in jamba


def test_parts_for_images_get_no_adapters() -> None:
    targets = find_targets(architectures.model("gemma3"), None)
    assert len(targets.layers) == 14
    assert all(name.startswith("model.language_model.") for name in targets.layers)
    named = find_targets(architectures.model("gemma3"), ["q_proj", "lm_head"])
    assert named.layers == (*(f"model.language_model.layers.{n}.self_attn.q_proj" for n in (0, 1)), "lm_head")
    with pytest.raises(ValueError, match=r"of this model \(.*\), found 'fc1'"):
        find_targets(architectures.model("gemma3"), ["fc1"])


def test_what_gets_no_adapter_is_logged_with_its_size(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    adapted("mixtral")
    # Two layers: attention 2 · 16·16 + 2 · 16·8, four experts of 16·48 + 24·16, a router of 4·16.
    adapters = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 4 * (16 * 48 + 24 * 16))
    said = f"adapters on 8 linear layers and 4 tensors of experts ({adapters:,} weights); "
    assert f"model.lora: {said}none on MixtralTopKRouter (128 weights)" in caplog.text
    model = architectures.model("mamba")
    assert left_out(model, find_targets(model, None))["out_proj"] == 2 * 24 * 16


@pytest.mark.parametrize(
    ("name", "wanted", "expected"),
    [
        ("mixtral", ["down_proj"], {"experts.down_proj"}),
        ("mixtral", ["experts", "q_proj"], {"experts.down_proj", "experts.gate_up_proj", "q_proj"}),
        ("mixtral", r".*experts\.gate.*", {"experts.gate_up_proj"}),
        (
            "mixtral",
            r".*(self_attn|experts).*",
            {"experts.down_proj", "experts.gate_up_proj", *(f"{n}_proj" for n in "qkvo")},
        ),
        ("qwen3_moe", ["mlp.down_proj"], {"mlp.down_proj"}),
        ("jetmoe", ["kv_proj", "router.layer"], {"kv_proj", "layer"}),
    ],
)
def test_names_mean_layers_and_tensors_of_experts(name: str, wanted: Any, expected: set[str]) -> None:
    targets = find_targets(architectures.model(name), wanted)
    found = {*targets.layers, *targets.experts}
    assert {next((end for end in expected if name.endswith(f".{end}")), name) for name in found} == expected


@pytest.mark.parametrize(
    ("name", "wanted", "said"),
    [
        ("mixtral", ["q_proj", "gate_proj"], r"\(down_proj, gate_up_proj, k_proj, .*\), found 'gate_proj'"),
        ("llama", "q_proj", r"\(down_proj, .*\), found 'q_proj'"),
        ("mixtral", ["q_proj", "input_layernorm"], r"found model\.layers\.0\.input_layernorm: MixtralRMSNorm"),
        ("mixtral", ["gate"], r"found model\.layers\.0\.mlp\.gate: MixtralTopKRouter"),
        ("mixtral", r".*layers\.0\..*", r"found model\.layers\.0\..*: MixtralTopKRouter"),
        (
            "mamba",
            ["in_proj", "x_proj"],
            r"that the model calls.* found backbone\.layers\.0\.mixer\.x_proj",
        ),
        ("llama", ["embed_tokens"], r"found model\.embed_tokens: Embedding"),
        ("llama", "q_proj)", r"expected names or a regular expression, found 'q_proj\)'"),
    ],
)
def test_names_that_match_nothing_or_no_linear_layer_are_refused(name: str, wanted: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"^model\.lora\.target_modules: .*" + said):
        LoRA(enabled=True, target_modules=wanted).attach(architectures.model(name), base="x")


def test_dropout_on_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.lora\.dropout: expected 0 with adapters on experts .*found 0\.1"):
        adapted("mixtral", dropout=0.1)
    adapted("mixtral", dropout=0.1, target_modules=["q_proj"])


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_a_mixture_starts_at_its_reference_and_shares_its_cache(name: str) -> None:
    base, model = architectures.model(name), adapted(name)
    assert list(effective_state(model)) == list(base.state_dict())
    assert model_key(model, "32-true") == model_key(base, "32-true")
    made = Backbone(model, with_reference=False, adapter_reference=True)
    expected = completion_logprobs(base, BATCH).tokens
    assert torch.equal(made.logprobs(BATCH).tokens, expected)
    architectures.shift(model, 0.1)
    assert model_key(model, "32-true") != model_key(base, "32-true")
    assert (made.logprobs(BATCH).sum - expected.sum(-1)).abs().min() > 1e-3
    assert torch.equal(made.reference_logprobs(BATCH).tokens, expected)


def test_a_checkpoint_holds_the_adapters_of_experts_alone() -> None:
    made = Backbone(adapted("mixtral"), with_reference=False)
    architectures.shift(made.policy, 0.1)
    state = made.state_dict()
    tensors = [name for name in state if name != "base_fingerprint"]
    assert all(".lora_" in name for name in tensors)
    assert len(tensors) == len(adapter_parameters(made.policy)) == 2 * (8 + 4)
    other = Backbone(adapted("mixtral"), with_reference=False)
    other.load_state_dict(state)
    assert torch.equal(other.logprobs(BATCH).tokens, made.logprobs(BATCH).tokens)


def test_every_expert_has_its_own_low_rank_product(tmp_path: Path) -> None:
    model = shaken("mixtral", rank=3, alpha=5)
    save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    merge_adapter(model)
    plain = architectures.model("mixtral")
    # peft wraps one tensor after the other.
    for tensor, place in (("gate_up_proj", "experts.base_layer"), ("down_proj", "experts")):
        prefix = f"base_model.model.model.layers.1.mlp.{place}"
        a, b = stored[f"{prefix}.lora_A.weight"], stored[f"{prefix}.lora_B.weight"]
        for expert in range(4):
            # A has the rows of an expert one after the other, B the columns of rank r of all experts.
            delta = 5 / 3 * b[:, expert::4] @ a[3 * expert : 3 * expert + 3]
            moved = model.get_parameter(f"model.layers.1.mlp.experts.{tensor}")[expert]
            start = plain.get_parameter(f"model.layers.1.mlp.experts.{tensor}")[expert]
            torch.testing.assert_close(moved - start, delta, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_an_adapter_on_experts_can_be_continued(name: str, tmp_path: Path) -> None:
    save_adapter(shaken(name), tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert any("experts" in tensor for tensor in stored["target_parameters"])
    model = architectures.model(name)
    LoRA(enabled=True, path=str(tmp_path)).attach(model, base="x", keep_start=True)
    made = Backbone(model, with_reference=False, adapter_reference=True)
    expected = completion_logprobs(shaken(name), BATCH).tokens
    torch.testing.assert_close(made.logprobs(BATCH).tokens, expected, rtol=0, atol=1e-6)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if f".{POLICY}." in name
    }
    architectures.shift(model, 0.1)
    torch.testing.assert_close(made.reference_logprobs(BATCH).tokens, expected, rtol=0, atol=1e-6)
    assert (made.logprobs(BATCH).sum - expected.sum(-1)).abs().min() > 1e-3
