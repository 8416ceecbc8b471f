"""What a user can get wrong: each is told with a message that helps, exit code 1, no traceback, and nothing begun.

A broken picture among good ones is no mistake: it is left out and named.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_tune.cli.main import exit_code
from sana_tune.config import legacy
from sana_tune.config.datasets import ImageDataset, TextDataset
from sana_tune.config.load import load
from sana_tune.config.schema import section_of
from sana_tune.errors import UserError
from tests.fixtures import cached_sana
from tests.journeys.kit import SMALL, metrics_of, pictures, small_run

ROOT = Path(__file__).resolve().parents[2]
CONFIG, BACKENDS = "config.json", "multidatabackend.json"

# What a run that was refused may leave in its folder: what it said, and what it knows of files now.
TRACES = {"log.txt", "cache/files.jsonl", "cache/model_hashes.json"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: three pictures, and a config that is right."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", 3)
    small_run(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- changes to the right config ----

Change = Callable[[Path], object]


def nothing(folder: Path) -> None:
    pass


def write(name: str, content: Any) -> Change:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def put(name: str, content: bytes) -> Change:
    """Write bytes."""
    return lambda folder: (folder / name).write_bytes(content)


def twice(folder: Path) -> None:
    """The one dataset, and once more."""
    (entry,) = json.loads((folder / BACKENDS).read_text(encoding="utf-8"))
    write(BACKENDS, [entry, entry])(folder)


def edit(name: str = CONFIG, **changes: Any) -> Change:
    """Set keys of config.json, or of the one dataset."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (content[0] if isinstance(content, list) else content).update(changes)
        write(name, content)(folder)

    return change


MASKS = {"id": "m", "dataset_type": "conditioning", "instance_data_dir": "masks"}


def also(*entries: dict[str, Any], **changes: Any) -> Change:
    """More entries of multidatabackend.json beside the one dataset, which gets these keys."""

    def change(folder: Path) -> None:
        edit(BACKENDS, **changes)(folder)
        (entry,) = json.loads((folder / BACKENDS).read_text(encoding="utf-8"))
        write(BACKENDS, [entry, *entries])(folder)

    return change


def remove(pattern: str) -> Change:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def spoil(path: Path) -> None:
    """A file that is no picture at all."""
    path.write_bytes(b"\x89PNG but not for long")


def cut(path: Path) -> None:
    """A picture whose header is whole and whose body is not."""
    path.write_bytes(path.read_bytes()[:-60])


def each(pattern: str, change: Callable[[Path], None]) -> Change:
    return lambda folder: [change(path) for path in folder.glob(pattern)]


def filters(value: Any) -> Change:
    """A text cache with this caption_filter_list, beside the one dataset."""

    def change(folder: Path) -> None:
        entries = json.loads((folder / BACKENDS).read_text(encoding="utf-8"))
        write(BACKENDS, [*entries, {"id": "t", "dataset_type": "text_embeds", "caption_filter_list": value}])(folder)

    return change


# what → (change, flags, what must be said)
MISTAKES: dict[str, tuple[Change, str, tuple[str, ...]]] = {
    # the config file
    "no config": (remove(CONFIG), "", ("no config file", "config/config.json.example", "--example nano")),
    "config not there": (nothing, "--config configs.json", ("--config", "configs.json does not")),
    "no such environment": (nothing, "--env mine", ("config/mine/config.json must exist",)),
    "no such example": (nothing, "--example nan", ("no example 'nan'", "known: nano")),
    "JSON with a comment": (write(CONFIG, '{\n  // mine\n  "seed": 1\n}'), "", (f"{CONFIG}, line 2", "no comments")),
    "JSON with a late comment": (write(CONFIG, '{\n"seed": 1, # mine\n"a": 2}'), "", ("line 2", "no comments")),
    "JSON with a last comma": (write(CONFIG, '{"seed": 1,\n}'), "", (CONFIG, "remove the comma")),
    "JSON cut short": (write(CONFIG, '{"seed": '), "", (CONFIG, "must be JSON")),
    "a list for a config": (write(CONFIG, []), "", (CONFIG, "one JSON object", "data_backend_config")),
    "no dataset file": (remove(BACKENDS), "", (BACKENDS, "data_backend_config", "must exist")),
    "an object of datasets": (write(BACKENDS, {}), "", (BACKENDS, "a list of datasets")),
    # keys and values
    "typo in a key": (edit(validation_promt="x"), "", ("validation_promt", "did you mean validation_prompt?")),
    "typo in a flag": (nothing, "--learning_rat 1e-5", ("learning_rat:", "did you mean learning_rate?")),
    "typo in a dataset's key": (edit(BACKENDS, repeat=1), "", (f"{BACKENDS}: d0: repeat", "did you mean repeats?")),
    "typo in a value": (edit(lr_scheduler="cosin"), "", ("lr_scheduler", "'cosin'", "did you mean 'cosine'?")),
    "a word for a number": (nothing, "--max_train_steps many", ("max_train_steps", "integer; found 'many'")),
    "a number out of range": (edit(learning_rate=-1), "", ("learning_rate", "greater than 0; found -1")),
    "a flag without value": (nothing, "--max_train_steps", ("max_train_steps: needs a value; found none",)),
    "a flag without value before another": (nothing, "--seed --max_train_steps 3", ("seed: needs a value",)),
    "a stray word": (nothing, "tain", ("'tain' is no --key value",)),
    "unknown optimizer": (nothing, "--optimizer adamw", ("optimizer", "the nearest is optimi-adamw")),
    "LoRA": (
        nothing, "--model_type lora --lora_type standard",
        ("a standard LoRA does not fit Sana", "use lora_type lycoris with a LoKr"),
    ),
    "no file of the adapter": (nothing, "--model_type lora", ("config/lycoris_config.json", "must exist")),
    "no number of processes": (nothing, "--num_processes many", ("num_processes", "integer; found 'many'")),
    "machines that do not know each other": (
        edit(num_processes=4, num_machines=2), "--machine_rank 1", ("missing: main_process_ip, main_process_port",)
    ),
    "a machine that is none of them": (
        edit(num_processes=2, machine_rank=1), "", ("must be below num_machines 1", "set num_machines")
    ),
    "machines of unequal size": (
        edit(num_processes=3, num_machines=2, main_process_ip="a", main_process_port=1),
        "--machine_rank 0", ("counts the processes of all 2 machines", "use a multiple of 2"),
    ),
    "DeepSpeed": (edit(deepspeed_config={"a": 1}), "", ("deepspeed_config: cannot be used", "FSDP2 shards")),
    "DeepSpeed for accelerate": (
        nothing, "--accelerate_extra_args=--use_deepspeed", ("DeepSpeed cannot be used here", "FSDP2 shards")
    ),
    "accelerate's own CPU": (nothing, "--accelerate_extra_args=--cpu", ("--cpu cannot be given here", "--device cpu")),
    "no file of accelerate": (
        nothing, "--accelerate_config none.yaml", ("none.yaml: the accelerate config must exist and does not",)
    ),
    "released on several": (
        edit(optimizer_release_gradients=True, num_processes=2), "", ("needs one process: several sum",)
    ),
    # the form of the files
    "single quotes": (write(CONFIG, "{'seed': 1}"), "", (f"{CONFIG}, line 1", "double quotes")),
    "Python's words": (write(CONFIG, '{"use_ema": True}'), "", ("true, false and null",)),
    "a Windows path": (write(CONFIG, '{"output_dir": "C:\\out"}'), "", ("backslash", "C:/pictures")),
    "UTF-16": (put(CONFIG, '{"seed": 1}'.encode("utf-16")), "", (CONFIG, "UTF-8 text", "save it as UTF-8")),
    "garbage": (put(CONFIG, bytes(range(256)) * 20_000), "", (CONFIG, "5.1 MB large", "right file")),
    "garbage of a config's size": (put(CONFIG, bytes(range(128)) * 40), "", (f"{CONFIG}, line 1", "must be JSON")),
    "deep nesting": (put(CONFIG, b"[" * 300_000), "", (CONFIG, "nested too deeply")),
    "deep nesting in a value": (put(CONFIG, b'{"a": %s%s}' % (b"[" * 900, b"]" * 900)), "", ("nested too deeply",)),
    "an empty file": (write(CONFIG, ""), "", (CONFIG, "must be JSON")),
    "a key twice": (write(CONFIG, '{"seed": 1, "seed": 2}'), "", ("seed: the key stands twice",)),
    "a folder for a config": (nothing, "--config pictures", ("--config", "must hold a config.json")),
    "two spellings": (edit(**{"--seed": 1, "seed": 2}), "", ("--seed: means the same setting as",)),
    "old and new name": (edit(checkpointing_steps=1, checkpoint_step_interval=2), "", ("means the same setting",)),
    "a null for the model": (edit(pretrained_model_name_or_path=None), "", ("must be set and is not", "hub id")),
    "a list for a number": (edit(seed=[1, 2]), "", ("seed", "must be a valid integer; found [1, 2]")),
    "an object for a text": (edit(output_dir={"a": 1}), "", ("output_dir", "must be a valid string; found {'a': 1}")),
    "a number for a text": (edit(revision=5), "", ("revision", "must be a valid string; found 5")),
    "a percent for a share": (edit(caption_dropout_probability="10%"), "", ("valid number", "found '10%'")),
    "ten for a tenth": (edit(caption_dropout_probability=10), "", ("less than or equal to 1; found 10",)),
    "a comma in a number": (edit(learning_rate="1,5e-5"), "", ("learning_rate", "found '1,5e-5'")),
    "not a number": (edit(max_grad_norm=float("nan")), "", ("max_grad_norm", "finite number")),
    "a fraction of a step": (edit(max_train_steps=10.5), "", ("max_train_steps", "found 10.5")),
    "a decay of 1": (edit(ema_decay=1), "", ("ema_decay", "less than 1; found 1")),
    "yes and no": (edit(use_ema="perhaps"), "", ("use_ema", "valid boolean", "found 'perhaps'")),
    "a switch for a number": (edit(lr_warmup_steps=True), "", ("must be no switch; found true",)),
    "a placeholder of nothing": (edit(output_dir="{env:SANA_TUNE_NONE}/x"), "", ("'SANA_TUNE_NONE' is not set",)),
    "a mask": (edit(revision="•••"), "", ("the mask that a run put in the place of a secret", "{env:VAR}")),
    "a TOML word": (
        write("c.toml", "seed = one"), "--config c.toml", ("c.toml, line 1", "must be TOML", "text stands in quotes")
    ),
    "a YAML tab": (write("c.yaml", "a:\n\tb: 1"), "--config c.yaml", ("c.yaml, line 2", "must be YAML", "not tabs")),
    "a YAML key twice": (write("c.yaml", "seed: 1\nseed: 2"), "--config c.yaml", ("c.yaml, line 2: seed", "twice")),
    "a YAML list": (write("c.yaml", "- seed: 1"), "--config c.yaml", ("one JSON object", "data_backend_config")),
    "a shell command": (
        write("config.env", "MODEL_NAME=$(cat x)\nif true; then"), "--config config.env",
        ("2 things are wrong", "MODEL_NAME: a command is not run", "line 2: must be KEY=VALUE"),
    ),
    "an unclosed quote in a shell config": (write("config.env", "A='x"), "--config config.env", ("is not closed",)),
    # contradictions
    "bf16 without Kahan": (
        nothing, "--weights_dtype bf16 --learning_rate 1e-5 --optimizer_config kahan_sum=false",
        ("about 85 % of the weights would not move", "leave kahan_sum out"),
    ),
    "a segment shorter than its recomputed blocks": (
        edit(gradient_checkpointing=True, gradient_checkpointing_interval=3, gradient_checkpointing_segment_stride=2),
        "", ("a segment must not be shorter; found 2", "set it to 3 or more"),
    ),
    "selective blocks compiled": (
        edit(gradient_checkpointing=True, gradient_checkpointing_backend="selective", dynamo_backend="inductor"), "",
        ("must not be recomputed selectively when they are compiled", "gradient_checkpointing_interval if memory"),
    ),
    "checkpointing of another trainer": (
        nothing, "--gradient_checkpointing_backend unsloth", ("there is next to nothing to save; use torch",)
    ),
    "a compiler of another trainer": (nothing, "--dynamo_backend cudagraphs", ("no compiler", "known: no, inductor")),
    "fp16 on a CPU": (nothing, "--mixed_precision fp16", ("fp16 needs a GPU", "use mixed_precision no")),
    "fp16 with bf16 weights": (
        edit(mixed_precision="fp16", weights_dtype="bf16"), "", ("fp16 needs fp32 weights", "use mixed_precision bf16")
    ),
    "an optimizer of another trainer": (nothing, "--optimizer prodigy", ("the nearest is optimi-adamw",)),
    "an option of another optimizer": (
        edit(optimizer_config="alpha=2"), "", ("optimi-adamw has no option alpha", "kahan_sum")
    ),
    "an option of another kind": (edit(optimizer_config="eps=small"), "", ("eps must be a number; found small",)),
    "options that are none": (edit(optimizer_config="beta1 0.9"), "", ('must be "name=value,name=value"',)),
    "an option twice": (edit(optimizer_config="beta1=0.9", optimizer_beta1=0.8), "", ("beta1 stands in", "keep one")),
    "nesterov without momentum": (
        edit(optimizer="torch-sgd", optimizer_config="nesterov=true"), "", ("needs a momentum above 0",)
    ),
    "two scales": (edit(lr_scale=True, lr_scale_sqrt=True), "", ("found lr_scale_sqrt beside it", "keep one of them")),
    "released and accumulated": (
        edit(optimizer_release_gradients=True, gradient_accumulation_steps=2), "",
        ("needs gradient_accumulation_steps 1", "larger train_batch_size"),
    ),
    "released in fp16": (
        edit(optimizer_release_gradients=True, mixed_precision="fp16"), "",
        ("cannot be used with mixed_precision fp16", "use mixed_precision bf16"),
    ),
    "an end above the start": (
        edit(lr_scheduler="polynomial", learning_rate=1e-6, lr_end=1e-5), "", ("lr_end", "learning_rate")
    ),
    "sine": (nothing, "--lr_scheduler sine", ("lr_scheduler", "cosine")),
    "fp8": (nothing, "--mixed_precision fp8", ("'fp8' is not built yet", "use bf16")),
    "quantised and full": (edit(base_model_precision="nf4-bnb"), "", ("base_model_precision: a quantised base", "GB")),
    "a flavour": (edit(model_flavour="sana1.0-1.6b-1024"), "", ("model_flavour", "pretrained_model_name_or_path")),
    "deleting": (edit(BACKENDS, delete_unwanted_images=True), "", ("nothing is ever deleted",)),
    "two distributions of noise": (
        edit(flow_use_uniform_schedule=True, flow_distribution="mode"), "",
        ("drawn from one distribution", "flow_distribution (mode) and flow_use_uniform_schedule (uniform)"),
    ),
    "a table of no noise levels": (nothing, "--flow_distribution custom", ("custom needs flow_custom_timesteps",)),
    "noise levels that are none": (nothing, "--flow_custom_timesteps 0.5,2000", ("up to 1000", "found '2000'")),
    "two weightings": (edit(snr_gamma=5, loss_weighting="cosmap"), "", ("snr_gamma is a weighting itself",)),
    "a weighting that is none": (edit(loss_weighting="logit_normal"), "", ("cannot be used", "use flow_distribution")),
    "offset noise": (edit(offset_noise=True, noise_offset=0.1), "", ("offset_noise: cannot be used", "pure noise")),
    "biased timesteps": (edit(timestep_bias_strategy="earlier"), "", ("timestep_bias_strategy: cannot be used",)),
    # datasets
    "an empty list of datasets": (write(BACKENDS, []), "", ("at least one dataset of pictures must be enabled",)),
    "all datasets disabled": (edit(BACKENDS, disabled=True), "", ("at least one dataset of pictures must be enabled",)),
    "datasets that are none": (write(BACKENDS, ["pictures"]), "", ("must be a list of datasets",)),
    "a dataset without id": (edit(BACKENDS, id=None), "", ("entry 1: id: must be set and is not",)),
    "a dataset without folder": (
        edit(BACKENDS, instance_data_dir=None), "", ("d0: instance_data_dir: type local needs instance_data_dir",)
    ),
    "two datasets of one id": (twice, "", (f"{BACKENDS}: d0: the id of a dataset must be unique",)),
    "another kind of dataset": (edit(BACKENDS, dataset_type="video"), "", ("dataset_type", "take frames out of")),
    # pictures that are far away, and tables
    "a bucket without a name": (edit(BACKENDS, type="aws"), "", ("type aws needs aws_bucket_name",)),
    "a bucket that is called local": (
        edit(BACKENDS, instance_data_dir=None, aws_bucket_name="b"), "", ('did you mean "type": "aws"?',)
    ),
    "half of the keys of a bucket": (
        edit(BACKENDS, type="aws", aws_bucket_name="b", aws_access_key_id="A"), "", ("must be given together",)
    ),
    "a store without http": (
        edit(BACKENDS, type="aws", aws_bucket_name="b", aws_endpoint_url="s3.example.com"), "",
        ("aws_endpoint_url", "must be an address such as"),
    ),
    "web shards": (edit(BACKENDS, type="webshart"), "", ("'webshart' cannot be used here", "unpack them into a")),
    "addresses without a table": (edit(BACKENDS, type="csv"), "", ("type csv needs csv_file",)),
    "downloads without a folder": (
        edit(BACKENDS, type="csv", csv_file="p.csv"), "",
        ("type csv needs csv_cache_dir", "where the pictures are kept"),
    ),
    "a table that is not there": (
        edit(BACKENDS, type="csv", csv_file="p.csv", csv_cache_dir="kept", caption_strategy="csv"), "",
        ("dataset d0: p.csv: the table must exist and does not",),
    ),
    "a table without addresses": (
        lambda folder: (write("p.csv", "adress,caption\n")(folder),
                        edit(BACKENDS, type="csv", csv_file="p.csv", csv_cache_dir="kept")(folder)),
        "--caption_strategy csv", ("p.csv: the table has no column url; it has adress, caption",),
    ),
    "captions of a table that is not named": (
        edit(BACKENDS, caption_strategy="parquet"), "",
        ("parquet needs the block parquet", '"path": "captions.parquet"'),
    ),
    "a table with a misspelt key": (
        edit(BACKENDS, caption_strategy="parquet", parquet={"path": "t.csv", "captoin_column": "x"}), "",
        ("parquet has no captoin_column; did you mean caption_column?",),
    ),
    "a table of captions without captions": (
        lambda folder: (write("t.csv", "filename,text\n")(folder),
                        edit(BACKENDS, caption_strategy="parquet", parquet={"path": "t.csv"})(folder)),
        "", ("t.csv: the table has no column caption; it has filename, text",),
    ),
    "a strategy of another type": (
        edit(BACKENDS, caption_strategy="huggingface"), "", ("type local takes filename, textfile",)
    ),
    "latents in a bucket": (
        edit(BACKENDS, cache_dir_vae="s3://b/latents"), "", ("must be a folder of this machine; found the address",)
    ),
    "a hub dataset without a name": (edit(BACKENDS, type="huggingface"), "", ("type huggingface needs dataset_name",)),
    "streaming": (
        edit(BACKENDS, type="huggingface", dataset_name="o/n", huggingface={"streaming": True}), "",
        ("streaming cannot be used: pictures are counted and hashed before training",),
    ),
    "a config's key in a dataset": (edit(BACKENDS, learning_rate=1), "", ("is a setting of config.json",)),
    "a dataset's key in the config": (edit(repeats=1), "", ("is a setting of a dataset", "multidatabackend.json")),
    "megapixels as pixels": (edit(BACKENDS, resolution_type="pixel_area", resolution=1), "", ("resolution", "px")),
    "pixels as megapixels": (edit(BACKENDS, resolution_type="area", resolution=1024), "", ("megapixel", "pixel_area")),
    "all held out": (
        edit(BACKENDS, eval_split=3), "",
        ("eval_split", "must leave pictures to train on; eval_split 3 would hold out 3 of 3 pictures"),
    ),
    "one and a half held out": (edit(eval_split=1.5), "", ("eval_split", "a share below 1, such as 0.1")),
    "nothing of it held out": (edit(eval_dataset_id="d0"), "", ("eval_dataset_id", "d0 holds none out, none does")),
    "no CLIP model": (
        edit(evaluation_type="clip", pretrained_evaluation_model_name_or_path="pictures", validation_disable=False), "",
        ("pretrained_evaluation_model_name_or_path", "lacks config.json", "it is no CLIP model"),
    ),
    "closest to nothing": (edit(BACKENDS, crop=True, crop_aspect="closest"), "", ("needs", "crop_aspect_buckets")),
    "aspects that are none": (
        edit(BACKENDS, crop=True, crop_aspect="closest", crop_aspect_buckets=["wide"]), "",
        ("crop_aspect_buckets", "wide"),
    ),
    "aspects the wrong way round": (
        edit(BACKENDS, minimum_aspect_ratio=2, maximum_aspect_ratio=1), "",
        ("minimum_aspect_ratio", "maximum_aspect_ratio"),
    ),
    "cropping by faces": (edit(BACKENDS, crop_style="face"), "", ("'face' is not built yet", "use center")),
    "half of two sizes": (edit(BACKENDS, crop=True, maximum_image_size=64), "", ("given together",)),
    "no instance prompt": (edit(BACKENDS, caption_strategy="instanceprompt"), "", ("needs an instance_prompt",)),
    "an unknown placeholder": (edit(BACKENDS, cache_dir_vae="{cache}/x"), "", ("there is no placeholder {cache}",)),
    "every picture too small": (
        edit(BACKENDS, minimum_image_size=4096), "", ("all 3 pictures are left out", "minimum_image_size 4096")
    ),
    "captions that are no text": (put("pictures/p01.txt", b"\xff\xfe\xff"), "", ("p01.txt is not UTF-8 text",)),
    "an alignment that does not fit": (edit(aspect_bucket_alignment=12), "", ("multiple of the VAE's factor 8",)),
    # roles and order
    "masks that are named and not there": (edit(BACKENDS, conditioning_data="m"), "", ("conditioning_data", "'m'")),
    "a text cache that is named and not there": (edit(BACKENDS, text_embeds="t"), "", ("text_embeds", "there is none")),
    "two default text caches": (
        also({"id": "a", "dataset_type": "text_embeds", "default": True},
             {"id": "b", "dataset_type": "text_embeds", "default": True}), "",
        ("one text cache at most can be the default; found a, b",),
    ),
    "no folder of masks": (also(MASKS, conditioning_data="m"), "", ("masks m:", "the folder does not exist")),
    "a mask short": (
        lambda folder: (shutil.copytree(folder / "pictures", folder / "masks"), remove("masks/p01.png")(folder),
                        also(MASKS, conditioning_data="m")(folder)),
        "", ("1 of 3 have none that can be used: p01.png: no p01", "white = counts"),
    ),
    "masks of a control net": (
        also({**MASKS, "conditioning_type": "controlnet"}, conditioning_data="m"), "",
        ("'controlnet' is not built yet", "use mask"),
    ),
    "held-out pictures alone": (edit(BACKENDS, dataset_type="eval"), "", ("at least one dataset of pictures must be",)),
    "a probability of nothing": (edit(BACKENDS, probability=0), "", ("must have a probability above 0; found none",)),
    "an end before the start": (edit(BACKENDS, start_step=9, end_step=3), "", ("end_step must not be below start",)),
    "nobody starts": (edit(BACKENDS, start_epoch=2), "", ("at least one dataset must be shown from the start",)),
    "everything ends too early": (
        edit(BACKENDS, end_step=3), "--max_train_steps 9", ("after step 3", "goes on to max_train_steps 9", "end_step")
    ),
    "fading out": (edit(BACKENDS, disable_after_epoch_step=9), "", ("cannot be used", "use end_step")),
    "small buckets refused": (
        edit(BACKENDS, small_buckets="error", train_batch_size=4), "", ("must fill a batch of 4", "set repeats to 1")
    ),
    "small buckets alone, dropped": (
        edit(BACKENDS, small_buckets="drop", train_batch_size=4), "",
        ("every bucket is smaller than a batch of 4", "fill or merge"),
    ),
    # the data
    "no data folder": (lambda folder: (folder / "pictures").rename(folder / "p"), "", ("dataset d0", "does not exist")),
    "an empty folder": (remove("pictures/*"), "", ("dataset d0", "no pictures (it is empty)", ".png")),
    "captions alone": (remove("pictures/*.png"), "", ("dataset d0", "no pictures (3 other files)")),
    "no captions": (remove("pictures/*.txt"), "", ("3 pictures have none", "p00.txt", "missing_caption", "skip")),
    "one caption short": (remove("pictures/p01.txt"), "", ("1 picture has none", "p01.png")),
    "all pictures broken": (each("pictures/*.png", spoil), "", ("all 3 pictures are left out", "p02.png")),
    # edits of captions, damaged files
    "a shuffle that is none": (edit(BACKENDS, caption_shuffle="yes"), "", ("a caption shuffle is an object", "enable")),
    "a shuffle neither on nor off": (edit(BACKENDS, caption_shuffle={"count": 3}), "", ("enable is not there",)),
    "a shuffle with a typo": (
        edit(BACKENDS, caption_shuffle={"enable": True, "split": "comma"}), "",
        ("a caption shuffle has enable, count", "found 'split'"),
    ),
    "a shuffle at nothing": (
        edit(BACKENDS, caption_shuffle={"enable": True, "split_on": ";"}), "", ("split_on must be comma or space",)
    ),
    "a shuffle of none": (edit(BACKENDS, caption_shuffle={"enable": True, "count": 0}), "", ("count must be a whole",)),
    "a filter that is no expression": (filters(["s/[/x/"]), "", ("entry 1: is no regular expression", "'s/[/x/'")),
    "filters cut short": (filters(["s/a", "s//x/", "s/a/b/q"]), "", (
        "entry 1: a replacement is written", "entry 2: the pattern is empty", "entry 3: behind the last slash",
    )),
    "a file of filters that is not there": (filters("mine.txt"), "", ("the file of filters cannot be read: ",)),
    "a file of filters of another kind": (filters("mine.csv"), "", ("or the path of a .txt or .json file",)),
    "an object of filters": (
        lambda folder: (write("mine.json", {"a": "b"})(folder), filters("mine.json")(folder)), "",
        ("the file of filters must hold a JSON list",),
    ),
    "filters that leave nothing": (filters(["s/.*//"]), "", ("3 pictures have none", "caption_filter_list is applied")),
    "a ground that is no colour": (edit(BACKENDS, alpha_ground="wite"), "", ("a colour is #rrggbb", "mean white?")),
    "a broken picture in a strict run": (
        each("pictures/p01.png", spoil), "--strict true", ("strict is on, and 1 picture would be left out: p01.png",)
    ),
    "deleting what is broken": (edit(delete_problematic_images=True), "", ("`sana_tune check --left-out --images`",)),
    # the model
    "no model": (edit(pretrained_model_name_or_path=""), "", ("pretrained_model_name_or_path: must be set",)),
    "no model folder": (nothing, "--pretrained_model_name_or_path ./sana", ("no folder ./sana", "relative paths")),
    "not a model": (nothing, "--pretrained_model_name_or_path pictures", ("model_index.json", "none of them")),
    "a file for a model": (nothing, f"--pretrained_model_name_or_path {CONFIG}", (f"{CONFIG} is a file",)),
    "hub id offline": (
        nothing, "--pretrained_model_name_or_path maker/sana",
        ("no folder of this name", "HF_HUB_OFFLINE", "maker/sana has not been downloaded"),
    ),
    "known hub id offline": (
        nothing, "--pretrained_model_name_or_path Efficient-Large-Model/Sana_600M_512px_diffusers --resolution 512",
        ("offline mode is on", "has not been downloaded"),
    ),
    "a revision of a folder": (nothing, "--revision main", ("nano is a folder",)),
    # the output
    "output below a file": (nothing, f"--output_dir {CONFIG}/out", (f"{CONFIG}/out", "can be written")),
    "no such checkpoint": (nothing, "--resume_from_checkpoint checkpoint-9", ("checkpoint-9", "no such checkpoint")),
    "an incomplete checkpoint": (
        lambda folder: (folder / "output/checkpoint-9/transformer").mkdir(parents=True),
        "--resume_from_checkpoint checkpoint-9", ("checkpoint-9", "not a complete checkpoint"),
    ),
    "too little disk": (
        nothing, "--max_train_steps 100000000 --checkpoint_step_interval 1 --checkpoints_total_limit 0",
        ("GB are free", "checkpoints_total_limit"),
    ),
    # validation
    "size not drawable": (nothing, "--validation_resolution 100x64", ("validation_resolution", "32 px", "use 96x64")),
    "size not readable": (nothing, "--validation_resolution large", ("validation_resolution", "1280x768")),
    "no prompt library": (
        nothing, "--validation_disable false --user_prompt_library mine.json", ("mine.json", "user_prompt_library")
    ),
    "a list for a prompt library": (
        nothing, f"--validation_disable false --user_prompt_library {BACKENDS}", (BACKENDS, '{"nickname": "prompt"')
    ),
    "an empty prompt": (
        write("mine.json", {"a": "x", "b": " ", "c": 1}),
        "--validation_disable false --user_prompt_library mine.json", ("mine.json: b", "mine.json: c", "not empty"),
    ),
    # several
    "several in the files": (
        lambda folder: (edit(optimizr="x", seed=-1)(folder), edit(BACKENDS, crop_style="centr")(folder)),
        "--lr_scheduler li", ("4 things are wrong", "optimizr", "seed", "lr_scheduler", "crop_style", "'center'"),
    ),
    "several in what they name": (
        edit(BACKENDS, instance_data_dir="nowhere"),
        "--resume_from_checkpoint none-such --pretrained_model_name_or_path ./sana --validation_disable false "
        "--user_prompt_library mine.json",
        ("4 things are wrong", "none-such", "no folder ./sana", "nowhere: the folder", "(looked in", "mine.json"),
    ),
}  # fmt: skip


def test_how_many_mistakes_are_tried():
    """Issue by issue the table grows; this keeps it from shrinking unnoticed."""
    assert len(MISTAKES) >= 100


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_and_nothing_is_begun(mistake, place, capsys):
    change, flags, expected = MISTAKES[mistake]
    change(place)
    before = contents(place)
    began = time.thread_time()
    code = exit_code(["train", *flags.split()])  # the config is found in the working directory
    assert time.thread_time() - began < 5, "a mistake is told at once"
    said = capsys.readouterr()
    assert code == 1, said.out + said.err
    assert "error: " in said.err and "Traceback" not in said.out + said.err
    for part in expected:
        assert part in said.err
    after = contents(place)
    assert {name: after[name] for name in before} == before
    assert {name.removeprefix("output/") for name in after.keys() - before.keys()} <= TRACES


@pytest.mark.parametrize("name", ["TRAINING_NUM_PROCESSES", "TRAINING_NUM_MACHINES"])
def test_a_variable_that_is_no_number_is_told(name, place, monkeypatch, capsys):
    monkeypatch.setenv(name, "many")
    before = contents(place)
    assert exit_code(["train"]) == 1
    said = capsys.readouterr().err
    assert f"environment: {name}: must be a valid integer; found 'many'" in said
    assert contents(place) == before


def test_a_mistake_is_told_by_a_program_that_never_loaded_torch(place):
    """As users start it: one that shows before the run's folder is made, and one of the last to be found."""
    begin = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from sana_tune.cli.main import exit_code; "
    code = begin + "code = exit_code(sys.argv[1:]); print('torch' in sys.modules); sys.exit(code)"
    for flags, expected in ((["--optimizer", "adamm"], "no optimizer"), (["--max_train_steps", "1000000000"], "free")):
        flags = [*flags, "--checkpoint_step_interval", "1", "--checkpoints_total_limit", "0"]
        ran = subprocess.run([sys.executable, "-c", code, "train", *flags], capture_output=True, text=True, cwd=place)
        assert ran.returncode == 1 and expected in ran.stderr and "Traceback" not in ran.stderr
        assert ran.stdout.splitlines()[-1] == "False"


# ---- any value of any key ----

ODD = ([], {}, [1], [None], {"a": 1}, True, "", "x", -1, 0, 1.5, 10**400, float("nan"), "nan", "\0", "long" * 2000)


def test_no_value_of_any_key_ends_in_a_traceback(place):
    """A wrong value is refused or passes for a right one; nothing else happens."""
    foreign = sorted(legacy.known_foreign_keys())
    datasets = {*ImageDataset.model_fields, *TextDataset.model_fields}
    refused: list[str] = []
    for file, keys in ((CONFIG, section_of()), (BACKENDS, datasets)):
        right = (place / file).read_text(encoding="utf-8")
        for value in ODD:
            for changes in (dict.fromkeys(foreign, value), *({key: value} for key in sorted(keys))):
                write(file, right)(place)
                edit(file, **changes)(place)
                try:
                    load(place / CONFIG, {}, {})
                except UserError as error:
                    assert file in str(error) or any(key in str(error) for key in changes)
                    refused.append(str(error))
        write(file, right)(place)
    assert len(refused) > 500
    load(place / CONFIG, {}, {})


# ---- a run that stands ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step on nano."""
    folder = tmp_path_factory.mktemp("trained")
    pictures(folder / "pictures", 3)
    small_run(folder, max_train_steps=1)
    assert exit_code(["train", "--config", str(folder / CONFIG)]) == 0
    return folder


@pytest.fixture
def standing(place: Path, trained: Path) -> Path:
    """A copy of the finished run in the working directory."""
    shutil.copytree(trained / "output", place / "output")
    return place


OTHER_RUNS = {
    "optimizer": "torch-adamw",
    "weights_dtype": "bf16",
    "pretrained_model_name_or_path": "tiny",
}


@pytest.mark.parametrize("key", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused_before_anything_heavy(key, standing, capsys):
    value = OTHER_RUNS[key]
    if value == "tiny":
        value = str(cached_sana())
    before = contents(standing)
    assert exit_code(["train", f"--{key}", value, "--cache_dir", "fresh"]) == 1
    said = capsys.readouterr().err
    assert "checkpoint-1: trained with" in said and "output_dir" in said and "--restart" in said
    assert not (standing / "fresh").exists()
    assert changed(before, contents(standing)) == set()
    assert exit_code(["train", f"--{key}", value, "--resume_from_checkpoint", "checkpoint-7"]) == 1
    assert "checkpoint-7: there is no such checkpoint" in (said := capsys.readouterr().err) and "checkpoint-1" in said


@pytest.mark.parametrize("flags", ["--restart --user_prompt_library mine.json --validation_disable false", "--seed x"])
def test_a_mistake_leaves_the_run_before_it_as_it_was(flags, standing, capsys):
    before = contents(standing)
    assert exit_code(["train", *flags.split()]) == 1
    assert changed(before, contents(standing)) == set()


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    """The files that came, went or are not what they were, but for the traces of a run that was refused."""
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {name for name in names if name.removeprefix("output/") not in TRACES}


# ---- pictures that cannot be read ----


def ledger_of(output: Path) -> dict[str, Any]:
    (entry,) = json.loads((output / "ledger.json").read_text(encoding="utf-8"))["datasets"]
    assert entry["found"] == entry["trained"] + len(entry["left_out"])
    return entry


def test_broken_pictures_among_good_ones_are_left_out_and_named(tmp_path, capsys):
    """One without a header, one without its end: the others are trained, now and when the run goes on."""
    pictures(tmp_path / "pictures", 5)
    spoil(tmp_path / "pictures/p01.png")
    cut(tmp_path / "pictures/p03.png")
    small_run(tmp_path, max_train_steps=2)
    before = contents(tmp_path / "pictures")
    for steps in (2, 3):
        assert exit_code(["train", "--config", str(tmp_path / CONFIG), "--max_train_steps", str(steps)]) == 0
        said = capsys.readouterr().out
        assert "p01.png (is not a picture" in said and "p03.png (is damaged" in said
        assert "settings changed" not in said, "the same pictures are left out as before"
        ledger = ledger_of(tmp_path / "output")
        assert (ledger["found"], ledger["trained"]) == (5, 3)
        assert [name for name, _ in ledger["left_out"]] == ["p01.png", "p03.png"]
        plan = json.loads((tmp_path / "output/plan.json").read_text(encoding="utf-8"))
        assert [bucket["pictures"] for bucket in plan["buckets"]] == [3]
        assert [line["step"] for line in metrics_of(tmp_path / "output")] == list(range(1, steps + 1))
    assert contents(tmp_path / "pictures") == before


def test_pictures_that_all_lack_their_end_are_told(place, capsys):
    """Their headers are fine, so that it takes the VAE's turn to see it."""
    each("pictures/*.png", cut)(place)
    assert exit_code(["train"]) == 1
    said = capsys.readouterr()
    assert "not one of 3 pictures could be encoded" in said.err and "ledger.json" in said.err
    assert "p00.png (is damaged" in said.out
    ledger = ledger_of(place / "output")
    assert ledger["trained"] == 0 and [name for name, _ in ledger["left_out"]] == ["p00.png", "p01.png", "p02.png"]
    assert not list((place / "output").glob("checkpoint-*")) and not (place / "output/pipeline").exists()
    assert not list((place / "output/cache/vae").rglob("*.safetensors"))


def test_the_right_config_is_right(place, capsys):
    """What every mistake above was made in trains."""
    assert exit_code(["train", "--max_train_steps", "1"]) == 0, capsys.readouterr().err
    assert len(metrics_of(place / "output")) == 1 and SMALL["max_train_steps"] > 1
