"""The Mamba heads: a selective state space model (Gu and Dao, arXiv 2312.00752) with normed dt, B and C; and Mamba-2's.

B batch, T time, E inner width, N state size per channel, K conv width
Mamba-2: S heads of P = E / S channels, C = E + 2 N channels of the convolution
"""

import math

import torch
from torch import Tensor, nn

from hymba import ops
from hymba.config import HymbaConfig
from hymba.model.layout import Layout
from hymba.model.norm import RMSNorm
from hymba.model.plain import is_plain

# range of softplus(dt bias) at initialisation (Mamba, section 3.6)
DT_MIN, DT_MAX = 1e-3, 1e-1
# range of -A at initialisation of Mamba-2 (its released code)
RATE_MIN, RATE_MAX = 1, 16


class Mamba(nn.Module):
    """Mamba heads between the input projection and the norm of their branch (paper, section 2.1)."""

    def __init__(self, config: HymbaConfig):
        super().__init__()
        E, N, K, rank = config.d_inner, config.d_state, config.d_conv, config.dt_rank
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
        (E, N), rank = self.A_log.shape, self.dt_weight.shape[1]
        _init_conv(self.conv_weight, self.conv_bias)
        nn.init.uniform_(self.dt_weight, -1 / math.sqrt(rank), 1 / math.sqrt(rank))
        _init_dt(self.dt_bias)
        with torch.no_grad():
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
        branch, u = ops.branch_conv(u, self.conv_weight, self.conv_bias, conv_state, layout.starts)
        given = (branch, self.x_proj.weight) if is_plain(self.x_proj) else (self.x_proj(branch), None)
        norms = [norm.weight for norm in (self.dt_norm, self.B_norm, self.C_norm)]
        # the bias of dt is added in float32, inside the scan
        dt, B, C = ops.selection(*given, self.dt_weight, norms, self.dt_norm.eps)
        A = -torch.exp(self.A_log.float())
        y, ssm_state = ops.selective_scan(
            u, dt, self.dt_bias, A, B, C, self.D, gate, ssm_state, layout.starts, layout.lengths
        )
        return y, after, ssm_state


class Mamba2(nn.Module):
    """The SSM of Mamba-2 (Dao and Gu, arXiv 2405.21060, section 7) between the projections of its block.

    A head's channels share one decay; B and C are inputs of the convolution, as x is, and all heads share them.
    """

    def __init__(self, config: HymbaConfig):
        super().__init__()
        E, N, K, heads = config.d_inner, config.d_state, config.d_conv, config.n_ssm_heads
        self.widths = (E, N, N)
        self.conv_weight = nn.Parameter(torch.empty(config.d_conv_inputs, K))
        self.conv_bias = nn.Parameter(torch.empty(config.d_conv_inputs))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = RMSNorm(E, eps=config.norm_eps)

    def init_weights(self) -> None:
        """As in the released code of Mamba-2: rates of decay are uniform, steps log-uniform."""
        _init_conv(self.conv_weight, self.conv_bias)
        _init_dt(self.dt_bias)
        with torch.no_grad():
            self.A_log.uniform_(RATE_MIN, RATE_MAX).log_()
        nn.init.ones_(self.D)

    def forward(
        self,
        u: Tensor,
        dt: Tensor,
        gate: Tensor,
        layout: Layout,
        conv_state: Tensor,
        ssm_state: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """u: (B, T, C) x, B and C before the convolution, dt: (B, T, S), gate: (B, T, E),
        conv_state: (B or 1, K - 1, C), ssm_state: (B or 1, E, N) float32

        -> y: (B, T, E), conv state and SSM state after each row's last token
        """
        after = conv_tail(conv_state, u, layout.lengths)
        u = ops.causal_conv(u, self.conv_weight, self.conv_bias, conv_state, layout.starts)
        x, B, C = u.split(self.widths, dim=-1)
        heads = self.A_log.shape[0]
        A = -torch.exp(self.A_log.float())
        y, state = ops.ssd(
            x.unflatten(-1, (heads, -1)), dt, self.dt_bias, A, B, C, self.D, gate.unflatten(-1, (heads, -1)),
            ssm_state.unflatten(1, (heads, -1)), layout.starts, layout.lengths,
        )  # fmt: skip
        return self.norm(y.flatten(2)), after, state.flatten(1, 2)


def _init_conv(weight: Tensor, bias: Tensor) -> None:
    K = weight.shape[1]
    nn.init.uniform_(weight, -1 / math.sqrt(K), 1 / math.sqrt(K))
    nn.init.zeros_(bias)


def _init_dt(bias: Tensor) -> None:
    with torch.no_grad():
        dt = torch.empty_like(bias).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


def conv_tail(state: Tensor, u: Tensor, lengths: Tensor | None) -> Tensor:
    """The last K - 1 inputs of each row's convolution, newest last.

    state: (B or 1, K - 1, E) the inputs before u, u: (B, T, E), lengths: (B,) tokens of u that count -> (B, K - 1, E)
    """
    kept, T = state.shape[1], u.shape[1]
    if lengths is None:
        u = u[:, max(0, T - kept) :]
        return torch.cat([state[:, u.shape[1] :].to(u.dtype).expand(u.shape[0], -1, -1), u], dim=1)
    past = torch.cat([state.to(u.dtype).expand(u.shape[0], -1, -1), u], dim=1)
    index = lengths[:, None] + torch.arange(kept, device=u.device)
    return past.gather(1, index[..., None].expand(-1, -1, u.shape[2]))
