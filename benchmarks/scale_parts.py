"""``python -m benchmarks.scale_parts WHO FOLDER``: prepare the feedback there; the last line is the seconds it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.scale import LENGTHS, PROCESSES


def ours(folder: Path, tokenizer: Any) -> Any:
    """Token rows of labelled completions with their mismatched ones, as ``loss=kto`` has them made."""
    from halos.data.module import PreferenceDataModule
    from halos.data.preparation.needs import DataNeeds, RowNeeds
    from halos.data.sources.feedback_files import FeedbackFiles

    options: dict[str, Any] = {"num_proc": PROCESSES, "cache_dir": folder / "cache", **LENGTHS}
    data = PreferenceDataModule(FeedbackFiles(folder / "feedback.jsonl"), **options)
    return data.prepare(DataNeeds(view="binary", flags=RowNeeds(mismatched=True)), tokenizer).rows["train"].table


def theirs(folder: Path, tokenizer: Any) -> Any:
    """The same token ids by ``datasets`` alone: no checks, no report, no order."""
    from datasets import load_dataset

    file, cache = str(folder / "feedback.jsonl"), str(folder / "datasets")
    rows = load_dataset("json", data_files=file, split="train", cache_dir=cache)

    def tokenised(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        turns = [[{"role": "user", "content": prompt}] for prompt in batch["prompt"]]
        prompts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        completions = [f"{text}{tokenizer.eos_token}" for text in batch["completion"]]
        ids = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, completions))
        return dict(zip(("prompt_ids", "completion_ids"), ids, strict=True))

    return rows.map(tokenised, batched=True, num_proc=PROCESSES, remove_columns=["prompt", "completion"])


def main(who: str, folder: str) -> None:
    """Prepare, and say how long it took."""
    from transformers import AutoTokenizer

    import halos.data.module  # noqa: F401 (neither side's time holds the imports)

    tokenizer = AutoTokenizer.from_pretrained(str(Path(folder) / "model"))
    work: dict[str, Callable[[Path, Any], Any]] = {"ours": ours, "datasets": theirs}
    start = time.perf_counter()
    work[who](Path(folder), tokenizer)
    print(f"{time.perf_counter() - start:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
