"""Data augmentation: random affine maps, one per image, applied on the device of the images."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class AffineMaps:
    """Shift, rotate, scale and mirror square images at random, padding with zeros; by default, leave them alone.

    Args:
        shift: maximal shift in pixels, along either axis and in either direction.
        whole_pixels: shift by whole pixels, which keeps all values.
        rotation: maximal rotation in degrees, in either direction.
        scale: each axis is scaled by its own factor, from 1 / (1 + scale) to 1 + scale.
        mirror: mirror half of the images left to right.
    """

    shift: float = 0.0
    whole_pixels: bool = False
    rotation: float = 0.0
    scale: float = 0.0
    mirror: bool = False

    def __str__(self) -> str:
        parts = {
            f"shifts up to {self.shift:g} pixels": self.shift,
            f"rotations up to {self.rotation:g} degrees": self.rotation,
            f"scales up to {1 + self.scale:g}": self.scale,
            "mirror images": self.mirror,
        }
        return ", ".join(text for text, amount in parts.items() if amount)

    def draw(self, count: int, random: np.random.Generator) -> Tensor:
        """Draw maps from positions in the new image to positions in the old one, relative to the centres.

        Returns:
            (count, 2, 3) float32 on the CPU: a 2 × 2 matrix, then a shift in pixels.
        """
        angle, *logs, x, y, side = 2 * random.random((6, count)) - 1
        angle = angle * math.radians(self.rotation)
        across, down = (np.exp(log * math.log1p(self.scale)) for log in logs)
        if self.mirror:
            across = np.where(side < 0, -across, across)
        shifts = np.stack([x, y])
        if self.whole_pixels:  # all shifts with equal probability
            shifts = np.floor((shifts + 1) / 2 * (2 * int(self.shift) + 1)) - int(self.shift)
        else:
            shifts = shifts * self.shift
        cos, sin = np.cos(angle), np.sin(angle)
        maps = np.array([[cos * across, -sin * down, shifts[0]], [sin * across, cos * down, shifts[1]]])
        return torch.from_numpy(maps.transpose(2, 0, 1).astype(np.float32))

    def __call__(self, pixels: Tensor, maps: Tensor) -> Tensor:
        """Apply a map from :meth:`draw` to each image (n, L, C) uint8, row by row, with linear interpolation.

        Raises:
            ValueError: the images are not square.
        """
        n, L, C = pixels.shape
        side = math.isqrt(L)
        if side * side != L:
            raise ValueError(f"pixels: expected square images, got {L} pixels")
        images = pixels.view(n, side, side, C).permute(0, 3, 1, 2).float()
        maps = torch.cat([maps[..., :2], maps[..., 2:] * (2 / side)], dim=2)  # grid coordinates run from -1 to 1
        grid = F.affine_grid(maps, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)
        return images.round_().to(torch.uint8).permute(0, 2, 3, 1).reshape(n, L, C)
