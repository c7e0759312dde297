"""The toy world's tokenizer and reference policy: small enough to ship, and plain Hugging Face."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from halos.data.records.record import Prompt
from halos.data.rows.rendering import render
from halos.toy.feedback import behaviour_completion
from halos.toy.people import people_prompts
from halos.toy.world import prompts_of, words
from halos.toy.writers import BEGINNER, people_reply

REFERENCE_DIR = Path(__file__).parent / "reference"
"""The reference policy that ships with the package: a Hugging Face directory."""
TOPICS_REFERENCE_DIR = Path(__file__).parent / "topics_reference"
"""That of the first edition."""

PAD, UNK, END = "<|pad|>", "<|unk|>", "<|end|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
GOOD, BAD = "<|good|>", "<|bad|>"  # reserved for conditioned SFT; the reference has never seen them
SPECIAL_TOKENS = (PAD, UNK, END, USER, ASSISTANT, GOOD, BAD)

# No spaces around the content: rendered prompt + completion + END is the rendered conversation.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + END + "{% else %}"
    "" + USER + "{{ message['content'] }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)
MAX_POSITIONS = 128
MAX_NEW_TOKENS = 24  # the longest completion has 20 tokens with its end of turn, and 15 in toy_topics


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer of the toy language. Its pad token is not its end-of-turn (eos) token."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *words()))}
    # Each word is a token. A policy of 10^5 weights can learn the grammar, because it does not have to learn spelling.
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins with spaces, none before punctuation
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, GOOD, BAD],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> LlamaForCausalLM:
    """Build an untrained Llama of about 10^5 weights, set to sample at temperature 1."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,  # so the reserved tokens keep distinct input embeddings
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Forked, so that building a model does not change what the caller draws next.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config.update(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS, bos_token_id=None
    )
    return model


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int = 1600,
    batch_size: int = 64,
    lr: float = 6e-3,
    seed: int = 0,
    topics: bool = False,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train the model by SFT on a beginner's replies (:mod:`halos.toy.writers`). The loss leaves out the prompts.

    With ``topics`` the prompts and completions are those of the world's first edition.
    """
    # Training prompts only: policies are compared on validation prompts, which the reference must not have seen.
    rng = random.Random(f"pretrain/{seed}")
    texts = prompts_of("train")
    prompts: Sequence[Prompt] = texts if topics else people_prompts(len(texts))
    draw: Callable[[Any, random.Random], str] = behaviour_completion if topics else _beginners_reply
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.05)
    model.train()
    for step in range(steps):
        batch = rng.choices(prompts, k=batch_size)
        loss = model(**demonstrations(tokenizer, batch, [draw(p, rng) for p in batch])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    model.eval()


def _beginners_reply(prompt: Prompt, rng: random.Random) -> str:
    return people_reply(prompt, rng, BEGINNER)


def demonstrations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Tokenise prompts and completions: padded ids, attention mask, labels of the completion and its end of turn."""
    # Prompts and completions are tokenised separately. This is safe only for a word-level tokenizer, in which no token
    # spans the boundary.
    heads = tokenizer([render(tokenizer, prompt) for prompt in prompts])["input_ids"]
    tails = tokenizer([completion + END for completion in completions])["input_ids"]
    width = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    ids = torch.full((len(heads), width), int(tokenizer.pad_token_id))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        end = len(head) + len(tail)
        ids[row, :end] = torch.tensor(head + tail)
        mask[row, :end] = 1
        labels[row, len(head) : end] = ids[row, len(head) : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
