"""The model card: front matter that the hub reads, a snippet that is Python, and nothing that breaks out of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import yaml

from sana_tune.progress import Progress
from sana_tune.watch.card import About, Licence, Seen, Shown, model_card
from sana_tune.watch.events import Measured, Validated
from sana_tune.watch.snippets import Sample

SAMPLE = Sample('a "zib" on {a} hill', width=64, height=96, steps=20, guidance=4.5, seed=3)
NVIDIA = Licence("non-commercial", "other", "nscl-v2-custom", "https://example.com/LICENSE.txt", is_gemma=True)
ABOUT = About(
    title="my dog",
    model="owner/sana",
    base_model="owner/sana",
    licence=NVIDIA,
    sample=SAMPLE,
    settings={"learning_rate": 1e-5, "loss_type": "l2|x"},
    datasets=("dog: 20 pictures trained, of 21; left out: 1 (too small)",),
)
TRAINING = {"Steps": 200, "Images seen": 1600}


def card(about: About = ABOUT, **more) -> str:
    return model_card(about, **{"place": "out/pipeline", "training": TRAINING, **more})


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def snippet(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    compile(found[1], "README.md", "exec")
    return found[1]


def test_the_snippet_is_python_with_the_runs_values():
    code = snippet(card())
    assert 'SanaPipeline.from_pretrained("out/pipeline", torch_dtype=torch.float32)' in code
    assert repr(SAMPLE.prompt) in code and "height=96, width=64, num_inference_steps=20" in code
    assert "manual_seed(3)" in code


def test_the_snippet_of_a_checkpoint_takes_the_rest_from_the_base_model():
    text = card(place="me/rex", checkpoint="checkpoint-20", about=replace(ABOUT, has_ema=True))
    code = snippet(text)
    assert '"me/rex", subfolder="checkpoint-20/transformer"' in code
    assert 'SanaPipeline.from_pretrained("owner/sana", transformer=transformer' in code
    assert "checkpoint-20/transformer_ema" in text and "A checkpoint of" in text


def test_the_front_matter_says_what_it_is_and_under_which_terms():
    values = front(card())
    assert values["license"] == "other" and values["license_name"] == "nscl-v2-custom"
    assert values["license_link"] == "https://example.com/LICENSE.txt"
    assert (values["base_model"], values["base_model_relation"]) == ("owner/sana", "finetune")
    assert (values["library_name"], values["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert {"sana", "text-to-image", "not-for-all-audiences"} <= set(values["tags"]) and "widget" not in values
    assert "not-for-all-audiences" not in front(card(replace(ABOUT, safe=True)))["tags"]
    own = front(card(replace(ABOUT, base_model=None, licence=Licence("free", "apache-2.0"))))
    assert own["license"] == "apache-2.0" and "base_model" not in own and "license_name" not in own


def test_the_huggingface_hub_client_reads_the_front_matter():
    from huggingface_hub import ModelCard

    data = ModelCard(card()).data
    assert data.license == "other" and data.base_model == "owner/sana" and data.license_name == "nscl-v2-custom"


def test_what_was_trained_of_what_with_which_result():
    text = card(numbers={"clip/raw": 0.31234, "held_out/ema": 0.9, "held_out/raw/sigma_0.1": 0.5})
    assert "# my dog\n" in text and "[owner/sana](https://huggingface.co/owner/sana)" in text
    assert "- Steps: 200\n- Images seen: 1600\n" in text
    assert "- dog: 20 pictures trained, of 21; left out: 1 (too small)\n" in text
    assert "| learning_rate | 1e-05 |" in text and "| loss_type | l2\\|x |" in text
    assert "| clip/raw | 0.3123 |" in text and "| held_out/ema | 0.9 |" in text and "sigma_0.1" not in text
    assert "non-commercial (https://example.com/LICENSE.txt)." in text and "ai.google.dev/gemma/terms" in text
    assert "gemma" not in card(replace(ABOUT, licence=Licence("free", "apache-2.0"))).lower()


def test_the_gallery_shows_pictures_with_their_prompts():
    hostile = 'a "zib": <script>](x) | [y\n# more'
    shown = [Shown(Path("v") / "step_20_zib_0_64x64.png", hostile), Shown(Path("v") / "step_20_b_0_64x64.png", "")]
    text = card(pictures=shown)
    widget = front(text)["widget"]
    assert widget[0] == {"text": hostile, "output": {"url": "images/step_20_zib_0_64x64.png"}}
    assert "<script>" not in text.split("---\n", 2)[2] and "\n# more" not in text.split("---\n", 2)[2]
    assert text.count("](images/step_20_") == 2
    many = [Shown(Path(f"step_1_p{number}_0_64x64.png"), "p") for number in range(40)]
    assert card(pictures=many).count("](images/") == 12


def test_a_note_comes_first_and_the_average_is_told_where_there_is_one():
    text = card(replace(ABOUT, note="Trained on my dog.", has_ema=True))
    assert text.index("Trained on my dog.") < text.index("## Use")
    assert "transformer_ema/" in text and "transformer_ema" not in card()


def test_what_a_card_needs_is_remembered():
    seen = Seen()
    for event in (
        Validated(Progress(1), ("a.png",)),
        Validated(Progress(2), ("b.png", "c.png")),
        Validated(Progress(2), ()),
        Measured(Progress(1), {"clip/raw": 0.1, "held_out/raw": 0.9}),
        Measured(Progress(2), {"clip/raw": 0.2}),
    ):
        seen.emit(event)
    assert seen.pictures == (Path("b.png"), Path("c.png")) and seen.numbers == {"clip/raw": 0.2, "held_out/raw": 0.9}
