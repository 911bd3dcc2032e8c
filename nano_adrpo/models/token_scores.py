"""log π(token) of given tokens, without a tensor of all tokens times the whole vocabulary in memory, forward or backward.

Of 4 × 1024 tokens and 152,000 words such a tensor has 2.5 GB in float32, and autograd would keep several.
"""

import torch
import torch.nn.functional as F

CHUNK = 2**26  # logits that are held at a time: 256 MiB in float32; of 152,000 words those of 441 tokens


class TokenScores(torch.autograd.Function):
    """log π(token) and, if asked for, π's entropy for π = softmax(hidden·Wᵀ / temperature), a few rows at a time:
    hidden [N, D], W [V, D], tokens [N] -> [N], [N] or None. The gradient of the logits is known:
    ∂ log π(token) / ∂ logits = (1 at the token − π) / temperature. So where W is frozen, that of the hidden states is computed
    in the forward pass; else backward computes each chunk's logits once more instead of keeping them. The entropy is for
    logging and has none. Where the logits are soft-capped, z = c · tanh(logits / c) takes their place, and
    ∂z / ∂ logits = 1 − tanh²(logits / c).
    """

    @staticmethod
    def chunks(hidden, weight, temperature, cap):
        """-> slices of rows, and for each log π and, where there is a cap, tanh(logits / cap); [rows, V], float32."""
        size = max(1, CHUNK // len(weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = F.linear(hidden[rows], weight).float()
            bent = None if cap is None else torch.tanh(logits / cap)
            logits = logits if cap is None else cap * bent
            yield rows, (logits if temperature == 1 else logits.div_(temperature)).log_softmax(dim=-1), bent

    @staticmethod
    def slope(every, tokens, bent):
        """temperature · ∂ log π(token) / ∂ logits, in the memory of `every` = log π [rows, V]."""
        slope = every.exp_().neg_()
        slope[torch.arange(len(slope), device=slope.device), tokens] += 1
        if bent is not None:
            slope *= 1 - bent**2
        return slope

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, cap, asks_entropy):
        ctx.temperature, ctx.cap, ctx.frozen = temperature, cap, not weight.requires_grad
        ctx.dtype = F.linear(hidden[:0], weight).dtype  # autocast chooses one for products
        logp = hidden.new_empty(len(tokens), dtype=torch.float32)
        entropy = torch.empty_like(logp) if asks_entropy else None
        known = ctx.frozen and hidden.requires_grad
        w, grad_h = weight.to(ctx.dtype), torch.empty_like(hidden) if known else None  # the gradient of Σ log π
        for rows, every, bent in TokenScores.chunks(hidden, weight, temperature, cap):
            logp[rows] = every.gather(-1, tokens[rows, None])[:, 0]
            if asks_entropy:
                entropy[rows] = -(every.exp() * every).sum(dim=-1)
            if known:
                grad_h[rows] = TokenScores.slope(every, tokens[rows], bent).to(ctx.dtype) @ w / temperature
            del every  # else it would be there while the next is computed
        ctx.save_for_backward(*([grad_h] if ctx.frozen else [hidden, weight, tokens]))
        if asks_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        if ctx.frozen:
            (grad_h,) = ctx.saved_tensors
            return (grad[:, None] * grad_h).to(grad_h.dtype), None, None, None, None, None
        hidden, weight, tokens = ctx.saved_tensors
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        grad_h = torch.empty_like(h)
        # A sum over chunks, in float32: half precision would lose the later ones.
        grad_w = torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
        for rows, every, bent in TokenScores.chunks(h, w, ctx.temperature, ctx.cap):
            slope = TokenScores.slope(every, tokens[rows], bent).mul_(grad[rows, None] / ctx.temperature).to(ctx.dtype)
            grad_h[rows] = slope @ w
            if grad_w.dtype == slope.dtype:
                grad_w.addmm_(slope.T, h[rows])  # without a second matrix of its size
            else:
                grad_w += slope.T @ h[rows]
            del every, slope
        return grad_h.to(hidden.dtype), grad_w.to(weight.dtype), None, None, None, None
