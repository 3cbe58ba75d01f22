"""A block's two branches as one autograd function each, for float32 on a CPU.

Autograd keeps the result of every operation that the next one's gradient needs: 8,100 numbers for each token of a
384-wide block. Here the LayerNorms and the perceptron's hidden layer are computed again in the backward pass, LayerScale
is folded into the last projection, queries and keys are rotated in place, and attention writes into one packed tensor;
the values too are projected again: 1,920 numbers, and no copies between crops. The formulas are those of `block`,
`attention` and `feed_forward`, which tests compare with these, gradients included.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from meddino.layers.attention import SelfAttention
from meddino.layers.block import StreamNorm, TransformerBlock
from meddino.layers.cpu.matmul import product, takes
from meddino.layers.feed_forward import Mlp
from meddino.layers.linear import KeyMaskedLinear, Linear
from meddino.layers.packing import CropGroup, split_groups


class LeanBlock(TransformerBlock):
    """`TransformerBlock`, whose branches run by this module wherever they can: float32 on a CPU, run eagerly."""

    def attention_branch(self, tokens: Tensor, groups: Sequence[CropGroup]) -> Tensor:
        """See `TransformerBlock.attention_branch`."""
        if not is_lean(tokens, self.norm1, self.attn):
            return super().attention_branch(tokens, groups)
        return attention_branch(tokens, self.norm1, self.attn, None if self.ls1 is None else self.ls1.gamma, groups)

    def mlp_branch(self, tokens: Tensor, groups: Sequence[CropGroup]) -> Tensor:
        """See `TransformerBlock.mlp_branch`."""
        if not (isinstance(self.mlp, Mlp) and is_lean(tokens, self.norm2, self.mlp)):
            return super().mlp_branch(tokens, groups)
        return mlp_branch(tokens, self.norm2, self.mlp, None if self.ls2 is None else self.ls2.gamma)


def is_lean(x: Tensor, norm: nn.Module, branch: nn.Module) -> bool:
    """Tell whether a branch can be run by this module.

    False wherever somebody put another layer into the branch (LoRA, for example) or hangs on it with a hook: both expect
    the modules to be called.
    """
    layers: list[tuple[nn.Module, type[nn.Module]]] = [(norm, StreamNorm)]
    if isinstance(branch, SelfAttention):
        layers += [(branch, SelfAttention), (branch.proj, Linear)]
        layers.append((branch.qkv, KeyMaskedLinear if isinstance(branch.qkv, KeyMaskedLinear) else Linear))
    elif isinstance(branch, Mlp):
        layers += [(branch, Mlp), (branch.fc1, Linear), (branch.fc2, Linear)]
    else:
        return False
    if any(type(layer) is not kind or _has_hooks(layer) for layer, kind in layers):
        return False
    return takes(x, *branch.parameters(), *norm.parameters())


def mlp_branch(
    x: Float[Tensor, "tokens dim"], norm: nn.LayerNorm, mlp: Mlp, gamma: Tensor | None
) -> Float[Tensor, "tokens dim"]:
    """Return gamma * mlp(norm(x)).

    Args:
        x: Packed tokens.
        norm: LayerNorm before the perceptron.
        mlp: Linear, GELU, linear.
        gamma: LayerScale; None for none.
    """
    output: Tensor = _MlpBranch.apply(
        x, norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, gamma, norm.eps
    )
    return output


def attention_branch(
    x: Float[Tensor, "tokens dim"],
    norm: nn.LayerNorm,
    attention: SelfAttention,
    gamma: Tensor | None,
    groups: Sequence[CropGroup],
) -> Float[Tensor, "tokens dim"]:
    """Return gamma * attention(norm(x)) within each crop.

    Args:
        x: Packed tokens.
        norm: LayerNorm before the attention.
        attention: Its projections.
        gamma: LayerScale; None for none.
        groups: How the tokens are packed.
    """
    qkv = attention.qkv
    bias = qkv.masked_bias() if isinstance(qkv, KeyMaskedLinear) else qkv.bias
    output: Tensor = _AttentionBranch.apply(
        x,
        norm.weight,
        norm.bias,
        qkv.weight,
        bias,
        attention.proj.weight,
        attention.proj.bias,
        gamma,
        norm.eps,
        attention.num_heads,
        tuple(groups),
    )
    return output


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


class _Norm:
    """LayerNorm that keeps its input and two numbers a token, and is computed again for the gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        normed, mean, inverse_std = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        return normed, mean, inverse_std

    @staticmethod
    def backward(
        grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor, bias: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean, inverse_std, weight, bias, wanted
        )
        return grad_x, grad_weight, grad_bias


def _scaled(weight: Tensor, bias: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return a projection's weight and bias with LayerScale folded in."""
    return (weight, bias) if gamma is None else (weight * gamma[:, None], bias * gamma)


def _unscaled_gradients(
    by_weight: Tensor, by_bias: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of weight, bias and gamma from those of the two that LayerScale is folded into."""
    if gamma is None:
        return by_weight, by_bias, None
    by_gamma = torch.linalg.vecdot(by_weight, weight) + by_bias * bias
    return by_weight.mul_(gamma[:, None]), by_bias * gamma, by_gamma


def _weight_gradient(grad: Tensor, inputs: Tensor) -> Tensor:
    """Return grad^T inputs, in stretches: oneDNN copies the transposed factor, which is three times the tokens for qkv."""
    result = grad.new_empty(grad.shape[1], inputs.shape[1])
    for part in _stretches(grad.shape[1], inputs.shape[1]):
        result[part] = product(grad[:, part].t(), inputs.t())
    return result


def _stretches(whole: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, whole)) for start in range(0, whole, step)]


class _MlpBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        gamma: Tensor | None,
        eps: float,
    ) -> Tensor:
        normed, mean, inverse_std = _Norm.forward(x, norm_weight, norm_bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, mean, inverse_std, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma)
        hidden = product(normed, fc1_weight, fc1_bias, gelu=True)
        return product(hidden, *_scaled(fc2_weight, fc2_bias, gamma))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse_std, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma = ctx.saved_tensors
        grad, wanted = grads[0].contiguous(), ctx.needs_input_grad
        normed = _Norm.forward(x, norm_weight, norm_bias, ctx.eps)[0]
        to_hidden = _scaled(fc2_weight, fc2_bias, gamma)[0].t().contiguous()
        by_fc1_weight = torch.empty_like(fc1_weight) if wanted[3] else None
        by_fc1_bias = torch.empty_like(fc1_bias) if wanted[4] else None
        by_output = torch.empty_like(fc2_weight) if any(wanted[5:8]) else None
        grad_normed: Tensor | None = None
        # Half of a four-fold hidden width at a time: half of what is the most memory that a block takes in this pass.
        for part in _stretches(len(fc1_weight), 2 * x.shape[1]):
            hidden = product(normed, fc1_weight[part], fc1_bias[part])
            if by_output is not None:
                by_output[:, part] = product(grad.t(), functional.gelu(hidden).t())
            grad_hidden = product(grad, to_hidden[part])
            torch.ops.aten.gelu_backward(grad_hidden, hidden, grad_input=grad_hidden)
            del hidden
            if by_fc1_weight is not None:
                by_fc1_weight[part] = product(grad_hidden.t(), normed.t())
            if by_fc1_bias is not None:
                by_fc1_bias[part] = grad_hidden.sum(0)
            through = product(grad_hidden, fc1_weight[part].t())
            grad_normed = through if grad_normed is None else grad_normed.add_(through)
            del grad_hidden, through  # before the next ones are made
        assert grad_normed is not None
        by_fc2: tuple[Tensor | None, ...] = (None, None, None)
        if by_output is not None:
            by_fc2 = _unscaled_gradients(by_output, grad.sum(0), fc2_weight, fc2_bias, gamma)
        by_norm = _Norm.backward(grad_normed, x, mean, inverse_std, norm_weight, norm_bias, list(wanted[:3]))
        return *by_norm, by_fc1_weight, by_fc1_bias, *by_fc2, None


class _AttentionBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        qkv_weight: Tensor,
        qkv_bias: Tensor | None,
        proj_weight: Tensor,
        proj_bias: Tensor,
        gamma: Tensor | None,
        eps: float,
        num_heads: int,
        groups: tuple[CropGroup, ...],
    ) -> Tensor:
        normed, mean, inverse_std = _Norm.forward(x, norm_weight, norm_bias, eps)
        queries_keys = product(normed, *_rows(qkv_weight, qkv_bias, slice(0, 2 * x.shape[1])))
        values = product(normed, *_rows(qkv_weight, qkv_bias, slice(2 * x.shape[1], None)))
        del normed
        attended = torch.empty_like(x)
        log_sums = []
        parts = _by_group((queries_keys, values, attended), num_heads, groups)
        for (part, value, output), group in zip(parts, groups, strict=True):
            if group.batch == 0:
                log_sums.append(x.new_empty(0))
                continue
            rotate_in_place(part, group, backwards=False)
            query, key = part.transpose(1, 3).unbind(2)
            result, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value[:, :, 0].transpose(1, 2)
            )
            output[:, :, 0].copy_(result.transpose(1, 2))
            log_sums.append(log_sum)
        ctx.eps, ctx.num_heads, ctx.groups = eps, num_heads, groups
        weights = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma)
        ctx.save_for_backward(x, mean, inverse_std, queries_keys, attended, *weights, *log_sums)
        return product(attended, *_scaled(proj_weight, proj_bias, gamma))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse_std, queries_keys, attended, *weights_and_sums = ctx.saved_tensors
        norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma = weights_and_sums[:7]
        log_sums = weights_and_sums[7:]
        grad, wanted = grads[0].contiguous(), ctx.needs_input_grad
        by_proj: tuple[Tensor | None, ...] = (None, None, None)
        if any(wanted[5:8]):
            by_proj = _unscaled_gradients(product(grad.t(), attended.t()), grad.sum(0), proj_weight, proj_bias, gamma)
        grad_attended = product(grad, _scaled(proj_weight, proj_bias, gamma)[0].t())
        normed = _Norm.forward(x, norm_weight, norm_bias, ctx.eps)[0]
        values = product(normed, *_rows(qkv_weight, qkv_bias, slice(2 * x.shape[1], None)))
        grad_qkv = _attention_gradient(grad_attended, queries_keys, values, attended, log_sums, ctx.num_heads, ctx.groups)
        del grad_attended, values
        by_qkv_weight = _weight_gradient(grad_qkv, normed) if wanted[3] else None
        del normed
        by_qkv_bias = grad_qkv.sum(0) if wanted[4] else None
        grad_normed = product(grad_qkv, qkv_weight.t())
        by_norm = _Norm.backward(grad_normed, x, mean, inverse_std, norm_weight, norm_bias, list(wanted[:3]))
        return *by_norm, by_qkv_weight, by_qkv_bias, *by_proj, None, None, None


def _rows(weight: Tensor, bias: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Return a projection to some of the outputs."""
    return weight[rows], None if bias is None else bias[rows]


def _by_group(packed: Sequence[Tensor], num_heads: int, groups: Sequence[CropGroup]) -> list[tuple[Tensor, ...]]:
    """Return for each group the views [batch, tokens, kinds, heads, head_dim] of tensors [tokens, kinds * dim].

    The last one holds one kind; the others' number of kinds follows from it.
    """
    dim = packed[-1].shape[1]  # named, for it cannot be inferred where drop path leaves no token
    views = [tensor.view(len(tensor), tensor.shape[1] // dim, num_heads, dim // num_heads) for tensor in packed]
    return list(zip(*(split_groups(view, groups) for view in views), strict=True))


def _attention_gradient(
    grad_attended: Tensor,
    queries_keys: Tensor,
    values: Tensor,
    attended: Tensor,
    log_sums: Sequence[Tensor],
    num_heads: int,
    groups: Sequence[CropGroup],
) -> Tensor:
    grad_qkv = attended.new_empty(len(attended), 3 * attended.shape[1])
    parts = _by_group((grad_qkv, queries_keys, values, attended, grad_attended), num_heads, groups)
    for (grad_part, part, *single), group, log_sum in zip(parts, groups, log_sums, strict=True):
        if group.batch == 0:
            continue
        query, key = part.transpose(1, 3).unbind(2)
        value, output, grad_output = (tensor[:, :, 0].transpose(1, 2) for tensor in single)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output, query, key, value, output, log_sum, 0.0, False
        )
        for place, gradient in enumerate(found):
            grad_part[:, :, place].copy_(gradient.transpose(1, 2))
        del found, gradient  # before the rotation takes as much
        rotate_in_place(grad_part, group, backwards=True)
    return grad_qkv


def rotate_in_place(part: Float[Tensor, "batch tokens kinds heads dim"], group: CropGroup, backwards: bool) -> None:
    """Rotate queries and keys, the first two kinds, by their positions, or gradients back by them; values stay."""
    sin, cos = group.table.sin, group.table.cos
    half = sin.shape[-1] // 2
    angles_sin, angles_cos = (values[..., None, None, :half] for values in (sin, cos))
    both = part[:, :, :2]
    if sin.dtype != part.dtype:
        both = both.to(sin.dtype)
    first, second = both[..., :half], both[..., half:]
    if backwards:
        angles_sin = -angles_sin
    # Each product is rounded by itself, as in the formula: with a table in bfloat16 that is what is to be matched.
    turned_first = first * angles_cos - second * angles_sin
    turned_second = second * angles_cos + first * angles_sin
    part[:, :, :2, :, :half] = turned_first
    part[:, :, :2, :, half:] = turned_second
