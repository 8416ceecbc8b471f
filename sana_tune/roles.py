"""What each dataset is for, and when it is shown: from the settings and the buckets, for the plan and for training.

Pure, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from sana_tune.config.datasets import ImageDataset
from sana_tune.config.evaluation_rules import asked_ids
from sana_tune.config.load import Loaded
from sana_tune.config.schema import Config
from sana_tune.data.buckets import Bucket, trained
from sana_tune.data.order import names_of, timeline_of
from sana_tune.data.records import Record, Role
from sana_tune.data.survey import role_of, rules_of
from sana_tune.data.timeline import Timeline, Window
from sana_tune.errors import Problem, UserError
from sana_tune.memory import changed
from sana_tune.model.levels import spread
from sana_tune.plan import DatasetPlan, EvaluationPlan, levels_of
from sana_tune.progress import Every

_NAMES_SHOWN = 5


def dataset_plans(loaded: Loaded) -> tuple[DatasetPlan, ...]:
    """What each dataset is for, and when it is shown."""
    return tuple(_dataset_plan(loaded, dataset) for dataset in loaded.datasets)


def _dataset_plan(loaded: Loaded, dataset: ImageDataset) -> DatasetPlan:
    role = role_of(dataset)
    masks = next((entry for entry in loaded.masks if entry.id == dataset.conditioning_data), None)
    if role is Role.EVAL:
        kind, text = masks and masks.conditioning_type, _own_text_cache(loaded, dataset)
        return DatasetPlan(dataset.id, role.value, text_cache=text, masks=masks and masks.id, mask_kind=kind)
    return DatasetPlan(
        id=dataset.id,
        role=role.value,
        probability=dataset.probability,
        start_epoch=max(1, dataset.start_epoch),
        start_step=dataset.start_step,
        end_epoch=dataset.end_epoch or None,
        end_step=dataset.end_step or None,
        text_cache=_own_text_cache(loaded, dataset),
        masks=masks and masks.id,
        mask_kind=masks and masks.conditioning_type,
        target=loaded.config.train.regularisation_target if role is Role.REGULARISE else None,
    )


def _own_text_cache(loaded: Loaded, dataset: ImageDataset) -> str | None:
    """The text cache of a dataset where that is not the default one."""
    name = loaded.text_cache_of(dataset.id).id
    return None if name == loaded.text_cache.id else name


def windows(loaded: Loaded) -> dict[str, Window]:
    """When each dataset is shown, by id."""
    return {plan.id: plan.window for plan in dataset_plans(loaded)}


def timeline_for(loaded: Loaded, buckets: Sequence[Bucket]) -> Timeline | None:
    """Which dataset comes when, where any of them starts or ends; None when all are always shown.

    Raises UserError when none of those that have pictures is shown in the first step.
    """
    shown, config = trained(buckets), loaded.config
    when = windows(loaded)
    if all(when[name].is_always for name in names_of(shown)):
        return None
    probabilities = {dataset.id: dataset.probability for dataset in loaded.datasets}
    timeline = timeline_of(
        shown,
        probabilities,
        config.data.data_backend_sampling,
        config.train.seed,
        when,
        config.train.gradient_accumulation_steps * config.launch.processes,
    )
    if not timeline.stretches:
        what = f"no dataset is shown in the first step; {', '.join(names_of(shown))} start later"
        raise UserError(Problem("datasets", what, "lower start_epoch or start_step of one of them"))
    return timeline


def changing(datasets: Iterable[ImageDataset]) -> frozenset[str]:
    """The datasets of which other crops are shown in each epoch."""
    return frozenset(
        each.id for each in datasets if each.vae_cache_clear_each_epoch and rules_of(each, 1, 2).needs_chance
    )


def evaluation_of(loaded: Loaded, buckets: Iterable[Bucket]) -> EvaluationPlan | None:
    """What is measured of held-out pictures; None when nothing is."""
    wanted, config = loaded.config.evaluation, loaded.config
    held, taught = Counter[str](), 0
    only, excluded = asked_ids(config), changing(loaded.datasets)
    for bucket in buckets:
        if bucket.role is Role.EVAL and (not only or bucket.dataset in only):
            held[bucket.dataset] += len(bucket.records)
        elif bucket.role is Role.TRAIN and bucket.dataset not in excluded:
            taught += len(bucket.records)
    if wanted.eval_loss_disable or not held:
        return None
    pictures = sum(min(count, wanted.num_eval_images or count) for count in held.values())
    levels, epochs = len(spread(levels_of(config), 1.0, wanted.eval_timesteps)), wanted.eval_epoch_interval or 0.0
    steps = wanted.eval_steps_interval
    if steps is None:
        steps = 0 if epochs else config.validation.validation_step_interval
    compared = min(pictures, taught) if wanted.alarms else 0
    return EvaluationPlan(pictures, levels, compared, config.ema.use_ema, Every(steps, epochs))


def is_regularised(buckets: Iterable[Bucket]) -> bool:
    """Whether any picture is regularisation data."""
    return any(bucket.role is Role.REGULARISE for bucket in buckets)


def learns_from_base(config: Config, buckets: Iterable[Bucket]) -> bool:
    """Whether the run needs the untrained model beside the one that it trains."""
    return config.train.regularisation_target == "base" and is_regularised(buckets)


def priced(config: Config, buckets: Iterable[Bucket]) -> Config:
    """The settings as they cost memory: without regularisation data there is no untrained model to keep."""
    if config.train.regularisation_target == "base" and not is_regularised(buckets):
        return changed(config, {"regularisation_target": "data"})
    return config


def held_out_copies(records: Iterable[Record]) -> tuple[str, ...]:
    """A warning when pictures that are held out are trained, byte for byte; () when none is.

    Pictures that were never read whole are not compared.
    """
    records = tuple(records)
    seen: dict[str, Record] = {}
    for record in records:
        if record.role is not Role.EVAL and record.content_hash is not None:
            seen.setdefault(record.content_hash, record)
    held = [record for record in records if record.role is Role.EVAL and record.content_hash in seen]
    return held_out_warning([(record.id, seen[str(record.content_hash)].id) for record in held], "the same file as")


def held_out_warning(pairs: Sequence[tuple[str, str]], relation: str) -> tuple[str, ...]:
    """Says which held-out pictures (first) are like trained ones (second); () for none."""
    if not pairs:
        return ()
    shown = "; ".join(f"{held} is {relation} {taught}" for held, taught in pairs[:_NAMES_SHOWN])
    more = f"; and {len(pairs) - _NAMES_SHOWN} more" if len(pairs) > _NAMES_SHOWN else ""
    count = "1 picture that is held out is" if len(pairs) == 1 else f"{len(pairs)} pictures that are held out are"
    return (f"{count} among the trained ones, where it tells nothing of what was learnt: {shown}{more}",)
