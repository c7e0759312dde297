"""``model.cpu_kernels``: models that are loaded compute by the CPU kernels or as they are; others stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from halos.data.batches.collate import collate
from halos.policy.backbone import Backbone
from halos.policy.kernels import matmul
from halos.policy.kernels.elementwise import Changed
from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.lookup import Policy
from halos.policy.lora import LoRA
from halos.sharding.sharding import Sharding
from halos.sharding.weights import make_backbone
from tests import tiny
from tests.fork import run_ranks

NORMS_AND_MLPS = 2 * 3 + 1  # two layers of two norms and an MLP, and the last norm
LINEARS = 2 * (4 + 3) + 1  # attention and MLP of two layers, and the LM head


def changed(model: nn.Module) -> tuple[int, int]:
    modules = list(model.modules())
    return sum(isinstance(m, Changed) for m in modules), sum(isinstance(m, matmul.Linear) for m in modules)


def backbone(spec: ModelSpec, *, with_reference: bool = False, sharding: Sharding | None = None) -> Backbone:
    spec = replace(spec, reference="live", reference_path=None) if with_reference else spec
    return make_backbone(spec, sharding, LoadOptions(), reference=with_reference)


WAYS: dict[str, Callable[[ModelSpec], Any]] = {
    "load": ModelSpec.load,
    "skeleton": ModelSpec.skeleton,
    "policy": lambda spec: backbone(spec).policy,
    "live reference": lambda spec: backbone(spec, with_reference=True).reference,
    "reference_path": lambda spec: backbone(spec.of_reference()).policy,
    "evaluation": lambda spec: Policy("name", spec).load(device="cpu", precision="32-true"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor on which oneDNN's products are faster."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_load_a_model_heeds_the_switch(way: str, enabled: bool, folder: Path) -> None:
    model = WAYS[way](ModelSpec(path=str(folder), reference_path=str(folder), cpu_kernels=enabled))
    assert changed(model) == ((NORMS_AND_MLPS, LINEARS) if enabled else (0, 0))


def test_the_linear_layers_of_adapters_take_part(folder: Path) -> None:
    model = ModelSpec(path=str(folder), lora=LoRA(enabled=True)).load()
    assert changed(model) == (NORMS_AND_MLPS, LINEARS + 2 * 14)


def on_a_rank(folder: Path) -> list[tuple[int, int]]:
    torch.distributed.init_process_group("gloo")
    matmul.onednn_is_faster = lambda: True  # type: ignore[assignment]  # a rank is a process of its own
    sharding = Sharding(mesh=init_device_mesh("cpu", (2,)), device=torch.device("cpu"))
    found = []
    for enabled in (True, False):
        made = backbone(ModelSpec(path=str(folder), cpu_kernels=enabled), with_reference=True, sharding=sharding)
        found += [changed(model) for model in (made.policy, made.reference, *made.skeleton)]
    return found


@pytest.mark.ranks
def test_sharded_models_and_what_is_exported_of_them_heed_it_too(folder: Path) -> None:
    for found in run_ranks(partial(on_a_rank, folder)):
        assert found == 3 * [(NORMS_AND_MLPS, LINEARS)] + 3 * [(0, 0)]


def test_the_caches_of_kernels_are_limited_only_where_they_are_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited: list[int] = []
    monkeypatch.setattr("halos.policy.kernels.cpu.limit_kernel_caches", lambda: limited.append(1))
    ModelSpec(path=str(folder), cpu_kernels=False).load()
    assert not limited
    ModelSpec(path=str(folder)).load()
    assert limited


def test_a_model_in_hand_is_used_as_it_is() -> None:
    made = Backbone(tiny.model(), with_reference=True)
    assert changed(made.policy) == changed(made.reference) == (0, 0)


def test_log_probs_are_the_same_to_the_bit_and_gradients_to_rounding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)  # its sums are rounded otherwise
    batch = collate(tiny.rows(4, seed=1, vocabulary=20))
    found = []
    for enabled in (True, False):
        made = backbone(ModelSpec(path=str(folder), cpu_kernels=enabled))
        tokens = made.logprobs(batch).tokens
        found.append((tokens, torch.autograd.grad(tokens.sum(), list(made.parameters()))))
    (with_kernels, gradients), (plain, expected) = found
    assert torch.equal(with_kernels, plain)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
