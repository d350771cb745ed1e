"""`cor-vllm analyse` from its options to the files: the order of its steps, progress, and resuming."""

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from math import isnan
from typing import Any

import torch
from rich.console import Console

from cor_vllm.calibrate.config import CalibrationError
from cor_vllm.calibrate.interventions.state import PartialState, partial_path, run_steps
from cor_vllm.calibrate.model.limits import memory_errors
from cor_vllm.calibrate.model.loading import load_model, model_folder, model_info, read_config
from cor_vllm.calibrate.model.moe_model import MoeModel
from cor_vllm.calibrate.model.offload import Room, offload_folder, waiting_places
from cor_vllm.calibrate.result.statistics import FEWEST_DOCUMENTS
from cor_vllm.calibrate.routes import statistics
from cor_vllm.calibrate.routes.groups import balanced, further_groups, only, probability_groups
from cor_vllm.calibrate.routes.measure import RouteMeasurement, chosen_layers
from cor_vllm.calibrate.routes.options import AnalysisOptions
from cor_vllm.calibrate.routes.pictures import draw_pictures
from cor_vllm.calibrate.routes.reading import read
from cor_vllm.calibrate.routes.standard import LastInputs, ScoredText
from cor_vllm.calibrate.routes.tables import (
    FILE,
    Analysis,
    LayerTable,
    ModelTable,
    TextTable,
    corrected,
    layer_table,
)
from cor_vllm.calibrate.routes.text import check_lengths, read_scored_text
from cor_vllm.calibrate.routes.utilities import Standard, Utilities
from cor_vllm.commands.console import progress_bar
from cor_vllm.fingerprint import read_routers
from cor_vllm.metadata import ModelInfo
from cor_vllm.version import __version__


@memory_errors()
def analyse(options: AnalysisOptions, console: Console) -> Analysis:
    """Analyse a model's routes and write `analysis.json`, its pictures, and --rows.

    Args:
        options: the options of the command.
        console: receives progress and notes.

    Returns:
        What was written.

    Raises:
        CalibrationError, FingerprintError: the analysis cannot be done, or its numbers mean nothing; one line
            says why.
    """
    folder, revision = model_folder(options.model)
    config = read_config(folder)
    routers = read_routers(folder)
    info = model_info(options.model, folder, revision, config, routers)
    chosen_layers(options, routers.layers)
    text = read_scored_text(options, folder, config.vocab_size)
    check_lengths(text, config.max_position_embeddings)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.rows is not None and not options.rows.parent.is_dir():
        raise CalibrationError(
            f"--rows {options.rows}: there is no folder {options.rows.parent}; create it first"
        )

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    with offload_folder(options.output / FILE) as waiting:
        room = Room(options.max_memory, _waiting_bytes(text, config), waiting)
        model = load_model(folder, options.dtype, options.device, room, lambda line: say(f"loading: {line}"))
        if model.offloaded:
            say(f"weights beyond the memory of {model.device} wait {waiting_places(model.model)}")
        return _analyse(options, info, model, text, console)


def _waiting_bytes(text: ScoredText, config: Any) -> int:
    """An estimate of what waits on the host: hidden states of all tokens, and of scored ones at the end."""
    tokens = sum(map(len, text.sequences)) + 2 * sum(map(len, text.positions))
    return int(tokens * config.hidden_size * 4)


def _analyse(
    options: AnalysisOptions, info: ModelInfo, model: MoeModel, text: ScoredText, console: Console
) -> Analysis:
    standard, last = read(model, text, options.seed, options.null, console)
    groups = probability_groups(standard.log_prob, options.bins)
    if options.max_tokens is None:
        groups += further_groups(standard.log_prob)
    else:
        counted = balanced(standard.keys, groups, options.max_tokens)
        rows = counted.any(dim=1)
        groups = [group.of(counted, rows) for group in groups]
        text, standard, last = only(rows, text, standard, last)
    found = _measured(options, info, model, text, standard, last, console)
    layers = [layer_table(standard, one, groups, info.num_experts, options.seed) for one in found]
    analysis = Analysis(
        options=options.record(),
        model=_model_table(info, model),
        text=_text_table(text),
        versions={name: version(name) for name in ("cor-vllm", "torch", "transformers")},
        notes=_notes(options, model, text),
        draws=statistics.draw_counts(options.routes),
        layers=corrected(layers),
    )
    _write(options, analysis, standard, found)
    return analysis


def _measured(
    options: AnalysisOptions,
    info: ModelInfo,
    model: MoeModel,
    text: ScoredText,
    standard: Standard,
    last: LastInputs | None,
    console: Console,
) -> list[Utilities]:
    state = PartialState(options.output / FILE, _key(options, info, model, text), standard.log_prob)
    with progress_bar(console) as progress:
        task = progress.add_task("measuring routes", total=None, step="")
        measurement = RouteMeasurement(
            model, text, standard, last, options, lambda rows: progress.advance(task, rows)
        )
        run_steps(
            measurement,
            state,
            options.resume,
            lambda **values: progress.update(task, **values),
            lambda line: console.print(line, highlight=False),
        )
    return measurement.result()


def _key(options: AnalysisOptions, info: ModelInfo, model: MoeModel, text: ScoredText) -> str:
    """A hash of all that determines the measurements, for the partial state."""
    parts = [
        __version__,
        options.record(),
        info.model_dump(),
        [text.sequences, text.positions],
        [str(model.model.dtype), str(model.device)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _model_table(info: ModelInfo, model: MoeModel) -> ModelTable:
    return ModelTable(
        **info.model_dump(exclude={"routers"}),
        dtype=str(model.model.dtype).removeprefix("torch."),
        device=model.device.type,
    )


def _text_table(text: ScoredText) -> TextTable:
    documents = {d for d, at in zip(text.documents, text.positions, strict=True) if at}
    return TextTable(
        name=text.name,
        sha256=text.sha256,
        read=sum(len(ids) - 1 for ids in text.sequences),
        scored=sum(map(len, text.positions)),
        documents=len(documents),
    )


def _notes(options: AnalysisOptions, model: MoeModel, text: ScoredText) -> list[str]:
    """What a reader of the tables should know, each one sentence."""
    notes, table = [], _text_table(text)
    pool = max(model.top_k, min(options.pool, model.eligible_experts))
    if options.token_ids is None and table.read < options.num_tokens:
        notes.append(
            f"Positions read: {table.read}, all that the text has (--num-tokens {options.num_tokens})."
        )
    if table.documents < FEWEST_DOCUMENTS:
        notes.append(f"Documents: {table.documents}, too few for intervals, which take {FEWEST_DOCUMENTS}.")
    if pool == model.top_k:
        notes.append(
            f"Every route has the same {pool} experts, because the pool has no others: every regret is 0."
        )
    elif pool < options.pool:
        notes.append(f"Routes are drawn from {pool} experts, all that a token can choose among.")
    if model.model.dtype != torch.float32:
        notes.append(
            f"The model runs in {str(model.model.dtype).removeprefix('torch.')}, whose rounding hides small "
            "differences between routes; --dtype float32 shows them."
        )
    return notes


def _write(options: AnalysisOptions, analysis: Analysis, standard: Standard, found: list[Utilities]) -> None:
    """Write the rows and the pictures, and last the result, which says that the folder is complete."""
    if options.rows is not None:
        with options.rows.open("w") as file:
            for one, layer in zip(found, analysis.layers, strict=True):
                file.writelines(json.dumps(row) + "\n" for row in _rows(standard, one, layer))
    draw_pictures(analysis, options.output)
    temporary = options.output / f".{FILE}.tmp"
    temporary.write_text(analysis.model_dump_json(indent=1) + "\n")
    temporary.replace(options.output / FILE)
    partial_path(options.output / FILE).unlink(missing_ok=True)


def _rows(standard: Standard, utilities: Utilities, layer: LayerTable) -> Iterator[dict[str, Any]]:
    """One record for each token and target: where it stands, its probability, and all its measures."""
    measures = statistics.token_measures(utilities, layer.epsilon)
    columns = torch.stack(list(measures.values()), dim=2)
    for t in range(len(columns)):
        place = {
            "layer": utilities.layer,
            "document": standard.document[t].item(),
            "sequence": standard.places.sequence[t].item(),
            "position": standard.places.position[t].item(),
        }
        for j, (token, log_prob) in enumerate(
            zip(standard.targets[t].tolist(), standard.log_prob[t].tolist(), strict=True)
        ):
            values = [None if isnan(value) else value for value in columns[t, j].tolist()]
            own = dict(zip(measures, values, strict=True))
            yield place | {"null": j > 0, "token": token, "log_prob": log_prob} | own
