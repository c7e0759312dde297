"""``model.compile``: the same numbers and the same files, whatever the strategy, and no new code for other shapes."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halos.data.batches.collate import collate
from halos.policy.backbone import Backbone
from halos.policy.checkpointing import checkpoint_layers
from halos.policy.kernels.layers import repeated_layers
from halos.policy.logprobs.compiling import check_compiler, compile_layers, uncompiled
from halos.policy.logprobs.packed import can_pack
from halos.policy.lora import LoRA
from tests import tiny
from tests.fork import run_ranks
from tests.host_memory import copies
from tests.train_runs import run, train_as_rank

WORDS = (
    "loss=sft",  # whose layers need the fewest versions
    "trainer.max_steps=3",
    "checkpoint.every=2",
    "optim.eps=1e-4",
    "optim.lr=1e-3",
    "model.compile=true",
)
TWO = ("trainer.devices=2", "data.batch_size=2")
KINDS = {
    "ddp": ("strategy=ddp",),
    "fsdp": ("strategy=fsdp",),
    "checkpointed": ("strategy=fsdp", "model.gradient_checkpointing=true"),
}


@pytest.fixture(autouse=True)
def without_code(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Graphs are taken as ever, but not made into code: that takes a compiler, and long."""
    if "inductor" not in request.node.name:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def values_and_gradients(model: Any, size: int, **options: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    rows = tiny.rows(size, branches=2, seed=size)
    batch = collate(rows, **{"packing": True, "share_prompts": True, "mismatched": True, **options})
    found = Backbone(model, with_reference=False, head_chunk=5).logprobs(batch)
    found.sum[:, 0].sum().backward()
    return found.tokens.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.long
@pytest.mark.parametrize(
    "kind",
    [
        "packed",
        pytest.param("padded", marks=pytest.mark.slow),
        "checkpointed",
        pytest.param("offload", marks=pytest.mark.slow),
        pytest.param("lora", marks=pytest.mark.slow),
    ],
)
def test_the_numbers_are_the_same_and_other_lengths_need_no_new_code(kind: str) -> None:
    model = tiny.model(dtype=torch.float64).train()
    checkpoint_layers(model, "offload" if kind == "offload" else kind == "checkpointed")
    if kind == "lora":
        pytest.importorskip("peft")
        LoRA(enabled=True).attach(model, base="some/model")
    options = {"packing": False} if kind == "padded" else {}
    expected = [values_and_gradients(model, size, **options) for size in (3, 4, 6, 7)]
    torch._dynamo.reset()  # code of the same layers, from the other kinds
    compile_layers(model)
    before, found = graphs(), []
    with copies() as copied:
        for size in (3, 4, 6, 7):
            found.append(values_and_gradients(model, size, **options))
            if size == 4:
                between = graphs()
    assert bool(copied) == (kind == "offload")
    assert before < between == graphs()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_code_of_inductor_gives_the_same_numbers() -> None:
    check_compiler("cpu")
    model = tiny.model(num_hidden_layers=1).train()
    expected = values_and_gradients(model, 4)
    compile_layers(model)
    torch.testing.assert_close(values_and_gradients(model, 4), expected, rtol=1e-5, atol=1e-5)


def test_whether_rows_can_be_packed_is_tried_out_without_new_code() -> None:
    model = tiny.model()
    compile_layers(model)
    before = graphs()
    assert can_pack(model)
    assert graphs() == before


def test_names_stay_and_the_plain_model_can_be_had(tmp_path: Path) -> None:
    model = tiny.model()
    names = list(model.state_dict())
    layer = repeated_layers(model)[0]
    compile_layers(model)
    assert list(model.state_dict()) == names
    assert "forward" in layer.__dict__
    with uncompiled(model):
        assert "forward" not in layer.__dict__
        model.save_pretrained(tmp_path)
    assert "forward" in layer.__dict__


def runs_on_a_rank(folder: Path) -> dict[str, list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        found = {}
        for name, words in KINDS.items():
            before = graphs() if hasattr(torch, "_dynamo") else 0
            found[name] = train_as_rank(folder / name, *WORDS, *TWO, *words)["train_loss"]
            assert graphs() > before, name
    return found


@pytest.mark.slow
@pytest.mark.runs
def test_a_run_is_that_without_it_and_goes_on_without_it(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", *WORDS, "model.compile=false")["train_loss"]
    before = graphs()
    assert run(tmp_path / "one", *WORDS, "sampling.size=4")["train_loss"] == pytest.approx(plain, rel=1e-5)
    assert graphs() > before
    resumed = f"resume='{tmp_path}/one/checkpoints/step_2.ckpt'"
    again = run(tmp_path / "resumed", *WORDS, "model.compile=false", resumed)
    assert again["train_loss"] == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.ranks
def test_runs_are_those_without_it_under_every_strategy(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", *WORDS, "model.compile=false")["train_loss"]
    for rank in run_ranks(partial(runs_on_a_rank, tmp_path)):
        for name, losses in rank.items():
            assert losses == pytest.approx(plain, rel=1e-5), name


def test_a_missing_compiler_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"model\.compile: expected torch.compile to work, which needs a C\+\+ comp"):
        run(tmp_path / "run", *WORDS)
    assert not (tmp_path / "run").exists()
