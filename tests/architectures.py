"""Checks of many architectures, tiny and random, and the table that docs/reference/architectures.md has of them.

python -m tests.architectures
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from halos.data.batches.batch import Batch
from halos.data.batches.collate import collate
from halos.data.rows.token_rows import Row
from halos.objectives import DPO
from halos.policy.adapters import save_adapter
from halos.policy.backbone import Backbone
from halos.policy.construction import set_dropout, silence_routers
from halos.policy.logprobs.packed import can_pack
from halos.policy.lora import LoRA
from halos.policy.lora_targets import Targets, find_targets, left_out
from halos.policy.router import find_router_loss
from tests import tiny

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "architectures.md"
TOLERANCE = 1e-5
"""Of log-probs of single tokens, in float32."""

_SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_TOP2 = {"num_experts_per_tok": 2, "output_router_logits": True}
_LOCAL = {"num_local_experts": 4, **_TOP2}
_FINE = {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8, **_TOP2}
_SHARED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_LATENT = {
    "kv_lora_rank": 4,
    "q_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
_SLIDING = {"head_dim": 8, "sliding_window": tiny.WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

_GEMMA4 = {
    "global_head_dim": 8,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": tiny.VOCABULARY,
}

DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": tiny.WINDOW},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": tiny.WINDOW},
    "gemma3_text": _SLIDING,
    "phi": {},
    "phi3": {},
    "gpt2": {"n_positions": 64},
    "gpt_neox": {},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "bloom": {},
    "falcon": {"num_kv_heads": 1},
    "olmo2": {},
    "cohere": {},
    "glm4": {"head_dim": 8},
    "granite": {},
    "smollm3": {},
    "starcoder2": {},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": _LOCAL,
    "qwen2_moe": {**_FINE, "shared_expert_intermediate_size": 8},
    "qwen3_moe": {**_FINE, "mlp_only_layers": [0]},
    "olmoe": {"num_experts": 4, **_TOP2},
    "phimoe": _LOCAL,
    "granitemoe": _LOCAL,
    "gpt_oss": {**_LOCAL, "head_dim": 8, "sliding_window": tiny.WINDOW},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 8,
        "moe_layer_start_index": 1,
        "output_router_logits": True,
    },
    "jetmoe": {**_LOCAL, "kv_channels": 8},
    "deepseek_v2": {**_SHARED, **_LATENT},
    "deepseek_v3": {**_SHARED, **_LATENT},
    "glm4_moe": {**_SHARED, "head_dim": 8},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 8,
        "intermediate_size_mlp": 24,
        "layer_types": ["full_attention", "full_attention"],
    },
}
HYBRID: dict[str, dict[str, Any]] = {
    "jamba": {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        **_TOP2,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 32, "head_dim": 8},
    "granitemoehybrid": {**_MAMBA2, **_LOCAL, "shared_intermediate_size": 8, "layer_types": ["mamba", "attention"]},
    "zamba2": {
        "num_hidden_layers": 3,
        "mamba_d_state": 4,
        "mamba_headdim": 8,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "num_mem_blocks": 1,
        "attention_head_dim": 16,
        "num_key_value_heads": 2,
        "chunk_size": 8,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
        "chunk_size": 8,
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "moe_shared_expert_intermediate_size": 8,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen3_next": {**_FINE, **_DELTA, "shared_expert_intermediate_size": 8},
    "minimax": {**_LOCAL, "layer_types": ["linear_attention", "full_attention"], "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 16,
        "attention_window_size": 8,
        "head_dim": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "rwkv": {"attention_hidden_size": 16, "context_length": 64},
    "xlstm": {"num_heads": 2, "num_blocks": 2, "qk_dim_factor": 1.0, "v_dim_factor": 1.0, "chunk_size": 8},
}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {"text_config": {**_SIZES, **_SLIDING}, "vision_config": _VISION, "mm_tokens_per_image": 4},
    "gemma4": {
        "text_config": {**_SIZES, **_SLIDING, **_GEMMA4, "pad_token_id": 0},
        "vision_config": {**_VISION, "head_dim": 8, "num_key_value_heads": 2},
        "audio_config": None,
    },
    "qwen3_5": {"text_config": {**_SIZES, **_DELTA}},
    "got_ocr2": {
        "text_config": {**_SIZES, "model_type": "qwen2"},
        "vision_config": {
            **_VISION,
            "output_channels": 8,
            "window_size": 2,
            "global_attn_indexes": [],
            "mlp_dim": 24,
        },
    },
    "gemma4_text": {
        **_SLIDING,
        **_GEMMA4,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 8,
    },
    "gemma3n_text": {
        **_SLIDING,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "vocab_size_per_layer_input": tiny.VOCABULARY,
        "altup_num_inputs": 2,
    },
}
KINDS = {
    "dense": DENSE,
    "mixture of experts": MIXTURES,
    "hybrid": HYBRID,
    "recurrent": RECURRENT,
    "multimodal, as text": MULTIMODAL,
}
ARCHITECTURES = {name: options for kind in KINDS.values() for name, options in kind.items()}


def model(name: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A causal language model in training mode, with all weights shifted at random."""
    options = {**ARCHITECTURES[name], **overrides}
    config = AutoConfig.for_model(name, **(options if "text_config" in options else {**_SIZES, **options}))
    set_dropout(config, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config)
        shift(made, 0.1)
    if dtype == torch.float64:
        made.set_experts_implementation("eager")  # grouped products have no float64
    made.to(dtype).train()
    silence_routers(made)
    return made


def shift(module: torch.nn.Module, size: float, *, seed: int = 0) -> None:
    """Add noise to all weights that are trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def rows() -> list[Row]:
    """Pairs of uneven lengths, two of them of one prompt with a completion in common."""
    made = tiny.rows(4, branches=2, seed=4)
    return [*made, Row("again", 9, made[0].prompt, (made[0].branches[0], made[1].branches[1]))]


ROWS = rows()
SEQUENCES = [row.prompt + branch for row in ROWS for branch in row.branches]


def plain_logprobs(model: Any) -> list[Tensor]:
    """log π of the tokens of each completion, from one forward of its whole sequence alone."""
    found = []
    for row in ROWS:
        for branch in row.branches:
            ids = torch.tensor([row.prompt + branch])
            logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            found.append(logprobs.gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :, 0])
    return found


def assert_plain(model: Any, tokens: Tensor) -> None:
    """Compare log-probs [B, K, C] with those of separate plain forwards of the model."""
    with torch.no_grad():
        expected = plain_logprobs(model)
    for mine, other in zip(tokens.detach().flatten(0, 1), expected, strict=True):
        torch.testing.assert_close(mine[: len(other)], other, rtol=0, atol=TOLERANCE)


def plain_router_loss(model: Any) -> Tensor:
    """transformers' own load-balancing loss of the sequences without their last tokens, padded on the right."""
    ids = pad_sequence([torch.tensor(ids[:-1]) for ids in SEQUENCES], batch_first=True)
    mask = pad_sequence([torch.ones(len(ids) - 1, dtype=torch.long) for ids in SEQUENCES], batch_first=True)
    loss: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True).aux_loss
    return loss


def plain_loss(model: Any, reference: Any, coefficient: float) -> Tensor:
    """DPO's loss with β = 0.1, by separate plain forwards, and the router loss."""
    with torch.no_grad():
        before = torch.stack([logprobs.sum() for logprobs in plain_logprobs(reference)])
    rewards = 0.1 * (torch.stack([logprobs.sum() for logprobs in plain_logprobs(model)]) - before)
    loss = -logsigmoid(rewards[::2] - rewards[1::2]).mean()
    return loss + coefficient * plain_router_loss(model) if coefficient else loss


@dataclass(frozen=True)
class Result:
    """A line of the table; ``matrices`` is the number of weights that could have an adapter."""

    name: str
    kind: str
    architecture: str
    packed: bool
    targets: Targets
    left_out: dict[str, int]
    matrices: int
    router_loss: str


def check(name: str, folder: Path) -> Result:
    """Train one DPO step with all weights and one with LoRA, export both, and compare log-probs and gradients.

    Raises:
        AssertionError: something differs from separate plain forwards.
    """
    batch = collate(ROWS, packing=True)
    base = model(name)
    _check_whole(base, batch, folder / "whole")
    targets = _check_adapter(base, batch, folder)
    return Result(
        name=name,
        kind=next(kind for kind, names in KINDS.items() if name in names),
        architecture=type(base).__name__,
        packed=can_pack(base),
        targets=targets,
        left_out=left_out(base, targets),
        matrices=sum(left_out(base, Targets((), ())).values()),
        router_loss=_router_loss(base),
    )


def _router_loss(model: Any) -> str:
    if find_router_loss(model, "auto"):
        return "yes"
    return "none" if find_targets(model, None).experts else ""


def _check_whole(base: Any, batch: Batch, folder: Path) -> None:
    policy = copy.deepcopy(base)
    objective = DPO(Backbone(policy, with_reference=True))
    objective.configure_model()
    shift(policy, 0.02, seed=1)
    _step(objective, batch)
    router_loss = objective.trained.router_loss
    found = {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}
    before = copy.deepcopy(base)
    shift(before, 0.02, seed=1)
    plain_loss(before, base, router_loss.coefficient if router_loss else 0.0).backward()
    for parameter_name, parameter in before.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max()) + 1e-3
            torch.testing.assert_close(found[parameter_name], parameter.grad, rtol=0, atol=1e-4 * scale)
    tokens = objective.trained.logprobs(batch).tokens
    assert_plain(policy, tokens)
    objective.trained.tokenizer = tiny.word_tokenizer(tiny.CHATML)
    objective.trained.save_pretrained(folder)
    assert_plain(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokens)


def _check_adapter(base: Any, batch: Batch, folder: Path) -> Targets:
    policy = copy.deepcopy(base)
    targets = find_targets(policy, None)
    LoRA(enabled=True, rank=2).attach(policy, base="x")
    backbone = Backbone(policy, with_reference=False, adapter_reference=True)
    objective = DPO(backbone)
    objective.configure_model()
    assert_plain(base, backbone.logprobs(batch).tokens)
    shift(policy, 0.05, seed=1)
    assert_plain(base, backbone.reference_logprobs(batch).tokens)
    _step(objective, batch)
    without = [
        name for name, p in policy.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not without, f"adapters without effect: {without}"
    tokens = backbone.logprobs(batch).tokens
    assert_plain(policy, tokens)
    backbone.tokenizer = tiny.word_tokenizer(tiny.CHATML)
    backbone.save_pretrained(folder / "merged")
    assert_plain(AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32), tokens)
    (folder / "adapter").mkdir()
    save_adapter(policy, folder / "adapter")
    assert_plain(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter"), tokens)
    return targets


def _step(objective: DPO, batch: Batch) -> None:
    terms = objective.compute_batch(batch)[0].loss.values()
    torch.stack([term.total / (term.step_count or 1.0) for term in terms]).sum().backward()
    torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1).step()


# The page


def page(results: Sequence[Result]) -> str:
    """The documentation's page, in Markdown."""
    lines = [
        "# Architectures",
        "",
        "Each of these was built from its config, tiny and with random weights, and trained one DPO step with all",
        "weights and one with LoRA adapters (`model.lora.enabled=true`, no other key). Log-probs of packed or padded",
        "rows, of the trained policy and of its exports (all weights, merged adapters, the adapter on its base) were",
        f"those of separate plain forwards of `transformers` {version('transformers')} to 1e-5, and the gradients of",
        "the step those of a loss computed from such forwards. `python -m tests.architectures` writes this page.",
        "",
        "- **Rows**: packed, where one forward shares each prompt among its completions, or padded.",
        "- **LoRA on**: linear layers and tensors of experts with adapters by default; the LM head has none.",
        "- **Without**: matrices that get no adapter, and their share of the tiny model's matrices (embeddings and LM",
        "  head not counted). Routers stay as they are; layers like Mamba's `out_proj` are not called, as a kernel",
        "  reads their weights; parts for images are not used.",
        "- **Router loss**: added with `model.router_loss=auto` if the model's config has `output_router_logits=true`,",
        "  or with a coefficient. *None*: transformers has no such loss for the model, which balances its routers in",
        "  another way; a coefficient is refused.",
        "",
        "| Architecture | Kind | Rows | LoRA on | Without | Router loss | Exported |",
        "|---|---|---|---|---|---|---|",
        *(_line(result) for result in results),
        "",
        "PhiMoE's routers add no noise in training, with which the policy would differ from its reference before the",
        "first step. RWKV does not rescale its weights in evaluation, which adapters and exports would not survive.",
        "",
        "Adapters on experts are peft's `target_parameters` (peft 0.21 or later loads them), and have no dropout. For",
        "a program that does not read these, export the merged model (`model.lora.export=merged`, the default).",
    ]
    return "\n".join(lines) + "\n"


def _line(result: Result) -> str:
    layers = f"{len(result.targets.layers)} layers"
    if result.targets.experts:
        layers += f", {len(result.targets.experts)} tensors of experts"
    missing = ", ".join(result.left_out)
    if missing:
        missing += f" ({sum(result.left_out.values()) / result.matrices:.0%})"
    cells = [
        f"`{result.name}` ({result.architecture})",
        result.kind,
        "packed" if result.packed else "padded",
        layers,
        missing,
        result.router_loss,
        "model, adapter",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run all checks and write the page."""
    results = []
    for name in ARCHITECTURES:
        with TemporaryDirectory() as folder:
            results.append(check(name, Path(folder)))
    PAGE.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
