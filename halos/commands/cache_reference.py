"""``cache_reference(cfg)``: computes and caches the reference's log-probs of a run, without training."""

import time

from omegaconf import DictConfig, OmegaConf

from halos.commands.assembly import assemble
from halos.config.combinations import DIVERGENCE, check_combinations
from halos.config.nodes import build
from halos.files import in_home
from halos.reporting import run_report


def cache_reference(cfg: DictConfig) -> run_report.CacheReport:
    """Fill ``cfg.cache_dir`` with the log-probs that training with this configuration reads from it.

    What is already in the cache is not computed again; after a kill, this is most of the earlier work. Nothing is
    written to ``output_dir``. The devices are those of the training run.

    Raises:
        ValueError: training would refuse the configuration, or its loss or model has no cached reference.
    """
    _check(cfg)
    # output_dir may hold a run. It is neither refused, nor resumed, nor logged to, and none of its files is touched.
    cfg = OmegaConf.merge(cfg, {"overwrite": True, "resume": None, "logger": {"_target_": None}})  # type: ignore[assignment]
    start = time.perf_counter()
    run = assemble(cfg)
    # A validation of no batches launches the processes, loads the model and runs the reference pass, as training does.
    run.trainer.limit_val_batches = 0
    run.trainer.validate(run.objective, datamodule=run.data, verbose=False)
    table = run.data.reference
    if table is None:
        raise ValueError("expected the objective's backbone to have computed the reference's log-probs, found none")
    folder = in_home(cfg.cache_dir) / "reference"
    report = run_report.CacheReport(
        completions=len(table.entries),
        found=len(table.entries) - table.computed,
        computed=table.computed,
        seconds=time.perf_counter() - start,
        folder=str(folder),
    )
    run_report.show_reference(report)
    return report


def _check(cfg: DictConfig) -> None:
    objective = build(cfg.loss, None, without=("name",))
    if not objective.needs.reference:
        raise ValueError(f"loss={cfg.loss.name}: expected a loss with a reference, found one that reads none")
    check_combinations({"model.reference": "cached", DIVERGENCE: objective.needs.divergence})
    if cfg.data.streaming:
        raise ValueError("data.streaming: expected false, found true: the reference of a stream is not computed before")
    if cfg.model.reference not in ("auto", "cached"):
        raise ValueError(f"model.reference: expected cached, found {cfg.model.reference}: there is nothing to compute")
