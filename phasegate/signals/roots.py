"""Take square roots with the same bits on every processor."""

from torch import Tensor


def root(x: Tensor) -> Tensor:
    """Return the square roots of x of any shape, right to the last or last but one bit.

    `torch.sqrt`, and so `pow(0.5)`, Adam unless it is fused, and `cdist` by products, are MKL's vector functions: under
    MKL_CBWR=COMPATIBLE a fifth of their float32 roots are rounded wrongly, and others on an emulated processor than
    on an Intel Xeon. `rsqrt` divides by the processor's own root, which is exact everywhere.
    """
    return x.rsqrt().reciprocal()
