"""The parts of the check, in their order."""

from __future__ import annotations

from functools import partial

from halos.gpu_check import device_choices, exactness, optimizers, runs, speed, waits
from halos.gpu_check.part import Part

_NUMBERS = "the precision of products (torch.get_float32_matmul_precision), the versions of PyTorch and the driver, and"
_NCCL = "NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, NCCL_P2P_DISABLE=1 as a trial; docs/symptoms.md"
_MODEL = f"{_NUMBERS} halos/policy/logprobs"

PARTS = (
    Part(name="pieces", check=exactness.pieces, limit=60, look_at=f"{_MODEL}/attention.py"),
    Part(name="padded", check=exactness.padded, limit=60, look_at=f"{_MODEL}/completions.py"),
    Part(name="head_chunks", check=exactness.head_chunks, limit=60, look_at=f"{_MODEL}/chunked_head.py"),
    Part(
        name="head_rows",
        check=device_choices.head_rows,
        limit=60,
        look_at=f"{_MODEL}/head_rows.py; model.head_chunk=512",
    ),
    Part(name="bf16", check=exactness.bf16, limit=60, look_at=f"{_MODEL}/precision.py"),
    Part(name="flex", check=exactness.flex, limit=120, look_at=f"{_MODEL}/flex.py; model.packed_attention=pieces"),
    Part(name="varlen", check=exactness.varlen, limit=60, look_at=f"{_MODEL}/varlen.py; model.packed_attention=pieces"),
    Part(name="attention", check=device_choices.attention, limit=240, look_at=f"{_MODEL}/attention_choice.py"),
    Part(name="liger", check=exactness.liger, limit=90, look_at="halos/policy/kernels/liger.py; model.liger=false"),
    Part(name="selective", check=exactness.selective, limit=60, look_at="halos/policy/checkpointing.py"),
    Part(name="offload", check=exactness.offload, limit=60, look_at="halos/policy/checkpointing.py"),
    Part(name="lora", check=exactness.lora, limit=60, look_at="the version of peft; halos/policy/adapters.py"),
    Part(name="qlora", check=exactness.qlora, limit=90, look_at="the versions of bitsandbytes and transformers"),
    Part(name="adamw", check=optimizers.adamw, limit=30, look_at="halos/optim.py"),
    Part(name="adamw_8bit", check=optimizers.adamw_8bit, limit=30, look_at="the version of bitsandbytes"),
    Part(name="waits", check=waits.waits, limit=90, look_at="the lines in the message; halos/transfer.py"),
    Part(name="launches", check=waits.launches, limit=60, look_at="docs/results/launches.md"),
    Part(name="bf16_mixed", check=runs.bf16_mixed, limit=120, look_at="halos/training/trainer.py"),
    Part(name="bf16_true", check=runs.bf16_true, limit=120, look_at="halos/training/trainer.py"),
    Part(name="float16", check=runs.float16, limit=120, look_at="halos/training/trainer.py"),
    Part(name="compile", check=runs.compiled, limit=180, look_at="model.compile=false; TORCH_LOGS=recompiles"),
    Part(name="ddp", check=runs.ddp, limit=120, look_at=_NCCL),
    Part(name="fsdp", check=runs.fsdp, limit=120, look_at=_NCCL),
    Part(name="hsdp", check=runs.hsdp, limit=120, look_at=_NCCL),
    Part(name="fsdp_offload", check=runs.offload, limit=120, look_at=_NCCL),
    Part(name="fsdp_tp", check=runs.tensor_parallel, limit=120, look_at=_NCCL),
    Part(name="resume", check=runs.resumed, limit=180, look_at="docs/guides/resume.md"),
    Part(name="vllm", check=runs.vllm, limit=240, look_at="the versions of vllm and torch; engine=transformers"),
    Part(name="speed_pieces", check=speed.ours, limit=90, look_at="docs/results/launches.md"),
    Part(name="speed_flex", check=partial(speed.ours, attention="flex"), limit=150, look_at="TORCH_LOGS=recompiles"),
    Part(name="speed_varlen", check=partial(speed.ours, attention="varlen"), limit=90, look_at=f"{_MODEL}/varlen.py"),
    Part(name="speed_plain", check=speed.plain, limit=90, look_at="nothing: it is for comparison"),
    Part(name="speed_trl", check=speed.trl, limit=120, look_at="nothing: it is for comparison"),
)
