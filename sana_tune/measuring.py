"""What is measured beside the loss of training, from what was prepared: held-out pictures, and scores of drawn ones.

Whatever brings torch is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_tune.caching import Caches, Reading, masks_of
from sana_tune.config.evaluation_rules import asked_ids
from sana_tune.data.buckets import trained
from sana_tune.data.held_out import companions, measured
from sana_tune.data.records import Keys, Record, digest
from sana_tune.log import log
from sana_tune.model.fetch_scorer import locate_scorer
from sana_tune.prepare import Prepared
from sana_tune.roles import changing
from sana_tune.watch.sinks import Watcher

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sana_tune.train.evaluate import Evaluator, NoEvaluator
    from sana_tune.train.probe import Look, Subject


def evaluator_of(
    prepared: Prepared, caches: Caches, reading: Reading, stopped: Callable[[], bool]
) -> Evaluator | NoEvaluator:
    """What measures the held-out pictures of the run; its batches are no larger than those of training."""
    from sana_tune.prompts import slugs
    from sana_tune.train.evaluate import Evaluator, NoEvaluator
    from sana_tune.train.probe import Probe

    config, plan, records = prepared.config, prepared.plan.evaluation, prepared.survey.records
    if plan is None:
        return NoEvaluator()
    seed, factor, wanted = config.train.seed, prepared.facts.vae_factor, config.evaluation
    held = measured(records, wanted.num_eval_images, seed, asked_ids(config))
    taught = companions(records, plan.compared, seed, changing(prepared.loaded.datasets))
    positions = max(bucket.batch_size * bucket.size.area for bucket in trained(prepared.buckets)) // factor**2

    def probe(pictures: Sequence[Record]) -> Probe:
        subjects = [subject_of(record, prepared.keys, factor) for record in pictures]
        look = look_of(prepared, caches, reading, pictures)
        return Probe(subjects, look, levels=wanted.eval_timesteps, positions=positions, seed=seed)

    return Evaluator(
        prepared.output.root,
        probe(held),
        probe(taught) if taught else None,
        pooled=wanted.eval_dataset_pooling,
        names=slugs(list(dict.fromkeys(record.dataset for record in held))),
        alarms=wanted.alarms,
        stopped=stopped,
    )


def subject_of(record: Record, keys: Keys, factor: int) -> Subject:
    """A picture as something to be measured, with its first caption. factor: px of a latent position."""
    from sana_tune.train.probe import Subject

    size, mask = record.placement.target, keys.mask(record) if record.mask_hash is not None else None
    made_of = digest(keys.latent(record), keys.text(record.captions[0]), mask)
    return Subject(record.id, record.dataset, size.height // factor, size.width // factor, made_of)


def look_of(prepared: Prepared, caches: Caches, reading: Reading, pictures: Sequence[Record]) -> Callable[[int], Look]:
    """What the model gets of each of these pictures, by number: its latent, its first caption, its mask."""
    from sana_tune.train.probe import Look

    loaded, keys, mask_of = prepared.loaded, prepared.keys, masks_of(prepared, caches)

    def look(number: int) -> Look:
        record = pictures[number]
        text = reading.texts[loaded.text_cache_of(record.dataset).id].get(keys.text(record.captions[0]))
        mask = None if record.mask_key is None else mask_of(record)
        return Look(reading.latents[record.dataset].get(keys.latent(record)), text, mask)

    return look


# ---- scores ----


def scorer_folder(prepared: Prepared) -> Path | None:
    """The folder of the CLIP model, downloaded if need be; None when nothing is scored. Raises UserError."""
    wanted = prepared.config.evaluation
    if wanted.evaluation_type == "none" or prepared.config.validation.validation_disable:
        return None
    if not prepared.prompts:
        log.warning("evaluation_type clip has no effect: there is no prompt, so no pictures are drawn")
        return None
    return locate_scorer(wanted.pretrained_evaluation_model_name_or_path)


def scored(prepared: Prepared, watcher: Watcher, folder: Path | None, accelerator: Accelerator) -> Watcher:
    """A watcher that has validation pictures scored as they come. folder: of the CLIP model; None = none are."""
    if folder is None or not accelerator.is_main_process:
        return watcher
    from sana_tune.data.images import decode
    from sana_tune.model.score import ClipScorer
    from sana_tune.train.scores import Scored, Scores

    def read(path: Path) -> Any:
        return decode(path.read_bytes())

    return Scored(watcher, Scores(prepared.prompts, lambda: ClipScorer.load(folder, accelerator.device), read))
