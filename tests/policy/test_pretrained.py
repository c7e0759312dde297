"""The kernel of packed attention that a loaded backbone gets."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halos.policy.loading import LoadOptions, ModelSpec
from halos.policy.logprobs.packed import attends_by
from halos.policy.pretrained import load_backbone
from tests import tiny


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "auto"),
        ({"packed_attention": "flex"}, "flex"),
        ({"packed_attention": "pieces"}, "pieces"),
        ({"compile": True}, "pieces"),
        ({"gradient_checkpointing": "selective"}, "pieces"),
        ({"gradient_checkpointing": "offload"}, "auto"),
    ],
)
def test_the_word_of_the_config_reaches_policy_and_reference(
    options: dict[str, Any], kernel: str, tmp_path: Path
) -> None:
    spec = ModelSpec(path=str(tiny.save(tmp_path)), reference="live", **options)
    made = load_backbone(spec, LoadOptions(), reference=True)
    assert [attends_by(member.policy) for member in made.with_reference_backbone()] == [kernel, kernel]


@pytest.mark.parametrize(("mesh", "kernel"), [(None, "auto"), ("of two devices", "pieces")])
def test_divided_heads_are_attended_to_piece_by_piece(mesh: object, kernel: str, tmp_path: Path) -> None:
    spec = ModelSpec(path=str(tiny.save(tmp_path)))

    def shard(backbone: Any) -> None:
        backbone.sharding = SimpleNamespace(tensor_group=mesh)

    assert attends_by(load_backbone(spec, LoadOptions(), shard=shard).policy) == kernel
