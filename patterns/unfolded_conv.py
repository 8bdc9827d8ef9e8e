"""A convolution as a linear layer of its unfolded input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from structfly.errors import ArgumentError

Pair = tuple[int, ...]


def unfolded_weight(conv: nn.Conv2d) -> Tensor:
    """(out, in * kh * kw), a view.

    Raises:
        ArgumentError: the convolution has groups, or pads with something other than zeros.
    """
    if conv.groups != 1:
        raise ArgumentError(f"a convolution with groups={conv.groups} has no single unfolded weight: groups=1 has")
    if conv.padding_mode != "zeros":
        raise ArgumentError(f'padding_mode={conv.padding_mode!r}: only "zeros"; pad the input before a layer without')
    return conv.weight.detach().flatten(1)


class UnfoldedConv2d(nn.Module):
    """``linear`` (in_channels * kh * kw -> out) of every patch of the input.

    Args:
        linear: applied to (N, patches, in_channels * kh * kw).
        kernel_size, stride, dilation: as :class:`torch.nn.Conv2d` has them.
        padding: the same; "same" and "valid", too.

    A 1 x 1 convolution takes the input as it is, without unfolding.
    """

    def __init__(self, linear: nn.Module, kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair) -> None:
        super().__init__()
        self.linear, self.kernel_size, self.stride, self.dilation = linear, kernel_size, stride, dilation
        if padding == "valid":
            padding = (0, 0)
        if isinstance(padding, str):
            spans = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
            margins = [(span // 2, span - span // 2) for span in spans]
        else:
            margins = [(each, each) for each in padding]
        self.margins = [*margins[1], *margins[0]]  # F.pad begins with the last dimension

    def forward(self, x: Tensor) -> Tensor:
        """(N, out, height, width) of x (N, in_channels, height, width)."""
        if any(self.margins):
            x = F.pad(x, self.margins)
        pairs = zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True)
        height, width = ((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in pairs)
        if self.kernel_size == (1, 1):
            patches = x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        else:
            patches = F.unfold(x, self.kernel_size, self.dilation, stride=self.stride)
        y: Tensor = self.linear(patches.mT).mT.unflatten(2, (height, width))
        return y
