"""Runs that train an adapter, also on a quantised base: exact after a resume; drawn, exported and merged as trained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SanaPipeline
from PIL import Image
from safetensors.torch import load_file

from sana_tune.cli.main import exit_code
from sana_tune.config.load import Loaded
from sana_tune.errors import UserError
from sana_tune.exporting import Wanted, export
from sana_tune.offline import Asked, generate
from sana_tune.run import run
from sana_tune.watch.events import Validated
from tests.journeys.kit import Heard, differences, metrics_of, output_of, pictures, small_run, state_of

FILE = "pytorch_lora_weights.safetensors"
LOKR = {
    "algo": "lokr", "multiplier": 1.0, "full_matrix": True, "linear_dim": 10000, "linear_alpha": 1, "factor": 4,
    "apply_preset": {"target_module": ["Attention", "FeedForward"], "module_algo_map": {"FeedForward": {"factor": 8}}},
}  # fmt: skip
DRAWN = {
    "validation_disable": False, "validation_prompt": "a dot", "validation_resolution": "32",
    "validation_num_inference_steps": 2, "validation_disable_unconditional": True, "disable_benchmark": True,
    "validation_step_interval": 0,
}  # fmt: skip


def asked(folder: Path, *datasets: Any, file: dict[str, Any] = LOKR, **settings: Any) -> Loaded:
    """A run of a LoKr on nano."""
    if not (folder / "pictures").exists():
        pictures(folder / "pictures", 4)
    (folder / "lycoris.json").write_text(json.dumps(file))
    settings = {"max_train_steps": 4, "learning_rate": 1e-3, "use_ema": True, **settings}
    return small_run(folder, *datasets, model_type="lora", lycoris_config=str(folder / "lycoris.json"), **settings)


@pytest.mark.parametrize("precision", ["no_change", "nf4-bnb", "int8-bnb"])
def test_stopped_and_resumed_it_is_the_straight_run_to_the_bit(precision: str, tmp_path: Path, full: bool):
    if precision == "int8-bnb" and not full:
        pytest.skip("with --full")
    last = 4 if precision == "no_change" else 2
    options = {"base_model_precision": precision, "optimizer": "bnb-lion8bit" if "bnb" in precision else "optimi-adamw"}
    options |= {"learning_rate": 1e-3, "gradient_checkpointing": True, "caption_dropout_probability": 0.5}
    straight = output_of(asked(tmp_path / "straight", **options))
    run(asked(tmp_path / "straight", **options, max_train_steps=last))
    for steps in (last // 2, last):
        run(asked(tmp_path / "parts", **options, max_train_steps=steps))
    parts = tmp_path / "parts/output"
    assert differences(state_of(straight / f"checkpoint-{last}"), state_of(parts / f"checkpoint-{last}")) == []
    assert [line["loss"] for line in metrics_of(straight)] == [line["loss"] for line in metrics_of(parts)]
    names = {path.name for path in (parts / f"checkpoint-{last}").iterdir()}
    assert names == {FILE, "lycoris_config.json", "ema", "optimizer.pt", "progress.json",
                     "manifest.json"}  # fmt: skip
    start, end = (
        load_file(parts / f"checkpoint-{step}/pytorch_lora_weights.safetensors") for step in (last // 2, last)
    )
    moved = [not torch.equal(start[name], end[name]) for name in start if "alpha" not in name]
    assert len(moved) == 120 and sum(moved) >= 110, "a sign of a mean that is zero moves nothing"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Validated]]:
    """A finished run that drew, with a large rate so that pictures show it."""
    folder, heard = tmp_path_factory.mktemp("home"), Heard()
    run(asked(folder, **DRAWN, learning_rate=3e-2, max_grad_norm=0), sinks=[heard])
    return folder, heard.of(Validated)


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_what_it_is_stands_in_the_plan_and_the_run_leaves_an_adapter(home):
    folder, _ = home
    plan = json.loads((folder / "output/plan.json").read_text())
    assert plan["adapter"][0].endswith(
        "60 layers (48 in Attention, 12 in GLUMBConv), 0.06 M parameters = 3.6 % of the model"
    )
    assert plan["adapter"][1] == "learning rate 0.03; usual with optimi-adamw: 0.0001"
    assert plan["memory"]["need"]["gradients_bytes"] == 4 * 62208 and plan["weights"]["dtype"] == "fp32"
    left = folder / "output/adapter"
    assert not (folder / "output/pipeline").exists()
    assert {path.name for path in left.iterdir()} == {
        "README.md", "ema", "images", "lycoris_config.json", FILE}  # fmt: skip
    for part in (".", "ema"):
        done, saved = (load_file(at / part / FILE) for at in (left, folder / "output/checkpoint-4"))
        assert differences(done, saved) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert exit_code(["train"]) == 0, "it is finished, and says so"


def test_generate_draws_what_the_run_drew(home, tmp_path: Path):
    folder, ((*_, drawn),) = home[0], [home[1]]
    made = generate(asked(folder, **DRAWN, learning_rate=3e-2, max_grad_norm=0), Asked("latest"), tmp_path / "out")
    assert [path.read_bytes() for path in made] == [Path(file).read_bytes() for file in drawn.files]
    weak = asked(folder, **DRAWN, learning_rate=3e-2, max_grad_norm=0, validation_lycoris_strength=0.0)
    (other,) = generate(weak, Asked("latest", views=("",)), tmp_path / "weak")
    assert np.abs(picture(other) - picture(made[0])).max() > 8, "without the adapter it is another picture"


def test_merged_it_is_a_pipeline_that_draws_the_same(home, tmp_path: Path):
    folder, validated = home
    config = asked(folder, **DRAWN, learning_rate=3e-2, max_grad_norm=0).config
    out = export(config, Wanted("latest", tmp_path / "merged", merge=True))
    pipe = SanaPipeline.from_pretrained(out, torch_dtype=torch.float32)
    seed = torch.Generator("cpu").manual_seed(11)
    size = {"height": 32, "width": 32, "use_resolution_binning": False}
    drawn = np.asarray(pipe("a dot", num_inference_steps=2, generator=seed, **size).images[0]).astype(int)
    assert np.abs(drawn - picture(Path(validated[-1].files[0]))).max() <= 2
    assert "An adapter, merged into the weights, of Sana" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="there is a pipeline already"):
        export(config, Wanted("latest", out, merge=True))


def test_alone_it_is_exported_with_a_readme_whose_snippet_runs(home, tmp_path: Path):
    folder, validated = home
    config = asked(folder, **DRAWN, learning_rate=3e-2, max_grad_norm=0).config
    out = export(config, Wanted("latest", tmp_path / "alone", ema=True))
    saved = load_file(folder / "output/checkpoint-4/ema/pytorch_lora_weights.safetensors")
    assert differences(load_file(out / FILE), saved) == []
    with pytest.raises(UserError, match="there is an adapter already"):
        export(config, Wanted("latest", out))
    text = (folder / "output/adapter/README.md").read_text()
    assert "A LoKr adapter of Sana" in text and "base_model_relation" not in text.split("---")[2]
    code = re.search(r"```python\n(.*?)```", text, re.S)[1].replace('"nano"', repr(str(nano())))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    assert np.abs(picture(tmp_path / "picture.png") - picture(Path(validated[-1].files[0]))).max() <= 2


def nano() -> Path:
    from sana_tune.model.fetch import locate

    return locate("nano")


def test_regularisation_data_learns_from_the_base_with_the_adapter_off(tmp_path: Path):
    other = pictures(tmp_path / "others", 4, name="other")
    entries = (
        {"instance_data_dir": str(pictures(tmp_path / "pictures", 4))},
        {"instance_data_dir": str(other), "is_regularisation_data": True},
    )
    loaded = asked(tmp_path, *entries, regularisation_target="base", max_train_steps=6, learning_rate=1e-2)
    run(loaded)
    losses = [line["loss_regularisation"] for line in metrics_of(output_of(loaded)) if "loss_regularisation" in line]
    assert losses[0] < 1e-9 and losses[-1] > 1e-7, "it begins as the base, and drifts from it"


def test_it_begins_with_another_ones_weights_average_and_step(home, tmp_path: Path):
    folder, _ = home
    saved = folder / "output/checkpoint-4"
    begin = {"init_lora": str(saved / FILE), "init_lora_step": 4}
    average = {"init_lora_ema": str(saved / "ema/pytorch_lora_weights.safetensors"), "ema_decay": 0.5}
    loaded = asked(tmp_path, **begin, **average, max_train_steps=5, learning_rate=1e-12, optimizer_weight_decay=0)
    run(loaded)
    (line,) = metrics_of(output_of(loaded))
    assert line["step"] == 5
    now, then = (load_file(at / FILE) for at in (output_of(loaded) / "checkpoint-5", saved))
    assert max(float((now[name] - then[name]).abs().max()) for name in then) < 1e-9
    now, then = (
        load_file(at / "ema/pytorch_lora_weights.safetensors") for at in (output_of(loaded) / "checkpoint-5", saved)
    )
    assert any(not torch.equal(now[name], then[name]) for name in then)
    run(asked(tmp_path, **begin, **average, max_train_steps=6, learning_rate=1e-12, optimizer_weight_decay=0))
    assert [each["step"] for each in metrics_of(output_of(loaded))] == [5, 6], "a checkpoint goes before it"


def test_with_noise_every_factor_learns_from_the_first_step(tmp_path: Path):
    loaded = asked(tmp_path, init_lokr_norm=1e-3, max_train_steps=1)
    run(loaded)
    state = state_of(output_of(loaded) / "checkpoint-1")
    seconds = [value for name, value in state.items() if name.endswith("exp_avg_sq")]
    assert len(seconds) == 120 and all(bool(value.any()) for value in seconds)


# ---- mistakes ----


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    nothing = {**LOKR, "apply_preset": {"target_module": ["Mlp"]}}
    asked(tmp_path, file=nothing, init_lora="none.safetensors")
    assert exit_code(["train"]) == 1
    said = capsys.readouterr().err
    assert "no layer of the model is in Mlp: nothing would be trained" in said and "GLUMBConv" in said
    assert "there is no file none.safetensors" in said and "Traceback" not in said
    assert exit_code(["train", "--lora_type", "standard"]) == 1
    said = capsys.readouterr().err
    assert "a standard LoRA does not fit Sana" in said
    assert not list((tmp_path / "output").glob("checkpoint-*")) if (tmp_path / "output").exists() else True


def test_without_the_library_it_says_what_to_install(tmp_path: Path):
    asked(tmp_path)
    code = (
        "import importlib.util as u, sys; real = u.find_spec; "
        "u.find_spec = lambda name, *more: None if name == 'lycoris' else real(name, *more); "
        "from sana_tune.cli.main import exit_code; sys.exit(exit_code(['train']))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1 and "pip install 'sana_tune[lokr]'" in ran.stderr and "Traceback" not in ran.stderr


def test_another_adapter_does_not_go_on_from_a_checkpoint(home, tmp_path: Path, monkeypatch, capsys):
    folder, _ = home
    asked(tmp_path, file={**LOKR, "factor": 8}, output_dir=str(folder / "output"))
    monkeypatch.chdir(tmp_path)
    assert exit_code(["train"]) == 1
    said = capsys.readouterr().err
    assert "adapter" in said and "Traceback" not in said
    asked(tmp_path, output_dir=str(folder / "output"))
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "full"}))
    assert exit_code(["train"]) == 1
