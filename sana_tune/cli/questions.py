"""The wizard's questions as values: what is asked, what is offered, how an answer is read. Asking is wizard.py's.

A reader raises UserError with the reason and what to do; `where` is the flag that gives the same answer.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sana_tune.cli import lokr, recipe
from sana_tune.cli.merge import SEVERAL, Existing
from sana_tune.cli.recipe import STRATEGIES, TRACKERS, ModelChoice, Target
from sana_tune.cli.scan import Scan, find_pictures, scan
from sana_tune.config.files import resolve
from sana_tune.config.findings import Findings
from sana_tune.config.legacy import SAME_VALUE
from sana_tune.config.placeholders import expand_env
from sana_tune.config.values import nearest
from sana_tune.config.watching import parse_trackers
from sana_tune.errors import Problem, UserError
from sana_tune.hardware import Device
from sana_tune.model.facts import NANO_LICENCE, WEIGHTS_LICENCE, from_folder, known
from sana_tune.model.fetch import local_folder
from sana_tune.plan import human_bytes
from sana_tune.watch.trackers import tracker_problems


@dataclass(frozen=True)
class Machine:
    """What this machine has: GPUs, and main memory in bytes (0 = unknown)."""

    gpus: tuple[Device, ...]
    ram_bytes: int

    @property
    def target(self) -> Target:
        """What would train here."""
        if self.gpus:
            return Target(self.gpus[0].total_bytes)
        return Target(self.ram_bytes, on_cpu=True)

    def lines(self) -> list[str]:
        """What was found, for the screen."""
        if not self.gpus:
            return [
                "This machine: no NVIDIA GPU found. A CPU trains nano alone, to try things out; settings for a GPU "
                "of another machine can be made here all the same."
            ]
        found = [
            f"{gpu.name}, {human_bytes(gpu.total_bytes)}"
            + (f", only {human_bytes(gpu.free_bytes)} of it free now" if gpu.free_bytes < 0.9 * gpu.total_bytes else "")
            for gpu in self.gpus
        ]
        more = ["Training runs on the first of them."] if len(found) > 1 else []
        return [f"This machine: {'; '.join(found)}.", *more]


@dataclass
class State:
    """What is known while asking. given: key of a question → its flag's text. answers: key → what was understood."""

    machine: Machine
    existing: Existing | None
    cwd: Path
    environ: Mapping[str, str]
    given: Mapping[str, str] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)

    def was(self, key: str) -> Any:
        """A setting of the existing config.json; None without one."""
        return self.existing.get(key) if self.existing else None

    def of_dataset(self, key: str) -> Any:
        """A setting of the existing dataset of pictures; None without one."""
        return self.existing.of_dataset(key) if self.existing and self.existing.group else None

    @property
    def usable(self) -> int:
        """Pictures that will be trained, as far as is known."""
        return recipe.usable(self.answers["pictures"], self.answers.get("captions", ""))

    def settings(self, resolutions: Sequence[int] | None = None) -> dict[str, Any]:
        """What is recommended for the answers so far. Raises UserError when the model does not fit."""
        sizes = resolutions or self.answers["resolutions"]
        adapter = self.answers.get("adapter", "full")
        return recipe.recommended(self.answers["model"], self.answers["target"], sizes, self.usable, adapter)


Lines = Callable[[State], Sequence[str]]


def _no_lines(state: State) -> Sequence[str]:
    return ()


def _nothing_said(answer: Any, state: State) -> Sequence[str]:
    return ()


def _always(state: State) -> bool:
    return True


@dataclass(frozen=True)
class Question:
    """One question.

    key: where the answer goes. flag: what gives it on the command line. title: a few words. why: one line.
    default: the answer of Enter as text, None when there is none. read: text → answer. more: what `?` shows.
    choices: lines shown before it is asked. said: lines shown once it is answered. applies: whether it is asked.
    needs: questions that must be answered before. is_path: whether Tab completes paths. must_name: the default is a
    guess that somebody must confirm, unless it is what the existing files say.
    """

    key: str
    flag: str
    title: str
    why: str
    default: Callable[[State], str | None]
    read: Callable[[str, State], Any]
    more: str = ""
    choices: Lines = _no_lines
    said: Callable[[Any, State], Sequence[str]] = _nothing_said
    applies: Callable[[State], bool] = _always
    needs: tuple[str, ...] = ()
    is_path: bool = False
    must_name: bool = False


def refuse(flag: str, what: str, fix: str = "") -> UserError:
    """An answer that is none."""
    return UserError(Problem(flag, what, fix))


def choose(text: str, names: Sequence[str], flag: str) -> str:
    """One of the names, given by itself or by its number."""
    word = text.strip().lower()
    if word.isdecimal() and 1 <= int(word) <= len(names):
        return names[int(word) - 1]
    if word in names:
        return word
    guess = nearest(word, names)
    fix = f"did you mean {guess}?" if guess else f"write one of them, or its number from 1 to {len(names)}"
    raise refuse(flag, f"must be one of {', '.join(names)}; found {text!r}", fix)


def clean_path(text: str) -> str:
    """A path as it is pasted or dropped into a terminal: quotes, escapes, file://, ~ and a slash at the end go."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    elif "\\" in text and not os.path.exists(text):
        try:
            words = shlex.split(text)
        except ValueError:
            words = [text]
        text = words[0] if len(words) == 1 else text
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if text.startswith("~"):
        text = os.path.expanduser(text)
    return text.rstrip("/") or ("/" if text else "")


# ---- 1: the model ----


def _model_default(state: State) -> str | None:
    return state.was("pretrained_model_name_or_path") or recipe.default_model(state.machine.target)


def _model_choices(state: State) -> list[str]:
    rows = [f"     {'':<54} {'weights':>8} {'GPU from':>9}"]
    for number, name in enumerate(recipe.offered_models(), start=1):
        facts = known(name)
        if facts is None:
            rows.append(f"{number:>3}  {name:<54} {'1.8 M':>8} {'CPU':>9}")
        else:
            weights, least = f"{facts.parameters / 1e9:.1f} B", f"{recipe.least_bytes(facts) / 1e9:.0f} GB"
            rows.append(f"{number:>3}  {name:<54} {weights:>8} {least:>9}")
    return rows


def _read_model(text: str, state: State) -> ModelChoice:
    names = recipe.offered_models()
    word = text.strip().strip("'\"")
    if word.isdecimal() and 1 <= int(word) <= len(names):
        word = names[int(word) - 1]
    if word.isdecimal():
        raise refuse("--model", f"the list has the numbers 1 to {len(names)}; found {word}", "write one of them")
    if (facts := known(word)) is not None:
        return ModelChoice(word, facts)
    name = word if word == recipe.NANO else clean_path(word)
    try:
        folder = local_folder(name)
    except UserError as error:
        raise UserError(*(Problem("--model", problem.what, problem.fix) for problem in error.problems)) from None
    return recipe.assumed(name) if folder is None else ModelChoice(name, from_folder(folder, name))


def _model_said(choice: ModelChoice, state: State) -> list[str]:
    facts = choice.facts
    if choice.assumed:
        return [
            f"sana_tune does not know {choice.name}: sizes and memory of the 1.6B model are assumed until it is here."
        ]
    amount = (
        f"{facts.parameters / 1e9:.1f} billion" if facts.parameters >= 1e8 else f"{facts.parameters / 1e6:.1f} million"
    )
    exact = [] if facts.bf16_safe else ["Its weights break in bf16, so everything will be computed in fp32."]
    return [f"{amount} weights, made for {facts.native_px} px. Licence: {facts.licence}.", *exact, *facts.notes]


# ---- 2: the pictures ----


def _pictures_default(state: State) -> str | None:
    return state.of_dataset("instance_data_dir") or find_pictures(state.cwd)


def _read_pictures(text: str, state: State) -> Scan:
    folder = clean_path(text)
    if not folder:
        raise refuse("--images", "a folder must be named", "write its path; Tab completes it")
    findings = Findings()
    expanded, _ = expand_env(folder, "--images", state.environ, findings)
    if findings.problems:
        raise UserError(*findings.problems)
    try:
        return scan(folder, resolve(expanded))
    except UserError as error:
        raise UserError(
            *(Problem("--images", _named(folder, problem), problem.fix) for problem in error.problems)
        ) from None


def _named(folder: str, problem: Problem) -> str:
    return f"{problem.what}; found {folder!r}"


# ---- 3: captions, and the subject ----


def _captions_default(state: State) -> str | None:
    was = state.of_dataset("caption_strategy")
    was = SAME_VALUE["caption_strategy"].get(was, was)
    return was if was in STRATEGIES else recipe.default_captions(state.answers["pictures"])


def _captions_choices(state: State) -> list[str]:
    found: Scan = state.answers["pictures"]
    example = f', such as "{found.names[0]}"' if found.names else ""
    return [
        f"  1  textfile        a .txt file beside each picture ({found.with_text} of {found.pictures} have one)",
        f"  2  filename        the picture's file name{example}",
        "  3  instanceprompt  one sentence of yours for all pictures",
    ]


def _read_captions(text: str, state: State) -> str:
    chosen = choose(SAME_VALUE["caption_strategy"].get(text, text), STRATEGIES, "--captions")
    found: Scan = state.answers["pictures"]
    if chosen == "textfile" and not found.with_text:
        what = f"no picture in {found.folder} has a .txt file of its own name beside it"
        raise refuse(
            "--captions", what, "choose filename or instanceprompt, or write the files (cat.jpg → cat.txt) first"
        )
    return chosen


def _captions_said(chosen: str, state: State) -> list[str]:
    found: Scan = state.answers["pictures"]
    without = found.pictures - found.with_text
    if chosen == "textfile" and without:
        count = f"{without} {'picture has' if without == 1 else 'pictures have'}"
        return [f"{count} no .txt file and will be left out (missing_caption: skip)."]
    if chosen == "filename" and found.with_name * 2 < found.pictures:
        return ["Few of the file names read like captions: the model would learn names that say nothing."]
    return []


def _subject_default(state: State) -> str | None:
    was = state.of_dataset("instance_prompt")
    if isinstance(was, (list, tuple)):
        return SEVERAL.join(map(str, was))
    return str(was) if was else recipe.default_subject(state.answers["pictures"])


def _read_subject(text: str, state: State) -> str | tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(SEVERAL.strip()) if part.strip())
    if not parts:
        raise refuse("--subject", "the caption must not be empty", 'write a sentence, such as "a photo of my dog Rex"')
    return parts[0] if len(parts) == 1 else parts


# ---- 4: the device ----


def _target_default(state: State) -> str | None:
    if state.machine.gpus:
        return f"{state.machine.gpus[0].total_bytes / recipe.TYPED_BYTES:.4g}"
    return "cpu" if state.answers["model"].is_tiny else f"{recipe.ASSUMED_GB:g}"


def _target_choices(state: State) -> list[str]:
    return [f"  {line}" for line in state.machine.lines()] if state.machine.gpus else []


def _read_target(text: str, state: State) -> Target:
    model: ModelChoice = state.answers["model"]
    target = recipe.parse_memory(text)
    if target is None:
        if not model.is_tiny:
            what = f"a CPU would take months for the {model.facts.parameters / 1e9:.1f} billion weights of {model.name}"
            raise refuse(
                "--vram", what, "take nano as the model to try things out, or write the GB of the GPU to train on"
            )
        return Target(state.machine.ram_bytes or recipe.TYPED_BYTES, on_cpu=True, beside_gpu=bool(state.machine.gpus))
    if state.machine.gpus and text.strip() == _target_default(state):
        target = state.machine.target
    found = [_does_not_fit(state, target, adapter) for adapter in ADAPTERS]
    if all(found):
        fix = "take a smaller model, or a GPU with more memory"
        raise UserError(*(Problem("--vram", problem.what, fix) for problem in found if problem))
    return target


# ---- 5: full rank or LoKr ----

ADAPTERS = ("full", "lokr")


def _does_not_fit(state: State, target: Target, adapter: str) -> Problem | None:
    """Why the model cannot be trained so on a device, not even with pictures of half its own size."""
    facts = state.answers["model"].facts
    side = max(facts.native_px // 2, 2 * facts.vae_factor)
    try:
        recipe.recommended(state.answers["model"], target, (side,), state.usable, adapter)
    except UserError as error:
        return error.problems[0]
    return None


def _adapter_default(state: State) -> str:
    if state.existing:
        return state.existing.adapter()
    return "full" if _does_not_fit(state, state.answers["target"], "full") is None else "lokr"


def _read_adapter(text: str, state: State) -> str:
    adapter = choose(text, ADAPTERS, "--adapter")
    if state.existing and adapter == state.existing.adapter():
        return adapter  # the settings that go with it are the user's own; `check` looks at them
    problem = _does_not_fit(state, state.answers["target"], adapter)
    if problem is not None:
        fix = "choose lokr" if adapter == "full" else "take a smaller model, or a GPU with more memory"
        raise refuse("--adapter", problem.what, fix)
    return adapter


def _adapter_said(adapter: str, state: State) -> list[str]:
    if adapter == "full":
        return []
    if state.existing and state.existing.adapter() == "lokr":
        return lokr.missing_library()
    return [*lokr.told(state.answers["model"].facts), *lokr.missing_library()]


# ---- 6: resolutions ----


def _resolutions_default(state: State) -> str | None:
    was = state.existing.resolutions() if state.existing else ()
    if was:
        return ",".join(map(str, was))
    return str(recipe.default_resolution(state.answers["model"].facts, state.answers["pictures"]))


def _read_resolutions(text: str, state: State) -> tuple[int, ...]:
    found = recipe.parse_resolutions(text, state.answers["model"].facts)
    if state.existing and found == state.existing.resolutions():
        return found  # the settings that go with them are the user's own; `check` looks at them
    try:
        state.settings(found)
    except UserError as error:
        raise UserError(*(Problem("--resolution", problem.what, problem.fix) for problem in error.problems)) from None
    return found


def _resolutions_said(sizes: tuple[int, ...], state: State) -> list[str]:
    found: Scan = state.answers["pictures"]
    native = state.answers["model"].facts.native_px
    lines = []
    if max(sizes) > native:
        lines.append(f"The model was made for {native} px; larger pictures train more slowly and may draw worse.")
    smaller = sum(size.area < (0.9 * max(sizes)) ** 2 for size in found.sizes)
    if smaller:
        of = f"{smaller} of the {len(found.sizes)} pictures {'is' if smaller == 1 else 'are'}"
        lines.append(
            f"{of} smaller and would be enlarged: Sana learns the blur. Fewer px, or better pictures, avoid it."
        )
    return lines


# ---- 7: length ----


def _length_default(state: State) -> str | None:
    if state.existing:
        return str(state.existing.length())
    return str(recipe.default_length(state.usable, state.answers["model"], state.settings()))


def _length_said(length: recipe.Length, state: State) -> list[str]:
    settings = batch_settings(state)
    batch = recipe.batch_of(settings)
    if state.existing:  # with repeats and datasets of its own
        return [f"{batch} {'picture' if batch == 1 else 'pictures'} a step; the check below counts steps and epochs."]
    count, sizes = state.usable, state.answers["resolutions"]
    per_epoch = recipe.steps_per_epoch(count, sizes, settings)
    steps = recipe.steps_of(length, per_epoch)
    epochs = steps / per_epoch
    told = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"
    at = f" at {len(sizes)} resolutions" if len(sizes) > 1 else ""
    return [f"{steps} steps = about {told} epochs over {count} pictures{at}, {batch} pictures a step."]


def batch_settings(state: State) -> dict[str, Any]:
    """Batch and accumulation: those of the existing file, else the recommended ones."""
    if state.existing is None:
        return state.settings()
    sizes = {key: state.existing.get(key) for key in ("train_batch_size", "gradient_accumulation_steps")}
    return {key: int(value) if str(value).isdecimal() and int(value) else 1 for key, value in sizes.items()}


# ---- 8: the prompt ----


def _prompt_default(state: State) -> str | None:
    return state.was("validation_prompt") or recipe.default_prompt(state.answers)


def _read_prompt(text: str, state: State) -> str:
    if not text.strip():
        raise refuse("--prompt", "the prompt must not be empty", "describe a picture in a sentence")
    return text.strip()


def _prompt_said(prompt: str, state: State) -> list[str]:
    lines = []
    if recipe.is_short(prompt) and not state.answers["model"].is_tiny:
        lines.append("A very short prompt: Sana draws these badly. A whole sentence shows more of what was learnt.")
    if re.search(r"<\w+>", prompt):
        lines.append("A word in < > is drawn as it stands: write what your captions call the subject.")
    return lines


# ---- 9 and 10: tracking, output ----


def _tracking_default(state: State) -> str | None:
    return str(state.was("report_to") or "none")


def _read_tracking(text: str, state: State) -> str:
    if text.strip() and text.strip() == state.was("report_to"):
        return text.strip()
    if "," in text or text.strip().lower() == "all":
        try:
            return parse_trackers(text)
        except ValueError as error:
            raise refuse("--tracking", str(error), "write none, wandb, tensorboard, or both with a comma") from None
    return choose(text, TRACKERS, "--tracking")


def _tracking_said(name: str, state: State) -> list[str]:
    lines = [f"{problem.what}: {problem.fix}." for problem in tracker_problems(str(name), state.environ)]
    if "tensorboard" in str(name):
        lines.append(
            "See the curves with: tensorboard --logdir OUTPUT/logs (OUTPUT: the folder that is asked for next)."
        )
    return lines


def _output_default(state: State) -> str | None:
    was = state.was("output_dir")
    if was:
        return str(was)
    name = recipe.default_output(state.answers["pictures"])
    number, found = 2, name
    while (state.cwd / found).exists():
        number, found = number + 1, f"{name}-{number}"
    return found


def _read_output(text: str, state: State) -> str:
    path = clean_path(text)
    if not path:
        raise refuse("--output", "a folder must be named", "write a path; it is made when training starts")
    if "{" in path:
        return path  # placeholders: `check` looks at them
    place = state.cwd / path
    there = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise refuse("--output", f"must be a folder; {there} is a file", "name another one")
    if not os.access(there, os.W_OK):
        raise refuse("--output", f"you may not write to {there}", "name a folder of yours")
    return path


def _output_said(path: str, state: State) -> list[str]:
    if any((state.cwd / path).glob("checkpoint-*")):
        return ["A run is in there already: training will go on with it, if it is of the same model."]
    return []


QUESTIONS: tuple[Question, ...] = (
    Question(
        "model", "--model", "What to train", "A number of the list, another hub id, or a folder in diffusers layout.",
        _model_default, _read_model, must_name=True, choices=_model_choices, said=_model_said,
        more="Larger models draw better and need more memory; the 1.6B ones are the usual choice. 'GPU from' is the "
        "smallest memory that trains every weight at the model's own size; LoKr needs less. Models named BF16 or "
        f"SANA1.5 compute in bf16; the 600M ones must compute in fp32. nano is for trying out: it draws simple "
        f"figures of 64 px. Licence: {WEIGHTS_LICENCE}. Of nano: {NANO_LICENCE}.",
    ),
    Question(
        "pictures", "--images", "Your pictures", "The folder they are in, subfolders included.",
        _pictures_default, _read_pictures, must_name=True, said=lambda found, state: found.lines(), is_path=True,
        more="A path from here, or a whole one; quotes, ~ and a folder dropped from the file manager are understood, "
        "Tab completes. Nothing in the folder is ever changed. 10 to 20 good pictures are enough for a subject.",
    ),
    Question(
        "captions", "--captions", "Captions", "Where the text of each picture comes from.",
        _captions_default, _read_captions, choices=_captions_choices, said=_captions_said, needs=("pictures",),
        more="A caption says what is in the picture, as you would ask for it later. Best is a .txt file beside each "
        "picture (cat.jpg + cat.txt, a line each variant); for one subject a single sentence does.",
    ),
    Question(
        "subject", "--subject", "The caption of all pictures", "One sentence that names what they show.",
        _subject_default, _read_subject, needs=("pictures", "captions"),
        applies=lambda state: state.answers["captions"] == "instanceprompt" or "subject" in state.given,
        more="Say what you will write in prompts later: a photo of Rex, a brown dog. Several sentences with | between "
        "them take turns.",
    ),
    Question(
        "target", "--vram", "The device", "Memory of the GPU that will train, in GB; or cpu.",
        _target_default, _read_target, choices=_target_choices, said=lambda target, state: [f"Planned for {target}."],
        needs=("model", "pictures"),
        more="Detected where there is a GPU. For another machine write its GPU's memory: 24, 48, 80. Batch size, "
        "checkpointing and precision follow from it.",
    ),
    Question(
        "adapter", "--adapter", "Full rank or LoKr", "full trains every weight; lokr a small addition to them.",
        _adapter_default, _read_adapter, said=_adapter_said, needs=("model", "pictures", "target"),
        more="full learns the most and makes a whole model. LoKr needs less memory and makes a small file that is put "
        "on the model it was trained on; both halves of every block are adapted. lycoris_config.json describes it.",
    ),
    Question(
        "resolutions", "--resolution", "Resolution", "Size of the training pictures in px; several with commas.",
        _resolutions_default, _read_resolutions, said=_resolutions_said,
        needs=("model", "pictures", "target", "adapter"),
        more="Pictures keep their shape; 1024 means as many px as 1024x1024 has. With 1024,512 every picture is "
        "trained at both sizes, which can help Sana and doubles an epoch. Smaller is faster and takes less memory.",
    ),
    Question(
        "length", "--steps", "Length", 'Optimizer steps, or passes over the pictures such as "20 epochs".',
        _length_default, lambda text, state: recipe.parse_length(text), said=_length_said,
        needs=("model", "pictures", "target", "adapter", "resolutions"),
        more="Too short learns little, too long forgets what the model knew; previews on the way show which. A "
        "finished run can be made longer.",
    ),
    Question(
        "prompt", "--prompt", "Preview prompt", "Drawn before, during and after training, to see what is learnt.",
        _prompt_default, _read_prompt, said=_prompt_said, needs=("model", "pictures", "captions"),
        more="Describe a picture that is not among yours, in a sentence, with the words of your captions.",
    ),
    Question(
        "tracking", "--tracking", "Tracking", "Where curves go besides metrics.jsonl: none, wandb or tensorboard.",
        _tracking_default, _read_tracking, said=_tracking_said,
        more="metrics.jsonl and the pictures in the output folder are always there. wandb shows them on its website "
        "and needs `wandb login`; tensorboard writes files to look at on this machine. Both: wandb,tensorboard.",
    ),
    Question(
        "output", "--output", "Output", "The folder for checkpoints, previews and the trained model.",
        _output_default, _read_output, said=_output_said, needs=("pictures",), is_path=True,
        more="It is made when training starts. The same folder again goes on with the run that is there.",
    ),
)  # fmt: skip
