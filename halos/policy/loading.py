"""Load tokenizer and policy from a hub id, a local directory, a GGUF file, or a config with random weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from halos.checks import check_choice, is_number
from halos.config.combinations import DIVERGENCE, REFERENCE, check_combinations
from halos.config.nodes import flatten
from halos.policy.chat_template import set_chat_template, template_day
from halos.policy.checkpointing import check_policy, checkpoint_layers
from halos.policy.checks import check_encodes, check_path
from halos.policy.construction import (
    forget_quantisation,
    freeze_outside_text,
    grow_vocabulary,
    parameters_on_meta,
    set_dropout,
    silence_routers,
)
from halos.policy.export.base_model import DTYPES, BaseModel, read_base
from halos.policy.export.trial import try_export
from halos.policy.kernels.cpu import use_cpu_kernels
from halos.policy.limits import as_large_as_its_files, check_config
from halos.policy.logprobs.head_rows import check_head_chunk
from halos.policy.logprobs.token_statistics import check_statistics
from halos.policy.lora import LoRA, quantization
from halos.policy.model_files import ModelFiles
from halos.policy.router import check_router_loss

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EXAMPLE = "model=hf model.path=HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Options of loading a model that are not part of its :class:`ModelSpec`.

    Args:
        dtype: precision of the weights.
        new_tokens: ids without trained embeddings; their rows start as the mean of the others.
        vocabulary: the minimum number of embedding rows.
        quiet: do not log which layers get adapters, because another load of the same model logs it.
    """

    dtype: torch.dtype = torch.float32
    new_tokens: Sequence[int] = ()
    vocabulary: int = 0
    quiet: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Which model to train, and how to load it. Its methods read files, the constructor does not.

    Args:
        path: a hub id, a local directory, a ``.gguf`` file or ``pkg://package/directory``.
        revision: a commit, a tag or a branch of a hub id. A commit is not affected by later changes of the files.
        trust_remote_code: run the code that comes with the model, with all rights of this process. If false, a model
            that needs code of its own is refused.
        random_weights: read only the config (and tokenizer) from ``path``.
        attention: transformers' attention implementation (``sdpa``, ``eager``, ``flash_attention_2``, …). None:
            transformers chooses one that the architecture supports.
        packed_attention: how packed rows attend. ``pieces``: one call of PyTorch's fused attention per piece. ``flex``:
            one call of FlexAttention for all (CUDA; compiled). ``auto``: :mod:`halos.policy.logprobs.attention_choice`.
        gradient_checkpointing: what decoder layers keep for the backward pass: all activations (false), their inputs
            (true, ``offload``), or their inputs and products (``selective``), see :mod:`halos.policy.checkpointing`.
        compile: run the decoder layers through torch.compile (:mod:`halos.policy.logprobs.compiling`).
        cpu_kernels: compute linear layers, RMSNorm and SwiGLU with this project's CPU kernels
            (:mod:`halos.policy.kernels`). False: use the model's own modules.
        liger: compute RMSNorm and SwiGLU with Liger's kernels, on CUDA (:mod:`halos.policy.kernels.liger`).
        dropout: probability for every dropout of the model. The default is 0, as in the authors' code: with dropout
            the policy would differ from its reference before the first step.
        head_chunk: rows of logits (one per scored token, as wide as the vocabulary) that are in memory at a time.
            None: all. ``auto``: by the free memory on CUDA, else 512 (:mod:`halos.policy.logprobs.head_rows`).
        router_loss: the coefficient of a mixture's load-balancing loss (:class:`halos.policy.router.RouterLoss`), where
            0 means none. ``auto``: the model's config decides by ``output_router_logits`` and ``router_aux_loss_coef``.
        statistics: statistics of the policy's distributions at scored tokens to log: ``entropy``, ``token_accuracy``,
            ``log_collision``.
        reference: where the reference's log-probs come from. ``cached``: computed once, before training, and stored
            on disk. ``live``: a frozen copy of the model computes them in every step. ``adapter``: the policy computes
            them with its LoRA adapter switched off. ``auto``: see :meth:`resolved`.
        reference_path: a model to use as the reference instead of the policy's start. Needs ``cached``, and the same
            tokenizer.
        chat_template: replaces the tokenizer's chat template: ``plain``, ``chatml``, a file, a Jinja template, or the
            name of one of several that the tokenizer has. It is exported with the model.
        chat_template_kwargs: values of the chat template's variables, such as ``{"enable_thinking": False}``. They are
            the defaults of the exported template.
        chat_template_date: the date (YYYY-MM-DD) that a chat template with ``strftime_now`` writes while training.
            None: the day on which the process started.
        export_dtype: precision of the exported weights: ``base`` (as in the base's files, or as they were trained if
            that is narrower), ``float32`` or ``bfloat16``. Trained weights are rounded once. An exported adapter stays
            as it was trained.
        lora: train adapters instead of the whole model.
    """

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    random_weights: bool = False
    attention: str | None = None
    packed_attention: str = "auto"
    gradient_checkpointing: bool | str = False
    compile: bool = False
    cpu_kernels: bool = True
    liger: bool = False
    dropout: float = 0.0
    head_chunk: int | str | None = "auto"
    router_loss: str | float = "auto"
    statistics: Sequence[str] = ()
    reference: str = "auto"
    reference_path: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    chat_template_date: str | None = None
    export_dtype: str = "base"
    lora: LoRA = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            expected = "a hub id, a directory or a .gguf file"
            raise ValueError(f"model.path: expected {expected}, found {self.path!r}; for example {EXAMPLE}")
        if self.revision is not None and not (isinstance(self.revision, str) and self.revision):
            raise ValueError(f"model.revision: expected a commit, a tag or null, found {self.revision!r}")
        if not isinstance(self.trust_remote_code, bool):  # a text would count as true
            raise ValueError(f"model.trust_remote_code: expected true or false, found {self.trust_remote_code!r}")
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout: expected a probability in [0, 1), found {self.dropout!r}")
        if not isinstance(self.lora, LoRA):
            raise ValueError(f"model.lora: expected halos.policy.LoRA, found {self.lora!r}")
        check_choice("model.packed_attention", self.packed_attention, ("auto", "pieces", "flex"))
        check_policy(self.gradient_checkpointing)
        if self.reference not in ("auto", "cached", "live", "adapter"):
            raise ValueError(f"model.reference: expected auto, cached, live or adapter, found {self.reference!r}")
        if self.export_dtype not in ("base", *DTYPES):
            raise ValueError(f"model.export_dtype: expected base, {' or '.join(DTYPES)}, found {self.export_dtype!r}")
        if self.lora.quantize and self.path.endswith(".gguf"):
            raise ValueError("model.lora.quantize: expected weights from a hub id or a directory as model.path")
        template_day(self.chat_template_date)  # raises for a text that is not a date
        check_head_chunk(self.head_chunk)
        check_statistics(self.statistics)
        check_router_loss(self.router_loss)
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
            hint = "use model.packed_attention=pieces"
            raise ValueError(f"model.packed_attention: flex needs a CUDA device, found none; {hint}")
        if self.reference_path is not None:
            self.of_reference().check()
        if self.revision is not None and self.local is not None:
            raise ValueError(f"model.revision: expected null for files of this machine ({self.path}); they have none")
        if self.trust_remote_code:
            log.warning("model.trust_remote_code: code that comes with %s runs with all your rights", self.path)
        check_path(self.path, self.files.location, weights=not self.random_weights)
        if self.files.location.is_dir():
            check_config(self.files.location / "config.json")

    def resolved(self, *, streaming: bool, divergence: bool = False) -> ModelSpec:
        """Return the spec with ``reference=auto`` replaced by ``cached``, ``live`` or ``adapter``.

        The choice is ``cached``. For streamed data, whose rows are not known before training, and for a loss that
        compares whole distributions it is ``adapter`` with LoRA and ``live`` without.

        Raises:
            ValueError: the reference must be cached, and the data are streamed or the loss compares distributions.
        """
        check_combinations(self.flat() | {"data.streaming": streaming, REFERENCE: True, DIVERGENCE: divergence})
        if self.reference != "auto":
            return self
        uncached = "adapter" if self.lora.enabled else "live"
        return replace(self, reference=uncached if streaming or divergence else "cached")

    def of_reference(self) -> ModelSpec:
        """Return the spec of the reference as a model of its own: ``reference_path`` or ``path``, without LoRA."""
        path, revision = self.reference_path or self.path, None if self.reference_path else self.revision
        # The reference scores the policy's token ids. Its own chat template is not used, and the keys may not fit it.
        return replace(
            self,
            path=path,
            revision=revision,
            reference_path=None,
            random_weights=False,
            chat_template=None,
            chat_template_kwargs={},
            lora=LoRA(),
        )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the model's tokenizer. A missing pad token becomes EOS: masks never come from token ids."""
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = self.files.read(AutoTokenizer)
        check_encodes(tokenizer, self.path)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        day = template_day(self.chat_template_date)
        set_chat_template(tokenizer, self.chat_template, self.chat_template_kwargs, day, model=self.path)
        return tokenizer

    def load(self, options: LoadOptions = LoadOptions()) -> PreTrainedModel:
        """Load the policy in training mode, on the CPU. With LoRA, adapters are attached and the rest is frozen.

        Raises:
            ValueError: transformers cannot load the model, or the files lack some of its weights.
        """
        from transformers import AutoModelForCausalLM

        built: dict[str, object] = self._build_options(options)
        if self.random_weights:
            model = AutoModelForCausalLM.from_config(**built, trust_remote_code=self.trust_remote_code)
        else:
            built |= quantization() if self.lora.quantize else {}
            with as_large_as_its_files(self.files.location) if self._has_weights else nullcontext():
                model, info = self.files.read(AutoModelForCausalLM, **built, output_loading_info=True)
            # transformers only logs a warning of weights that it draws at random.
            if info["missing_keys"]:
                lacking = f"{self.path} lacks weights of {type(model).__name__}, which would start at random"
                raise ValueError(f"model.path: {lacking}: {', '.join(sorted(info['missing_keys'])[:5])}")
        self._prepare(model, options)
        return self._finish(model)

    def skeleton(self, options: LoadOptions = LoadOptions()) -> PreTrainedModel:
        """Build the model that :meth:`load` returns with its weights on the meta device.

        Buffers, and the weights of LoRA adapters, have memory and values.
        """
        from transformers import AutoModelForCausalLM

        if self._has_weights:
            # Each parameter has memory for a moment below, and buffers keep theirs.
            with as_large_as_its_files(self.files.location), torch.device("meta"):
                AutoModelForCausalLM.from_config(
                    **self._build_options(options), trust_remote_code=self.trust_remote_code
                )
        with parameters_on_meta():
            built = self._build_options(options)
            model = AutoModelForCausalLM.from_config(**built, trust_remote_code=self.trust_remote_code)
            if not self.random_weights:
                model.generation_config = self.files.generation(model.config)
            self._prepare(model, options)
        return self._finish(model)

    def missing_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the ids for which the model has no rows in its embeddings, and log their number.

        Raises:
            ValueError: see :meth:`check_new_tokens`.
        """
        rows = self._config().get_text_config().vocab_size
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
        name, file = self.files.names
        return read_base(None if file else name, self._config(), self.export_dtype, trained, self.revision)

    def try_export(
        self, tokenizer: PreTrainedTokenizerBase, base: BaseModel, *, end_of_turn: int, control: str = ""
    ) -> None:
        """Export everything but the weights to a temporary folder; see :mod:`halos.policy.export.trial`."""
        config = self._config()
        if self.files.is_gguf and hasattr(config, "quantization_config"):
            del config.quantization_config
        generation = self.files.generation(config)
        trust = self.trust_remote_code
        try_export(
            config, generation, tokenizer, base, end_of_turn=end_of_turn, control=control, trust_remote_code=trust
        )

    @property
    def files(self) -> ModelFiles:
        """The model's files."""
        return ModelFiles(path=self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)

    @property
    def local(self) -> Path | None:
        """The model's file or directory on this machine. None for a hub id."""
        return self.files.local

    @property
    def _has_weights(self) -> bool:
        # An estimate reads folders without weights too. Where they are needed, check() has refused such a folder.
        return not self.random_weights and self.files.has_safetensors

    def _config(self) -> PretrainedConfig:
        config = self.files.config()
        set_dropout(config, self.dropout)
        return config

    def _build_options(self, options: LoadOptions) -> dict[str, object]:
        self.check_new_tokens(options.new_tokens)
        config, attention = self._config(), self.attention
        if attention is None and getattr(config.get_text_config(), "attn_logit_softcapping", None):
            attention = "eager"  # transformers before 5.23 chooses SDPA, which leaves these caps out
        return {"config": config, "dtype": options.dtype, "attn_implementation": attention}

    def _prepare(self, model: PreTrainedModel, options: LoadOptions) -> None:
        if self.files.is_gguf:
            forget_quantisation(model)
        grow_vocabulary(model, options.vocabulary, options.new_tokens)
        checkpoint_layers(model, self.gradient_checkpointing)
        if self.lora.enabled:
            base, keep_start = self.files.names[0], self.reference == "adapter"
            new_tokens, logged = options.new_tokens, not options.quiet
            self.lora.attach(model, base=base, new_tokens=new_tokens, keep_start=keep_start, logged=logged)
        freeze_outside_text(model)

    def _finish(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.cpu_kernels:
            # After LoRA, whose own linear layers take part. Outside of parameters_on_meta: each kernel is tried out
            # first, on small modules whose weights need memory.
            use_cpu_kernels(model)
        model.train()
        silence_routers(model)
        return model
