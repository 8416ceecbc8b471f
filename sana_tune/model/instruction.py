"""The complex human instruction that Sana puts before prompts, and the length of a text. Torch-free."""

from __future__ import annotations

MAX_TOKENS = 300
NO_INSTRUCTION = "None"
# The default of diffusers' SanaPipeline.__call__ (0.42); a test compares the two.
INSTRUCTION = "\n".join(
    [
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for "
        "image generation. Evaluate the level of detail in the user prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
        "relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly without "
        "overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
        "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing "
        "street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering "
        "glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including any additional "
        "commentary or evaluations:",
        "User Prompt: ",
    ]
)


def resolve_instruction(setting: str | None) -> str:
    """The instruction put before prompts: diffusers' own for None, nothing for "None", else the given text."""
    if setting is None:
        return INSTRUCTION
    return "" if setting in (NO_INSTRUCTION, "") else setting
