"""The house: layers, circles, what may import the configuration object, public names, and what imports stay light."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import halos

PACKAGE = Path(halos.__file__).parent
LAYERS = (
    "checks safe_text",
    "files formulas metrics optim processes transfer",
    "caches",
    "terminal data",
    "config toy",
    "policy",
    "loop sampling sharding",
    "objectives",
    "testing judges reporting",
    "theory",
    "training evaluation pytest_plugin",
    "comparison estimation gpu_check",
    "commands",
    "cli",
)
"""From the ground up; imports run downwards only."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names.split()}
PUBLIC = {
    "halos": (
        "AOT AOTUnpaired APODown APOZero Adafactor AdamW BCO BCOPair DiscoPOP EXO FDPO Hinge NCAPair SPPO Backbone "
        "BitsAndBytesAdamW BradleyTerry CPO CSFT DPO FSDP GRPO HALO HHSource IPO FeedbackFiles KTO LoRA Mix "
        "MixedSource ModelSpec Needs ORPO OasstSource Objective Output PPO PreferenceDataModule RMSprop RobustDPO SFT "
        "SHPSource SLiC Selection SimPO StreamingDataModule ToySource UltraFeedbackSource data objectives policy "
        "testing theory train NCA InfoNCA EXORewards"
    ),
    "halos.data": (
        "Batch Batches Completion Conversation FileSource HHSource FeedbackFiles Message MixedSource OasstSource "
        "OnPolicySource PreferenceDataModule Record Row RowSource SHPSource Selection Source Step StreamingDataModule "
        "TrueReward UltraFeedbackSource collate"
    ),
    "halos.judges": "ChatJudge CompletionJudge RewardModel TruthJudge",
    "halos.objectives": (
        "AOT AOTUnpaired APODown APOZero BCO BCOPair BradleyTerry CPO CSFT DPO DiscoPOP EXO FDPO GRPO HALO Hinge "
        "Humanline IPO KTO Mix NCAPair Needs ORPO Objective Output PPO SPPO aot_loss bco_pair_loss discopop_loss "
        "exo_loss f_derivative f_dpo_loss hinge_loss nca_pair_loss sppo_loss PPOLosses RobustDPO SFT SLiC SimPO "
        "apo_down_loss apo_zero_loss bco_loss bradley_terry_loss cpo_loss dpo_loss group_advantages grpo_loss "
        "halo_loss ipo_loss kto_loss orpo_loss ppo_loss robust_dpo_loss sft_loss simpo_loss slic_loss NCA InfoNCA "
        "group_shares infonca_loss nca_loss EXORewards exo_rw_loss"
    ),
    "halos.policy": "Backbone LoRA LogProbs ModelSpec completion_logprobs",
    "halos.sharding": "FSDP FSDPTP",
    "halos.theory": "ImpliedLoss Shape Side Trace Verdict gradient_bounds is_halo shape sides trace value_curve",
    "halos.toy": "Annotator ToySource ToyTopicsSource",
    "halos.training": "Checkpoints PolicyPoint ReferenceSync RunFolder RunRecord",
}


def modules() -> dict[str, Path]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports(path: Path, *, at_runtime: bool = False) -> Iterator[str]:
    """The names that a file imports; with ``at_runtime``, only those that importing it imports."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        lazy = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        if at_runtime and lazy:
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_run_down_the_layers() -> None:
    wrong = []
    for name, path in modules().items():
        if "." not in name:
            continue
        room = name.split(".")[1]
        for target in (t.split(".")[1] for t in imports(path) if t.startswith("halos.") and len(t.split(".")) > 2):
            if target != room and LEVEL[target] >= LEVEL[room]:
                wrong.append(f"{name} imports halos.{target}")
    assert not wrong


def test_the_architecture_page_has_the_layers() -> None:
    page = (PACKAGE.parent / "docs" / "develop" / "architecture.md").read_text(encoding="utf-8")
    assert f"From the ground up: {'; '.join(', '.join(layer.split()) for layer in LAYERS)}." in page


def test_every_room_has_a_layer() -> None:
    rooms = {name.split(".")[1] for name in modules() if "." in name}
    assert rooms == set(LEVEL)


def test_no_modules_import_each_other() -> None:
    known = modules()
    graph = {}
    for name, path in known.items():
        found = {t if t in known else t.rpartition(".")[0] for t in imports(path, at_runtime=True)}
        graph[name] = {target for target in found if target in known and target != name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' → '.join(error.args[1])}")


def test_only_commands_touch_the_configuration_object() -> None:
    allowed = {"cli", "commands", "config", "processes"}
    found = {
        name.split(".")[1]
        for name, path in modules().items()
        if any(target.split(".")[0] == "omegaconf" for target in imports(path))
    }
    assert found <= allowed


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_exports_its_public_names(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_a_package_that_exports_names_is_listed() -> None:
    assert {".".join(p.relative_to(PACKAGE.parent).parent.parts) for p in PACKAGE.rglob("__init__.pyi")} == set(PUBLIC)


@pytest.mark.parametrize("module", ["halos", "halos.data", "halos.cli", "halos.pytest_plugin", "halos.objectives"])
def test_an_import_loads_neither_torch_nor_lightning(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
