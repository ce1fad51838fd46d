"""Runs the stages of an experiment in order; finished stages are skipped, interrupted ones continue."""
import time
from dataclasses import replace

from data.catalog import build_source, data_key
from files.run_folder import RunFolder
from training.distributed import Processes
from training.experiment import STAGES, Experiment, Stage
from training.same_data import data_record
from training.stages.context import StageContext
from training.stages.personal import few_images


def run_stages(experiment: Experiment, run: RunFolder, processes: Processes, changed_data: bool = False) -> None:
    """Train the stages that are not finished. Every process calls this. Raises ConfigError if the data is not what the
    run began with, unless ``changed_data``."""
    unfinished = [name for name in experiment.stages if STAGES[name].reads_images and not run.has(*STAGES[name].leaves)]
    with processes.main_first():
        record = data_record(experiment.data, run, unfinished, changed_data) if processes.main else {}
    run.record(seed=experiment.seed, processes=processes.world, **record)
    start = RunFolder.open(experiment.start_from) if experiment.start_from else None
    for stage in (STAGES[name] for name in experiment.stages):
        if start:
            not_trained = [STAGES[name] for name in stage.needs if name not in experiment.stages]
            with processes.main_first():
                run.take_over(start, *stage.inherits, *(file for needed in not_trained for file in needed.leaves))
        finished = processes.from_main(run.has(*stage.leaves))
        if finished and processes.main:
            print(f"{stage.name}: finished before, skipped")
        if finished:
            continue
        began = time.perf_counter()
        run.require(*(name for needed in stage.needs for name in STAGES[needed].leaves))
        context = context_of(stage, experiment, run, processes)
        stage.train(getattr(experiment, stage.name), replace(context, start=start))
        processes.from_main()  # what the main process writes last is there
        if processes.main:
            print(f"{stage.name}: done in {time.perf_counter() - began:.0f} s")
    if processes.main:
        how = f"; sample with: python sample.py --run {run.path} \"a prompt\""
        print(f"trained: {run.path}{how if {'denoiser', 'student', 'decoder'} & {*experiment.stages} else ''}")


def context_of(stage: Stage, experiment: Experiment, run: RunFolder, processes: Processes) -> StageContext:
    """The inputs of a stage beside its configuration. Raises ValueError if a split that it reads is empty."""
    context = StageContext(run, seed=experiment.seed, device=processes.device(), processes=processes,
                           data_key=data_key(experiment.data), system=experiment.system,
                           preview_prompts=experiment.preview_prompts)
    if not stage.reads_images:
        return context
    unreadable = run.path / "unreadable.jsonl"
    if stage.teaches:
        few = few_images(experiment.data, getattr(experiment, stage.name).captions)
        return replace(context, source=build_source(few, "train", unreadable))
    source = build_source(experiment.data, "train", unreadable)
    validation = build_source(experiment.data.squares, "validation", unreadable)
    for split, items in (("train", source), ("validation", validation)):
        if not len(items):
            raise ValueError(f"data.{experiment.data.source}: its {split} split is empty; valid: at least one item")
    return replace(context, source=source, validation=validation)
