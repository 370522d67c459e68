"""Scores from gradients: Fisher information, gradient magnitude and Taylor importance of each subnet.

The gradients of a linear layer's weight and bias follow from its input and the gradient of its output, so a probe
needs only those: it asks autograd for the output gradients of the blocks' linear layers and forms weight gradients
itself. No parameter's `.grad` and no gradient hook of an engine is ever touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from d2ft_hpc.families.head_axis import HeadAxis
from d2ft_hpc.model.probe import probe
from d2ft_hpc.model.subnets import SubnetMap
from d2ft_hpc.score_table import SCORES

LossFunction = Callable[[Tensor, Tensor], Tensor]

_FP16_SCALE = 2.0**10
"""Keeps the gradients of a mean loss within fp16's range."""


def gradient_scores(
    model: nn.Module,
    subnets: SubnetMap,
    images: Tensor,
    labels: Tensor,
    loss_function: LossFunction,
    names: Iterable[str],
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Scores of one micro-batch, with g the gradient of the loss and w the weight.

    names: those in `SCORES` that read gradients, summed over a subnet's weights: fisher g^2 (arXiv 2504.12471),
    gradient_magnitude |g|, taylor |w g| (arXiv 1906.10771).

    images: [sample, channel, height, width], cast to the model's dtype; labels: [sample, ...]; loss_function
    returns the *mean* over the samples.
    autocast_dtype: of the pass and of the products that give weight gradients, as in training under autocast; None:
    the model's own, products in float32 unless the model is in bfloat16.
    Of a model with LoRA, the weights are the heads' slices of the low-rank factors.
    Runs the dense model in evaluation mode; model, gradients and random state stay as they were. Where memory is too
    short for all samples at once, they are taken in parts, of half as many at each try.

    Returns for each name float32 [1, block, head].
    """
    at_once, names = images.shape[0], list(names)
    gradients = partial(_gradients_of_part, model, subnets, loss_function, autocast_dtype)
    while True:
        parts = list(zip(images.split(at_once), labels.split(at_once), strict=True))
        try:
            return _scores_of_parts(gradients, parts, names, subnets.shape)
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
        at_once = -(-at_once // 2)


def _scores_of_parts(
    gradients: Callable[[Tensor, Tensor], Iterable[_OfParameter]],
    parts: Sequence[tuple[Tensor, Tensor]],
    names: Sequence[str],
    shape: tuple[int, int],
) -> dict[str, Tensor]:
    """`gradient_scores` of images and labels in parts. A weight's gradient is kept until the last part."""
    samples, device = sum(len(images) for images, _ in parts), parts[0][0].device
    scores = {name: torch.zeros(1, *shape, device=device) for name in names}
    earlier: dict[_Place, Tensor] = {}
    done = 0
    for images, labels in parts:
        done += len(images)
        for place, axis, value, gradient in gradients(images, labels):
            if len(parts) > 1:
                gradient = len(images) / samples * gradient + earlier.pop(place, 0)
                if done < samples:
                    earlier[place] = gradient
                    continue
            for score, total in scores.items():
                total[:, place[0]] += axis.sum_by_head(SCORES[score].of_weight(gradient, value))
    return scores


_Place = tuple[int, str, int]
"""Block, layer name, and which of the layer's parameters it is."""

_OfParameter = tuple[_Place, HeadAxis, Tensor, Tensor]
"""Of a parameter that heads own: its place, its split by head, its value, its gradient [1, ...]."""


def _gradients_of_part(
    model: nn.Module,
    subnets: SubnetMap,
    loss_function: LossFunction,
    autocast_dtype: torch.dtype | None,
    images: Tensor,
    labels: Tensor,
) -> Iterator[_OfParameter]:
    """From one pass."""
    dtype = next(model.parameters()).dtype
    scale = _FP16_SCALE if dtype == torch.float16 else 1.0
    autocast = torch.autocast(images.device.type, autocast_dtype, enabled=autocast_dtype is not None)
    product_dtype = torch.bfloat16 if torch.bfloat16 in (dtype, autocast_dtype) else torch.float32
    with probe(model, training=False), _recording(model, subnets) as records:
        with autocast:
            loss = loss_function(model(images.to(dtype)), labels)
        output_gradients = torch.autograd.grad(loss * scale, [output for _, _, _, output in records])
    blocks = subnets.blocks(model)
    for (block, name, layer_input, _), output_gradient in zip(records, output_gradients, strict=True):
        inputs = layer_input.to(product_dtype).reshape(1, -1, layer_input.shape[-1])
        gradients = 1 / scale * output_gradient.float().reshape(1, -1, output_gradient.shape[-1])
        for index, found in enumerate(gradients_of_heads(blocks[block], name, subnets, inputs, gradients)):
            yield (block, name, index), *found


def gradients_of_heads(
    block: nn.Module,
    name: str,
    subnets: SubnetMap,
    inputs: Tensor,
    output_gradients: Tensor,
) -> Iterator[tuple[HeadAxis, Tensor, Tensor]]:
    """For everything that heads own of a block's layer `name`: its split by head, value and gradient, float32
    [group, *value.shape].

    inputs: [group, token, channel] in the dtype of the products; output_gradients: float32.
    """

    def summed(left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum("gto,gti->goi", left.to(inputs.dtype), right.to(inputs.dtype)).float()

    layer: Any = block.get_submodule(name)
    if not subnets.has_adapters:
        if axis := subnets.head_axes.get(f"{name}.weight"):
            yield axis, layer.weight, summed(output_gradients, inputs)
        for bias, channels in subnets.family.biases(block, name).items():
            if axis := subnets.head_axes.get(bias):
                owner, _, last = bias.rpartition(".")
                value = getattr(block.get_submodule(owner), last)
                yield axis, value, output_gradients[..., channels].sum(1)
        return
    for adapter in getattr(layer, "active_adapters", ()):
        down, up = (factor[adapter].weight.detach() for factor in (layer.lora_A, layer.lora_B))
        scaled = layer.scaling[adapter] * output_gradients
        if axis := subnets.head_axes.get(f"{name}.lora_B.{adapter}.weight"):
            yield axis, up, summed(scaled, inputs @ down.T.to(inputs.dtype))
        if axis := subnets.head_axes.get(f"{name}.lora_A.{adapter}.weight"):
            yield axis, down, summed(scaled @ up.float(), inputs)


_Record = tuple[int, str, Tensor, Tensor]
"""Block, layer name, the layer's input, the layer's output."""


@contextmanager
def _recording(model: nn.Module, subnets: SubnetMap) -> Iterator[list[_Record]]:
    """Records input and output of every linear layer of the blocks for one forward pass."""
    records: list[_Record] = []

    def record(block: int, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:  # everything up to here is frozen
            output.requires_grad_()
        records.append((block, name, inputs[0].detach(), output))

    handles = hooks_on_layers(enumerate(subnets.blocks(model)), subnets, record)
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def hooks_on_layers(
    blocks: Iterable[tuple[int, nn.Module]],
    subnets: SubnetMap,
    see: Callable[[int, str, nn.Module, tuple[Tensor, ...], Tensor], None],
) -> list[RemovableHandle]:
    """`see` gets the block's index, the name, the layer, its inputs and its output after each call of a linear layer of
    these blocks, until the returned hooks are removed."""
    handles: list[RemovableHandle] = []
    for index, block in blocks:
        for name in subnets.layers:
            handles.append(block.get_submodule(name).register_forward_hook(partial(see, index, name)))
        handles += _hooks_for_calls(block, subnets)
    return handles


def _hooks_for_calls(block: nn.Module, subnets: SubnetMap) -> list[RemovableHandle]:
    """Lets a block call its layers as modules, so that hooks on these fire, until the returned ones are removed."""
    if subnets.family.calling(block) is None:
        return []
    entered = ExitStack()

    def before(*_: Any) -> None:
        context = subnets.family.calling(block)
        assert context is not None
        entered.enter_context(context)

    def after(*_: Any) -> None:
        entered.close()

    return [block.register_forward_pre_hook(before), block.register_forward_hook(after, always_call=True)]
