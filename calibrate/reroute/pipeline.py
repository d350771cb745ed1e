"""`cor-vllm reroute` from its options to the router file: reads the text, trains, chooses, judges, writes."""

import dataclasses
import hashlib
import json
from typing import Any

import torch
from rich.console import Console

from cor_vllm import overlay
from cor_vllm.calibrate.config import CalibrationError, check_output, writing
from cor_vllm.calibrate.interventions.state import PartialState
from cor_vllm.calibrate.model.limits import memory_errors
from cor_vllm.calibrate.model.loading import load_model, model_folder, model_info, read_config
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.reroute.judgement import diagnostics, heldout
from cor_vllm.calibrate.reroute.options import RerouteOptions
from cor_vllm.calibrate.reroute.parts import Parts, split
from cor_vllm.calibrate.reroute.problem import Problem
from cor_vllm.calibrate.reroute.training import Candidate, Trained, Training, TrainingOptions, rounded
from cor_vllm.calibrate.result.assemble import versions
from cor_vllm.calibrate.routes.closed_form import TOKENS, LastLayer
from cor_vllm.calibrate.routes.reading import read
from cor_vllm.calibrate.routes.standard import LastInputs, ScoredText
from cor_vllm.calibrate.routes.text import check_lengths, read_scored_text
from cor_vllm.calibrate.routes.utilities import Standard
from cor_vllm.commands.console import progress_bar
from cor_vllm.fingerprint import read_routers
from cor_vllm.metadata import ModelInfo
from cor_vllm.overlay import DtypeName, OverlayConfig, RouterOverlay, TrainingInfo
from cor_vllm.version import __version__


@memory_errors()
def reroute(options: RerouteOptions, console: Console) -> RouterOverlay:
    """Train the last router and write the router file.

    Candidates that are done are kept in `<output>.partial`; a run that was killed goes on from there.

    Args:
        options: the options of the command.
        console: receives progress and notes.

    Returns:
        The overlay as written to `options.output`. If no candidate lowers the loss on the tuning part, its
        weight is the model's own.

    Raises:
        CalibrationError, FingerprintError: it cannot be done or not be written; one line says why.
    """
    check_output(options.output)
    folder, revision = model_folder(options.model)
    config = read_config(folder)
    info = model_info(options.model, folder, revision, config, read_routers(folder))
    text = read_scored_text(options, folder, config.vocab_size)
    check_lengths(text, config.max_position_embeddings)
    model = load_model(folder, options.dtype, options.device)
    problem, epsilon = read_problem(model, text, options, console)
    parts = split(text, problem.documents, options.seed)
    training = TrainingOptions(
        options.draw, options.tau, options.beta, options.batch, options.epochs, options.debias, options.seed,
        epsilon, served_dtype(options, config),
    )  # fmt: skip
    state = PartialState(
        options.output, _key(options, info, text), problem.executed(problem.weight, parts.tuning)[1]
    )
    chosen, best = _train(problem, parts, training, options, state, console)
    result = _result(problem, parts, training, options, info, text, chosen, best)
    with writing(options.output):
        overlay.save(options.output, result)
    state.remove()
    return result


def dtype_name(dtype: torch.dtype) -> DtypeName:
    """The name of a dtype in a router file."""
    names: dict[torch.dtype, DtypeName] = {
        torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"
    }  # fmt: skip
    return names[dtype]


def served_dtype(options: RerouteOptions, config: Any) -> torch.dtype:
    """The dtype that the server keeps the router in: as `vllm serve --dtype auto` chooses it."""
    if options.served_dtype != "auto":
        found: torch.dtype = getattr(torch, options.served_dtype)
        return found
    stored: torch.dtype = config.dtype or torch.float32
    return torch.bfloat16 if stored == torch.float32 else stored


def read_problem(
    model: MoeModel, text: ScoredText, options: RerouteOptions, console: Console
) -> tuple[Problem, float]:
    """Everything behind the last router, and ε: losses that differ by less are the same but for rounding.

    Raises:
        CalibrationError: the last decoder layer has no experts, or the model's numbers mean nothing.
    """
    standard, inputs = read(model, text, options.seed, 0, console)
    if inputs is None:
        raise CalibrationError(
            f"{model.config.architectures[0]}: the last decoder layer has no experts, and only the router of "
            "that layer can be trained without running the layers behind it"
        )
    if model.offloaded:
        raise CalibrationError("the weights do not fit into memory; give --dtype bfloat16, or --device cpu")
    problem = _problem(model, standard, inputs, options.max_memory)
    every = torch.arange(len(problem))
    error = (problem.executed(problem.weight, every)[1] + standard.log_prob[:, 0]).abs()
    return problem, 2 * torch.quantile(error.double(), 0.99).item()


def _problem(model: MoeModel, standard: Standard, inputs: LastInputs, max_memory: int) -> Problem:
    weight, bias = model.router_weight(-1)
    problem = Problem(
        # Clones, because tensors of the inference mode take no part in gradients.
        x=inputs.x.float().clone(),
        residual=inputs.residual.float().clone(),
        targets=standard.targets[:, 0].clone(),
        documents=standard.document.clone(),
        keys=standard.keys.clone(),
        router=model.routers[-1],
        weight=weight,
        bias=bias,
        layer=model.layer_index[-1],
        eligible=model.eligible_experts,
        last=LastLayer.of(model),
    )
    if problem.x.numel() * model.num_experts * 4 > max_memory:
        return problem
    everyone = torch.arange(model.num_experts)
    outputs = [
        problem.expert_outputs(rows, everyone.expand(len(rows), -1))
        for rows in torch.arange(len(problem)).split(TOKENS)
    ]
    return dataclasses.replace(problem, outputs=torch.cat(outputs))


def _train(
    problem: Problem,
    parts: Parts,
    training: TrainingOptions,
    options: RerouteOptions,
    state: PartialState,
    console: Console,
) -> tuple[Candidate, Trained]:
    """Train every candidate, and take the one of lowest loss on the tuning part; of equals the first."""
    tensors, note = state.load() if options.resume else ({}, "")
    if note:
        console.print(note, highlight=False)
    candidates = options.candidates()
    best = candidates[0], Trained(rounded(problem.weight, training.dtype), 0, 0.0)
    with progress_bar(console) as progress:
        work = len(parts.train) * options.epochs  # of one candidate
        task = progress.add_task("training", total=(len(candidates) - 1) * work, step="")
        for number, candidate in enumerate(candidates[1:], start=1):
            progress.update(task, step=str(candidate))
            if f"{number}/weight" not in tensors:
                trained = Training(
                    problem, parts.train, parts.tuning, candidate, training,
                    lambda tokens: progress.advance(task, tokens),
                ).run()  # fmt: skip
                tensors |= _as_tensors(number, trained)
                state.save(tensors)
            trained = _from_tensors(number, tensors)
            progress.update(task, completed=number * work)
            progress.console.print(
                f"{candidate}: {trained.change:+.5f} nats on the tuning part after {trained.steps} steps",
                highlight=False,
            )
            if trained.steps and trained.change < best[1].change:
                best = candidate, trained
    return best


def _as_tensors(number: int, trained: Trained) -> dict[str, torch.Tensor]:
    return {
        f"{number}/weight": trained.weight,
        f"{number}/steps": torch.tensor(trained.steps),
        f"{number}/change": torch.tensor(trained.change, dtype=torch.float64),
    }


def _from_tensors(number: int, tensors: dict[str, torch.Tensor]) -> Trained:
    weight, steps, change = (tensors[f"{number}/{name}"] for name in ("weight", "steps", "change"))
    return Trained(weight, int(steps), change.item())


def _result(
    problem: Problem,
    parts: Parts,
    training: TrainingOptions,
    options: RerouteOptions,
    info: ModelInfo,
    text: ScoredText,
    chosen: Candidate,
    best: Trained,
) -> RouterOverlay:
    """The overlay with its report, and the same figures of a random change of equal size for comparison."""
    base = rounded(problem.weight, training.dtype)
    drift = ((best.weight - base).double().norm() / base.double().norm()).item()
    table = heldout(problem, best.weight, parts.report, training.epsilon, options.seed)
    config = OverlayConfig(
        model=info,
        dtype=dtype_name(training.dtype),
        training=_training_info(options, chosen, best, problem, parts, text),
        heldout=table,
        diagnostics={"epsilon": training.epsilon, "tuning_change": best.change}
        | diagnostics(problem, best.weight, parts.report, training),
        drift=drift,
        versions=versions(),
    )
    index = torch.tensor([problem.layer], dtype=torch.int32)
    result = RouterOverlay(index, best.weight[None].clone(), config)
    if not drift:
        return result
    control = overlay.random_like(result, problem.weight, options.seed).weight
    change = heldout(problem, control, parts.report, training.epsilon, options.seed)["all"].change
    assert change is not None, "the split leaves positions for the report"
    figures = {"change": change} | diagnostics(problem, control, parts.report, training)
    added = config.diagnostics | {f"random_{name}": value for name, value in figures.items()}
    return dataclasses.replace(result, config=config.model_copy(update={"diagnostics": added}))


def _training_info(
    options: RerouteOptions,
    chosen: Candidate,
    best: Trained,
    problem: Problem,
    parts: Parts,
    text: ScoredText,
) -> TrainingInfo:
    return TrainingInfo(
        objective=chosen.objective,
        learning_rate=chosen.learning_rate,
        kl=chosen.kl,
        steps=best.steps,
        corpus=text.name,
        corpus_sha256=text.sha256,
        positions=len(parts.train),
        documents=len(problem.documents[parts.train].unique()),
        **options.model_dump(
            include={"beta", "tau", "routes", "pool", "temperature", "epochs", "batch", "debias", "seed"}
        ),
    )


def _key(options: RerouteOptions, info: ModelInfo, text: ScoredText) -> str:
    """A hash of all that determines the candidates, for the partial state."""
    values = options.model_dump(mode="json", exclude={"model", "output", "resume"})
    parts = [__version__, values, info.model_dump(), text.sequences, text.positions, text.documents]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
