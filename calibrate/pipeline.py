"""`cor-vllm calibrate` from its options to the file: the order of its steps, progress, and resuming."""

import hashlib
import json
from typing import Any

from rich.console import Console

from cor_vllm import scores as scores_file
from cor_vllm.calibrate.config import CalibrationError, CalibrationOptions, check_output, writing
from cor_vllm.calibrate.interventions.checks import check_baseline, check_measured
from cor_vllm.calibrate.interventions.measurement import baseline
from cor_vllm.calibrate.interventions.plain import PlainAlgorithm
from cor_vllm.calibrate.interventions.state import PartialState, run_steps
from cor_vllm.calibrate.interventions.sweep import Sweep
from cor_vllm.calibrate.model.families import eligible_experts
from cor_vllm.calibrate.model.limits import memory_errors
from cor_vllm.calibrate.model.loading import fitting, load_model, model_folder, model_info, read_config
from cor_vllm.calibrate.model.memory import waiting_bytes
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import Room, offload_folder, waiting_places
from cor_vllm.calibrate.result.allocation import bounds
from cor_vllm.calibrate.result.assemble import assemble
from cor_vllm.calibrate.text.inputs import Inputs, read_inputs
from cor_vllm.calibrate.text.stratify import flat_mask, stratify
from cor_vllm.commands.console import progress_bar
from cor_vllm.fingerprint import read_routers
from cor_vllm.metadata import ModelInfo
from cor_vllm.scores import Scores
from cor_vllm.version import __version__

ALGORITHMS: dict[str, type[Sweep] | type[PlainAlgorithm]] = {"sweep": Sweep, "plain": PlainAlgorithm}


@memory_errors()
def calibrate(options: CalibrationOptions, console: Console) -> Scores:
    """Calibrate a model and write the scores file.

    Whatever can be refused is refused before the weights load. Finished layers are kept in
    `<output>.partial`; a run that was killed goes on from there and ends in the same bytes.

    Args:
        options: the options of the command.
        console: receives progress and notes.

    Returns:
        The scores as written to `options.output`.

    Raises:
        CalibrationError, FingerprintError: the calibration cannot be done or not be written, or its numbers
            mean nothing; one line says why.
    """
    check_output(options.output)
    folder, revision = model_folder(options.model)
    config = read_config(folder)
    _check_config(options, config)
    routers = read_routers(folder)
    info = model_info(options.model, folder, revision, config, routers)
    router = None if options.cor_router is None else fitting(options.cor_router, info)
    if router is not None:
        info = info.model_copy(update={"router_overlay": router.fingerprint})
    inputs = read_inputs(options, folder, config.vocab_size)

    def say(line: str) -> None:
        console.print(f"loading {info.name} ({info.architecture}): {line}", highlight=False, soft_wrap=True)

    with offload_folder(options.output) as waiting:
        room = Room(options.max_memory, waiting_bytes(options, config, itemsize=4), waiting)
        model = load_model(folder, options.dtype, options.device, room, say)
        if router is not None:
            model.replace_router(router.layer, router.weight)
        if model.offloaded:
            console.print(f"weights beyond the memory of {model.device} wait {waiting_places(model.model)}")
        return _measure_and_write(options, info, inputs, model, console)


def _measure_and_write(
    options: CalibrationOptions, info: ModelInfo, inputs: Inputs, model: MoeModel, console: Console
) -> Scores:
    base = baseline(model, inputs.sequences)
    check_baseline(model, base, inputs.sequences)
    given = flat_mask(inputs.hard_positions, inputs.sequences) if inputs.hard_positions else None
    strata = stratify(base.losses, options.hard_percentile, options.easy_percentile, given)
    state = PartialState(options.output, _key(options, info, inputs, model), base.losses)
    if options.algorithm == "plain":
        console.print("the plain algorithm: one forward per intervention, much slower than the sweep")
    with progress_bar(console) as progress:
        task = progress.add_task("measuring", total=None, step="")
        algorithm = ALGORITHMS[options.algorithm](
            model, options, inputs.sequences, base, strata, lambda rows: progress.advance(task, rows)
        )
        run_steps(
            algorithm,
            state,
            options.resume,
            lambda **values: progress.update(task, **values),
            lambda line: console.print(line, highlight=False),
        )
    check_measured(model, algorithm.result())
    console.print(
        "checking the result on held-out text" if inputs.heldout else "no held-out text to check on"
    )
    result = assemble(model, options, info, inputs, base, strata, algorithm.result())
    with writing(options.output):
        scores_file.save(options.output, result)
    state.remove()
    return result


def _check_config(options: CalibrationOptions, config: Any) -> None:
    bounds(options, eligible_experts(config), config.num_experts_per_tok)
    if options.seq_len > config.max_position_embeddings:
        raise CalibrationError(
            f"--seq-len {options.seq_len}: this model reads at most {config.max_position_embeddings} tokens"
        )


def _key(options: CalibrationOptions, info: ModelInfo, inputs: Inputs, model: MoeModel) -> str:
    """A hash of all that determines the measurements, for the partial state."""
    parts = [
        __version__,
        options.record(),
        info.model_dump(),
        [inputs.sequences, inputs.hard_positions, inputs.tuning, inputs.heldout],
        [str(model.model.dtype), str(model.device)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
