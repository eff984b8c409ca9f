"""The slow, obvious rolling window: no cache, all frames so far through the stock transformer again."""

import block_causal
import torch


def rollout(transformer, embeds, *, noise, blocks, sigmas, context_timestep=0.0, given=None, joint=True):
    """Window w holds blocks w - T + 1 to w; block k is at level w - k in it; the first one leaves clean.

    Arguments as of ``rollout.rollout``. Without ``joint`` blocks of a window see what is before them only, which is
    wrong.
    """
    given = given if given is not None else torch.zeros(embeds.shape[0], 0, *noise.shape[1:])
    starts = [sum(blocks[:i]) for i in range(len(blocks))]
    num_given = starts.index(given.shape[1]) if given.shape[1] else 0
    clean, x = given, {}
    count = len(blocks) - num_given
    for w in range(count + len(sigmas) - 1):
        if w < count:
            k = num_given + w
            x[w] = noise.initial(w, starts[k], (embeds.shape[0], blocks[k], *noise.shape[1:]))
        window = sorted(x)
        first = starts[num_given + window[0]]
        end = starts[num_given + window[-1]] + blocks[num_given + window[-1]]

        def allowed(frame, first=first, end=end):
            own = next(s + n for s, n in zip(starts, blocks, strict=True) if s <= frame < s + n)
            return range(end if frame >= first and joint else own)

        levels = [0.0] * given.shape[1] + [context_timestep] * (first - given.shape[1])
        levels += [1000 * sigmas[w - k] for k in window for _ in range(x[k].shape[1])]
        flow = block_causal.masked_flow(
            transformer,
            torch.cat((clean, *(x[k] for k in window)), 1),
            timesteps=levels,
            prompt_embeds=embeds,
            mask=block_causal.frame_mask(end, allowed),
        )
        place = first
        for k in window:
            part = flow[:, place : place + x[k].shape[1]]
            place += x[k].shape[1]
            level = w - k
            x0 = x[k] - sigmas[level] * part
            if level + 1 < len(sigmas):
                fresh = noise.renoise(k, starts[num_given + k], level, x0.shape)
                x[k] = (1 - sigmas[level + 1]) * x0 + sigmas[level + 1] * fresh
            else:
                clean = torch.cat((clean, x0), 1)
                del x[k]
    return clean[:, given.shape[1] :]
