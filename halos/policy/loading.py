"""Model files → tokenizer and policy: a hub id, a local directory, a GGUF file, or random weights from a config."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub.errors import StrictDataclassError

from halos.checks import check_whole
from halos.data.rows.templates import template_of
from halos.policy.checks import check_directory, check_gguf
from halos.policy.logprobs.token_statistics import check_statistics
from halos.policy.lora import LoRA, quantization

log = logging.getLogger(__name__)

PACKAGED = "pkg://"
"""``pkg://halos.toy/reference`` is a directory inside an installed package."""


class ModelOptions(TypedDict, total=False):
    """The parameters of :class:`ModelSpec` beside its path."""

    random_weights: bool
    attention: str | None
    packed_attention: str
    gradient_checkpointing: bool
    compile: bool
    liger: bool
    dropout: float
    head_chunk: int | None
    statistics: Sequence[str]
    reference: str
    reference_path: str | None
    chat_template: str | None
    lora: LoRA


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which model, and how it is to be loaded. Nothing is read until a method is called.

    Args:
        path: a hub id, a local directory, a ``.gguf`` file or ``pkg://package/directory``.
        random_weights: take only the config (and tokenizer) from ``path``.
        attention: transformers' attention implementation (``sdpa``, ``eager``, ``flash_attention_2``, …); None lets
            it choose what the architecture supports.
        packed_attention: how packed rows attend: ``pieces``, a call of PyTorch's fused attention for each, or ``flex``,
            one call of FlexAttention for all (CUDA; compiled when it is first used).
        gradient_checkpointing: recompute activations in the backward pass.
        compile: put the decoder layers through torch.compile (:mod:`halos.policy.logprobs.compiling`).
        liger: RMSNorm and SwiGLU by Liger's kernels, on CUDA (:mod:`halos.policy.kernels.liger`).
        dropout: probability for every dropout of the model. 0 by default, as in the authors' code: with dropout the
            policy would differ from its reference before the first step.
        head_chunk: rows of logits (one a scored token, as wide as the vocabulary) that exist at a time; None: all.
        statistics: what is logged of the policy's distributions at scored tokens: ``entropy``, ``token_accuracy``.
        reference: ``cached``: its log-probs are computed once, before training, and kept on disk; ``live``: a frozen
            copy of the model computes them in every step; ``adapter``: the model does, with LoRA switched off;
            ``auto``: see :meth:`resolved`.
        reference_path: the model whose log-probs are the reference's, where that is not the one that the policy starts
            from. With ``cached`` only; of the same tokenizer.
        chat_template: for a tokenizer that has none, or instead of its own: ``plain``, ``chatml``, a file or a Jinja
            template. It is exported with the model.
        lora: train adapters instead of the whole model.
    """

    path: str
    random_weights: bool = False
    attention: str | None = None
    packed_attention: str = "pieces"
    gradient_checkpointing: bool = False
    compile: bool = False
    liger: bool = False
    dropout: float = 0.0
    head_chunk: int | None = 512
    statistics: Sequence[str] = ()
    reference: str = "auto"
    reference_path: str | None = None
    chat_template: str | None = None
    lora: LoRA = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(
                f"model.path: expected a hub id, a directory or a .gguf file, found {self.path!r}; "
                "for example model=hf model.path=HuggingFaceTB/SmolLM2-135M-Instruct"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected a probability in [0, 1), found {self.dropout}")
        if self.packed_attention not in ("pieces", "flex"):
            raise ValueError(f"model.packed_attention: expected pieces or flex, found {self.packed_attention!r}")
        if self.packed_attention == "flex" and self.compile:
            raise ValueError("model.packed_attention: expected pieces with model.compile=true, found flex")
        if self.liger and self.compile:
            raise ValueError("model.liger: expected false with model.compile=true, found true")
        if self.reference not in ("auto", "cached", "live", "adapter"):
            raise ValueError(f"model.reference: expected auto, cached, live or adapter, found {self.reference!r}")
        if self.reference == "adapter" and not self.lora.enabled:
            raise ValueError("model.reference: expected model.lora.enabled=true with adapter, found false")
        if self.reference_path is not None and (
            self.reference not in ("auto", "cached") or self.lora.path or self.lora.quantize
        ):
            raise ValueError(
                "model.reference_path: expected model.reference=cached, no model.lora.path and no model.lora.quantize"
            )
        if self.lora.quantize and (self.random_weights or self.path.endswith(".gguf")):
            raise ValueError("model.lora.quantize: expected weights from a hub id or a directory as model.path")
        check_whole("model.head_chunk", self.head_chunk, 1, null=True)
        check_statistics(self.statistics)

    def check(self) -> None:
        """Raise ``ValueError`` for a path that cannot be loaded; reads headers only. Hub ids are not contacted."""
        self.lora.check()
        if self.packed_attention == "flex" and not torch.cuda.is_available():
            raise ValueError(
                "model.packed_attention: flex needs a CUDA device, found none; use model.packed_attention=pieces"
            )
        if self.reference_path is not None:
            self.of_reference().check()
        location = self._location
        if location.suffix == ".gguf":
            if any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
                raise ValueError(
                    f"model.path: {self.path} is a GGUF file; install the extra with pip install 'halos[gguf]'"
                )
            check_gguf(location)
        elif location.is_dir():
            check_directory(location, weights=not self.random_weights)
        elif location.exists():
            raise ValueError(f"model.path: expected a model directory or a .gguf file, found the file {self.path}")
        elif self.path.startswith((PACKAGED, "/", "./", "../", "~")) or self.path.count("/") > 1:
            raise ValueError(f"model.path: no such directory or file: {self.path}")
        elif "/" in self.path and location.parent.is_dir():
            raise ValueError(
                f"model.path: no such directory or file: {self.path}; it is not taken for a hub id, as "
                f"{location.parent} is a folder here"
            )

    def resolved(self, *, streaming: bool) -> ModelSpec:
        """The same with ``auto`` decided: ``cached``, or for data of which nobody knows beforehand which are read,
        ``adapter`` with LoRA and ``live`` without.

        Raises ``ValueError`` for a cached reference of such data.
        """
        uncached = "adapter" if self.lora.enabled else "live"
        if streaming and (self.reference == "cached" or self.reference_path is not None):
            raise ValueError(
                f"model.reference: expected {uncached} with data.streaming=true, found cached: a stream's log-probs "
                "cannot be computed before it is read"
            )
        chosen = uncached if streaming else "cached"
        return replace(self, reference=chosen) if self.reference == "auto" else self

    def of_reference(self) -> ModelSpec:
        """The model that the reference is, as it is loaded without a policy."""
        path = self.reference_path or self.path
        return replace(self, path=path, reference_path=None, random_weights=False, lora=LoRA())

    def tokenizer(self) -> Any:
        """The model's tokenizer; a missing pad token becomes EOS (padding is never found by its id)."""
        from transformers import AutoTokenizer

        tokenizer = self._from_pretrained(AutoTokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if self.chat_template is not None:
            if tokenizer.chat_template is not None:
                log.info("model.chat_template replaces the chat template of %s", self.path)
            tokenizer.chat_template = template_of(self.chat_template)
        return tokenizer

    def load(self, *, dtype: torch.dtype = torch.float32, new_tokens: Sequence[int] = (), vocabulary: int = 0) -> Any:
        """The policy, in training mode; with LoRA, its adapters attached and the rest frozen.

        ``vocabulary`` is the least number of embeddings; rows of ``new_tokens`` start as the mean of the others.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        self._check_new_tokens(new_tokens)
        config = self._from_pretrained(AutoConfig)
        set_dropout(config, self.dropout)
        if self.random_weights:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self.attention)
        else:
            model, info = self._from_pretrained(
                AutoModelForCausalLM,
                config=config,
                dtype=dtype,
                attn_implementation=self.attention,
                output_loading_info=True,
                **(quantization() if self.lora.quantize else {}),
            )
            if info["missing_keys"]:
                raise ValueError(
                    f"model.path: {self.path} lacks weights of {type(model).__name__}, which would start at random: "
                    + ", ".join(sorted(info["missing_keys"])[:5])
                )
        if self._location.suffix == ".gguf":
            forget_quantisation(model)
        grow_vocabulary(model, vocabulary, new_tokens)
        return self._prepared(model, new_tokens)

    def skeleton(
        self, *, dtype: torch.dtype = torch.float32, new_tokens: Sequence[int] = (), vocabulary: int = 0
    ) -> Any:
        """What :meth:`load` returns, without its weights: to be called where parameters get no memory."""
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        self._check_new_tokens(new_tokens)
        config = self._from_pretrained(AutoConfig)
        set_dropout(config, self.dropout)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self.attention)
        if self._location.suffix == ".gguf":
            forget_quantisation(model)
        if not self.random_weights:
            with suppress(ValueError):  # many models have no file of their own for it
                model.generation_config = self._from_pretrained(GenerationConfig)
        grow_vocabulary(model, vocabulary, ())
        return self._prepared(model, new_tokens)

    @property
    def folder(self) -> Path | None:
        """The local directory that the model lies in, if it is one."""
        return self._location if self._location.is_dir() else None

    def _check_new_tokens(self, new_tokens: Sequence[int]) -> None:
        if self.lora.enabled and new_tokens and (self.lora.path is not None or self.lora.export == "adapter"):
            raise ValueError(
                "model.lora: new control tokens need rows in the embeddings, which an adapter alone does not hold: "
                "expected model.lora.export=merged and no model.lora.path"
            )

    def _prepared(self, model: Any, new_tokens: Sequence[int]) -> Any:
        if self.gradient_checkpointing:
            # transformers 5 renames it.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if self.lora.enabled:
            base, keep_start = self._names[0], self.reference == "adapter"
            self.lora.attach(model, base=base, new_tokens=new_tokens, keep_start=keep_start)
        return model.train()

    @property
    def local(self) -> Path | None:
        """The file or folder of the model, if it is on this machine by the name given."""
        return self._location if self._location.exists() else None

    @property
    def _location(self) -> Path:
        if self.path.startswith(PACKAGED):
            package, _, folder = self.path.removeprefix(PACKAGED).partition("/")
            try:
                return Path(str(files(package))) / folder
            except ModuleNotFoundError as error:
                raise ValueError(f"model.path: no such package: {package} (of {self.path})") from error
        return Path(self.path).expanduser()

    @property
    def _names(self) -> tuple[str, dict[str, str]]:
        # What transformers calls the model: a hub id or a folder, and the file in it.
        location = self._location
        if location.suffix == ".gguf":
            return str(location.parent), {"gguf_file": location.name}
        return str(location) if location.is_dir() else self.path, {}

    def _from_pretrained(self, factory: Any, **options: Any) -> Any:
        name, file = self._names
        try:
            return factory.from_pretrained(name, **file, **options)
        except (OSError, KeyError, ValueError, RuntimeError, ImportError, StrictDataclassError) as error:
            raise ValueError(f"model.path: {self.path} could not be loaded by transformers: {error}") from error


def forget_quantisation(model: Any) -> None:
    """Weights from a GGUF file are dequantised by now; a model that says otherwise could be neither cast nor saved."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def set_dropout(config: Any, probability: float) -> None:
    """Set every dropout probability that the config knows, under whichever name."""
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, int | float):
            setattr(config, name, probability)


def grow_vocabulary(model: Any, size: int, new_tokens: Sequence[int]) -> None:
    """Make room for ``size`` tokens, and start each of ``new_tokens`` as the mean of all embeddings before it."""
    if size > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(size, mean_resizing=False)
    if not new_tokens:
        return
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight[list(new_tokens)] = embedding.weight[: min(new_tokens)].mean(0)


def add_control_tokens(tokenizer: Any, texts: Iterable[str]) -> list[int]:
    """Make each text a single special token; returns the ids of those that are new to the vocabulary."""
    before = len(tokenizer)
    missing = [
        text for text in texts if text and tokenizer.convert_tokens_to_ids(text) in (None, tokenizer.unk_token_id)
    ]
    tokenizer.add_tokens(missing, special_tokens=True)
    return list(range(before, len(tokenizer)))
