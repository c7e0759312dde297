"""The live reference is the policy as it was, frozen."""

import pytest
import torch

from halos.policy.backbone import frozen_copy
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def test_it_has_the_policys_weights_in_memory_of_its_own() -> None:
    policy = tiny.model()
    copied = dict(frozen_copy(policy).named_parameters())
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, copied[name])
        assert parameter.data_ptr() != copied[name].data_ptr()
    assert len(copied) == len(list(policy.parameters()))


def test_it_is_frozen_and_in_evaluation_mode() -> None:
    reference = frozen_copy(tiny.model())
    assert not any(module.training for module in reference.modules())
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_the_policy_stays_trainable_and_in_training_mode() -> None:
    policy = tiny.model()
    frozen_copy(policy)
    assert policy.training
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_it_keeps_tied_weights_tied() -> None:
    reference = frozen_copy(tiny.model("qwen2"))
    assert reference.get_input_embeddings().weight is reference.get_output_embeddings().weight


def test_it_recomputes_nothing_where_the_policy_checkpoints_activations() -> None:
    policy = tiny.model()
    policy.gradient_checkpointing_enable()
    reference = frozen_copy(policy)
    runs: list[int] = []
    reference.get_decoder().layers[0].register_forward_hook(lambda *_: runs.append(1))
    embeddings = torch.randn(1, 3, 16, requires_grad=True)
    reference(inputs_embeds=embeddings).logits.sum().backward()
    assert len(runs) == 1
