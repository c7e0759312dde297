"""Load tokenizer and policy from a hub id, a local directory, a GGUF file, or a config with random weights."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from halos.checks import check_whole
from halos.config.combinations import REFERENCE, check_combinations
from halos.config.flat import flatten
from halos.data.rows.templates import TEMPLATES, template_of
from halos.policy.checks import check_directory, check_gguf, check_markers
from halos.policy.construction import (
    forget_quantisation,
    freeze_outside_text,
    grow_vocabulary,
    modules_outside_text,
    parameters_on_meta,
    set_dropout,
)
from halos.policy.export.base_model import DTYPES, BaseModel, read_base
from halos.policy.export.tokenizer import unconditioned
from halos.policy.export.trial import try_export
from halos.policy.kernels.cpu import use_cpu_kernels
from halos.policy.logprobs.token_statistics import check_statistics
from halos.policy.lora import LoRA, quantization

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PACKAGED = "pkg://"
"""``pkg://halos.toy/reference`` is a directory inside an installed package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which model to train, and how to load it. Its methods read files, the constructor does not.

    Args:
        path: a hub id, a local directory, a ``.gguf`` file or ``pkg://package/directory``.
        random_weights: read only the config (and tokenizer) from ``path``.
        attention: transformers' attention implementation (``sdpa``, ``eager``, ``flash_attention_2``, …). None:
            transformers chooses one that the architecture supports.
        packed_attention: how packed rows attend. ``pieces``: one call of PyTorch's fused attention per piece.
            ``flex``: one call of FlexAttention for all pieces (CUDA; compiled at first use).
        gradient_checkpointing: recompute activations in the backward pass.
        compile: run the decoder layers through torch.compile (:mod:`halos.policy.logprobs.compiling`).
        cpu_kernels: compute linear layers, RMSNorm and SwiGLU with this project's CPU kernels
            (:mod:`halos.policy.kernels`). False: use the model's own modules.
        liger: compute RMSNorm and SwiGLU with Liger's kernels, on CUDA (:mod:`halos.policy.kernels.liger`).
        dropout: probability for every dropout of the model. The default is 0, as in the authors' code: with dropout
            the policy would differ from its reference before the first step.
        head_chunk: rows of logits (one per scored token, as wide as the vocabulary) that are in memory at a time.
            None: all.
        statistics: what is logged of the policy's distributions at scored tokens: ``entropy``, ``token_accuracy``.
        reference: where the reference's log-probs come from. ``cached``: computed once, before training, and stored
            on disk. ``live``: a frozen copy of the model computes them in every step. ``adapter``: the policy computes
            them with its LoRA adapter switched off. ``auto``: see :meth:`resolved`.
        reference_path: a model to use as the reference instead of the policy's start. Needs ``cached``, and the same
            tokenizer.
        chat_template: replaces the tokenizer's chat template: ``plain``, ``chatml``, a file or a Jinja template. It is
            exported with the model.
        export_dtype: precision of the exported weights: ``base`` (as in the base's files, or as they were trained if
            that is narrower), ``float32`` or ``bfloat16``. Trained weights are rounded once. An exported adapter stays
            as it was trained.
        lora: train adapters instead of the whole model.
    """

    path: str
    random_weights: bool = False
    attention: str | None = None
    packed_attention: str = "pieces"
    gradient_checkpointing: bool = False
    compile: bool = False
    cpu_kernels: bool = True
    liger: bool = False
    dropout: float = 0.0
    head_chunk: int | None = 512
    statistics: Sequence[str] = ()
    reference: str = "auto"
    reference_path: str | None = None
    chat_template: str | None = None
    export_dtype: str = "base"
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
        if self.reference not in ("auto", "cached", "live", "adapter"):
            raise ValueError(f"model.reference: expected auto, cached, live or adapter, found {self.reference!r}")
        if self.export_dtype not in ("base", *DTYPES):
            raise ValueError(f"model.export_dtype: expected base, {' or '.join(DTYPES)}, found {self.export_dtype!r}")
        if self.lora.quantize and self.path.endswith(".gguf"):
            raise ValueError("model.lora.quantize: expected weights from a hub id or a directory as model.path")
        check_whole("model.head_chunk", self.head_chunk, 1, null=True)
        check_statistics(self.statistics)
        # The command has checked the whole configuration by then. A spec that is made in Python meets its rules here.
        check_combinations(self.flat())

    def flat(self) -> dict[str, object]:
        """Return the parameters by their configuration keys, as rules of combinations read them."""
        return flatten(asdict(self), "model")

    def check(self) -> None:
        """Check that the model can be loaded. Reads file headers only, and does not contact the hub.

        Raises:
            ValueError: no such path, damaged or missing files, a missing package, or no CUDA device for ``flex``.
        """
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
            # A typing error in a local path would otherwise be downloaded as a hub id, or fail there obscurely.
            raise ValueError(
                f"model.path: no such directory or file: {self.path}; it is not taken for a hub id, as "
                f"{location.parent} is a folder here"
            )

    def resolved(self, *, streaming: bool) -> ModelSpec:
        """Return the spec with ``reference=auto`` replaced by ``cached``, ``live`` or ``adapter``.

        The choice is ``cached``. For streamed data it is ``adapter`` with LoRA and ``live`` without, as the rows of a
        stream are not known before training.

        Raises:
            ValueError: the reference must be cached, and the data are streamed.
        """
        check_combinations(self.flat() | {"data.streaming": streaming, REFERENCE: True})
        if self.reference != "auto":
            return self
        uncached = "adapter" if self.lora.enabled else "live"
        return replace(self, reference=uncached if streaming else "cached")

    def of_reference(self) -> ModelSpec:
        """Return the spec of the reference as a model of its own: ``reference_path`` or ``path``, without LoRA."""
        path = self.reference_path or self.path
        return replace(self, path=path, reference_path=None, random_weights=False, lora=LoRA())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer. A missing pad token becomes EOS: masks never come from token ids."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = self._from_pretrained(AutoTokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if self.chat_template is not None:
            if tokenizer.chat_template is not None:
                log.info("model.chat_template replaces the chat template of %s", self.path)
            tokenizer.chat_template = template_of(self.chat_template)
            check_markers(tokenizer, refuse=self.chat_template in TEMPLATES)
        return tokenizer

    def load(
        self, *, dtype: torch.dtype = torch.float32, new_tokens: Sequence[int] = (), vocabulary: int = 0
    ) -> PreTrainedModel:
        """Load the policy in training mode, on the CPU. With LoRA, adapters are attached and the rest is frozen.

        Args:
            dtype: precision of the weights.
            new_tokens: ids without trained embeddings; their rows start as the mean of the others.
            vocabulary: least number of embedding rows.

        Raises:
            ValueError: transformers cannot load the model, or the files lack some of its weights.
        """
        from transformers import AutoModelForCausalLM

        config = self._config(new_tokens)
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
            # transformers only logs a warning of weights that it draws at random.
            if info["missing_keys"]:
                raise ValueError(
                    f"model.path: {self.path} lacks weights of {type(model).__name__}, which would start at random: "
                    + ", ".join(sorted(info["missing_keys"])[:5])
                )
        if self._location.suffix == ".gguf":
            forget_quantisation(model)
        grow_vocabulary(model, vocabulary, new_tokens)
        self._prepare(model, new_tokens)
        return self._finish(model)

    def skeleton(
        self, *, dtype: torch.dtype = torch.float32, new_tokens: Sequence[int] = (), vocabulary: int = 0
    ) -> PreTrainedModel:
        """Build the model that :meth:`load` returns with its weights on the meta device. Takes the same arguments.

        Buffers, and the weights of LoRA adapters, have memory and values.
        """
        from transformers import AutoModelForCausalLM

        config = self._config(new_tokens)
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=self.attention)
            if self._location.suffix == ".gguf":
                forget_quantisation(model)
            if not self.random_weights:
                model.generation_config = self._generation(config)
            grow_vocabulary(model, vocabulary, ())  # without values, new tokens' rows have no mean to start from
            self._prepare(model, new_tokens)
        return self._finish(model)

    def missing_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the ids for which the model has no rows in its embeddings, and log their number.

        Raises:
            ValueError: see :meth:`check_new_tokens`.
        """
        rows = self._config(()).get_text_config().vocab_size
        missing = list(range(rows, len(tokenizer)))
        if missing:
            log.warning(
                "model.path: the tokenizer has %d tokens, and %s embeddings for %d; the %d rows that are added start "
                "as the mean of the others, and are trained and exported",
                *(len(tokenizer), self.path, rows, len(missing)),
            )
        self.check_new_tokens(missing)
        return missing

    def check_new_tokens(self, new_tokens: Sequence[int]) -> None:
        """Raise ``ValueError`` if the export could not hold the embeddings of new tokens."""
        if self.lora.enabled and new_tokens and (self.lora.path is not None or self.lora.export == "adapter"):
            raise ValueError(
                f"model.lora.export: expected merged and no model.lora.path, as {len(new_tokens)} tokens are new: an "
                "adapter alone does not hold their rows in the embeddings, and would not fit the base; or give the "
                "base these rows first: model.resize_token_embeddings(len(tokenizer)), and save_pretrained of both"
            )

    def base(self, trained: torch.dtype = torch.float32) -> BaseModel:
        """Return what an export of weights that are trained in this precision takes over from the model's files."""
        name, file = self._names
        return read_base(None if file else name, self._config(()), self.export_dtype, trained)

    def try_export(
        self, tokenizer: PreTrainedTokenizerBase, base: BaseModel, *, end_of_turn: int, control: str = ""
    ) -> None:
        """Export everything but the weights to a temporary folder; see :mod:`halos.policy.export.trial`."""
        config = self._config(())
        if self._location.suffix == ".gguf" and hasattr(config, "quantization_config"):
            del config.quantization_config
        generation = self._generation(config)
        try_export(config, generation, tokenizer, base, end_of_turn=end_of_turn, control=control)

    @property
    def folder(self) -> Path | None:
        """The model's local directory. None for a hub id or a GGUF file."""
        return self._location if self._location.is_dir() else None

    @property
    def local(self) -> Path | None:
        """The model's file or directory on this machine. None for a hub id."""
        return self._location if self._location.exists() else None

    def _config(self, new_tokens: Sequence[int]) -> PretrainedConfig:
        from transformers import AutoConfig

        self.check_new_tokens(new_tokens)
        config: PretrainedConfig = self._from_pretrained(AutoConfig)
        set_dropout(config, self.dropout)
        return config

    def _generation(self, config: PretrainedConfig) -> GenerationConfig:
        from transformers import GenerationConfig

        try:
            generation: GenerationConfig = self._from_pretrained(GenerationConfig)
        except ValueError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            return GenerationConfig.from_model_config(config)  # many models have no file of their own for it
        # Unlike the other factories, this one keeps the argument, and would write it to the exported file.
        vars(generation).pop("trust_remote_code", None)
        return generation

    def _prepare(self, model: PreTrainedModel, new_tokens: Sequence[int]) -> None:
        if self.gradient_checkpointing:
            # transformers 5 renames it.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if self.lora.enabled:
            base, keep_start = self._names[0], self.reference == "adapter"
            outside = modules_outside_text(model)
            self.lora.attach(model, base=base, new_tokens=new_tokens, exclude=outside, keep_start=keep_start)
        freeze_outside_text(model)

    def _finish(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.cpu_kernels:
            # After LoRA, whose own linear layers take part. Outside of parameters_on_meta: each kernel is tried out
            # first, on small modules whose weights need memory.
            use_cpu_kernels(model)
        model.train()
        return model

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
        # transformers addresses a model by hub id or folder, and a GGUF file by its name inside the folder.
        location = self._location
        if location.suffix == ".gguf":
            return str(location.parent), {"gguf_file": location.name}
        return str(location) if location.is_dir() else self.path, {}

    def _from_pretrained(self, factory: Any, **options: Any) -> Any:
        # Any: transformers' factories have no common class, and return what the files name.
        name, file = self._names
        try:
            # Not None, with which transformers asks on the terminal.
            return factory.from_pretrained(name, **file, **options, trust_remote_code=False)
        except (OSError, KeyError, ValueError, RuntimeError, ImportError, StrictDataclassError) as error:
            if "custom code" in str(error):
                raise ValueError(
                    f"model.path: {self.path} needs code of its own (auto_map in its config), which halos does not "
                    "run; use a model whose architecture transformers contains"
                ) from error
            raise ValueError(f"model.path: {self.path} could not be loaded by transformers: {error}") from error


def add_control_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[int]:
    """Make each non-empty text a single special token. Returns the ids that are new to the vocabulary."""
    before = len(tokenizer)
    controls = [text for text in texts if text]
    for text in controls:
        # The chat template of a policy that was trained with this token ends with it already.
        unconditioned(tokenizer, text)
    missing = [text for text in controls if tokenizer.convert_tokens_to_ids(text) in (None, tokenizer.unk_token_id)]
    tokenizer.add_tokens(missing, special_tokens=True)
    return list(range(before, len(tokenizer)))
