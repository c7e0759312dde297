"""Rebuild the toy world's reference policy from scratch: SFT on the behaviour distribution, then save and measure.

python scripts/build_toy.py [--people] [--steps N] [--seed N] [--output DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.sampling.before_after import judged
from halos.sampling.generate import sample
from halos.toy.model import MAX_NEW_TOKENS, MAX_POSITIONS, REFERENCE_DIR, build_model, build_tokenizer, pretrain
from halos.toy.people_source import ToyPeopleSource
from halos.toy.source import ToySource


def report(step: int, loss: float) -> None:
    """Print one line every hundred steps."""
    if step % 100 == 0:
        print(f"step {step}: loss {loss:.4f}", flush=True)


def main() -> None:
    """Build, save, and print the share desirable on held-out prompts."""
    parser = argparse.ArgumentParser(description="Rebuild the toy world's reference policy.")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=REFERENCE_DIR)
    parser.add_argument("--people", action="store_true", help="of the second edition (data=toy_people); set --output")
    options = parser.parse_args()
    if options.people and options.output == REFERENCE_DIR:
        parser.error("--output: expected a folder of your own with --people, as the package ships the first edition's")

    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.seed)
    pretrain(model, tokenizer, steps=options.steps, seed=options.seed, people=options.people, report=report)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)

    tokens, judge = (
        ChatTokens(tokenizer, Limits(MAX_POSITIONS)),
        (ToyPeopleSource(size=1) if options.people else ToySource()).true_reward(),
    )
    prompts = judge.prompts(2048)
    replies = sample(
        model,
        [tokens.prompt(prompt) for prompt in prompts],
        end_of_turn=tokens.end_of_turn,
        pad=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    share = judged(prompts, replies, tokens, judge).desirable_share
    print(f"{options.output}: {model.num_parameters()} weights, {share:.1%} of {len(prompts)} samples desirable")


if __name__ == "__main__":
    main()
