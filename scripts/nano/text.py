"""nano's tokenizer and text encoder: Gemma's own forms, small and never trained."""

from __future__ import annotations

import inspect
import json
import tempfile

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model, GemmaTokenizer

from scripts.nano import draw

VOCABULARY = 512
WIDTH = 64
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]  # Gemma's, in Gemma's order
PROBES = ["", "a red star on a blue background", "  two  spaces", "é…ß 漢字 <bos> User Prompt: ", "a\nb"]


def instruction() -> str:
    """The complex human instruction that diffusers' SanaPipeline puts before every prompt."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)


def captions() -> list[str]:
    """Every caption that can be drawn, the new figure's too (a word the tokenizer can spell in one piece)."""
    return [
        draw.Scene(figure, colour, ground).caption
        for figure in (*draw.FIGURES, draw.NEW_FIGURE)
        for colour in draw.COLOURS
        for ground in draw.COLOURS
        if colour != ground
    ]


def build_tokenizer() -> GemmaTokenizer:
    """A byte-pair tokenizer in Gemma's form: space becomes "▁", no prefix space, byte fallback, BOS in front.

    Trained with the very normaliser and pre-tokenizer that transformers rebuilds on loading; any other
    (Metaspace with a prefix, say) would give other ids after ``from_pretrained``.
    """
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="▁", behavior="merged_with_next", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY + 256,
        special_tokens=SPECIALS + byte_tokens,
        show_progress=False,
        min_frequency=1,
    )
    tokenizer.train_from_iterator(captions() + [instruction()] * 200, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    return GemmaTokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],  # pyright: ignore[reportArgumentType]
        add_bos_token=True,
        padding_side="right",
        model_max_length=8192,
    )


def check_reload(tokenizer: GemmaTokenizer) -> None:
    """Ids must be the same after saving and loading; they silently were not in a first try."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)
    for text in [*PROBES, *captions(), instruction(), instruction() + captions()[0]]:
        before, after = tokenizer(text)["input_ids"], again(text)["input_ids"]
        if before != after or before[0] != tokenizer.bos_token_id:
            raise AssertionError(f"the tokenizer reloads to other ids: {text!r}: {before} then {after}")


def build_encoder(tokenizer: GemmaTokenizer, seed: int = 0) -> Gemma2Model:
    """Two layers of width 64 with random weights: enough to tell a few hundred captions apart."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=8192,
        sliding_window=4096,
        initializer_range=0.2,  # the usual 0.02 would mix too little at this width
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",  # pyright: ignore  (soft-capped logits: no SDPA for Gemma 2)
    )
    torch.manual_seed(seed)
    return Gemma2Model(config).eval()
