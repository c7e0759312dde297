"""What several files of whole runs share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from halos.policy.loading import ModelSpec
from tests.train_runs import RESUMABLE, run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, run(folder, *RESUMABLE)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelSpec, "load", lambda *_, **__: pytest.fail("a model was loaded"))


MINE = """
from halos.objectives import Objective, Output

class Mine(Objective):
    view = "pairs"
    needs = Needs(reference=False)

    def __init__(self, backbone, *, margin=1.0, **base):
        super().__init__(backbone, **base)
        self.margin = margin

    def compute(self, batch, policy, reference):
        chosen, rejected = policy.sum.unbind(1)
        return Output({"hinge": self.per_example((self.margin - chosen + rejected).relu(), batch)})

def not_a_class(): ...
"""


@pytest.fixture
def my_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "mymodule.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "mymodule"
    sys.modules.pop("mymodule", None)
