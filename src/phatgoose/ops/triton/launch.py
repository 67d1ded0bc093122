"""How the Triton kernels are launched: blocks, grids and buffers between kernels.

Block sizes are powers of two, since Triton has no others, and at least 16 where `tl.dot` is used, since tensor
cores take no fewer rows or columns. Upper limits keep what a program holds at once in registers and shared memory.
In the names of constants B stands for a block: BN tokens, BE experts, BM tokens of a tile, BR rows of A or B, BD
columns of A (inputs), BO columns of B (outputs).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from phatgoose.ops.operands import KernelOperands, check_choice, check_is, tokens_of

FEW_TOKENS = 64
"""Up to this many tokens, each reads its own experts' rows. Above, tokens are sorted by expert, so that an
expert's rows are read once for all of its tokens. Chosen by arithmetic, not measured."""


@cache
def kernels() -> Any:
    """The kernels' module, imported when first wanted: it takes a second or two. Raises ImportError without Triton."""
    from phatgoose.ops.triton import kernels as triton_kernels

    return triton_kernels


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Starts a kernel. All are started here, so that tests and `compile_kernels.py` can look at what would run."""
    kernel[grid](*arguments, **constants)


def _on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes the tensors' GPU the current one: Triton launches on that, whatever GPU its tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def updated(
    rows: KernelOperands, u: Tensor, y: Tensor, gates: Tensor, k: int, into_y: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """y + Σ w Δ(u) of the k ≤ E experts with the highest scores, and who they are: int64 and float32 [N, k].

    Raises RoutingError if a tensor is of another shape, or the gates aren't in float32.
    """
    tokens_of(u, y, rows.a.shape[1], rows.b.shape[1])
    check_is("gates", gates, torch.float32, rows.scales.shape[0], rows.a.shape[1])
    flat = u.reshape(-1, u.shape[-1]).contiguous()
    chosen = torch.empty(flat.shape[0], k, dtype=torch.int64, device=u.device)
    weights = torch.empty(flat.shape[0], k, dtype=torch.float32, device=u.device)
    if not flat.shape[0]:
        return y, chosen, weights
    leaders = _score(flat, gates, k)
    return _run(rows, flat, y, into_y, chosen, weights, leaders), chosen, weights


def mixed(rows: KernelOperands, u: Tensor, y: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """y + Σ w Δ(u) of experts chosen elsewhere. chosen int64, weights float32: contiguous [N, k], N and k not 0.

    Raises:
        RoutingError: a tensor is of another shape. An index of E or more isn't noticed: to check it is to wait
            for the GPU.
    """
    check_choice(chosen, weights, tokens_of(u, y, rows.a.shape[1], rows.b.shape[1]))
    return _run(rows, u.contiguous(), y, False, chosen, weights, None)


def _run(
    rows: KernelOperands,
    u: Tensor,
    y: Tensor,
    into_y: bool,
    chosen: Tensor,
    weights: Tensor,
    leaders: Tensor | None,
) -> Tensor:
    if not y.is_contiguous():
        y, into_y = y.contiguous(), True
    out = y if into_y else torch.empty_like(y)
    call = _Call(rows, u, y, out, chosen, weights, leaders)
    with _on_device(u.device):
        (_few if call.n <= FEW_TOKENS else _grouped)(call)
    return out


@dataclass(eq=False)
class _Call:
    """Contiguous u [n, d_in], y and out [n, d_out] (out may be y), chosen int64 and weights float32 [n, k]."""

    rows: KernelOperands
    u: Tensor
    y: Tensor
    out: Tensor
    chosen: Tensor
    weights: Tensor
    leaders: Tensor | None = None
    """int64 [n, splits, K2]: `_score`'s candidates, of which the choice is still to be made. None if it is made."""

    def __post_init__(self) -> None:
        (self.n, self.k), self.k2 = self.chosen.shape, _power(self.chosen.shape[1])
        # A u of each pair of token and choice, which shrink writes and expand reads. There is room for the highest
        # rank, so that no rank is asked of the GPU; what is beyond an expert's rank is never read.
        self.h = torch.empty(
            self.n * self.k, max(1, self.rows.widest), dtype=torch.float32, device=self.u.device
        )
        splits = 1 if self.leaders is None else self.leaders.shape[1]
        self.merge: dict[str, Any] = {
            "K": self.k,
            "K2": self.k2,
            "W": _power(splits * self.k2),
            "SCORED": self.leaders is not None,
        }
        self.splits = splits


def _few(call: _Call) -> None:
    """Every pair of token and choice is computed by itself: nothing is sorted.

    Few pairs get small blocks. These make more programs, so that more of the GPU's processors have work.
    """
    rows, pairs = call.rows, call.n * call.k
    widest, (d_in, d_out) = call.h.shape[1], (rows.a.shape[1], rows.b.shape[1])
    # A program adds up a block [rows, inputs] of A in registers. Fewer rows leave room for more inputs: 8192 values.
    block = min(_power(widest), 4 if pairs <= 16 else 16)
    launch(
        kernels().shrink_few, (pairs, -(-widest // block)),
        call.u, rows.a, *rows.owners, rows.scales, call.leaders, call.chosen, call.weights, call.h,
        d_in, widest, call.n, call.splits,
        **call.merge, BR=block, BD=min(_power(d_in), 8192 // block),
    )  # fmt: skip
    # Each program adds all k choices, so that y is read and written once. Of B it reads 16 rows at a time.
    columns = min(_power(d_out), 64 if call.n <= 8 else 256)
    launch(
        kernels().expand_few, (call.n, -(-d_out // columns)),
        call.y, rows.b, *rows.owners, call.chosen, call.h, call.out, d_out, widest,
        K=call.k, BR=min(_power(widest), 16), BO=columns,
    )  # fmt: skip


def _grouped(call: _Call) -> None:
    """Tokens are sorted by expert, for each of the k choices separately. An expert's rows are read once for a
    tile of tokens.

    A tile holds as many tokens as an expert has on average, between the 16 rows that tensor cores need and 64.
    """
    rows, n, k = call.rows, call.n, call.k
    experts, widest, device = rows.scales.shape[0], call.h.shape[1], call.u.device
    d_in, d_out = rows.a.shape[1], rows.b.shape[1]
    tile = min(64, max(16, _power(n // (experts + 1))))
    # Σ ⌈n_e / tile⌉ is never more. How many tiles there are isn't asked of the GPU; programs without one end at once.
    tiles = (n + min(n, experts + 1) * (tile - 1)) // tile
    # Zeros, because `finish` counts up, and a tile of size 0 is one that `plan` never filled.
    zeros = torch.zeros(k * (experts + 1 + 3 * tiles), dtype=torch.int32, device=device)
    counts, tables = zeros.split([k * (experts + 1), 3 * k * tiles])
    owners, slots = torch.empty(2, k, n, dtype=torch.int32, device=device)
    # `finish` holds all keys of its tokens, W for each: 4096 in all, or one token's.
    block = max(1, min(16, 4096 // call.merge["W"]))
    launch(
        kernels().finish, (-(-n // block),),
        call.leaders, call.chosen, call.weights, owners, counts, n, experts, call.splits, **call.merge, BN=block,
    )  # fmt: skip
    # `plan` looks through all n tokens, 1024 at a time, for those of its expert. One more owner, the last, stands for
    # "nothing chosen".
    launch(
        kernels().plan, (k, experts + 1), owners, counts, slots, tables, n, experts, tiles,
        E2=_power(experts + 1), BM=tile, BP=min(_power(n), 1024),
    )  # fmt: skip
    # One program for up to 64 rows: ranks are rarely higher, and then u is read once.
    block = min(64, max(16, _power(widest)))
    launch(
        kernels().shrink_grouped, (k * tiles, -(-widest // block)),
        call.u, rows.a, *rows.owners, rows.scales, call.weights, slots, tables, call.h, d_in, widest, n, experts, tiles,
        K=k, BM=tile, BR=block, BD=min(max(16, _power(d_in)), 64),
    )  # fmt: skip
    # With two choices, the first one's product is kept in the output's dtype, as torch would. With more,
    # sums of sums are kept, which float32 must hold.
    partial = torch.empty_like(call.out, dtype=call.out.dtype if k == 2 else torch.float32) if k > 1 else None
    columns = min(max(16, _power(d_out)), 128)
    for j in range(k):
        launch(
            kernels().expand_grouped, (tiles, -(-d_out // columns)),
            call.y, rows.b, *rows.owners, slots, tables, call.h, partial, call.out, d_out, widest, n, experts, tiles, j,
            K=k, FIRST=j == 0, LAST=j == k - 1, BM=tile, BR=min(block, 32), BO=columns,
        )  # fmt: skip


def _score(u: Tensor, gates: Tensor, k: int) -> Tensor:
    """Each token's k best of each split of the experts, as keys: int64 [n, splits, K2].

    One program scores a block of tokens against one split. Tokens alone would leave most of a GPU idle when
    there are few of them, so the experts are split until there are two programs a processor. `finish` or
    `shrink_few` chooses among the splits' best.
    """
    (n, d), experts, k2 = u.shape, gates.shape[0], _power(k)
    # One or two tokens: tensor cores take at least 16 rows, which would be padding. So a program has one
    # token and four gates, and reads d in long pieces.
    few = n <= 2
    # More tokens: a larger block reads u and the gates less often, but makes fewer programs. Above 1024
    # tokens there are enough.
    tokens = 1 if few else 16 if n <= 1024 else 64
    block = 4 if few else 16 if n <= 1024 or experts <= 16 else 64
    # Two programs a processor, but no split without experts, and at most 1024 keys a token: one program
    # merges them later.
    programs = -(-2 * _processors(u.device) // -(-n // tokens))
    splits = max(1, min(-(-experts // block), programs, 1024 // k2))
    each = -(-experts // (splits * block)) * block
    splits = -(-experts // each)
    leaders = torch.empty(n, splits, k2, dtype=torch.int64, device=u.device)
    with _on_device(u.device):
        launch(
            kernels().score, (-(-n // tokens), splits), u, gates, leaders, n, experts, d, each,
            K=k, K2=k2, BN=tokens, BE=block, BD=min(max(16, _power(d)), 2048 if few else 64),
            num_warps=8 if few else 4, num_stages=6 if tokens == 16 else 3,
        )  # fmt: skip
    return leaders


def _power(value: int) -> int:
    """The least power of two that is at least `value`."""
    return 1 << max(0, value - 1).bit_length()
