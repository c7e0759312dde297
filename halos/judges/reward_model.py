"""Reward models as judges: sequence classifiers with one score, ours (``loss=bradley_terry``) or any other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from halos.checks import check_whole
from halos.config.devices import DTYPES, choice, device_of
from halos.config.runs import CONFIG
from halos.data.records.record import Prompt, Reply, messages_of, reply_text
from halos.data.rows.chat_tokens import ChatTokens, Limits
from halos.files import in_home
from halos.judges.base import CompletionJudge, PromptCompletion
from halos.policy.checks import check_encodes
from halos.policy.kernels.matmul import limit_kernel_caches
from halos.policy.limits import TooLarge, as_large_as_its_files, check_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)

Encoded = dict[str, list[int]]
"""One sequence as a tokenizer's ``pad`` takes it: ``input_ids`` and ``attention_mask``."""


class RewardModel(CompletionJudge):
    """Scores a conversation with a sequence classifier.

    The conversation is rendered by the classifier's own chat template, up to the token that ends the completion, as in
    the training of our reward models. If the tokenizer has no chat template, prompt and completion are passed as
    a pair of texts, unless the model is known to be ours by the configuration in its run folder.

    Args:
        path: a run folder, a hub id or a directory with a model.
        revision: of a hub id: a commit, a tag or a branch.
        trust_remote_code: run the code that comes with the model, with all rights of this process.
        threshold: completions with at least this score are desirable; None: those above the median.
        batch_size: sequences in one forward.
        max_length: the maximum number of tokens in prompt and completion; prompts of more than half as many tokens keep
            their end.
        limits: the limits that the reward model was trained with, instead of ``max_length``.
        text: ``plain``, or ``rendered`` where prompts and completions carry the chat template's markup.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``32-true`` or ``bf16-true``.

    Raises:
        ValueError: a parameter is missing or outside its range.
    """

    def __init__(
        self,
        path: str | None,
        *,
        threshold: float | None = None,
        batch_size: int = 32,
        max_length: int = 1024,
        limits: Limits | None = None,
        text: str = "plain",
        device: str = "auto",
        precision: str = "32-true",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(threshold=threshold)
        if not path:
            raise ValueError("judge.path: expected a reward model: a run's folder, a hub id or a directory; found none")
        check_whole("judge.batch_size", batch_size, 1)
        check_whole("judge.max_length", max_length, 2)
        # A run's folder has the model in a subfolder; hub ids and model directories have no config.yaml.
        folder = in_home(path)
        self._ours = (folder / CONFIG).is_file()
        self.path = str(folder / "model") if self._ours else path
        if not isinstance(trust_remote_code, bool):  # a text would count as true
            raise ValueError(f"judge.trust_remote_code: expected true or false, found {trust_remote_code!r}")
        self.trust_remote_code = trust_remote_code
        self.revision = {} if revision is None else {"revision": revision}
        self.batch_size = batch_size
        self.limits, self.text = limits or Limits(max_length, max_length // 2), text
        self.device, self.dtype = device_of(device), choice("precision", precision, DTYPES)

    def check(self) -> None:
        from transformers import AutoConfig, AutoTokenizer

        if self.trust_remote_code:
            log.warning("judge.trust_remote_code: code that comes with %s runs with all your rights", self.path)
        if (config := in_home(self.path) / "config.json").is_file():
            check_config(config, "judge.path")
        check_encodes(self._pretrained(AutoTokenizer), self.path, "judge.path")
        self._check_labels(self._pretrained(AutoConfig))

    @torch.no_grad()
    def scores(self, completions: Sequence[PromptCompletion]) -> list[float | None]:
        model, tokenizer = self._loaded
        sequences = self._sequences(tokenizer, completions)
        scores: list[float | None] = []
        for start in range(0, len(sequences), self.batch_size):
            part = sequences[start : start + self.batch_size]
            # On the right: the classifier reads the state of the last token that is not padding.
            batch = tokenizer.pad(part, return_tensors="pt", padding_side="right")
            scores += model(**batch.to(self.device)).logits[:, 0].float().tolist()
        return scores

    def tokens(self, completions: Sequence[PromptCompletion]) -> list[int]:
        """The number of tokens in each completion, its end-of-turn token included."""
        tokenizer = self._loaded[1]
        texts = [reply_text(reply) for _, reply in completions]
        return [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts]

    def _sequences(self, tokenizer: PreTrainedTokenizerBase, completions: Sequence[PromptCompletion]) -> list[Encoded]:
        if tokenizer.chat_template is None and not self._ours:
            return [self._pair_of_texts(tokenizer, *completion) for completion in completions]
        chat = ChatTokens(tokenizer, self.limits, self.text)
        sequences: list[Encoded] = []
        for number, (prompt, completion) in enumerate(completions):
            where = f"prompt {number}"
            ids = chat.fitted_prompt(prompt, where=where)
            ids += chat.fit_completion(chat.completion(completion, prompt, where=where), len(ids))[0]
            sequences.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
        return sequences

    def _pair_of_texts(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Reply) -> Encoded:
        text = "\n\n".join(turn.text for turn in messages_of(prompt))
        # dict(): some tokenizers add token_type_ids, which tell such a classifier the two texts apart.
        return dict(tokenizer(text, reply_text(completion), truncation=True, max_length=self.limits.max_length))

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        # Batches differ in width, and on a CPU oneDNN would keep code for each of them.
        limit_kernel_caches()
        tokenizer = self._pretrained(AutoTokenizer)
        classifier = AutoModelForSequenceClassification
        folder = in_home(self.path)
        with as_large_as_its_files(folder, "judge.path") if folder.is_dir() else nullcontext():
            model, info = self._pretrained(classifier, dtype=self.dtype, output_loading_info=True)
        # transformers fills missing weights with random numbers: a language model would load as a classifier.
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:5])
            raise ValueError(f"judge.path: expected a reward model, but {self.path} lacks the weights {missing}")
        self._check_labels(model.config)
        return model.to(self.device).eval(), tokenizer

    def _pretrained(self, factory: Any, **options: object) -> Any:
        try:
            options |= {**self.revision, "trust_remote_code": self.trust_remote_code}
            return factory.from_pretrained(self.path, **options)
        except TooLarge:
            raise
        except Exception as error:  # whatever libraries make of files that may hold anything
            reason = str(error) or type(error).__name__
            hint = "; if you know its code, set judge.trust_remote_code=true" if "custom code" in reason else ""
            raise ValueError(f"judge.path: {self.path} could not be loaded as a classifier: {reason}{hint}") from error

    def _check_labels(self, config: PreTrainedConfig) -> None:
        if config.num_labels != 1:
            raise ValueError(f"judge.path: expected one score, {self.path} has {config.num_labels} classes")
