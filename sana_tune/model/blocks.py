"""How the blocks of the transformer are run while it is trained: kept or recomputed, compiled or not.

One function is handed to diffusers' own gradient-checkpointing switch and gets every block of every forward that needs
gradients. Weights, their names and what is computed do not change; drawing and held-out losses run as without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sana_tune.log import log

if TYPE_CHECKING:
    from diffusers import SanaTransformer2DModel

# What a selectively recomputed block keeps: results of matrix products over the whole width, and of softmax attention.
# The linear attention's small products, norms, gates and the depthwise convolution are computed again.
_KEPT = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
# Blocks are compiled anew for every size: inductor (torch 2.13) fails, and in the backward pass of a later step, over
# sizes that it keeps as symbols, and fixed sizes make faster kernels. So that there are few, text is rounded up to
# TEXT_MULTIPLE and its mask is always given: at most FORMS_A_SIZE forms for each size of picture and batch.
TEXT_MULTIPLE = 64
FORMS_A_SIZE = 5
SPARE_FORMS = 8  # with more forms than are due, something is wrong, and it is said


# What a compiler may raise as it is while it makes a backward pass.
_BARE = (RuntimeError, AssertionError, TypeError, ValueError, LookupError, AttributeError, OSError)


class Blocks:
    """Runs one block at a time: `recomputed[i]` says whether block i is computed again in the backward pass.

    selective: of a recomputed block, keep the matrix products; not with a compiler. compiler: a backend of
    torch.compile, None = eager. sizes: of batches of latents that will come, each compiled for at most FORMS_A_SIZE
    lengths of text. When compiling fails, that is said once and everything goes on without it.
    """

    def __init__(
        self,
        transformer: SanaTransformer2DModel,
        recomputed: Sequence[bool],
        selective: bool,
        compiler: Any = None,
        sizes: int = 1,
    ):
        again = partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=transformer.config["dropout"] > 0,
            **({"context_fn": _selective_contexts} if selective else {}),
        )
        blocks = transformer.transformer_blocks
        self._again = {id(block): wanted for block, wanted in zip(blocks, recomputed, strict=True)}
        self._eager: tuple[Callable[..., Any], Callable[..., Any]] = (_run, again)
        self._compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._failures: tuple[type[Exception], ...] = ()
        if compiler is not None:
            self._compile(compiler, sizes * FORMS_A_SIZE + SPARE_FORMS)

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled, and compiling has not failed."""
        return self._compiled is not None

    def __call__(self, block: Any, *inputs: Any) -> Any:
        again = self._again[id(block)]
        if self._compiled is None:
            return self._eager[again](block, *inputs)
        states, _, text, bias, *rest = inputs
        bias = None if bias is None else bias[:, None]  # as it is used: inductor (torch 2.13) fails over a view of it
        # The first block gets its tokens in another layout, and under autocast in another dtype, than all others: made
        # alike (no number changes), one compiled form is enough for all.
        states = states.to(block.scale_shift_table.dtype).contiguous()
        try:
            return self._compiled[again](block, states, None, text, bias, *rest)
        except self._failures as error:
            self.give_up(error)
            return self._eager[again](block, *inputs)

    def warm_up(self, forward: Callable[[Any], Tensor], sizes: Iterable[Any], weights: Sequence[Tensor]) -> None:
        """Compile forward and backward for some sizes before anything depends on it. forward: size → a result."""
        for size in sizes:
            if not self.compiled:
                return
            try:
                forward(size).float().square().mean().backward()
            except torch.OutOfMemoryError:
                raise
            except (*self._failures, *_BARE) as error:
                self.give_up(error)
            finally:
                for weight in weights:
                    weight.grad = None

    def give_up(self, error: Exception) -> None:
        """Go on without compiling, and say so."""
        self._compiled = None
        first = " ".join(str(error).strip().splitlines()[:2])  # "backend='inductor' raised:", and what
        log.warning("dynamo_backend: the blocks could not be compiled and run as they are, which is slower (%s)", first)
        log.debug("compiling failed", exc_info=error)

    def _compile(self, compiler: Any, forms: int) -> None:
        from torch._dynamo import config as dynamo
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        dynamo.recompile_limit = max(dynamo.recompile_limit, forms)
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 2 * forms)
        self._failures = (TorchDynamoException, FailOnRecompileLimitHit)
        plain, again = (
            torch.compile(run, backend=compiler, fullgraph=True, dynamic=False)
            for run in (_run, _checkpointed(self._eager[1]))
        )
        self._compiled = (plain, again)


def arrange(
    transformer: SanaTransformer2DModel,
    recomputed: Sequence[bool] = (),
    *,
    selective: bool = False,
    compiler: Any = None,
    sizes: int = 1,
) -> Blocks | None:
    """Run the blocks so from now on; see `Blocks`. recomputed: for each block, () = none. None: nothing is to be done.

    compiler: "inductor", another backend of torch.compile by name or as a function, or None.
    """
    recomputed = tuple(recomputed) or (False,) * len(transformer.transformer_blocks)
    if not any(recomputed) and compiler is None:
        transformer.disable_gradient_checkpointing()
        return None
    blocks = Blocks(transformer, recomputed, selective, compiler, sizes)
    transformer.enable_gradient_checkpointing(gradient_checkpointing_func=blocks)  # pyright: ignore[reportArgumentType]
    return blocks


def sample(
    transformer: Any, precision: Callable[..., AbstractContextManager[Any]], batch: int, height: int, width: int
) -> Tensor:
    """The model's answer to zeros of latent size height × width: what `Blocks.warm_up` compiles with."""
    config, weight = transformer.config, next(transformer.parameters())
    device, dtype = weight.device, weight.dtype
    with precision():
        return transformer(
            hidden_states=torch.zeros(batch, config["in_channels"], height, width, device=device, dtype=dtype),
            encoder_hidden_states=torch.ones(
                batch, TEXT_MULTIPLE, config["caption_channels"], device=device, dtype=dtype
            ),
            encoder_attention_mask=torch.ones(batch, TEXT_MULTIPLE, dtype=torch.int64, device=device),
            timestep=torch.full((batch,), 500.0, device=device),
            return_dict=False,
        )[0]


def _run(block: Any, *inputs: Any) -> Any:
    return block(*inputs)


def _checkpointed(again: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own for the compiler, which keeps its forms by function."""

    def run(block: Any, *inputs: Any) -> Any:
        return again(block, *inputs)

    return run


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute: matrix products, and convolutions that mix channels (an adapter's 1×1 ones)."""
    mixes = operation is torch.ops.aten.convolution.default and args[8] == 1
    return CheckpointPolicy.MUST_SAVE if mixes or operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
