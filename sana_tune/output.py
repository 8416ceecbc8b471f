"""The folder of a run (contracts §8): where everything goes, and what is written there besides checkpoints."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_tune.config.datasets import ImageDataset, TextDataset
from sana_tune.config.load import Loaded
from sana_tune.config.schema import Config
from sana_tune.config.secrets import MASK, masked
from sana_tune.errors import Problem, UserError
from sana_tune.store import write_atomically


@dataclass(frozen=True)
class Output:
    """`output_dir`, as paths."""

    root: Path

    @classmethod
    def open(cls, root: Path) -> Output:
        """Make the folder and see that it can be written. Raises UserError when it cannot."""
        probe = root / f".writable-{os.getpid()}"  # several processes may look at once
        try:
            root.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink(missing_ok=True)  # of another machine a process may have the same number
        except (OSError, ValueError) as error:  # a path can be none at all
            reason = error.strerror if isinstance(error, OSError) else error
            what = f"output_dir must be a folder that can be written: {reason}"
            raise UserError(Problem(str(root), what, "name another one with --output_dir PATH")) from None
        return cls(root)

    @property
    def log_file(self) -> Path:
        return self.root / "log.txt"

    def log_of(self, rank: int) -> Path:
        """Where a process writes its log; that of the first one is the run's."""
        return self.root / f"log-rank{rank}.txt" if rank else self.log_file

    @property
    def metrics_file(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def pictures(self) -> Path:
        return self.root / "validation_images"

    @property
    def pipeline(self) -> Path:
        return self.root / "pipeline"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    def result(self, config: Config) -> Path:
        """The folder of what a finished run leaves: the pipeline, or the adapter."""
        return self.adapter if config.model.model_type == "lora" else self.pipeline

    @property
    def file_memory(self) -> Path:
        """What is known of the pictures' files, so that none is read twice."""
        return self.root / "cache" / "files.jsonl"

    @property
    def hash_memory(self) -> Path:
        """What is known of the model's files."""
        return self.root / "cache" / "model_hashes.json"

    def latent_folder(self, config: Config, dataset: ImageDataset) -> Path:
        """Where a dataset's latents are: its cache_dir_vae, else <cache_dir_vae>/<id>, else <cache_dir>/vae/<id>."""
        if dataset.cache_dir_vae:
            return Path(dataset.cache_dir_vae)
        if config.data.cache_dir_vae:
            return Path(config.data.cache_dir_vae) / dataset.id
        return self._cache(config) / "vae" / dataset.id

    def text_folder(self, config: Config, text: TextDataset) -> Path:
        """Where embeddings are: the entry's cache_dir, else cache_dir_text, else <cache_dir>/text."""
        return Path(text.cache_dir or config.data.cache_dir_text or self._cache(config) / "text")

    def _cache(self, config: Config) -> Path:
        return Path(config.data.cache_dir) if config.data.cache_dir else self.root / "cache"

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, whole."""
        text = json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n"
        write_atomically(self.root / name, text.encode("utf-8"))

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; empty when there is none or it cannot be read."""
        try:
            content = json.loads((self.root / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_config(self, loaded: Loaded) -> None:
        """The resolved settings as a config.json that can be run again, with their origins under "__origins__".

        Secrets are masked; a file with a mask is told so when it is run.
        """
        sections = loaded.config.model_dump(mode="json").values()
        settings = {key: value for section in sections for key, value in section.items() if value is not None}
        settings["validation_resolution"] = ",".join(map(str, loaded.config.validation.validation_resolution))
        shown = {key: MASK if key in loaded.secret else masked(key, value) for key, value in settings.items()}
        self.write_json("config.json", {**shown, "__origins__": dict(loaded.origins)})

    def set_aside(self) -> None:
        """Move what an earlier run left, but not its caches, to before_restart_<n>/."""
        found = [path for path in self.root.iterdir() if path.name in _OF_A_RUN or path.name.startswith("checkpoint-")]
        if not found:
            return
        number = 1
        while (target := self.root / f"before_restart_{number}").exists():
            number += 1
        target.mkdir()
        for path in found:
            path.rename(target / path.name)


_OF_A_RUN = (
    "config.json",
    "plan.json",
    "ledger.json",
    "metrics.jsonl",
    "events.jsonl",
    "environment.json",
    "prompts.json",
    "report.html",
    "first_batches",
    "previews",
    "validation_images",
    "pipeline",
    "pipeline.json",
    "held_out.json",
    "held_out.safetensors",
    "run_id.json",
    "logs",
    "checkpoint_scores.json",
)


def free_bytes(path: Path) -> int:
    """Free bytes on the disk of an existing folder."""
    return shutil.disk_usage(path).free
