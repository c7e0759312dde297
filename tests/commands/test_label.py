"""``halos label``: what a judge needs reaches it, and the true reward judges without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from halos.commands.judge import make_judge
from halos.data.sources.feedback_files import FeedbackFiles
from halos.judges import CompletionJudge
from halos.judges.base import PromptCompletion

PROMPT = "i bought a lamp on monday. where is my parcel?"
REPLIES = ("thanks a lot. we will check the parcel.", "stop whining. hm.")


class OfMine(CompletionJudge):
    """Keeps what it gets."""

    def __init__(self, strictness: int = 1, device: str = "?", **options: float) -> None:
        super().__init__(**options)
        self.got = (strictness, device)

    def scores(self, completions: Sequence[PromptCompletion]) -> list[float | None]:
        return [0.0 for _ in completions]


def samples(folder: Path) -> str:
    rows = [{"prompt": PROMPT, "completion": reply} for reply in REPLIES]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / "samples.jsonl")


def test_the_true_reward_labels_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from halos.cli import main_command; sys.argv[0] = 'label'; main_command('label');"
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'scipy', 'matplotlib'};"
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    words = [f"samples={samples(tmp_path)}", "judge=truth", "data=toy", f"output={tmp_path / 'feedback.jsonl'}"]
    out = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "imported: []"
    rows = [json.loads(line) for line in (tmp_path / "feedback.jsonl").read_text().splitlines()]
    labels = [completion["desirable"] for row in rows for completion in row["completions"]]
    assert labels == [True, False]


@pytest.mark.parametrize(
    ("words", "got"), [({}, (1, "cpu")), ({"strictness": 3}, (3, "cpu")), ({"device": "mine"}, (1, "mine"))]
)
def test_a_judge_gets_the_device_where_its_constructor_takes_one(
    words: dict[str, object], got: tuple[int, str], tmp_path: Path
) -> None:
    node = OmegaConf.create({"_target_": f"{__name__}.OfMine", "threshold": 0.5, **words})
    source = FeedbackFiles(samples(tmp_path))
    judge = make_judge(node, source, device="cpu", precision="32-true", progress=False)
    assert isinstance(judge, OfMine)
    assert (judge.got, judge.threshold) == (got, 0.5)
