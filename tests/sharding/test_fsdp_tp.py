"""``strategy=fsdp_tp``: the same results as on one device, less in each process, and checkpoints that move."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halos.loop.reference_pass import _numbers_key
from halos.objectives import BCO, DPO, KTO, PPO, BradleyTerry, Objective
from halos.optim import Adafactor, AdamW, BitsAndBytesAdamW, RMSprop
from halos.policy.loading import ModelSpec
from halos.policy.lora import LoRA
from halos.sharding.consolidate import consolidate
from halos.sharding.fsdp_tp import FSDPTP, check_model
from halos.toy.model import REFERENCE_DIR
from tests.fork import run_ranks
from tests.host_memory import offloaded
from tests.sharding.test_fsdp import BFLOAT16, counted
from tests.test_strategies import Run, as_rank, assert_alike, run as run_tiny
from tests.train_runs import run, run_until, train_as_rank

# Every number of a step, in float64: gradients, norms that clip, metrics; of losses with an average over the
# micro-step, without, with a value head, with running means, with a reward head


def divided(kind: type[Objective], *, groups: int, **options: Any) -> Run:
    return offloaded(run_tiny, kind, FSDPTP(tensor_parallel_size=2), ranks=2 * groups, key_value_heads=2, **options)


def alone(kind: type[Objective]) -> Run:
    return run_tiny(kind, "auto", ranks=1, key_value_heads=2)


WAYS: list[tuple[type[Objective], dict[str, Any]]] = [
    (KTO, {}),
    (PPO, {}),
    (DPO, {"accumulate": 3}),
]
OTHER_WAYS: list[tuple[type[Objective], dict[str, Any]]] = [
    (DPO, {}),
    (BCO, {}),
    (BradleyTerry, {}),
    (DPO, {"checkpointing": True}),
    (DPO, {"checkpointing": "selective"}),
    (DPO, {"checkpointing": "offload"}),
]


def in_one_group(ways: Any) -> list[Run]:
    return [divided(kind, groups=1, **options) for kind, options in ways]


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("ways", [WAYS, OTHER_WAYS], ids=["some", "others"])
def test_a_group_of_two_processes_trains_as_one(ways: Any) -> None:
    expected = [alone(kind) for kind, _ in ways]
    for found in run_ranks(partial(as_rank, in_one_group, ways)):
        for mine, theirs in zip(found, expected, strict=True):
            assert_alike(mine, theirs)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("kind", [KTO, pytest.param(PPO, marks=pytest.mark.slow)])
def test_two_groups_of_two_train_as_one(kind: type[Objective]) -> None:
    expected = alone(kind)
    for found in run_ranks(partial(as_rank, divided, kind, groups=2), 4):
        assert_alike(found, expected)


# Whole runs of the toy world

ASKED = "model.statistics=[entropy]"
WORDS = (
    "model.reference=live",
    "trainer.max_steps=5",
    "checkpoint.every=3",
    "optim.lr=1e-3",
    ASKED,
    "sampling.kl=true",
)
TWO = ("trainer.devices=2", "strategy=fsdp_tp", "strategy.data_parallel_size=1")
RMSPROP = ("optim=rmsprop", "optim.eps=1e-2", "optim.warmup=0")
OTHERS = {"dpo": ("loss=dpo", "model.reference=cached"), "ppo": ("loss=ppo",), "csft": ("loss=csft", *RMSPROP)}
MOVING = ("reference_sync.every=2",)


def runs_on_a_rank(folder: Path) -> dict[str, Any]:
    shared = (*WORDS, *TWO)
    replies = ("sampling.size=4", "sampling.prompts=2", "logger=tensorboard")
    found: dict[str, Any] = {"counted": counted(train_as_rank, folder / "tp", *shared, *replies)}
    file = folder / "auto/checkpoints/step_3.ckpt"
    found["from auto"] = train_as_rank(folder / "from-auto", *shared, f"resume='{file}'")
    return found


def more_runs_on_a_rank(folder: Path) -> dict[str, Any]:
    shared = (*WORDS, *TWO)
    cached = f"cache_dir={folder}/cache"
    sharded = "strategy.trainer.sharded_checkpoints=true"
    found: dict[str, Any] = {}
    for name, words in OTHERS.items():
        found[name] = train_as_rank(folder / f"tp-{name}", *shared, *words, cached)
    for precision in BFLOAT16:
        found[precision] = train_as_rank(folder / precision, *shared, cached, f"precision={precision}")
    found["moving"] = train_as_rank(folder / "tp-moving", *shared, *MOVING)
    found["folder"] = train_as_rank(folder / "folder", *shared, sharded)
    file = folder / "tp/checkpoints/step_3.ckpt"
    found["from own"] = train_as_rank(folder / "from-own", *shared, f"resume='{file}'")
    file = folder / "folder/checkpoints/step_3.ckpt"
    found["from folder"] = train_as_rank(folder / "from-folder", *shared, sharded, f"resume='{file}'")
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    one = counted(run, folder / "auto", *WORDS, "sampling.size=4")
    return {"folder": folder, "one": one, "ranks": run_ranks(partial(runs_on_a_rank, folder), timeout=400)}


@pytest.fixture(scope="module")
def more(runs: dict[str, Any]) -> list[dict[str, Any]]:
    return run_ranks(partial(more_runs_on_a_rank, runs["folder"]), timeout=400)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_model(one: Path, other: Path) -> None:
    found, expected = weights_of(one), weights_of(other)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.runs
def test_losses_metrics_and_model_are_those_of_one_device(runs: dict[str, Any]) -> None:
    expected, _ = runs["one"]
    assert len(set(expected["train_loss"])) == 5
    assert expected["metrics"]["entropy"] > 0.1
    for rank in runs["ranks"]:
        found, _ = rank["counted"]
        assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-4)
        assert found["world_size"] == 2
        assert [found[key] for key in ("examples", "tokens")] == [expected[key] for key in ("examples", "tokens")]
    assert runs["ranks"][0]["counted"][0]["samples"] == pytest.approx(expected["samples"], abs=1e-4)
    assert_same_model(runs["folder"] / "tp", runs["folder"] / "auto")


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_too(name: str, runs: dict[str, Any], more: Any, tmp_path: Path) -> None:
    expected = run(tmp_path / "auto", *WORDS, *OTHERS[name])
    for rank in more:
        assert rank[name]["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert rank[name]["metrics"] == pytest.approx(expected["metrics"], rel=1e-3, abs=1e-4)
    assert_same_model(runs["folder"] / f"tp-{name}", tmp_path / "auto")


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.runs
def test_each_process_holds_half_but_for_the_norms_of_layers(runs: dict[str, Any]) -> None:
    _, alone = runs["one"]
    norms = 2 * 2 * 64
    for rank in runs["ranks"]:
        for name, elements in alone.items():
            copies = 2 if name == "optimizer" else 1
            held = (elements - copies * norms) / 2 + copies * norms
            assert rank["counted"][1][name] == pytest.approx(held, rel=2e-3), name


def assert_goes_on(folder: Path, file: Path, expected: dict[str, Any], whole: Path) -> None:
    summary = run(folder, *WORDS, f"resume='{file}'")
    assert summary["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    assert_same_model(folder, whole)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.runs
def test_checkpoints_move_between_strategies(runs: dict[str, Any]) -> None:
    folder, (expected, _) = runs["folder"], runs["one"]
    for rank in runs["ranks"]:
        assert rank["from auto"]["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    assert_goes_on(folder / "back", folder / "tp/checkpoints/step_3.ckpt", expected, folder / "auto")


@pytest.mark.slow
@pytest.mark.ranks
def test_checkpoints_move_within_the_strategy_and_from_folders(runs: dict[str, Any], more: Any) -> None:
    folder, (expected, _) = runs["folder"], runs["one"]
    for rank in more:
        for name in ("folder", "from own", "from folder"):
            assert rank[name]["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5), name
    consolidate(folder / "folder/checkpoints/step_3.ckpt", folder / "whole.ckpt")
    assert_goes_on(folder / "whole", folder / "whole.ckpt", expected, folder / "auto")


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("precision", BFLOAT16)
def test_bfloat16_follows_float32(precision: str, runs: dict[str, Any], more: Any) -> None:
    expected = runs["one"][0]["train_loss"]
    for rank in more:
        assert rank[precision]["train_loss"][0] == pytest.approx(0.5, abs=1e-6)  # the reference is rounded alike
        assert rank[precision]["train_loss"] == pytest.approx(expected, rel=2e-2)
        assert rank[precision]["train_loss"] != pytest.approx(expected, rel=1e-5)
    assert {tensor.dtype for tensor in weights_of(runs["folder"] / precision).values()} == {BFLOAT16[precision]}


@pytest.mark.slow
@pytest.mark.ranks
def test_the_reference_may_move(runs: dict[str, Any], more: Any, tmp_path: Path) -> None:
    expected = run(tmp_path / "auto", *WORDS, *MOVING)["train_loss"]
    assert expected[2:] != pytest.approx(runs["one"][0]["train_loss"][2:], rel=1e-5)
    for rank in more:
        assert rank["moving"]["train_loss"] == pytest.approx(expected, rel=1e-5)


FOUR = (*WORDS, "trainer.devices=4", "data.batch_size=2", "strategy=fsdp_tp", "model.reference=cached")


@pytest.mark.slow
@pytest.mark.ranks
def test_two_groups_of_two_are_stopped_and_train_as_one_device(runs: dict[str, Any]) -> None:
    folder, (expected, _) = runs["folder"], runs["one"]
    words = (folder / "four", *FOUR, f"cache_dir={folder}/cache-of-four")
    run_ranks(partial(as_rank, run_until, "on_train_batch_start", 4, *words), 4)
    for summary in run_ranks(partial(train_as_rank, *words, "resume=auto"), 4):
        assert summary["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
        assert (summary["world_size"], summary["examples"]) == (4, expected["examples"])
    assert_same_model(folder / "four", folder / "auto")


def test_log_probs_that_are_rounded_otherwise_are_kept_apart() -> None:
    backbone: Any = SimpleNamespace(sharded=True, device=torch.device("cpu"))
    strategies = [SimpleNamespace(), *(SimpleNamespace(tensor_parallel_size=size) for size in (2, 4))]

    def keys(precision: str) -> list[str]:
        trainers: list[Any] = [SimpleNamespace(precision=precision, strategy=strategy) for strategy in strategies]
        return [_numbers_key(backbone, trainer) for trainer in trainers]

    assert keys("32-true") == ["32-true"] * 3
    for precision in ("bf16-true", "bf16-mixed"):
        assert len(set(keys(precision))) == 3
        on_cpu, backbone.device = keys(precision), torch.device("meta")
        assert not set(keys(precision)) & set(on_cpu)  # attention is rounded otherwise there
        backbone.device = torch.device("cpu")


# What is refused

TOY: dict[str, Any] = {"path": str(REFERENCE_DIR)}


def test_the_toy_model_is_not_refused_and_optimizers_that_were_not_tried_are() -> None:
    for optim in (AdamW(), RMSprop()):
        check_model(ModelSpec(**TOY), optim, 2)
    for other in (Adafactor(), BitsAndBytesAdamW()):
        with pytest.raises(ValueError, match=f"optim: expected AdamW or RMSprop .*, found {type(other).__name__}"):
            check_model(ModelSpec(**TOY), other, 2)


@pytest.mark.parametrize(
    ("options", "ranks", "said"),
    [
        ({"compile": True}, 2, "model.compile: expected false with strategy=fsdp_tp, found true"),
        ({"packed_attention": "flex"}, 2, "model.packed_attention: expected pieces"),
        ({"dropout": 0.1}, 2, "model.dropout: expected 0"),
        ({"lora": LoRA(enabled=True)}, 2, "model.lora.enabled: expected false"),
        ({}, 3, "a divisor of the 4 num_attention_heads of LlamaForCausalLM, found 3"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], ranks: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_model(ModelSpec(**TOY, **options), AdamW(), ranks)


def test_a_model_that_cannot_be_divided_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a divisor of the 4 num_attention_heads of LlamaForCausalLM, found 3"):
        run(tmp_path / "run", "strategy=fsdp_tp", "strategy.tensor_parallel_size=3", "trainer.devices=3")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("groups", "devices", "said"),
    [
        (None, 3, "tensor_parallel_size: expected a divisor of the 3 devices"),
        (3, 4, r"data_parallel_size: expected 2 \(4 devices in groups of 2\) or null, found 3"),
    ],
)
def test_devices_make_whole_groups(groups: int | None, devices: int, said: str) -> None:
    strategy = FSDPTP(tensor_parallel_size=2, data_parallel_size=groups)
    with pytest.raises(ValueError, match=said):
        strategy.check(devices)


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size: expected a whole number from 1 on, found 0"):
        FSDPTP(tensor_parallel_size=0)
    with pytest.raises(ValueError, match="data_parallel_size: expected a whole number from 1 on or null, found 0"):
        FSDPTP(tensor_parallel_size=2, data_parallel_size=0)
    FSDPTP(tensor_parallel_size=2).check(4)
    FSDPTP(tensor_parallel_size=2, data_parallel_size=2).check(4)
