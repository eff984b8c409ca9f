"""Softmax attention written out in float64 under a mask of tokens, and block plans written out token by token."""

import math

import torch


def attention(q, k, v, mask=None, *, scale=None):
    """(batch, tokens, heads, head_dim) in, the same and (batch, heads, queries) log-sum-exp out, float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def token_mask(plan, num_heads):
    """(num_heads, queries, keys) of a block plan, by loops over heads, blocks and lists."""
    mask = torch.zeros(num_heads, plan.num_queries, plan.num_keys, dtype=torch.bool)
    for head in range(num_heads):
        q_edges, k_edges = (_of_head(edges, head, ndim=1) for edges in (plan.q_edges, plan.k_edges))
        counts, index = _of_head(plan.counts, head, ndim=1), _of_head(plan.index, head, ndim=2)
        placed = torch.zeros(plan.num_queries, plan.num_keys, dtype=torch.bool)
        for row, count in enumerate(counts.tolist()):
            for column in index[row, :count].tolist():
                rows = slice(int(q_edges[row]), int(q_edges[row + 1]))
                columns = slice(int(k_edges[column]), int(k_edges[column + 1]))
                placed[rows, columns] = True
        q_order = range(plan.num_queries) if plan.q_perm is None else _of_head(plan.q_perm, head, ndim=1).tolist()
        k_order = range(plan.num_keys) if plan.k_perm is None else _of_head(plan.k_perm, head, ndim=1).tolist()
        mask[head][torch.tensor(q_order)[:, None], torch.tensor(k_order)] = placed
    return mask


def _of_head(part, head, *, ndim):
    return part if part.ndim == ndim else part[head % part.shape[0]]


def signature(plan):
    """Everything in a plan, for comparisons."""
    names = ("q_edges", "k_edges", "counts", "index", "q_perm", "k_perm")
    return [None if getattr(plan, name) is None else getattr(plan, name).tolist() for name in names]
