"""The prompts of validation_prompt_library: nickname → text. Each shows one thing that fine-tuning tends to break."""

from __future__ import annotations

BUILT_IN: dict[str, str] = {
    # people: skin, eyes, hands, groups
    "portrait_window": (
        "a close portrait of an elderly fisherman with a grey beard, soft light from a window on one side of "
        "his face, fine wrinkles, a dark blue woollen sweater, shallow depth of field"
    ),
    "hands_clay": (
        "the hands of a potter shaping a bowl of wet clay on a wheel, all ten fingers visible, water drops, "
        "warm workshop light, seen from above"
    ),
    "family_table": (
        "four people of different ages laughing at a long wooden table with bread, fruit and candles, evening "
        "light in a garden, a candid photo"
    ),
    # places: depth, light, weather
    "mountain_lake": (
        "a mountain lake at dawn with thin fog over still water, pine trees on the far shore, snow on the "
        "peaks catching the first pink light, a wide photo with great depth"
    ),
    "rainy_street": (
        "a narrow city street at night after rain, neon signs mirrored in the wet asphalt, a cyclist with a "
        "yellow coat passing by, steam rising from a grate"
    ),
    "library_hall": (
        "the reading hall of an old library with tall arched windows, rows of green lamps on oak tables, dust "
        "in the beams of afternoon sun, strictly symmetrical"
    ),
    # animals and things: texture, material, reading
    "fox_snow": (
        "a red fox standing in deep snow and looking into the camera, sharp whiskers, snowflakes on its fur, "
        "blurred birch trees behind it"
    ),
    "glass_still_life": (
        "a still life of three lemons, a glass carafe of water and a folded white linen cloth on a dark "
        "table, refraction in the glass, light from the left, in the manner of an oil painting"
    ),
    "watch_product": (
        "a product photo of a steel wristwatch on a slab of black slate, a crisp reflection, studio light, "
        "small numerals on the dial that can be read"
    ),
    # what is asked for exactly: colours, places, writing
    "colours_apart": (
        "a red cube on the left, a green ball in the middle and a blue cone on the right, on a plain white "
        "table, even light, each of them in its own colour"
    ),
    "shop_sign": (
        "the front of a small bakery with a hand-painted wooden sign that reads FRESH BREAD in white letters, "
        "loaves in the window, a bicycle leaning on the wall"
    ),
    # styles
    "watercolour_harbour": (
        "a loose watercolour painting of a small harbour with fishing boats at low tide, visible paper grain, "
        "pale washes of blue and ochre"
    ),
    "anime_train": (
        "an anime-style drawing of a girl with short black hair at the window of a moving train, summer "
        "fields outside, clean lines, vivid colours, a calm expression"
    ),
    "ink_crane": (
        "a japanese ink drawing of a crane among reeds, a few confident strokes, much empty paper, a red seal "
        "in the corner"
    ),
}
