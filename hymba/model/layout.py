"""Where the tokens of one forward pass stand: positions, rotary angles, documents, padding."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hymba.config import HymbaConfig


class Layout(NamedTuple):
    """What every layer must know about the tokens of a call, or about the meta tokens in front of them. Rows are
    left-aligned: padding comes last."""

    shape: tuple[int, int]  # B rows, T tokens of each
    positions: Tensor  # (B or 1, T), counting meta tokens
    cos: Tensor  # (B or 1, 1, T, dk), float32
    sin: Tensor
    documents: Tensor | None = None  # (B, T) ids in packed rows
    starts: Tensor | None = None  # (B, T) bool, the first token of each document
    lengths: Tensor | None = None  # (B,) how many tokens of each row count; None: all


class Rope(nn.Module):
    """Angles of rotary positions (Su et al., arXiv 2104.09864) with NTK-aware rescaling of the base.

        ntk:          base = theta (2 max_length / original - 1) ^ (d / (d - 2)), at any length
        dynamic_ntk:  the same with the row's own length for max_length, once that is longer than `original`

    The factor 2 is the released implementation's. Angles are float32 whatever the model's dtype: inverse frequencies
    rounded to bfloat16 move the logits of a small model by 0.2.
    """

    def __init__(self, config: HymbaConfig):
        super().__init__()
        self.config = config

    def base(self, lengths: Tensor) -> float | Tensor:
        """lengths: (B or 1,) of the rows, meta tokens included -> the base, one for all rows or (B or 1, 1)"""
        c = self.config
        if c.rope == "ntk":
            return c.rope_theta * (2 * c.max_length / c.rope_original_length - 1) ** (c.d_key / (c.d_key - 2))
        if c.rope == "dynamic_ntk":
            stretch = 2 * lengths.clamp(min=c.rope_original_length).float() / c.rope_original_length - 1
            return (c.rope_theta * stretch ** (c.d_key / (c.d_key - 2)))[:, None]
        return c.rope_theta

    def forward(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """positions: (B or 1, T), lengths as in `base` -> cos, sin: (B or 1, 1, T, dk)"""
        d = self.config.d_key
        if self.config.rope == "none":
            angles = torch.zeros(*positions.shape, d, device=positions.device)
        else:
            inverse = 1.0 / self.base(lengths) ** (torch.arange(0, d, 2, device=positions.device).float() / d)
            angles = positions[..., None].float() * inverse.unsqueeze(-2)  # (B or 1, T, dk / 2)
            angles = torch.cat([angles, angles], dim=-1)
        return angles.cos()[:, None], angles.sin()[:, None]
