"""log π(token) of given tokens, without a tensor of all tokens times the whole vocabulary in memory, forward or backward.

Of 4 × 1024 tokens and 152,000 words such a tensor has 2.5 GB in float32, and autograd would keep several.
"""

import torch
import torch.nn.functional as F

CHUNK = 2**24  # logits that are held at a time: 64 MiB in float32


class TokenScores(torch.autograd.Function):
    """log π(token) and π's entropy for π = softmax(hidden·Wᵀ / temperature), a few rows at a time: hidden [N, D], W [V, D],
    tokens [N] -> two [N]. Backward computes each chunk's logits once more instead of keeping them, and knows their gradient:
    ∂ log π(token) / ∂ logits = (1 at the token − π) / temperature. The entropy is for logging and has none. Where the logits
    are soft-capped, z = c · tanh(logits / c) takes their place, and ∂z / ∂ logits = 1 − tanh²(logits / c).
    """

    @staticmethod
    def chunks(hidden, weight, temperature, cap):
        """-> slices of rows, and for each log π and, where there is a cap, tanh(logits / cap); [rows, V], float32."""
        size = max(1, CHUNK // len(weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = F.linear(hidden[rows], weight).float()
            bent = None if cap is None else torch.tanh(logits / cap)
            yield rows, ((logits if cap is None else cap * bent) / temperature).log_softmax(dim=-1), bent

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperature, cap):
        ctx.save_for_backward(hidden, weight, tokens)
        ctx.temperature, ctx.cap = temperature, cap
        ctx.dtype = F.linear(hidden[:0], weight).dtype  # autocast chooses one for products
        logp, entropy = hidden.new_empty(2, len(tokens), dtype=torch.float32)
        for rows, every, _ in TokenScores.chunks(hidden, weight, temperature, cap):
            logp[rows] = every.gather(-1, tokens[rows, None])[:, 0]
            entropy[rows] = -(every.exp() * every).sum(dim=-1)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, tokens = ctx.saved_tensors
        h, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        grad_h, grad_w = torch.empty_like(h), None
        if ctx.needs_input_grad[1]:  # a sum over chunks, in float32: half precision would lose the later ones
            grad_w = torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
        for rows, every, bent in TokenScores.chunks(h, w, ctx.temperature, ctx.cap):
            slope = every.exp_().neg_()  # −π, in the chunk's own memory
            slope[torch.arange(len(slope)), tokens[rows]] += 1
            if bent is not None:
                slope *= 1 - bent**2
            slope = slope.mul_(grad[rows, None] / ctx.temperature).to(ctx.dtype)  # [rows, V], of the logits
            grad_h[rows] = slope @ w
            if grad_w is not None and grad_w.dtype == slope.dtype:
                grad_w.addmm_(slope.T, h[rows])  # without a second matrix of its size
            elif grad_w is not None:
                grad_w += slope.T @ h[rows]
        return grad_h.to(hidden.dtype), None if grad_w is None else grad_w.to(weight.dtype), None, None, None
