"""A sharded model starts with the weights of its files, which no process holds whole."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from halos.policy.loading import LoadOptions, ModelSpec
from halos.processes.collectives import full_tensor, local
from halos.sharding.sharding import Sharding
from halos.sharding.weights import make_backbone, matching_files
from tests import tiny
from tests.fork import run_ranks


def divided_start(folder: Path, gguf: Path) -> list[dict[str, torch.Tensor]]:
    """The state of each model, put together again, made without and with a bigger vocabulary, and from GGUF."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    sharding = Sharding(mesh=mesh, device=torch.device("cpu"))
    found = []
    loaded: list[str] = []
    load = ModelSpec.load
    ModelSpec.load = lambda spec, *given: [loaded.append(spec.path), load(spec, *given)][1]  # type: ignore[method-assign]
    for path, size in ((folder, 0), (folder, 40), (gguf, 0)):
        spec = ModelSpec(path=str(path), reference="live")
        backbone = make_backbone(spec, sharding, LoadOptions(vocabulary=size), reference=True)
        assert all(isinstance(p, DTensor) for p in (*backbone.policy.parameters(), *backbone.reference.parameters()))
        half = sum(p.numel() for p in backbone.parameters()) / 2
        assert sum(local(p).numel() for p in backbone.parameters()) == pytest.approx(half, rel=0.1)
        state = {name: full_tensor(tensor) for name, tensor in backbone.policy.state_dict().items()}
        reference = {name: full_tensor(tensor) for name, tensor in backbone.reference.state_dict().items()}
        assert all(torch.equal(state[name], reference[name]) for name in state)
        found.append(state | {name: buffer.clone() for name, buffer in backbone.policy.named_buffers()})
    # Of what lies in plain safetensors each rank reads its part; the rest is read by the first alone.
    assert loaded == ([str(folder), str(gguf)] if torch.distributed.get_rank() == 0 else [])
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen2")]
)  # qwen2's embeddings are tied
def test_a_start_without_the_whole_model_gives_its_weights_and_buffers(architecture: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", architecture, max_shard_size="5KB")
    shard = load_file(sorted(folder.glob("model-*.safetensors"))[0])
    # A file that the index does not name, with the names of weights: nothing of it is read.
    save_file({name: torch.zeros_like(tensor) for name, tensor in shard.items()}, folder / "zeros.safetensors")
    gguf = tiny.save_gguf(tmp_path / "model.gguf", tiny.model(vocab_size=len(tiny.bpe_tokenizer())))
    for found in run_ranks(partial(divided_start, folder, gguf)):
        for state, (path, size) in zip(found, ((folder, 0), (folder, 40), (gguf, 0)), strict=True):
            model = ModelSpec(path=str(path)).load(LoadOptions(vocabulary=size))
            expected = model.state_dict() | dict(model.named_buffers())
            assert state.keys() == expected.keys()
            grown = {name for name, tensor in expected.items() if 40 in tensor.shape}  # new rows start at random
            for name in expected.keys() - grown:
                assert torch.equal(state[name], expected[name]), name
            assert bool(grown) == bool(size)


def test_files_that_need_more_than_a_copy_are_left_to_transformers(tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path)
    assert set(matching_files(model, tmp_path) or ()) == set(model.state_dict())
    assert matching_files(model, None) is None
    assert matching_files(tiny.model(intermediate_size=28), tmp_path) is None  # other shapes
    assert matching_files(tiny.model(num_hidden_layers=3), tmp_path) is None  # missing names
    assert matching_files(tiny.model(num_hidden_layers=1), tmp_path) is None  # names that it lacks
