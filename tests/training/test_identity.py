"""What identifies a run."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from halos.config.nodes import flatten
from halos.files import EDGE_BYTES
from halos.training.identity import identity, weights_key
from tests.test_config import compose


def identified(*words: str, **changes: Any) -> dict[str, object]:
    settings = flatten(OmegaConf.to_container(compose("output_dir=out", *words), resolve=True))
    arguments: dict[str, Any] = {
        "data": {"train": "a"},
        "model": None,
        "examples_per_step": 4,
        "accumulate": 1,
    } | changes
    return identity(settings, **arguments)


@pytest.mark.parametrize(
    ("words", "changes", "key"),
    [
        (("loss.beta=0.3",), {}, "loss.beta"),
        (("optim.lr=1.0",), {}, "optim.lr"),
        (("model.path=other",), {}, "model.path"),
        (("model.lora.rank=4",), {}, "model.lora.rank"),
        (("model.reference_path=other",), {}, "model.reference_path"),
        (("humanline.log_epsilon_R=2.0",), {}, "humanline.log_epsilon_R"),
        (("reference_sync.every=2",), {}, "reference_sync.every"),
        (("data.keep_together=1",), {}, "data.keep_together"),
        (("precision=bf16-true",), {}, "precision"),
        (("seed=1",), {}, "seed"),
        ((), {"data": {"train": "b"}}, "data (train)"),
        ((), {"examples_per_step": 8}, "examples per step"),
        ((), {"accumulate": 2}, "micro-batches per step"),
    ],
)
def test_what_changes_a_run_changes_one_key(words: tuple[str, ...], changes: dict[str, Any], key: str) -> None:
    one, other = identified(), identified(*words, **changes)
    assert {name for name in {*one, *other} if one.get(name) != other.get(name)} == {key}


@pytest.mark.parametrize(
    "word",
    [
        "model.gradient_checkpointing=true",
        "model.gradient_checkpointing=offload",
        "model.head_chunk=8",
        "model.lora.export=adapter",
        "model.export_dtype=float32",
        "trainer.devices=2",
        "data.packing=false",
        "resume=auto",
    ],
)
def test_what_changes_speed_and_memory_only_changes_nothing(word: str) -> None:
    assert identified(word) == identified()


def test_a_local_model_is_known_by_its_weights_wherever_it_is(tmp_path: Path) -> None:
    files = []
    for name in ("one", "other"):
        (tmp_path / name / "model").mkdir(parents=True)
        files.append(tmp_path / name / "model" / "model.safetensors")
        files[-1].write_bytes(b"w" * 4 * EDGE_BYTES)
        (tmp_path / name / "model" / f"{name}.log").touch()
    one, other = (file.parent for file in files)
    assert identified(model=one) == identified(model=other) == identified("model.path=elsewhere", model=one)
    for place in (0, -1):
        data = bytearray(b"w" * 4 * EDGE_BYTES)
        data[place] = 0
        files[1].write_bytes(data)
        assert weights_key(one) != weights_key(other)
    files[1].write_bytes(b"w" * (4 * EDGE_BYTES + 1))
    assert weights_key(files[0]) != weights_key(files[1])


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("config.json", True),
        ("adapter_config.json", True),
        ("model.safetensors.index.json", True),
        ("model-00002-of-00002.safetensors", True),
        ("generation_config.json", False),
        ("preprocessor_config.json", False),
        ("tokenizer_config.json", False),
        ("README.md", False),
        ("pytorch_model.bin", False),
    ],
)
def test_only_files_that_log_probs_depend_on_identify_a_model(name: str, counts: bool, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"w")
    before = weights_key(tmp_path)
    (tmp_path / name).write_text("one")
    created = weights_key(tmp_path)
    (tmp_path / name).write_text("two")
    assert (created != before) == (weights_key(tmp_path) != created) == counts
