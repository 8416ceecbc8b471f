"""Who listens to a run beside the screen and metrics.jsonl, and the model card: made from what was prepared. No torch.

Only the first process of a run tells anything.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sana_tune.check import settings_changed
from sana_tune.config.schema import SECTIONS, Config
from sana_tune.config.secrets import MASK, masked
from sana_tune.data.survey import DatasetLedger
from sana_tune.drawing import sample_of
from sana_tune.model import fetch
from sana_tune.model.facts import NANO_LICENCE, WEIGHTS_LICENCE, ModelFacts
from sana_tune.prepare import Prepared, adapter_file
from sana_tune.progress import Progress
from sana_tune.watch.card import IMAGES, MOST_PICTURES, About, Licence, Seen, Shown, model_card
from sana_tune.watch.hub import HubSink, Repository, find_repository, wants_hub
from sana_tune.watch.messages import picture_name
from sana_tune.watch.names import hub_name, logging_folder, run_id, run_name
from sana_tune.watch.scripts import Scripts
from sana_tune.watch.sinks import Sink
from sana_tune.watch.trackers import RunInfo, tracker_sinks
from sana_tune.watch.uploads import Uploaded
from sana_tune.watch.webhook import Webhooks

# Settings that say something of a machine, not of a model.
_OF_THE_MACHINE = frozenset({"pretrained_model_name_or_path", "output_dir", "resume_from_checkpoint", "device"})
_PUBLISHED = ("model", "adapter", "flow", "loss", "optimizer", "train", "ema")  # sections whose settings a card shows


def is_first_process() -> bool:
    """Whether this process is the one of its run that tells things."""
    return os.environ.get("RANK", "0") == "0"


def repository_of(config: Config) -> Repository | None:
    """Where uploads go, the hub having been asked; None where nothing is uploaded. Raises UserError."""
    if not wants_hub(config.watch) or not is_first_process():
        return None
    return find_repository(config.watch, hub_name(config))


def listeners(prepared: Prepared, repository: Repository | None) -> list[Sink]:
    """The sinks that the settings ask for, in the order in which they are closed: uploads before scripts."""
    config, watch = prepared.config, prepared.config.watch
    if not is_first_process():
        return []
    name, key = run_name(config), run_id(prepared.output.root, resumed=prepared.checkpoint is not None)
    info = RunInfo(watch.tracker_project_name, name, key, logging_folder(config), shown_settings(prepared))
    hooks = [Webhooks(watch.webhook_config, name, key)] if watch.webhook_config else []
    found: list[Sink] = [*hooks, *tracker_sinks(watch.report_to, info)]
    scripts = None
    if watch.post_checkpoint_script or watch.post_upload_script:
        values = script_values(config, repository)
        scripts = Scripts(watch, values, uploads=repository is not None)
    if repository is not None:
        done: Callable[[Uploaded], None] = scripts.uploaded if scripts is not None else lambda upload: None
        card = checkpoint_card(prepared, repository)
        found.append(HubSink(prepared.output.root, watch, repository, card, done))
    return [*found, *([scripts] if scripts is not None else [])]


def shown_settings(prepared: Prepared) -> dict[str, Any]:
    """Every setting with a value, plain and with its secrets masked: what trackers are told."""
    found: dict[str, Any] = {}
    for section in prepared.config.model_dump(mode="json").values():
        for key, value in section.items():
            if value not in (None, [], ""):
                found[key] = MASK if key in prepared.loaded.secret else masked(key, value)
    return found


def script_values(config: Config, repository: Repository | None) -> dict[str, str]:
    """The placeholders of scripts that are the same all through a run."""
    watch = config.watch
    drawn = {key: _text(value) for key, value in vars(config.validation).items()}
    return {
        "tracker_run_name": run_name(config),
        "tracker_project_name": watch.tracker_project_name,
        "model_family": config.model.model_family,
        "model_type": config.model.model_type,
        "lora_type": config.adapter.lora_type if config.model.model_type == "lora" else "",
        "huggingface_path": repository.id if repository else "",
        "remote_checkpoint_path": "",
        **{key: value for key, value in drawn.items() if key.startswith("validation_")},
    }


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


# ---- the model card ----


@dataclass(frozen=True)
class Readme:
    """The card of an exported pipeline, and the pictures that go beside it: their names there → where they are."""

    text: str
    pictures: Mapping[str, Path]


def pipeline_card(prepared: Prepared, progress: Progress, dtype: str, seen: Seen) -> Readme:
    """The card of the finished pipeline in its folder. dtype: of the snippet, such as bfloat16."""
    texts = prompt_texts(prepared)
    shown = [Shown(path, texts(path)) for path in seen.pictures if path.is_file()][:MOST_PICTURES]
    text = model_card(
        about(prepared, dtype),
        place=str(prepared.output.result(prepared.config)),
        training=training_of(prepared, progress),
        pictures=shown,
        numbers=seen.numbers,
    )
    return Readme(text, {f"{IMAGES}/{picture.file.name}": picture.file for picture in shown})


def checkpoint_card(prepared: Prepared, repository: Repository) -> Callable[[str, int], str]:
    """Makes the card that goes up with a checkpoint: of its folder's name and its step."""
    dtype = "float32" if prepared.plan.weights.dtype == "fp32" else "bfloat16"
    subject = about(prepared, dtype)

    def card(folder: str, step: int) -> str:
        progress = Progress(step, prepared.plan.epoch_after(step))
        training = {key: value for key, value in training_of(prepared, progress).items() if key != "Images seen"}
        return model_card(subject, place=repository.id, training=training, checkpoint=folder)

    return card


def about(prepared: Prepared, dtype: str) -> About:
    """What the cards of a run have in common."""
    config, facts = prepared.config, prepared.facts
    is_folder = fetch.local_folder(facts.name) is not None
    adapter = adapter_file(config) if config.model.model_type == "lora" else None
    return About(
        title=run_name(config),
        model=Path(facts.name).name if is_folder else facts.name,
        base_model=None if is_folder else facts.name,
        licence=licence_of(facts, is_folder=is_folder),
        sample=sample_of(prepared, dtype),
        settings=published_settings(prepared),
        datasets=[dataset_line(part) for part in prepared.survey.ledger.datasets],
        note=config.watch.model_card_note,
        safe=config.watch.model_card_safe_for_work,
        has_ema=config.ema.use_ema,
        adapter=adapter.algo if adapter else "",
        multiplier=adapter.multiplier if adapter else 1.0,
    )


def licence_of(facts: ModelFacts, *, is_folder: bool) -> Licence:
    """The terms that what was trained from a model falls under."""
    if facts.licence == WEIGHTS_LICENCE:
        link = f"https://huggingface.co/{facts.name}/blob/main/LICENSE.txt"
        return Licence(facts.licence, "other", "nscl-v2-custom", link, is_gemma=True)
    if facts.licence == NANO_LICENCE:
        return Licence(facts.licence, "apache-2.0")
    link = None if is_folder else f"https://huggingface.co/{facts.name}"
    return Licence(facts.licence, "other", "see-the-base-model", link)


def training_of(prepared: Prepared, progress: Progress) -> dict[str, Any]:
    """The lines of a card about the training."""
    config, plan = prepared.config, prepared.plan
    return {
        "Steps": f"{progress.step} of {plan.total_steps}, {progress.epoch:.4g} epochs",
        "Images seen": progress.images,
        "Optimizer": f"{config.optimizer.optimizer}, learning rate {plan.schedule.peak_lr:g}",
        "Flow shift": f"{plan.flow_shift:g}",
    }


def published_settings(prepared: Prepared) -> dict[str, Any]:
    """The settings that differ from the defaults and say something of the model: no paths, no names of machines."""
    keys = {key for section in _PUBLISHED for key in SECTIONS[section].model_fields} - _OF_THE_MACHINE
    changed = {each.key: each.value for each in settings_changed(prepared.loaded) if each.key in keys}
    return {key: value for key, value in changed.items() if not _is_path(value)}


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))


def dataset_line(part: DatasetLedger) -> str:
    """What became of the pictures of a dataset, in a line; left-out ones with their reasons, without their names."""
    reasons = Counter(re.sub(r"\d+", "n", reason) for _, reason in part.left_out)
    left = f"; left out: {', '.join(f'{count} ({reason})' for reason, count in reasons.items())}" if reasons else ""
    rest = f"; {part.not_drawn} not drawn" if part.not_drawn else ""
    use = {"eval": "held out", "regularise": "for regularisation"}.get(part.role, "trained")
    return f"{part.dataset}: {part.trained} pictures {use}, of {part.found}{left}{rest}"


def prompt_texts(prepared: Prepared) -> Callable[[Path], str]:
    """Tells the prompt of a validation picture by its file's name; the name itself where that is not known."""
    from sana_tune.prompts import slugs

    names = {slug: name for name, slug in slugs(list(prepared.prompts)).items()}

    def text(path: Path) -> str:
        match = re.fullmatch(r"(.+)_\d+_\d+x\d+(_ema)?", picture_name(path))
        name = names.get(match[1]) if match else None
        average = " (moving average of the weights)" if match and match[2] else ""
        return prepared.prompts[name] + average if name is not None else picture_name(path)

    return text


def comment_of(config: Config, progress: Progress, now: datetime | None = None) -> str | None:
    """modelspec_comment with its placeholders filled in. now: the time to tell; None: the present."""
    text = config.watch.modelspec_comment
    if text is None:
        return None
    values = {
        "current_step": str(progress.step),
        "current_epoch": f"{progress.epoch:.4g}",
        "timestamp": (now or datetime.now(UTC)).isoformat(timespec="seconds"),
    }
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)
