"""The Mamba heads: a selective state space model (Gu and Dao, arXiv 2312.00752) with normed dt, B and C.

B batch, T time, E inner width, N state size per channel, K conv width
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hymba import ops
from hymba.config import HymbaConfig
from hymba.model.layout import Layout
from hymba.model.norm import RMSNorm

# range of softplus(dt bias) at initialisation (Mamba, section 3.6)
DT_MIN, DT_MAX = 1e-3, 1e-1


class Mamba(nn.Module):
    """Mamba heads between the shared input projection and the norm of their branch (paper, section 2.1)."""

    def __init__(self, config: HymbaConfig):
        super().__init__()
        E, N, K, rank = config.d_inner, config.d_state, config.d_conv, config.dt_rank
        self.widths = (rank, N, N)
        self.conv_weight = nn.Parameter(torch.empty(E, K))
        self.conv_bias = nn.Parameter(torch.empty(E))
        self.x_proj = nn.Linear(E, rank + 2 * N, bias=False)
        self.dt_norm = RMSNorm(rank, eps=config.norm_eps)
        self.B_norm = RMSNorm(N, eps=config.norm_eps)
        self.C_norm = RMSNorm(N, eps=config.norm_eps)
        self.dt_weight = nn.Parameter(torch.empty(E, rank))
        self.dt_bias = nn.Parameter(torch.empty(E))
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.empty(E))

    def init_weights(self) -> None:
        """Mamba's initialisation (section 3.6): state n of a channel decays at rate n, steps are log-uniform."""
        E, K = self.conv_weight.shape
        N, rank = self.A_log.shape[1], self.dt_weight.shape[1]
        nn.init.uniform_(self.conv_weight, -1 / math.sqrt(K), 1 / math.sqrt(K))
        nn.init.zeros_(self.conv_bias)
        nn.init.uniform_(self.dt_weight, -1 / math.sqrt(rank), 1 / math.sqrt(rank))
        with torch.no_grad():
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            self.A_log.copy_(torch.arange(1, N + 1).log().expand(E, N))
        nn.init.ones_(self.D)

    def forward(
        self,
        u: Tensor,
        gate: Tensor,
        layout: Layout,
        conv_state: Tensor,
        ssm_state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """u, gate: (B, T, E), conv_state: (B or 1, K - 1, E), ssm_state: (B or 1, E, N) float32

        -> y: (B, T, E), conv state and SSM state after each row's last token
        """
        after = conv_tail(conv_state, u, layout.lengths)
        u = ops.causal_conv(u, self.conv_weight, self.conv_bias, conv_state, layout.starts)
        dt, B, C = self.x_proj(u).split(self.widths, dim=-1)
        dt = F.linear(self.dt_norm(dt), self.dt_weight)  # its bias is added in float32, inside the scan
        A = -torch.exp(self.A_log.float())
        B, C = self.B_norm(B), self.C_norm(C)
        y, ssm_state = ops.selective_scan(
            u, dt, self.dt_bias, A, B, C, self.D, gate, ssm_state, layout.starts, layout.lengths
        )
        return y, after, ssm_state


def conv_tail(state: Tensor, u: Tensor, lengths: Tensor | None) -> Tensor:
    """The last K - 1 inputs of each row's convolution, newest last.

    state: (B or 1, K - 1, E) the inputs before u, u: (B, T, E), lengths: (B,) tokens of u that count -> (B, K - 1, E)
    """
    kept = state.shape[1]
    past = torch.cat([state.to(u.dtype).expand(u.shape[0], -1, -1), u], dim=1)
    if lengths is None:
        return past[:, past.shape[1] - kept :]
    index = lengths[:, None] + torch.arange(kept, device=u.device)
    return past.gather(1, index[..., None].expand(-1, -1, u.shape[2]))
