"""LoRA: exact at the start, on the fast path, in checkpoints and in what is exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from halos.data.batches.collate import collate
from halos.policy.adapters import POLICY, adapter_layers, adapter_parameters, effective_state, merge_adapter
from halos.policy.backbone import Backbone
from halos.policy.export.card import ModelCard
from halos.policy.export.language_model import export_policy
from halos.policy.loading import ModelSpec
from halos.policy.logprobs.completions import completion_logprobs
from halos.policy.logprobs.head import HeadOptions, logit_shape
from halos.policy.lora import LoRA
from halos.policy.reference.cache import model_key
from tests import tiny

peft = pytest.importorskip("peft")
ROWS = tiny.rows(6, branches=2, seed=3)


def batch(**options: Any) -> Any:
    return collate(ROWS, **{"packing": True, "share_prompts": True, "mismatched": True, **options})


def adapted(architecture: str = "llama", *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = tiny.model(architecture, dtype=dtype)
    torch.manual_seed(1)
    LoRA(enabled=True, **options).attach(model, base="some/model")
    return model


def shake(model: nn.Module, size: float = 0.3) -> Any:
    """As if it had been trained: no B is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{POLICY}." in name + ".":
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(size * noise.to(parameter))
    return model


def adapter_folder(folder: Path, **options: Any) -> Path:
    """An adapter as peft itself writes it."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], lora_dropout=0.5, **options)
    shake(peft.get_peft_model(tiny.model(), config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_only_adapters_of_all_linear_layers_but_the_head_are_trained(architecture: str) -> None:
    model = adapted(architecture, rank=2)
    plain = tiny.model(architecture)
    linear = {
        name
        for name, module in plain.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not plain.get_output_embeddings()
    }
    assert set(adapter_layers(model)) == linear
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{side}.default.weight" for name in linear for side in "AB"}


@pytest.mark.parametrize("reference", ["adapter", "live"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_policy_starts_at_its_reference_to_the_bit(architecture: str, dtype: torch.dtype, reference: str) -> None:
    model = adapted(architecture, dropout=0.5)
    live = reference == "live"
    made = Backbone(model, with_reference=live, adapter_reference=not live, head_chunk=3).to(dtype).train()
    base = Backbone(tiny.model(architecture), with_reference=False, head_chunk=3).to(dtype)
    expected = base.logprobs(batch()).tokens
    assert torch.equal(made.logprobs(batch()).tokens, made.reference_logprobs(batch()).tokens)
    assert torch.equal(made.reference_logprobs(batch()).tokens, expected)
    shake(made.policy)
    assert (made.logprobs(batch()).sum - expected.sum(-1)).abs().min() > 1e-3
    assert torch.equal(made.reference_logprobs(batch()).tokens, expected)
    assert {p.dtype for p in adapter_parameters(made.policy)} == {torch.float32}


def test_the_reference_changes_no_flag_of_the_policy() -> None:
    made = Backbone(shake(adapted()), with_reference=False, adapter_reference=True)
    trained = [parameter.requires_grad for parameter in made.parameters()]
    before = made.logprobs(batch())
    made.reference_logprobs(batch())
    assert [parameter.requires_grad for parameter in made.parameters()] == trained
    assert made.policy.training
    assert torch.equal(made.logprobs(batch()).tokens, before.tokens)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_the_fast_path_gives_the_gradients_of_separate_rows(targets: Any, checkpointing: bool) -> None:
    def found(fast: bool) -> tuple[Tensor, list[Tensor]]:
        model = tiny.exact(shake(adapted(dtype=torch.float64, target_modules=targets, rank=3)))
        if fast and checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False}) if hasattr(
                model, "activation_checkpointing_enable"
            ) else model.gradient_checkpointing_enable({"use_reentrant": False})
        if fast:
            assert logit_shape(model) is not None
            logprobs = completion_logprobs(model, batch(), HeadOptions(4))
        else:
            logprobs = completion_logprobs(model, batch(packing=False, share_prompts=False))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = torch.linspace(-1, 2, 6, dtype=torch.float64)
        return logprobs.tokens, list(torch.autograd.grad((logprobs.sum[:, 0] * weights).sum(), trained))

    (tokens, gradients), (expected, wanted) = found(True), found(False)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-10)
    for left, right in zip(gradients, wanted, strict=True):
        assert right.abs().max() > 0
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


def test_the_first_step_is_that_of_the_whole_model_through_the_adapter() -> None:
    # With B = 0: dL/dB = s·G·Aᵀ and dL/dA = 0, so that a step of SGD moves W by −lr·s²·G·Aᵀ·A; G is the whole model's.
    model = adapted(dtype=torch.float64, rank=5, alpha=3.0)
    plain = tiny.model(dtype=torch.float64)
    start = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    down = {
        f"{name}.weight": layer.lora_A[POLICY].weight.detach().clone() for name, layer in adapter_layers(model).items()
    }
    for made in (model, plain):
        trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.7)
        completion_logprobs(made, batch()).sum[:, 0].mean().backward()
        optimizer.step()
    merge_adapter(model)
    for name, parameter in model.named_parameters():
        moved = plain.get_parameter(name).detach() - start[name]
        expected = (3 / 5) ** 2 * moved @ down[name].T @ down[name] if name in down else torch.zeros_like(moved)
        assert expected.abs().max() > 1e-4 or name not in down
        torch.testing.assert_close(parameter.detach() - start[name], expected, rtol=1e-7, atol=1e-10)


# Continuing an adapter


@pytest.mark.parametrize("reference", ["adapter", "live"])
def test_a_continued_adapter_is_part_of_the_reference(reference: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path)
    expected = completion_logprobs(
        peft.PeftModel.from_pretrained(tiny.model(), folder).eval().base_model.model, batch()
    )
    model = tiny.model()
    LoRA(enabled=True, path=str(folder)).attach(model, base="x", keep_start=reference == "adapter")
    made = Backbone(model, with_reference=reference == "live", adapter_reference=reference == "adapter", head_chunk=3)
    assert torch.equal(made.logprobs(batch()).tokens, made.reference_logprobs(batch()).tokens)
    torch.testing.assert_close(made.reference_logprobs(batch()).tokens, expected.tokens, rtol=0, atol=5e-6)
    before = made.reference_logprobs(batch()).tokens
    assert (completion_logprobs(tiny.model(), batch()).sum - before.sum(-1)).abs().min() > 1e-3
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.5)
    made.logprobs(batch()).sum[:, 0].mean().neg().backward()
    optimizer.step()
    assert torch.equal(made.reference_logprobs(batch()).tokens, before)
    assert (made.logprobs(batch()).sum - before.sum(-1)).abs().min() > 1e-3


def test_bad_adapters_are_refused(tmp_path: Path) -> None:
    def refused(said: str) -> None:
        with pytest.raises(ValueError, match=r"^model\.lora\.path: .*" + said):
            LoRA(enabled=True, path=str(tmp_path)).check()

    refused("expected adapter_config.json")
    adapter_folder(tmp_path)
    LoRA(enabled=True, path=str(tmp_path)).check()
    with pytest.raises(ValueError, match=r"^model\.lora\.path: .* is not of this model"):
        LoRA(enabled=True, path=str(tmp_path)).attach(tiny.model(hidden_size=32), base="x")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    refused("more than plain LoRA .use_dora=True")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    refused("expected a LoRA adapter")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused("cut off")


# Identity and checkpoints


def test_a_new_adapter_shares_the_cache_of_its_base() -> None:
    base, model = tiny.model(), adapted()
    assert list(effective_state(model)) == list(base.state_dict())
    assert model_key(model, "32-true") == model_key(base, "32-true")
    assert model_key(shake(model), "32-true") != model_key(base, "32-true")


def test_a_checkpoint_holds_only_what_is_trained_and_fits_only_its_base() -> None:
    made = Backbone(adapted(), with_reference=False)
    shake(made)
    state = made.state_dict()
    assert {name for name in state if not name.endswith(".default.weight")} == {"base_fingerprint"}
    other = Backbone(adapted(), with_reference=False)
    outer = nn.ModuleDict({"backbone": other})
    outer.load_state_dict({f"backbone.{name}": value for name, value in state.items()})
    assert torch.equal(other.logprobs(batch()).tokens, made.logprobs(batch()).tokens)
    # A module that comes before the backbone, and whose weight is missing: frozen weights alone may be.
    both = nn.ModuleDict({"head": nn.Linear(1, 1), "backbone": other})
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
        both.load_state_dict({f"backbone.{name}": value for name, value in state.items()})
    missing = dict(state)
    del missing[next(name for name in state if "lora_A" in name)]
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_A"):
        other.load_state_dict(missing)
    model = tiny.model(seed=1)
    LoRA(enabled=True).attach(model, base="x")
    strange = Backbone(model, with_reference=False)
    with pytest.raises(ValueError, match="another base"):
        strange.load_state_dict(state)
    with pytest.raises(ValueError, match="expected a checkpoint of LoRA adapters"):
        other.load_state_dict(Backbone(tiny.model(), with_reference=False).state_dict())


# Export


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "lm_head"]])
def test_what_is_exported_is_the_policy(kind: str, targets: Any, tmp_path: Path) -> None:
    tokenizer = tiny.word_tokenizer(tiny.CHATML)
    policy = shake(adapted(dtype=torch.float64, target_modules=targets)).eval()
    expected = completion_logprobs(policy, batch()).tokens
    if kind == "merged":
        merge_adapter(policy)
        assert not adapter_layers(policy)
    end: Any = tokenizer.convert_tokens_to_ids(tiny.END)
    export_policy(policy, tokenizer, tmp_path / "model", end_of_turn=end, card=ModelCard(loss="kto", base="b"))
    if kind == "merged":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    else:
        base = tiny.model(dtype=torch.float64)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "model", autocast_adapter_dtype=False).base_model.model
    torch.testing.assert_close(completion_logprobs(loaded, batch()).tokens, expected, rtol=0, atol=1e-6)


def test_rows_of_new_tokens_are_trained_and_merged() -> None:
    model = tiny.model("qwen2")
    LoRA(enabled=True, rank=2).attach(model, base="x", new_tokens=[3, 5])
    shake(model)
    expected = completion_logprobs(model, batch()).tokens.detach()
    before = tiny.model("qwen2").get_input_embeddings().weight
    merge_adapter(model)
    after = model.get_input_embeddings().weight
    assert [n for n in range(len(after)) if not torch.equal(before[n], after[n])] == [3, 5]
    assert model.lm_head.weight is after
    torch.testing.assert_close(completion_logprobs(model, batch()).tokens, expected, rtol=0, atol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "model.lora.rank: expected a whole number"),
        ({"alpha": 0.0}, "model.lora.alpha"),
        ({"dropout": 1.0}, "model.lora.dropout"),
        ({"target_modules": []}, "model.lora.target_modules: expected names or null, found none"),
        ({"init": "pissa"}, "model.lora.init: .*would not start at its reference"),
        ({"export": "both"}, "model.lora.export: expected merged or adapter"),
        ({"quantize": "8bit", "export": "adapter"}, "model.lora.quantize: expected 4bit"),
        ({"quantize": "4bit"}, "model.lora.export: expected adapter"),
        ({"path": {}}, "model.lora.path: expected a folder or null, found {}"),
        ({"path": "x", "rank": 4}, "model.lora.rank: expected null with model.lora.path=x"),
        ({"path": "x", "enabled": False}, "model.lora.path: expected model.lora.enabled=true"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoRA(**{"enabled": True, **options})


def test_targets_that_are_not_there_or_not_linear_or_tied_are_refused() -> None:
    for architecture, target in (("llama", "nothing"), ("llama", "embed_tokens"), ("qwen2", "lm_head")):
        with pytest.raises(ValueError, match=r"^model\.lora\.target_modules: "):
            LoRA(enabled=True, target_modules=[target]).attach(tiny.model(architecture), base="x")


def test_four_bits_need_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^model\.lora\.quantize: (bitsandbytes is missing|4bit needs a CUDA)"):
        LoRA(enabled=True, quantize="4bit", export="adapter").check()


def test_a_reference_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^model\.reference: .*set model\.lora\.enabled=true"):
        ModelSpec(path="x", reference="adapter")
    with pytest.raises(ValueError, match="expected a model with LoRA adapters"):
        Backbone(tiny.model(), with_reference=False, adapter_reference=True)
