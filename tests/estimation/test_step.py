"""A traced step against the same step on a CPU: memory by the allocator's events, operations by PyTorch's counter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig

from halos.data.batches.collate import collate
from halos.estimation import functions, rows
from halos.estimation.division import EXCHANGE, GATHERED, WHOLE_GRADIENTS, Division
from halos.estimation.step import Batching, Plan, Traced, trace
from halos.estimation.tracer import Tracer
from halos.objectives import DPO, KTO, SFT, Objective
from halos.optim import AdamW, RMSprop
from halos.policy.kernels import matmul
from halos.policy.loading import ModelSpec
from halos.policy.lora import LoRA
from halos.training.gpus import GPUS
from tests.estimation.measured import measured
from tests.loop_runs import OBJECTIVES, REQUIRED

PROMPT, COMPLETION, LAYERS = 60, 40, 3
SIZES: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOLERANCE = 0.01
"""Asked for are 10 %; the cases below differ by up to 0.6 %."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model of which there is only the config."""
    made = tmp_path_factory.mktemp("model")
    LlamaConfig(**SIZES).save_pretrained(made)
    return made


def plan(folder: Path, *, objective: Any = DPO, precision: str = "32-true", **options: Any) -> Plan:
    spec = {name: options.pop(name) for name in list(options) if name in ModelSpec.__dataclass_fields__}
    defaults: dict[str, Any] = {"optim": AdamW(), "device": "cpu", "batching": Batching(examples=4), "clip": 1.0}
    defaults["gpu"] = GPUS["h100"]
    return Plan(
        spec=ModelSpec(path=str(folder), random_weights=True, **({"reference": "live"} | spec)),
        objective=objective,
        precision=precision,
        **(defaults | options),
    )


CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"batching": Batching(examples=4, packing=False)},
    "mixed, checkpointed": {"precision": "bf16-mixed", "gradient_checkpointing": True},
    "selective": {"gradient_checkpointing": "selective"},
    "adapter": {"lora": LoRA(enabled=True), "reference": "adapter"},
}
SLOW_CASES: dict[str, dict[str, Any]] = {
    "KTO": {"objective": KTO},
    "accumulated": {"objective": SFT, "reference": "cached", "batching": Batching(examples=4, accumulate=2)},
    "cached": {"reference": "cached"},
    "checkpointed": {"gradient_checkpointing": True},
    "selective, mixed": {"gradient_checkpointing": "selective", "precision": "bf16-mixed"},
    "divided rows": {"batching": Batching(examples=4, max_tokens=300)},
    "all logits": {"head_chunk": None},
    "small chunks": {"head_chunk": 64},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "plain modules, RMSprop": {"optim": RMSprop(), "cpu_kernels": False},
}


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)], ids=str
)
def test_memory_and_operations_are_those_of_a_real_step(folder: Path, case: str) -> None:
    made = plan(folder, **(CASES | SLOW_CASES)[case])
    traced = trace(made, PROMPT, COMPLETION)
    memory, operations = measured(made, PROMPT, COMPLETION)
    # On AMD processors with AVX-512 a second backward pass in a step takes 2 % more than is traced.
    tolerance = 0.025 if case in ("accumulated", "divided rows") else TOLERANCE
    assert sum(traced.memory.values()) == pytest.approx(memory, rel=tolerance)
    assert traced.micro_batch.operations == pytest.approx(operations, rel=1e-3)


def test_parts_that_are_known_by_hand(folder: Path) -> None:
    hidden, inner, layers, words = 128, 352, LAYERS, 2000
    weights = layers * (hidden * hidden * 3 + 3 * hidden * inner + 2 * hidden) + hidden + 2 * words * hidden
    traced = trace(plan(folder, batching=Batching(examples=1)), 5, 4)
    buffers = 2 * 16 * 4  # rotary frequencies of half a head, twice
    assert traced.memory["weights"] == traced.memory["reference"] == 4 * weights + buffers
    assert traced.memory["optimizer"] == pytest.approx(8 * weights, rel=1e-3)  # and a number of steps for each tensor
    # The prompt is fed once, the last token of a completion not at all. Policy and reference have a forward pass.
    fed, scored = 5 + 2 * 3, 2 * 4
    products = 2 * layers * (hidden * hidden * 3 + 3 * hidden * inner) * fed
    head = 2 * words * hidden * scored
    assert traced.micro_batch.operations == pytest.approx(4 * (products + head), rel=0.02)  # and attention


@pytest.mark.parametrize("kind", [DPO, KTO, SFT])
def test_rows_have_the_lengths_that_are_asked_for_and_share_nothing(kind: type[Objective]) -> None:
    needs = kind(None).data_needs()
    made = rows.rows(needs, 3, 7, 5)
    assert all(len(row.prompt) == 7 and {len(branch) for branch in row.branches} == {5} for row in made)
    branches = 1 + (kind is DPO)
    (first, *_) = collate(made, packing=True, mismatched=needs.flags.mismatched).packs
    assert len(first.input_ids) == 3 * (7 + 4 * branches)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBJECTIVES, ids=lambda kind: kind.__name__)
def test_every_objective_can_be_traced(folder: Path, kind: Any) -> None:
    made = plan(folder, objective=lambda backbone: kind(backbone, **REQUIRED.get(kind, {})))
    assert trace(made, 6, 4).micro_batch.operations > 0


# A GPU's kernels, and several devices, which cannot be measured here


def test_cuda_has_no_blocks_of_a_cpu_and_keeps_no_scores(folder: Path) -> None:
    cpu, cuda = (trace(plan(folder, device=device), PROMPT, COMPLETION) for device in ("cpu", "cuda"))
    # On a CPU the head has blocks of 16 rows.
    assert cuda.micro_batch.kernels < cpu.micro_batch.kernels
    assert cuda.micro_batch.operations == pytest.approx(cpu.micro_batch.operations, rel=1e-6)
    long, longer = (trace(plan(folder, device="cuda", batching=Batching(examples=1)), n, 8) for n in (1000, 2000))
    # All scores would be four times as large.
    assert longer.memory["activations"] < 2.1 * long.memory["activations"]


# Checkpointing policies

LONG, SHORT = 600, 400
EXAMPLES = 4


def policies(folder: Path, **options: Any) -> dict[bool | str, Traced]:
    # SFT has no prompts to share, and feeds all tokens of an example but the last. A small head, so that layers count.
    shared: dict[str, Any] = {"objective": SFT, "reference": "cached", "device": "cuda", "precision": "bf16-true"}
    return {
        policy: trace(plan(folder, gradient_checkpointing=policy, head_chunk=512, **(shared | options)), LONG, SHORT)
        for policy in (False, True, "selective", "offload")
    }


@pytest.fixture(scope="module")
def traced(folder: Path) -> dict[bool | str, Traced]:
    return policies(folder)


def test_selective_lies_between_and_offload_keeps_the_least(traced: dict[bool | str, Traced]) -> None:
    kept = {policy: step.memory["activations"] for policy, step in traced.items()}
    assert kept["offload"] < 0.5 * kept[True] < 0.25 * kept["selective"]
    assert kept["selective"] < 0.75 * kept[False]
    totals = {policy: sum(step.memory.values()) for policy, step in traced.items()}
    assert totals["offload"] < totals[True] < totals["selective"] < totals[False]


def test_the_host_holds_the_input_of_every_layer(traced: dict[bool | str, Traced]) -> None:
    inputs = LAYERS * EXAMPLES * (LONG + SHORT - 1) * 128 * 2
    assert {policy: step.host_memory for policy, step in traced.items()} == {
        **dict.fromkeys((False, True, "selective"), 0),
        "offload": inputs,
    }
    # The device has them no longer, but for the one that is computed again.
    kept = {policy: step.memory["activations"] for policy, step in traced.items()}
    assert kept[True] - kept["offload"] == inputs


def test_only_true_and_offload_compute_products_again(traced: dict[bool | str, Traced]) -> None:
    work = {policy: step.micro_batch for policy, step in traced.items()}
    assert work["selective"].operations == work[False].operations
    assert work["offload"].operations == work[True].operations
    tokens = EXAMPLES * (LONG + SHORT - 1)
    # All products of a layer but the last one, whose result no gradient needs, and attention.
    products = 2 * LAYERS * (3 * 128 * 128 + 2 * 128 * 352) * tokens
    scores = 2 * LAYERS * 2 * 128 * EXAMPLES * (LONG + SHORT - 1) ** 2
    assert work[True].operations - work[False].operations == pytest.approx(products + scores, rel=0.01)


def test_copies_take_the_time_of_the_hosts_bus(traced: dict[bool | str, Traced]) -> None:
    waiting = 2 * traced["offload"].host_memory / (GPUS["h100"].host_bandwidth * 1e9)
    added = traced["offload"].micro_batch.seconds - traced[True].micro_batch.seconds
    assert added == pytest.approx(waiting, rel=1e-6)
    assert traced["offload"].micro_batch.kernels == traced[True].micro_batch.kernels + 2 * LAYERS


def test_scores_that_are_products_are_not_kept(folder: Path) -> None:
    def activations(policy: bool | str, prompt: int) -> float:
        made = plan(
            folder,
            attention="eager",
            gradient_checkpointing=policy,
            objective=SFT,
            reference="cached",
            batching=Batching(examples=1, packing=False),
        )
        return trace(made, prompt, 8).memory["activations"]

    # The mask, which all layers share, is kept by every policy.
    short, long = (activations("selective", length) - activations(True, length) for length in (1000, 2000))
    assert 0 < long < 2.1 * short
    assert activations(False, 2000) > 3 * activations(False, 1000)


@pytest.mark.slow
def test_on_a_cpu_offload_is_true(folder: Path) -> None:
    found = policies(folder, device="cpu")
    assert found["offload"] == found[True]


# Several devices


def test_fsdp_divides_what_it_divides(folder: Path) -> None:
    whole = trace(plan(folder, precision="bf16-mixed"), PROMPT, COMPLETION)
    division = Division(devices=4, shards=4, compute_dtype=torch.bfloat16)
    made = plan(folder, precision="bf16-mixed", division=division)
    divided = trace(made, PROMPT, COMPLETION)
    for part in ("weights", "reference", "optimizer"):
        assert divided.memory[part] == pytest.approx(whole.memory[part] / 4, rel=1e-3)
    tables, layer = 2 * 2000 * 128 + 128, 3 * 128 * 128 + 3 * 128 * 352 + 2 * 128
    assert divided.memory[GATHERED] == 2 * (tables + 2 * layer)
    # At the end of a short step all gradients are there, those of embeddings and head once more in float32.
    short = trace(replace(made, batching=Batching(examples=1)), 2, 2)
    assert short.memory[WHOLE_GRADIENTS] == 2 * tables
    assert short.memory["gradients"] == 4 * LAYERS * layer / 4
    assert short.memory[EXCHANGE] == 4 * tables
    offloaded = trace(replace(made, division=replace(division, offload=True)), 2, 2)
    assert not {"weights", "reference", "optimizer", "gradients"} & {n for n, size in offloaded.memory.items() if size}
    kept = trace(replace(made, division=replace(division, reshard=False)), 2, 2)
    assert kept.memory[GATHERED] == 2 * (tables + LAYERS * layer)


def test_ddp_has_buckets_of_gradients(folder: Path) -> None:
    alone, ranks = (trace(plan(folder, division=d), 2, 2) for d in (Division(), Division(devices=2, ddp=True)))
    assert ranks.memory[EXCHANGE] == pytest.approx(alone.memory["weights"], rel=1e-3)


# The tracer


def test_the_peak_is_that_of_pytorchs_own_tracker() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).to("meta")
    inputs = torch.empty(32, 64, device="meta")

    def run() -> None:
        model(inputs).sum().backward()
        model.zero_grad()

    theirs = MemTracker()
    theirs.track_external(model, inputs)
    with theirs:
        run()
    ours = Tracer({}, GPUS["h100"], vocabulary=10_000)
    with ours:
        ours.relabel("weights", [*model.parameters(), inputs])
        ours.memory.begin()
        run()
    (peak,) = [parts["Total"] for parts in theirs.get_tracker_snapshot("peak").values()]
    assert sum(ours.memory.peak.values()) == peak
    assert ours.memory.alive["activations"] == 0


def test_a_share_decides_which_moment_is_the_fullest() -> None:
    def peak(share: float) -> dict[str, float]:
        tracer = Tracer({"divided": share}, GPUS["h100"], vocabulary=10_000)
        with tracer:
            with tracer.labelled("divided"):
                first = torch.empty(100, device="meta")
            del first
            second = torch.empty(40, device="meta")
            del second
        return tracer.memory.peak

    assert peak(1.0) == {"divided": 400}
    assert peak(0.25) == {"activations": 160}


def test_seconds_are_those_of_operations_or_of_memory() -> None:
    gpu = GPUS["h100"]

    def seconds(size: int, dtype: torch.dtype) -> float:
        tracer = Tracer({}, gpu, vocabulary=10_000_000)
        left = torch.empty(size, size, device="meta", dtype=dtype)
        with tracer:
            left @ left
        assert (tracer.work.kernels, tracer.work.operations) == (1, 2 * size**3)
        return tracer.work.seconds

    assert seconds(8192, torch.bfloat16) == pytest.approx(2 * 8192**3 / 989e12)
    assert seconds(8192, torch.float32) == pytest.approx(2 * 8192**3 / 67e12)
    assert seconds(64, torch.bfloat16) == pytest.approx(3 * 2 * 64**2 / 3350e9)


# Faults, planted: each moves a result by more than the comparisons above allow


def other_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(matmul, "device_type", lambda tensor: "meta")


def scores_are_kept(patch: pytest.MonkeyPatch) -> None:
    # PyTorch's own choice for the meta device.
    attend: Any = torch.nn.functional.scaled_dot_product_attention
    patch.setattr(functions.DeviceFunctions, "_attend", lambda _, *args, **options: attend(*args, **options))


def no_copies_of_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(functions, "LOWERED", set())


def freed_late(patch: pytest.MonkeyPatch) -> None:
    free, late = Tracer._free, list[int]()

    def delayed(self: Tracer, key: int) -> None:
        late.append(key)
        if len(late) > 100:
            free(self, late.pop(0))

    patch.setattr(Tracer, "_free", delayed)


SLOW_FAULTS = [pytest.param(fault, marks=pytest.mark.slow) for fault in (no_copies_of_weights, freed_late)]


@pytest.mark.parametrize("fault", [other_kernels, scores_are_kept, *SLOW_FAULTS])
def test_a_planted_fault_shows(folder: Path, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(folder, precision="bf16-mixed" if fault is no_copies_of_weights else "32-true")
    sizes = [sum(trace(made, PROMPT, COMPLETION).memory.values())]
    fault(monkeypatch)
    sizes.append(sum(trace(made, PROMPT, COMPLETION).memory.values()))
    assert abs(sizes[1] / sizes[0] - 1) > 2 * TOLERANCE
