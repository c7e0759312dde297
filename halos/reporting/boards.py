"""What a person looks at while a run trains: TensorBoard or Weights & Biases, with the same sections in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from halos.safe_text import markdown, visible

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Layout = Mapping[str, Mapping[str, Sequence[str]]]
"""Names of metrics by the title of their chart, by the title of a group of charts."""


class Board(Protocol):
    """Shows charts, histograms and tables. Its sections are the first parts of the names, in alphabetical order."""

    def lay_out(self, layout: Layout) -> None:
        """Draw metrics in common charts."""

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""

    def log_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Add a histogram of values, [n]."""

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        """Add a table of texts, which may be anyone's."""

    def log_hparams(self, params: Mapping[str, object], final: Mapping[str, float], step: int) -> None:
        """Add the run's parameters, and the metrics by which runs are compared.

        Args:
            params: by flat keys.
            final: names of curves, of which the last point counts, and metrics of the run's end under ``val/final/``.
            step: the last one.
        """


FINAL = "val/final/"
"""Prefix of metrics of the run's end, which no curve has."""
LEADING_PARAMS = ("loss.beta", "loss.name", "model.path", "optim.lr", "seed")
"""Parameters that a table of runs shows first, as many as TensorBoard shows at once."""


class TensorBoard:
    """The page of a :class:`TensorBoardLogger`. Curves of one chart are told apart by their marks."""

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def lay_out(self, layout: Layout) -> None:
        groups = {
            # Names are patterns to TensorBoard: val/kl would draw val/kl_error too.
            group: {title: ["Multiline", [f"^{name}$" for name in names]] for title, names in charts.items()}
            for group, charts in layout.items()
        }
        self.writer.add_custom_scalars(groups)

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_histogram(self, name: str, values: Tensor, step: int) -> None:
        self.writer.add_histogram(name, values, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        lines = [columns, ["---"] * len(columns), *([_cell(text) for text in row] for row in rows)]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def log_hparams(self, params: Mapping[str, object], final: Mapping[str, float], step: int) -> None:
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        self.log_scalars({name: value for name, value in final.items() if name.startswith(FINAL)}, step)
        known = {name: value if isinstance(value, bool | int | float) else str(value) for name, value in params.items()}
        # Under the names of the curves: logged once more, each would be a chart with a single point.
        experiment, *session = hparams(known, dict(final))
        # Columns come in alphabetical order, after those that differ between runs, as far as this says so.
        plugin_data = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(plugin_data.content)
        for info in content.experiment.hparam_infos:
            info.differs = info.name in LEADING_PARAMS
        plugin_data.content = content.SerializeToString()
        for summary in (experiment, *session):
            self.writer._get_file_writer().add_summary(summary)
        self.writer.flush()


class WeightsAndBiases:
    """The page of a :class:`WandbLogger`, whose API draws no metrics in common charts without network."""

    def __init__(self, logger: WandbLogger) -> None:
        self.logger = logger

    def lay_out(self, layout: Layout) -> None:
        pass

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.logger.log_metrics(dict(values), step)

    def log_histogram(self, name: str, values: Tensor, step: int) -> None:
        import wandb

        histogram: Any = wandb.Histogram(values.float().cpu().numpy())
        self.logger.log_metrics({name: histogram}, step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]], step: int) -> None:
        import wandb

        table: Any = wandb.Table(columns=list(columns), data=[[visible(text) for text in row] for row in rows])
        self.logger.log_metrics({name: table}, step)

    def log_hparams(self, params: Mapping[str, object], final: Mapping[str, float], step: int) -> None:
        self.logger.log_hyperparams(dict(params))
        self.log_scalars({name: value for name, value in final.items() if name.startswith(FINAL)}, step)


def has_boards(trainer: pl.Trainer) -> bool:
    """Whether the run has a board; the same on all processes."""
    return any(isinstance(logger, TensorBoardLogger | WandbLogger) for logger in trainer.loggers)


def boards(trainer: pl.Trainer) -> list[Board]:
    """The run's boards; none on other processes than the first."""
    run_boards: list[Board] = []
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            run_boards.append(TensorBoard(logger.experiment))
        elif isinstance(logger, WandbLogger):
            run_boards.append(WeightsAndBiases(logger))
    return run_boards


def _cell(text: str) -> str:
    # Line by line, as a cell of Markdown has one line. TensorBoard has no formulas and no struck-out text, so that a
    # backslash before a dollar or a tilde would be shown.
    lines = [markdown(line).replace(r"\$", "$").replace(r"\~", "~") for line in text.strip().split("\n")]
    return "<br>".join(lines)
