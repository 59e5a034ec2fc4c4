"""`mmpretrain train`: build everything a config describes, train, evaluate, save and report."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from mmpretrain.config import instantiate, without_pretrained
from mmpretrain.data.datamodule import DataModule
from mmpretrain.data.fingerprint import check_order
from mmpretrain.data.preflight import summary
from mmpretrain.distributed import leave, sum_over_ranks
from mmpretrain.errors import InputError, LimitReached, Preempted, RunFailed
from mmpretrain.evaluation import write_metrics
from mmpretrain.initial import adapt, check_identity, fill, follow, identity
from mmpretrain.model import MultimodalModel
from mmpretrain.pretrained import Pretrained, save
from mmpretrain.provenance import given_overrides, manifest, record
from mmpretrain.report import report_run
from mmpretrain.runs import Run, check_adapters, check_checkpoint, check_groups, open_run
from mmpretrain.training.assembly import Assembly, assemble
from mmpretrain.training.checks import check_tokenizer
from mmpretrain.training.compilation import check_place, uncompiled
from mmpretrain.training.csv_logger import MetricsCsv
from mmpretrain.training.fsdp import full_state
from mmpretrain.training.lora import Lora
from mmpretrain.training.module import TrainingModule
from mmpretrain.training.preemption import Preemption, release
from mmpretrain.training.remembered import remember_frozen
from mmpretrain.training.workers import dead_worker
from mmpretrain.types import Tokenizer

STEP = ("micro_batch_size", "compile", "activation_checkpointing", "fp8")
"""Keys of the group `trainer` that are not Lightning's but say how a step is computed."""


def train(config: DictConfig) -> dict[str, float]:
    """Train what `config` (see configs/train.yaml) describes and return the final metrics.

    Raises `InputError` for parts that do not fit or data that is not there, before a run folder is made; `Preempted`
    after a signal; `LimitReached` beyond a limit of the config; `RunFailed` where a worker was killed.
    """
    with ExitStack() as stack:
        preemption = Preemption()
        preemption.install()
        stack.callback(preemption.restore)
        return _train(config, preemption, stack)


def _train(config: DictConfig, preemption: Preemption, stack: ExitStack) -> dict[str, float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    sources = follow(config, given_overrides())
    resolved: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    build = partial(instantiate, allow=tuple(config.allow_targets))
    if not 0 <= config.seed < 2**32:
        raise InputError(f"seed is {config.seed}; give a number from 0 to {2**32 - 1}")
    lightning.seed_everything(config.seed, workers=True, verbose=False)
    tokenizer: Tokenizer = build(config.tokenizer)
    model: MultimodalModel = build(config.model)
    check_tokenizer(model, tokenizer)
    arguments = {key: value for key, value in resolved["trainer"].items() if key not in STEP}
    step = {key: value for key, value in resolved["trainer"].items() if key in STEP}
    original = fill(model, sources, tuple(config.allow_targets))
    lora: Lora | None = None if config.finetune.lora is None else build(config.finetune.lora)
    if lora is not None:
        adapt(lora, model, sources, resolved["model"])
    if config.finetune.remember:
        remember_frozen(model)
    module = training_module(config, model, step, build)
    module.preserve(original)
    del original  # a second model, needed only where a loss asked for it
    run = open_run(config)
    check_identity(run.folder, sources)
    check_adapters(run, resolved["finetune"]["lora"])
    check_checkpoint(run, module, config.trainer.max_steps)
    check_groups(run, module.optimizer(module.groups(model, module.weight_decay)).param_groups)
    config.run_dir = str(run.folder)  # what loggers and config.yaml see
    data: DataModule = build(config.data.module)
    data.prepare_data()
    data.setup()
    check_order(run.saved_order(), data, config.allow_new_order)
    parts = assemble(config, run.folder, run.checkpoints, preemption, build, tokenizer)
    parts.evaluation.check_data()
    trainer: lightning.Trainer = build(
        arguments,
        callbacks=parts.in_order(),
        logger=[MetricsCsv(run.folder), *loggers(build(config.logger))],
        plugins=[parts.checkpoints.io],
        default_root_dir=str(run.folder),
        enable_checkpointing=False,  # Lightning's own; see Checkpoints
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # nothing goes through Lightning's own logging; see Metrics
    )
    if module.compile_mode is not None:
        check_place(module.compile_mode, trainer.strategy.root_device, trainer.world_size)
    if trainer.is_global_zero:
        run.start(config)
        stack.callback(run.end)
        described = manifest(config, data.shards, trainer.world_size)
        record(run.folder, {**described, "init": identity(sources)}, run.step)
        for line in _beginning(run, data, trainer.world_size):
            print(line, file=sys.stderr)
    fit(trainer, module, data, run)
    if preemption.stopped_at is not None:
        release(trainer)
        if not parts.checkpoints.stop_saved:
            raise RunFailed(
                f"stopped at step {preemption.stopped_at}, whose checkpoint could not be saved into {run.checkpoints}; "
                f"make room there, then go on from the one before with run_dir={run.folder} resume=auto"
            )
        raise Preempted(
            f"stopped at step {preemption.stopped_at} of {trainer.max_steps}; go on with the same command and "
            f"run_dir={run.folder} resume=auto"
        )
    if not parts.evaluation.metrics:  # resumed at the last step: all that is left is to evaluate
        module.to(trainer.strategy.root_device)
        parts.evaluation.evaluate(trainer, module)
    with nullcontext() if parts.ema is None else parts.ema.applied(module.model):
        return finish(config, run, trainer, parts, lora)


def fit(trainer: lightning.Trainer, module: TrainingModule, data: DataModule, run: Run) -> None:
    """Train, from the run's checkpoint if it has one; raises `RunFailed` where a worker of the loader was killed."""
    try:
        trainer.fit(module, data, ckpt_path=run.checkpoint)
    except LimitReached:
        release(trainer)
        raise
    except (RuntimeError, OSError, EOFError) as error:
        what = dead_worker(error, data) or (str(error) if isinstance(error, OSError) else None)
        if what is None:
            raise
        raise RunFailed(f"{what}; go on with run_dir={run.folder} resume=auto") from error


def _beginning(run: Run, data: DataModule, ranks: int) -> Iterator[str]:
    """Say where a run writes, what it reads, and what is odd about that."""
    yield f"run folder: {run.folder}"
    for name, source in data.sources.items():
        samples, batch = data.sizes()[name].samples, data.global_batch_size
        yield from summary(name, data.shards[name], samples, source.fields, batch, ranks, data.num_workers)


def training_module(
    config: DictConfig, model: MultimodalModel, step: Mapping[str, Any], build: Callable[..., Any]
) -> TrainingModule:
    """Build losses, optimizer and scheduler around a model; `step` has the values of `STEP`."""
    if config.trainer.get("accumulate_grad_batches", 1) != 1:
        raise InputError(
            "trainer.accumulate_grad_batches changes a contrastive loss, which needs a batch's negatives at once; "
            "set trainer.micro_batch_size instead, which changes no gradient"
        )
    losses, optimizer = build(config.losses), build(config.optimizer)
    return TrainingModule(
        model,
        losses["losses"],
        optimizer["optimizer"],
        optimizer["groups"],
        optimizer["weight_decay"],
        build(config.scheduler),
        losses["weights"],
        seed=config.seed,
        **step,
    )


def finish(
    config: DictConfig, run: Run, trainer: lightning.Trainer, parts: Assembly, lora: Lora | None = None
) -> dict[str, float]:
    """Write model, metrics and report, on rank 0; the counts of data read and lost join the metrics.

    Adapters are merged into the model that is saved, and lie alone in the folder `adapter`.
    """
    evaluation = parts.evaluation
    data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
    module: Any = trainer.lightning_module
    final = {**evaluation.metrics, "train/steps": float(trainer.global_step)}
    truncated = torch.tensor(data.collate.truncated.value, device=trainer.strategy.root_device)
    final["train/truncated_captions"] = float(sum_over_ranks(truncated))
    for name, sizes in data.sizes().items():
        final[f"train/{name}/samples"] = float(sizes.samples)
    final |= parts.data_log.totals()
    final["train/bad_steps"] = float(parts.guard.total)
    sharded = module.device_mesh is not None
    state = full_state(module.model) if sharded else module.model.state_dict() if lora is not None else {}
    leave()
    if trainer.is_global_zero:
        resolved: Any = OmegaConf.to_container(config, resolve=True)
        saved = {part: resolved[part] for part in ("model", "tokenizer")}
        model: MultimodalModel = module.model
        if lora is not None:
            lora.save(run.folder / "adapter", state, config.init if isinstance(config.init, str) else None)
            state = lora.merged(state)
        if state:  # sharded, or with adapters: the plain model is built anew
            model = instantiate(without_pretrained(resolved["model"]), allow=tuple(config.allow_targets))
            model.load_state_dict(state)
            model.to(trainer.strategy.root_device).eval()
        described = {**saved, "preprocess": resolved["data"]["preprocess"]}
        made_by = f"trained by mmpretrain, run {run.folder.name}"
        save(run.folder / "model", model, described, made_by, tuple(config.allow_targets))
        try:
            if config.report:
                pretrained = Pretrained(model, evaluation.preprocess, evaluation.tokenizer)
                with uncompiled():
                    path = report_run(run.folder, config, pretrained, final, evaluation.evaluators)
                print(f"report: {path}", file=sys.stderr)
        finally:
            write_metrics(run.folder / "metrics.json", final)  # last: with it the run is finished
    return final


def loggers(built: Any) -> list[Logger]:
    """List the loggers of the config group besides the CSV file, which is always written."""
    return [value for value in (built or {}).values() if isinstance(value, Logger)]
