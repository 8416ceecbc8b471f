"""Properties of the files: what loads means the same in every format and when written again; no bytes crash it."""

from __future__ import annotations

import json
import string
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt, MinLen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sana_tune.config.caption_edits import SPLITS
from sana_tune.config.choices import (
    CAPTION_STRATEGIES,
    CHECKPOINTING_BACKENDS,
    HUBER_SCHEDULES,
    LOSS_TYPES,
    LOSS_WEIGHTINGS,
    LR_SCHEDULERS,
    NOISE_DISTRIBUTIONS,
    OPTIMIZERS,
    PRECISIONS,
    SAMPLERS,
)
from sana_tune.config.datasets import ImageDataset
from sana_tune.config.files import resolve
from sana_tune.config.load import Loaded, load, parse_overrides
from sana_tune.config.schema import SECTIONS, AdapterConfig, LaunchConfig
from sana_tune.config.sources import SourceSettings
from sana_tune.errors import UserError
from sana_tune.output import Output
from tests.config.helpers import write_files

QUICK = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)

# Any text that a file can hold: no masks, no placeholders, and blanks only inside.
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), exclude_characters="{}•\x85\u2028\u2029\ufeff"),
    min_size=1, max_size=12,
).filter(lambda text: text.strip() == text)  # fmt: skip
SIZES = st.lists(st.tuples(st.integers(32, 2048), st.integers(32, 2048)), min_size=1, max_size=3).map(
    lambda sizes: ",".join(f"{width}x{height}" for width, height in sizes)
)
OF_KEYS: dict[str, st.SearchStrategy[Any]] = {
    "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
    "text_encoder_1_precision": st.sampled_from(sorted(PRECISIONS)),
    "lr_scheduler": st.sampled_from(sorted(LR_SCHEDULERS)),
    "caption_strategy": st.sampled_from(sorted(set(CAPTION_STRATEGIES) - {"parquet", "csv", "huggingface"})),
    "validation_resolution": SIZES,
    "sana_complex_human_instruction": TEXT | st.lists(TEXT, min_size=1, max_size=3),
    "crop_aspect_buckets": st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.5]), min_size=1, max_size=3, unique=True),
    "resolution": st.integers(32, 2048),
    "learning_rate": st.floats(1e-6, 1.0),  # above the ends of all schedules
    "gradient_checkpointing_backend": st.sampled_from(sorted(CHECKPOINTING_BACKENDS)),
    "loss_type": st.sampled_from(sorted(LOSS_TYPES)),
    "huber_schedule": st.sampled_from(sorted(HUBER_SCHEDULES)),
    "loss_weighting": st.sampled_from(sorted(LOSS_WEIGHTINGS)),
    "flow_distribution": st.sampled_from(sorted({*NOISE_DISTRIBUTIONS} - {"custom"})),
    "scheduled_sampling_strategy": st.sampled_from(["uniform", "biased_early", "biased_late"]),
    "scheduled_sampling_sampler": st.sampled_from(["unipc", "dpm", "euler"]),
    "scheduled_sampling_max_step_offset": st.integers(0, 1),
    "validation_noise_scheduler": st.sampled_from(sorted(SAMPLERS)),
    "disk_low_threshold": st.one_of(st.integers(0, 10**15), st.sampled_from(["20 GB", "5%", "1.5TiB", "500M"])),
    "probability": st.floats(0, 1e4, exclude_min=True, allow_subnormal=False),
    "report_to": st.sampled_from(["none", "all", "wandb", "tensorboard,wandb"]),
    "hub_model_id": st.sampled_from(["rex", "me/rex", "https://huggingface.co/me/rex"]),
    "alpha_ground": st.sampled_from(["#0a1B2c", "#fff", "white", "rebeccapurple"]),
    "eval_split": st.sampled_from([0, 0.05, 0.5, 1, 12]),
    "caption_shuffle": st.fixed_dictionaries(
        {"enable": st.booleans()},
        optional={
            "count": st.integers(1, 9),
            "seed": st.integers(0, 2**40),
            "split_on": st.sampled_from(sorted(SPLITS)),
            "position_start": st.integers(0, 5),
            "include_original": st.booleans(),
        },
    ),
}
# Keys whose values depend on each other or on files are given by hand.
BY_HAND = {"pretrained_model_name_or_path", "data_backend_config", "id", "instance_data_dir", "disabled", "lr_end",
           "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size", "crop_aspect",
           "minimum_aspect_ratio", "maximum_aspect_ratio", "crop_aspect_buckets", "instance_prompt", "weights_dtype",
           "prepend_instance_prompt", "only_instance_prompt", "max_upscale_threshold", "type", "metadata_backend",
           "conditioning_data", "text_embeds", "start_epoch", "start_step", "end_epoch", "end_step",
           *SourceSettings.model_fields,
           "flow_custom_timesteps", "flow_use_uniform_schedule", "flow_use_beta_schedule", "snr_gamma",
           "optimizer_config", "optimizer_release_gradients", "lr_scale_sqrt",
           "gradient_checkpointing_segment_stride", "dynamo_backend", "base_model_precision", "validation_method",
           "validation_external_script", "eval_dataset_id",
           "webhook_config", "post_checkpoint_script", "post_upload_script", "modelspec_comment",
           "disk_low_action", "checkpoints_keep_every", *LaunchConfig.model_fields,
           *AdapterConfig.model_fields}  # fmt: skip


def values_of(info: FieldInfo) -> st.SearchStrategy[Any]:
    """Values that a setting takes, by its type and range."""
    low = next((limit.ge for limit in info.metadata if isinstance(limit, Ge)), 0)
    above = next((limit.gt for limit in info.metadata if isinstance(limit, Gt)), None)
    high = next((limit.le for limit in info.metadata if isinstance(limit, Le)), None)
    below = next((limit.lt for limit in info.metadata if isinstance(limit, Lt)), None)
    kind: Any = info.annotation
    kinds = [part for part in (get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,))
             if part is not type(None)]  # fmt: skip
    if get_origin(kinds[0]) is Literal:
        return st.sampled_from(get_args(kinds[0]))
    if kinds[0] is bool:
        return st.booleans()
    if kinds[0] is int:
        return st.integers(int(low), 10_000 if high is None else int(high))
    if kinds[0] is float:
        top = below or high or 1e4
        return st.floats(
            above if above is not None else low, top, exclude_min=above is not None, exclude_max=below is not None,
            allow_subnormal=False,
        )  # fmt: skip
    assert kinds[0] is str, kinds
    return TEXT.filter(
        lambda text: len(text) >= next((m.min_length for m in info.metadata if isinstance(m, MinLen)), 0)
    )


def strategies(kinds: list[type[BaseModel]]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {
        key: OF_KEYS[key] if key in OF_KEYS else values_of(info)
        for kind in kinds
        for key, info in kind.model_fields.items()
        if key not in BY_HAND
    }
    return st.fixed_dictionaries({}, optional=fields)


CONFIGS = strategies(list(SECTIONS.values()))
DATASETS = strategies([ImageDataset])


def _toml(values: dict[str, Any]) -> str:
    return "\n".join(f"{key} = {_toml_value(value)}" for key, value in values.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _yaml(values: Any) -> str:
    """Block style for the outside; JSON inside, which is YAML too."""
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()) or "{}"


WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "json": lambda values: json.dumps({f"--{key}": value for key, value in values.items()}),
    "toml": _toml,
    "yaml": _yaml,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("round_trip")


def loaded(folder: Path, ending: str, config: dict[str, Any], dataset: dict[str, Any]) -> Loaded:
    """The settings, loaded from a file of the ending; the dataset's from JSON."""
    write_files(folder, {}, dataset)
    asked = {"pretrained_model_name_or_path": "nano", "data_backend_config": str(folder / "multidatabackend.json")}
    path = folder / f"config.{ending}"
    path.write_text(WRITERS[ending]({**asked, **config}), encoding="utf-8")
    return load(path, {}, environ={})


def fitting(config: dict[str, Any], dataset: dict[str, Any]) -> None:
    """Take out what contradicts itself; the rules have their own tests."""
    for values in (config, dataset):
        if values.get("caption_strategy") == "instanceprompt":
            values["instance_prompt"] = "a zib"
    config.pop("resume_from_checkpoint", None)


@QUICK
@given(CONFIGS, DATASETS)
def test_every_format_means_the_same_and_survives_being_written(folder: Path, config: dict, dataset: dict) -> None:
    fitting(config, dataset)
    plain = loaded(folder, "json", config, dataset)
    assert {**dict(plain.config.train), **dict(plain.config.ema)}.items() >= {
        key: value for key, value in config.items() if key in ("seed", "ema_decay", "max_train_steps")
    }.items()
    for ending in ("toml", "yaml"):
        other = loaded(folder, ending, config, dataset)
        assert other.config == plain.config and other.datasets == plain.datasets, ending
    output = Output.open(folder / "output")
    output.write_config(plain)
    again = load(output.root / "config.json", {}, environ={})
    assert again.config == plain.config and again.datasets == plain.datasets
    assert {key: origin == "default" for key, origin in again.origins.items()} == {
        key: origin == "default" for key, origin in plain.origins.items()
    }


@QUICK
@given(CONFIGS)
def test_flags_mean_what_the_file_means(folder: Path, config: dict) -> None:
    fitting(config, {})
    config = {key: value for key, value in config.items() if not isinstance(value, list)}
    words = [f"--{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in config.items()]
    write_files(folder, {}, {"instance_prompt": "a zib"})
    base = folder / "config.json"
    flags = load(base, parse_overrides(words), environ={})
    both = {**json.loads(base.read_text()), **config}
    base.write_text(json.dumps(both), encoding="utf-8")
    assert load(base, {}, environ={}).config == flags.config


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.binary(max_size=400) | st.text(string.printable, max_size=400).map(str.encode), st.sampled_from(
    ["json", "toml", "yaml", "env"]), st.booleans())  # fmt: skip
def test_no_bytes_crash_the_loader(folder: Path, content: bytes, ending: str, as_datasets: bool) -> None:
    path = folder / f"random.{ending}"
    path.write_bytes(content)
    try:
        if as_datasets:
            load(write_files(folder, {"data_backend_config": str(path)}), {}, environ={})
        else:
            load(path, {}, environ={})
    except UserError as error:
        assert all(problem.what for problem in error.problems)
    else:
        raise AssertionError("random bytes cannot name a model")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(sorted({*(key for kind in SECTIONS.values() for key in kind.model_fields)}))
DATASET_KEYS = st.sampled_from([*ImageDataset.model_fields, "type", "dataset_type", "conditioning_type"])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.dictionaries(KEYS, JSON, max_size=6), st.lists(st.dictionaries(DATASET_KEYS, JSON, max_size=6), max_size=3))
def test_no_values_crash_the_loader(folder: Path, config: dict, datasets: list) -> None:
    """Right names, any values: a Problem or a config, nothing else."""
    path = write_files(folder, config)
    resolve(str(config.get("data_backend_config", "")))
    (folder / "multidatabackend.json").write_text(json.dumps(datasets), encoding="utf-8")
    try:
        load(path, {}, environ={})
    except UserError as error:
        assert all(problem.where and problem.what for problem in error.problems)
