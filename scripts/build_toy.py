"""Rebuild the toy world's reference policy from scratch: SFT on a beginner's replies, then save and measure.

python scripts/build_toy.py [--topics] [--steps N] [--seed N] [--output DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.sampling.before_after import judged
from halos.sampling.generate import sample
from halos.toy.model import (
    MAX_NEW_TOKENS,
    MAX_POSITIONS,
    REFERENCE_DIR,
    TOPICS_REFERENCE_DIR,
    build_model,
    build_tokenizer,
    pretrain,
)
from halos.toy.source import ToyJudge
from halos.toy.topics_source import TopicsJudge


def report(step: int, loss: float) -> None:
    """Print one line every hundred steps."""
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.4f}", flush=True)


def main() -> None:
    """Build, save, and print the share desirable on held-out prompts."""
    parser = argparse.ArgumentParser(description="Rebuild the toy world's reference policy.")
    parser.add_argument("--topics", action="store_true", help="of the first edition (data=toy_topics)")
    parser.add_argument("--steps", type=int, help="1600, and 800 with --topics")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a folder; by default the one that the package ships")
    options = parser.parse_args()
    output = options.output or (TOPICS_REFERENCE_DIR if options.topics else REFERENCE_DIR)
    steps = options.steps or (800 if options.topics else 1600)

    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.seed)
    pretrain(model, tokenizer, steps=steps, seed=options.seed, topics=options.topics, report=report)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    tokens = ChatTokens(tokenizer, Limits(MAX_POSITIONS))
    judge = TopicsJudge() if options.topics else ToyJudge()
    prompts = judge.prompts(2048)
    replies = sample(
        model,
        [tokens.prompt(prompt) for prompt in prompts],
        end_of_turn=tokens.end_of_turn,
        pad=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    share = judged(prompts, replies, tokens, judge).desirable_share
    print(f"{output}: {model.num_parameters()} weights, {share:.1%} of {len(prompts)} samples desirable")


if __name__ == "__main__":
    main()
