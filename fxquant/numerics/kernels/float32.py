"""What x64 float32 instructions do that torch has no function for: fused multiply-add, and conversion to int32."""

from __future__ import annotations

import torch

INT32_SPAN = 2.0**31


def fused_multiply_add(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c rounded once to float32, as an FMA instruction has it; float32 operands that broadcast.

    a * b is exact in float64 (24 + 24 bits of 53). The sum is rounded to odd there: where float64 cannot hold it (its
    error, by Knuth's TwoSum, is not 0) and the result's last bit is even, its neighbour towards the error is taken. A
    number rounded to odd with 2 bits or more to spare rounds to float32 as the exact number does (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums", IEEE Transactions on Computers 57(4), 2008).
    """
    product, addend = a.to(torch.float64) * b.to(torch.float64), c.to(torch.float64)
    total = product + addend
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    infinity = torch.full_like(total, torch.inf)
    odd = torch.nextafter(total, torch.where(error > 0, infinity, -infinity))
    is_even = total.view(torch.int64).bitwise_and(1).eq(0)
    return torch.where(error.ne(0) & is_even, odd, total).to(torch.float32)


def round_to_int32(values: torch.Tensor) -> torch.Tensor:
    """float32 rounded half to even and converted to int32, in int64: what does not fit becomes -2^31, on x64."""
    rounded = torch.round(values)
    fits = (rounded >= -INT32_SPAN) & (rounded < INT32_SPAN)
    return torch.where(fits, rounded, torch.full_like(rounded, -INT32_SPAN)).to(torch.int64)
