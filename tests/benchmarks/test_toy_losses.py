"""What is written of each loss's runs on the toy world."""

import json
from pathlib import Path

from benchmarks.toy_losses import write


def run(folder: Path, seed: int, **summary: object) -> None:
    (folder / f"seed_{seed}").mkdir(parents=True)
    (folder / f"seed_{seed}" / "summary.json").write_text(json.dumps({"seed": seed, **summary}))


def test_runs_are_in_the_order_of_seeds_and_other_losses_stay(tmp_path: Path) -> None:
    for seed, share in ((10, 0.9004), (2, 0.95)):
        samples = {"policy_desirable": share, "kl": seed + 0.123, "reference_desirable": 0.25}
        run(tmp_path / "kto", seed, samples=samples)
    run(tmp_path / "rewards", 0, metrics={"rewards/accuracies": 0.5})
    results = tmp_path / "results.json"
    write(results, "kto", tmp_path / "kto")
    write(results, "bradley_terry", tmp_path / "rewards")
    kto = {"desirable": [95.0, 90.0], "kl": [2.12, 10.12], "reference": [25.0, 25.0]}
    assert json.loads(results.read_text()) == {"kto": kto, "bradley_terry": {"accuracy": [50.0]}}
