"""Rules between the settings of validation pictures."""

from __future__ import annotations

from collections.abc import Callable

from sana_tune.config.commands import wrong_with
from sana_tune.config.schema import Config, section_of
from sana_tune.errors import Problem


def script_with_its_method(config: Config) -> Problem | None:
    """validation_method external-script needs the script."""
    wanted = config.validation
    if wanted.validation_method == "external-script" and not wanted.validation_external_script:
        what = "external-script needs validation_external_script, the command that draws"
        fix = "add it, such as 'python draw.py {local_checkpoint_path} {global_step}', or leave validation_method out"
        return Problem("validation_method", what, fix)
    return None


SCRIPT_PLACEHOLDERS: tuple[str, ...] = (
    "local_checkpoint_path", "global_step", "epoch", "output_dir", "validation_images", "model",
    "validation_prompt", "validation_negative_prompt", "validation_seed", "validation_resolution",
    "validation_guidance", "validation_num_inference_steps",
)  # fmt: skip


def script_is_a_command(config: Config) -> Problem | None:
    """The script's quotes match and its placeholders are known."""
    command = config.validation.validation_external_script
    if command is None or (what := wrong_with(command, SCRIPT_PLACEHOLDERS)) is None:
        return None
    fix = "write a program and its arguments, such as 'python draw.py {local_checkpoint_path} {global_step}'"
    return Problem("validation_external_script", what, fix)


VALIDATION_RULES: tuple[Callable[[Config], Problem | None], ...] = (
    script_with_its_method,
    script_is_a_command,
)


def unused_validation_settings(config: Config) -> list[str]:
    """Notes on settings of validation pictures that do nothing beside the others. Defaults are no wish."""
    wanted = config.validation
    fields = type(wanted).model_fields
    given = {key for key in fields if vars(wanted)[key] != fields[key].default}
    reasons: dict[str, str] = {}
    if not wanted.validation_preview:
        reasons |= dict.fromkeys(
            ("validation_preview_steps", "validation_preview_decoder"), "validation_preview is off"
        )
    if wanted.validation_image_format == "png":
        reasons["validation_image_quality"] = "PNG files lose nothing"
    if wanted.validation_method != "external-script":
        keys = ("validation_external_script", "validation_external_background")
        reasons |= dict.fromkeys(keys, "validation_method is simpletuner-local")
    if not wanted.validation_step_interval and not wanted.validation_epoch_interval:
        reasons |= dict.fromkeys(("validate_after_step", "validate_after_epoch"), "there is no interval")
    return [f"{key} has no effect: {reason}" for key, reason in reasons.items() if key in given]


def preview_notes(config: Config) -> list[str]:
    """Where previews go when no webhook takes them."""
    if not config.validation.validation_preview or config.validation.validation_disable or has_webhook(config):
        return []
    return ["validation_preview: there is no webhook (webhook_config), so previews go to the report of the run alone"]


def has_webhook(config: Config) -> bool:
    """Whether pictures have somewhere to go while they come."""
    section = section_of().get("webhook_config")
    return section is not None and bool(vars(vars(config)[section])["webhook_config"])
