"""A trained backbone, written from Python."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.policy.adapters import adapter_layers, merge_adapter
from halos.policy.export.card import ModelCard
from halos.policy.export.language_model import export_policy
from halos.processes.first import on_first_process

if TYPE_CHECKING:
    from halos.policy.backbone import Backbone


def save_backbone(backbone: Backbone, folder: Path) -> None:
    """Do what :meth:`Backbone.save_pretrained` documents."""
    if backbone.sharded:
        raise ValueError(
            "save_pretrained: expected a policy that each rank has whole, found a sharded one; halos.train writes "
            " OUTPUT_DIR/model"
        )
    if not on_first_process():
        return
    tokenizer, policy = backbone.tokenizer, backbone.policy
    end_of_turn = ChatTokens(tokenizer, Limits(2)).end_of_turn
    if adapter_layers(policy) and (backbone.spec is None or backbone.spec.lora.export == "merged"):
        policy = copy.deepcopy(policy)  # so that the policy can be trained further
        merge_adapter(policy)
    export_policy(
        policy,
        tokenizer,
        folder,
        end_of_turn=end_of_turn,
        control=backbone.control,
        card=ModelCard(
            loss=backbone.loss, base=None if backbone.spec is None else backbone.spec.path, paper=backbone.paper
        ),
    )
