"""``python -m benchmarks.scale --rows 2_000_000 --folder DIR``: preparing much feedback, and training on it.

Rows a second of our preparation (reading and checking, the hygiene report, the view, tokenising) beside ``datasets``
doing nothing but the tokenising, both from nothing and with two processes, and the peak memory of each process. The
folder is left empty.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.inputs import EOS, llama

PROCESSES = 2
LENGTHS = {"max_length": 256, "max_prompt_length": 128}
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def main(words: list[str] | None = None) -> None:
    """Make the data, measure, print the numbers."""
    made = argparse.ArgumentParser("benchmarks.scale", description=__doc__)
    made.add_argument("--rows", type=int, default=100_000)
    made.add_argument("--steps", type=int, default=100)
    made.add_argument("--alone", action="store_true", help="without datasets, for memory")
    made.add_argument("--stream", action="store_true", help="nothing but training, with data.streaming=true")
    made.add_argument("--folder", type=Path, required=True)
    options = made.parse_args(words)
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        measure(options.folder, options.rows, options.steps, compare=not options.alone, stream=options.stream)
    finally:
        shutil.rmtree(options.folder)


def measure(folder: Path, rows: int, steps: int, *, compare: bool, stream: bool = False) -> None:
    """Print the numbers of each part as it ends."""
    file = folder / "feedback.jsonl"
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in feedback(rows))
    write_model(folder / "model", file)
    print(f"{rows:,} completions, {file.stat().st_size / 2**20:,.0f} MiB", flush=True)
    words = [
        *("loss=kto", "model=hf", f"model.path={folder / 'model'}", "data=files", f"data.train={file}"),
        *(f"data.{name}={value}" for name, value in LENGTHS.items()),
        *(f"data.num_proc={PROCESSES}", f"cache_dir={folder / 'cache'}"),
        *("trainer.accelerator=cpu", "trainer.enable_progress_bar=false"),
    ]
    train = [sys.executable, "-m", "halos.cli", "train", *words]
    if stream:
        for count in (1, steps):
            run = [f"trainer.max_steps={count}", f"output_dir={folder / f'run{count}'}", "data.streaming=true"]
            report(f"{count} steps of KTO on the stream", [*train, *run])
        return
    rates = {}
    for part in ("ours", "datasets") if compare else ("ours",):
        seconds = report(f"prepared by {part}", [sys.executable, "-m", "benchmarks.scale_parts", part, str(folder)])
        rates[part] = rows / seconds
        print(f"  {rates[part]:,.0f} rows a second", flush=True)
        shutil.rmtree(folder / "datasets", ignore_errors=True)
    if compare:
        print(f"ours / datasets: {rates['ours'] / rates['datasets']:.2f}", flush=True)
    report(f"{steps} steps of KTO on it", [*train, f"trainer.max_steps={steps}", f"output_dir={folder / 'run'}"])


def feedback(rows: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Labelled completions of about 500 bytes, of made-up words of which few are frequent, two to a prompt."""
    draw = random.Random(seed)
    letters = "etaoinshrdlucmfwygpb"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / n for n in range(1, len(words) + 1)]
    pool = draw.choices(words, weights, k=1 << 20)

    def text(size: int) -> str:
        start = draw.randrange(len(pool) - size)
        return " ".join(pool[start : start + size])

    for n in range(rows):
        if n % 2 == 0:
            prompt = f"{n} {text(30)}"
        yield {"prompt": prompt, "completion": text(draw.randint(30, 60)), "label": draw.random() < 0.6}


def write_model(folder: Path, file: Path) -> None:
    """A tiny random Llama, and a byte-level BPE tokenizer trained on the beginning of the file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [EOS, "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=special, show_progress=False)
    with file.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((line for line, _ in zip(lines, range(5000), strict=False)), trainer)
    LlamaForCausalLM(llama(hidden=64, layers=2, vocabulary=len(tokenizer.get_vocab()))).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def report(what: str, command: list[str]) -> float:
    """Run a command, print what it took; how many seconds it says that its work took, else all.

    Raises ``ValueError`` with its last line if it fails.
    """
    start = time.perf_counter()
    peaks: dict[int, tuple[int, int]] = {}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            for child in _tree(process.pid):
                own, resident = _memory(child)
                most = peaks.get(child, (0, 0))
                peaks[child] = (max(own, most[0]), max(resident, most[1]))
            time.sleep(0.1)
        said.seek(0)
        last = next((line for line in reversed(said.read().splitlines()) if line.strip()), "")
    if process.returncode:
        raise ValueError(f"{what}: {last}")
    seconds = float(last) if last.replace(".", "").isdigit() else time.perf_counter() - start
    own, resident = (max(found) >> 10 for found in zip(*peaks.values(), strict=True))
    memory = f"most memory in one: {own:,} MiB of its own, {resident:,} MiB with the pages of files"
    print(f"{what}: {seconds:.1f} s, {len(peaks)} processes; {memory}", flush=True)
    return seconds


def _tree(process: int) -> list[int]:
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return [process, *(other for child in found for other in _tree(int(child)))]


def _memory(process: int) -> tuple[int, int]:
    """(private, resident) memory now, in KiB: memory-mapped files are pages that the system can drop."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0, 0
    values = dict(line.split(":", 1) for line in text.splitlines())
    if "RssAnon" not in values:  # it has just ended
        return 0, 0
    return int(values["RssAnon"].split()[0]), int(values["VmRSS"].split()[0])


if __name__ == "__main__":
    main()
