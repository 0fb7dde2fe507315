"""Poolings of averages over the locations: of the features (GAP), of their products (B-CNN), sketched (CBP).

Shapes: B images, C channels, M = H * W locations; X is the C x M matrix of an image's local features.
B-CNN and CBP end in the signed square root sign(y) sqrt(|y| + 1e-8) and l2 normalisation. All compute in float32
(float64 for float64 input), products with autocast off: nothing here is as ill-conditioned as a covariance's spectrum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fgvc.pooling.registry import Pooling, register_pooling, whole_number
from fgvc.spectral.precision import result_dtype, without_autocast


@register_pooling("gap", "GAP", source="Lin, Chen, Yan, ICLR 2014", reduced=False)
class GlobalAveragePooling(Pooling):
    """Mean over the locations: (B, C, H, W) -> (B, C), float32 (float64 for float64 input)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def pool(self, x: Tensor) -> Tensor:
        return x.to(result_dtype(x)).flatten(2).mean(dim=-1)


@register_pooling("bilinear", "B-CNN", source="Lin, RoyChowdhury, Maji, ICCV 2015")
class BilinearPooling(Pooling):
    """B-CNN: the matrix X X^T / M, signed square root, l2 norm 1: (B, C, H, W) -> (B, C^2), row by row.

    Lin, RoyChowdhury, Maji, ICCV 2015, with both streams the same network. An image of zeros gives zeros and a zero
    gradient.

    Args:
        channels: C, at least 1.

    Raises:
        ConfigError: `channels` is no whole number of at least 1.
        ValueError, TypeError: in `forward`, for features of another shape or dtype.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels * channels)

    def pool(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            features = x.flatten(2).to(result_dtype(x))
            moments = features @ features.mT / features.shape[-1]
            return signed_root(moments.flatten(1))


@register_pooling("compact_bilinear", "CBP", source="Gao, Beijbom, Zhang, Darrell, CVPR 2016")
class CompactBilinearPooling(Pooling):
    """CBP by tensor sketch: X X^T projected to D random bins, signed square root, l2 norm 1: (B, C, H, W) -> (B, D).

    Gao, Beijbom, Zhang, Darrell, CVPR 2016, after Pham, Pagh, KDD 2013. See `sketch` for what is computed. The hashes
    and signs are drawn from `seed` alone and are buffers: a state_dict carries them, so that loading it gives the same
    sketch whatever the seed. Nothing is trainable. An image of zeros gives zeros and a zero gradient.

    Args:
        channels: C, at least 1.
        out_features: D, at least 1.
        seed: Seed of the hashes and signs, 0 <= seed < 2^64; torch's global generator is neither read nor advanced.

    Raises:
        ConfigError: an argument is no whole number or out of range.
        ValueError, TypeError: in `forward` and `sketch`, for features of another shape or dtype.
    """

    hashes: Tensor
    signs: Tensor

    def __init__(self, channels: int, out_features: int = 8192, seed: int = 0) -> None:
        super().__init__(channels, out_features)
        generator = torch.Generator(device="cpu").manual_seed(whole_number("seed", seed, at_least=0, below=2**64))
        shape = (2, channels)  # one row for each of the two count sketches
        hashes = torch.randint(out_features, shape, generator=generator, device="cpu")
        signs = 2 * torch.randint(2, shape, generator=generator, device="cpu") - 1
        self.register_buffer("hashes", hashes)
        self.register_buffer("signs", signs.to(torch.int8))  # integers: module.half() leaves them alone

    def pool(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            return signed_root(self.sketch(x))

    def sketch(self, x: Tensor) -> Tensor:
        """Tensor sketch of X X^T, before the square root and the norm, summed (not averaged) over locations.

        out[k] = sum of s1_i s2_j (X X^T)_ij over the pairs (i, j) with (h1_i + h2_j) mod D = k. This is the published
        sum over locations of irfft(rfft(count sketch 1) rfft(count sketch 2)) with the order of the sums exchanged: one
        matrix product and C^2 additions per image instead of 2 M transforms of length D, and B C^2 numbers in memory
        instead of several times B M D. The FFT form does less arithmetic only where C^2 far exceeds M D log D. Bins
        that no pair falls in are exactly 0 here, where an FFT leaves rounding errors for the square root to blow up.

        On CUDA the additions come in no fixed order, so the last bits differ from call to call, unless
        torch.use_deterministic_algorithms(True) is set; the backward pass only gathers. On a CPU the order is fixed.

        Args:
            x: (B, C, H, W), any floating dtype.

        Returns:
            (B, D), float32, or float64 for float64 input. For fixed x, y and random seeds, the inner product
            <sketch(x), sketch(y)> has the mean <X X^T, Y Y^T>.
        """
        self.check(x)
        with without_autocast(x):
            features = x.flatten(2).to(result_dtype(x))
            signs = self.signs.to(features.dtype).unsqueeze(-1)  # (2, C, 1)
            moments = (features * signs[0]) @ (features * signs[1]).mT
            bins = (self.hashes[0, :, None] + self.hashes[1]) % self.out_features  # (C, C)
            values = moments.flatten(1)
            empty = values.new_zeros(values.shape[0], self.out_features)
            return empty.scatter_add(1, bins.flatten().expand_as(values), values)


def signed_root(y: Tensor, eps: float = 1e-8) -> Tensor:
    """Signed square root and l2 norm of each row: (B, n) -> (B, n).

    `eps` bounds the slope of the root by 0.5 / sqrt(eps); at y = 0 autograd's slope is 0, as that of |y| and of the
    sign. A row of zeros stays zero.
    """
    return F.normalize(y.sign() * (y.abs() + eps).sqrt(), dim=1)
