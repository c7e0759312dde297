"""Reward models: sequence classifiers with one score, ours (``loss=bradley_terry``) or any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from halos.checks import check_whole
from halos.config.devices import DTYPES, choice, device_of
from halos.data.records.record import messages_of
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.judges.base import CompletionJudge, Said
from halos.policy.kernels.matmul import limit_kernel_caches


class RewardModel(CompletionJudge):
    """The score that a sequence classifier gives to a conversation.

    The prompt is rendered by the classifier's own chat template, and the completion follows with its end-of-turn token,
    as our reward models are trained. A tokenizer without a chat template gets the prompt and the completion as a pair
    of texts, unless the model is known as ours by its run's folder.

    Args:
        path: a run's folder, a hub id or a model's directory.
        max_length: tokens of prompt and completion; prompts of more than half as many keep their end.
        limits: those that the reward model was trained with, in place of ``max_length``.
    """

    def __init__(
        self,
        path: str | None,
        *,
        threshold: float | None = None,
        batch_size: int = 32,
        max_length: int = 1024,
        limits: Limits | None = None,
        device: str = "auto",
        precision: str = "32-true",
    ) -> None:
        super().__init__(threshold=threshold)
        if not path:
            raise ValueError("judge.path: expected a reward model: a run's folder, a hub id or a directory; found none")
        check_whole("judge.batch_size", batch_size, 1)
        check_whole("judge.max_length", max_length, 2)
        folder = Path(path).expanduser()
        self._ours = (folder / "config.yaml").is_file()
        self.path = str(folder / "model") if self._ours else path
        self.batch_size = batch_size
        self.limits = limits or Limits(max_length, max_length // 2)
        self.device, self.dtype = device_of(device), choice("precision", precision, DTYPES)
        self._loaded: tuple[Any, Any] | None = None

    def check(self) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self._pretrained(AutoTokenizer)
        self._check_labels(self._pretrained(AutoConfig))

    @torch.no_grad()
    def scores(self, said: Sequence[Said]) -> list[float | None]:
        model, tokenizer = self._load()
        rows = self._rows(tokenizer, said)
        found: list[float | None] = []
        for start in range(0, len(rows), self.batch_size):
            batch = tokenizer.pad(rows[start : start + self.batch_size], return_tensors="pt", padding_side="right")
            found += model(**batch.to(self.device)).logits[:, 0].float().tolist()
        return found

    def tokens(self, said: Sequence[Said]) -> list[int]:
        """The number of tokens of each completion, its end-of-turn token included."""
        tokenizer = self._load()[1]
        return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for _, text in said]

    def _rows(self, tokenizer: Any, said: Sequence[Said]) -> list[dict[str, Any]]:
        if tokenizer.chat_template is None and not self._ours:
            texts = ("\n\n".join(turn.content for turn in messages_of(prompt)) for prompt, _ in said)
            return [
                dict(tokenizer(text, completion, truncation=True, max_length=self.limits.max_length))
                for text, (_, completion) in zip(texts, said, strict=True)
            ]
        chat = ChatTokens(tokenizer, self.limits)
        rows = []
        for number, (prompt, completion) in enumerate(said):
            where = f"prompt {number}"
            start, _ = chat.fit_prompt(chat.prompt(prompt, where=where), where)
            rows.append(start + chat.fit_completion(chat.completion(completion), len(start))[0])
        return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = self._read()
        return self._loaded

    def _read(self) -> tuple[Any, Any]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        limit_kernel_caches()
        tokenizer = self._pretrained(AutoTokenizer)
        kind = AutoModelForSequenceClassification
        model, info = self._pretrained(kind, dtype=self.dtype, output_loading_info=True)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:5])
            raise ValueError(f"judge.path: expected a reward model, but {self.path} lacks the weights {missing}")
        self._check_labels(model.config)
        return model.to(self.device).eval(), tokenizer

    def _pretrained(self, factory: Any, **options: Any) -> Any:
        try:
            return factory.from_pretrained(self.path, **options)
        except (OSError, KeyError, ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"judge.path: {self.path} could not be loaded as a classifier: {error}") from error

    def _check_labels(self, config: Any) -> None:
        if config.num_labels != 1:
            raise ValueError(f"judge.path: expected one score, {self.path} has {config.num_labels} classes")
