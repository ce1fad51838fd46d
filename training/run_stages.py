"""Runs the stages of an experiment in order; finished stages are skipped, interrupted ones continue."""
import hashlib
import json
import time
from dataclasses import replace

from data.catalog import build_source, data_key
from files.run_folder import RunFolder
from training.distributed import Processes
from training.experiment import STAGES, Experiment, Stage
from training.stages.context import StageContext


def run_stages(experiment: Experiment, run: RunFolder, processes: Processes) -> None:
    """Train the stages that are not finished. Every process calls this."""
    key = data_key(experiment.data)
    run.record(seed=experiment.seed, data=key, data_sha256=hashlib.sha256(json.dumps(key).encode()).hexdigest(),
               processes=processes.world)
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
        print(f"trained: {run.path}{how if {'denoiser', 'student'} & {*experiment.stages} else ''}")


def context_of(stage: Stage, experiment: Experiment, run: RunFolder, processes: Processes) -> StageContext:
    """The inputs of a stage beside its configuration. Raises ValueError if a split that it reads is empty."""
    context = StageContext(run, seed=experiment.seed, device=processes.device(), processes=processes,
                           data_key=data_key(experiment.data), system=experiment.system,
                           preview_prompts=experiment.preview_prompts)
    if not stage.reads_images:
        return context
    unreadable = run.path / "unreadable.jsonl"
    source = build_source(experiment.data, "train", unreadable)
    validation = build_source(experiment.data.squares, "validation", unreadable)
    for split, items in (("train", source), ("validation", validation)):
        if not len(items):
            raise ValueError(f"data.{experiment.data.source}: its {split} split is empty; valid: at least one item")
    return replace(context, source=source, validation=validation)
