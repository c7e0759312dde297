"""The files of a model: finds them, and lets transformers read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halos.policy.checks import locate
from halos.policy.limits import TooLarge

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A hub id, a local directory or a GGUF file. The arguments are those of :class:`halos.policy.ModelSpec`."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def location(self) -> Path:
        """The local file or directory; for a hub id, a path that does not exist."""
        return locate(self.path)

    @property
    def local(self) -> Path | None:
        """The local file or directory. None for a hub id."""
        return self.location if self.location.exists() else None

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a single GGUF file."""
        return self.location.suffix == ".gguf"

    @property
    def has_safetensors(self) -> bool:
        """Whether the model is a local directory with weights. An estimate reads directories without them too."""
        return self.location.is_dir() and any(self.location.glob("*.safetensors*"))

    @property
    def names(self) -> tuple[str, dict[str, str]]:
        """The name by which transformers addresses the model, and a keyword for a GGUF file inside a directory."""
        if self.is_gguf:
            return str(self.location.parent), {"gguf_file": self.location.name}
        return str(self.location) if self.location.is_dir() else self.path, {}

    def config(self) -> PretrainedConfig:
        """Read the model's config. Raises ``ValueError`` if transformers cannot."""
        from transformers import AutoConfig

        config: PretrainedConfig = self.read(AutoConfig)
        return config

    def generation(self, config: PretrainedConfig) -> GenerationConfig:
        """Read the model's generation config. Many models have no file for it; it is then made from the config."""
        from transformers import GenerationConfig

        try:
            generation: GenerationConfig = self.read(GenerationConfig)
        except ValueError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            return GenerationConfig.from_model_config(config)
        # Unlike other classes, this one keeps the argument and would write it to the exported file.
        vars(generation).pop("trust_remote_code", None)
        return generation

    def read(self, factory: Any, **options: Any) -> Any:
        """Call ``factory.from_pretrained`` for the model.

        Args:
            factory: a class of transformers. Their results have no common type: the files determine it.
            options: further keywords.

        Raises:
            ValueError: for files that transformers cannot load, or that need code of their own.
        """
        name, file = self.names
        try:
            revision = {} if self.revision is None else {"revision": self.revision}
            # trust_remote_code is never None, for which transformers would ask on the terminal.
            options |= {**file, **revision, "trust_remote_code": self.trust_remote_code}
            return factory.from_pretrained(name, **options)
        except TooLarge:
            raise
        except Exception as error:  # libraries raise all kinds of errors for files with any content
            if "custom code" in str(error):
                raise ValueError(
                    f"model.path: {self.path} needs code of its own (auto_map in its config), which halos does not "
                    "run; use a model whose architecture transformers contains, or, if you know that code, allow it: "
                    f"model.trust_remote_code=true for training, trust_remote_code=[{self.path}] in other commands"
                ) from error
            reason = str(error) or type(error).__name__
            raise ValueError(f"model.path: {self.path} could not be loaded by transformers: {reason}") from error
