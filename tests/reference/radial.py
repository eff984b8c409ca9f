"""Radial attention as written in section "block mask" of its description: token by token, block by block."""

import torch


def token_mask(i, j, tokens, *, block_size, decay_factor=1.0, model="wan", adjacent="full", thin_below=128):
    """(tokens, tokens): which keys of frame j the queries of frame i attend to."""
    if j == 0 and model == "wan":
        return torch.ones(tokens, tokens, dtype=torch.bool)
    distance = abs(i - j)
    length = 2 ** len(f"{tokens:b}") / 2 ** (len(f"{distance:b}") if distance else 0)
    if distance > 1 and length < thin_below and distance % int(thin_below // length) != 0:
        return torch.zeros(tokens, tokens, dtype=torch.bool)
    if distance <= 1:
        width = tokens // 2 if distance == 1 and adjacent == "half" else tokens
    else:
        width = max(block_size, decay_factor * length)
    place = torch.arange(tokens)
    return (place[:, None] - place).abs() <= width


def shrink(mask, block_size):
    """Blocks of which more than 0.6 of the touched columns are more than a third full."""
    rows, columns = (size // block_size for size in mask.shape)
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    for a in range(rows):
        for b in range(columns):
            block = mask[a * block_size : (a + 1) * block_size, b * block_size : (b + 1) * block_size]
            full = block.sum(0) / block_size
            touched = (full > 0).sum()
            kept[a, b] = touched > 0 and (full > 1 / 3).sum() / touched > 0.6
    return kept


def block_mask(num_frames, tokens, *, block_size=128, **options):
    """The mask over whole blocks: what is left of the last tokens is not covered."""
    count = num_frames * tokens // block_size
    grid = torch.zeros(count, count, dtype=torch.bool)
    canvas = -(-tokens // block_size)
    for i in range(num_frames):
        for j in range(num_frames):
            row, column = i * tokens, j * tokens
            offsets = row % block_size, column % block_size
            padded = torch.zeros(*(offset + canvas * block_size for offset in offsets), dtype=torch.bool)
            frames = token_mask(i, j, tokens, block_size=block_size, **options)
            padded[offsets[0] : offsets[0] + tokens, offsets[1] : offsets[1] + tokens] = frames
            blocks = shrink(padded, block_size)
            place = grid[row // block_size :, column // block_size :][: blocks.shape[0], : blocks.shape[1]]
            place |= blocks[: place.shape[0], : place.shape[1]]
    return grid
