"""Data augmentation."""

import numpy as np
import pytest
import torch

import cifar10.model
import pmnist.model
from trellisnet.data.augmentation import AffineMaps
from trellisnet.data.pixels import normalise, permutation
from trellisnet.models import TrellisClassifier
from trellisnet.training.tasks import Classification

TASKS = pytest.mark.parametrize(("module", "side", "colours"), [(pmnist.model, 28, 1), (cifar10.model, 32, 3)])


def images(n, side, colours):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(256, (n, side * side, colours), generator=generator, dtype=torch.uint8)


def draws(maps, n, seed=3):
    return maps.draw(n, np.random.default_rng(seed))


@pytest.mark.parametrize(("side", "colours"), [(28, 1), (32, 3), (7, 2)])
def test_by_default_images_are_unchanged(side, colours):
    pixels, maps = images(50, side, colours), AffineMaps()
    assert torch.equal(maps(pixels, draws(maps, 50)), pixels)


def test_whole_shifts_and_mirror_images_move_values_and_pad_with_zeros():
    pixels = images(1, 5, 2)
    image = pixels.view(5, 5, 2)
    augmented = AffineMaps(shift=2, whole_pixels=True)(pixels, torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, -2.0]]]))
    expected = torch.zeros_like(image)
    expected[2:, :4] = image[:3, 1:]  # read one pixel further right and two further up
    assert torch.equal(augmented.view(5, 5, 2), expected)
    mirrored = AffineMaps(mirror=True)(pixels, torch.tensor([[[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]))
    assert torch.equal(mirrored.view(5, 5, 2), image.flip(1))


def test_a_quarter_turn_is_exact_and_a_half_pixel_is_the_mean_of_two():
    pixels = images(1, 6, 1)
    image = pixels.view(6, 6)
    turned = AffineMaps()(pixels, torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]]))
    assert torch.equal(turned.view(6, 6), image.rot90(1))
    half = AffineMaps()(pixels, torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]])).view(6, 6)
    between = (image[:, :-1].float() + image[:, 1:].float()) / 2
    assert (half[:, :-1].float() - between).abs().max() <= 0.5  # rounded


def test_amounts_are_as_requested():
    maps = draws(AffineMaps(shift=2, rotation=10, scale=0.1, mirror=True), 4000).double()
    matrix, shift = maps[..., :2], maps[..., 2]
    factors = matrix.square().sum(1).sqrt()  # of the axes
    assert factors.min() > 1 / 1.1 - 1e-6
    assert factors.max() < 1.1 + 1e-6
    assert factors.max() - factors.min() > 0.19
    angle = torch.rad2deg(torch.atan2(-matrix[:, 0, 1], matrix[:, 1, 1]))
    assert 9.9 < angle.abs().max() <= 10 + 1e-4
    assert 1.99 < shift.abs().max() <= 2
    assert abs((torch.linalg.det(matrix) < 0).double().mean() - 0.5) < 0.03
    whole = draws(AffineMaps(shift=4, whole_pixels=True), 9000)[..., 2]
    values, counts = whole.unique(return_counts=True)
    assert values.tolist() == list(range(-4, 5))
    assert counts.min() > 1800  # of 2000 each


@TASKS
def test_images_of_the_tasks(module, side, colours):
    maps, pixels = module.Config.augmentation, images(64, side, colours)
    drawn = draws(maps, 64)
    augmented = maps(pixels, drawn)
    assert (augmented.shape, augmented.dtype) == (pixels.shape, torch.uint8)
    assert torch.equal(augmented, maps(pixels, draws(maps, 64)))
    assert torch.equal(augmented[10:20], maps(pixels[10:20], drawn[10:20]))  # independent of the rest of the batch
    assert not torch.equal(augmented, maps(pixels, draws(maps, 64, seed=4)))
    bright = maps(torch.full_like(pixels, 255), drawn)
    assert bright.float().mean() > 200
    with pytest.raises(ValueError, match="expected square images, got 6 pixels"):
        maps(pixels[:, :6], drawn)


@TASKS
def test_only_training_batches_are_augmented_before_they_are_permuted(module, side, colours):
    maps, pixels = module.Config.augmentation, images(30, side, colours)
    labels = torch.arange(30) % 10
    order = permutation(side * side, 0)
    model = TrellisClassifier(colours, 10, 12, 2)

    def task(augment, seed=8, size=8):
        return Classification(
            model, batch_size=size, seed=seed, augment=augment, eval_batch_size=30,
            prepare=lambda x: normalise(x[:, order], module.Config.mean, module.Config.std),
        )  # fmt: skip

    plain, varied = (list(task(a).batches((pixels, labels), 2)) for a in (None, maps))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(plain, varied, strict=True))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(plain, varied, strict=True))
    shuffled = torch.from_numpy(np.random.default_rng([8, 2]).permutation(30))
    drawn = maps.draw(30, np.random.default_rng([8, 2, 1]))
    by_hand = normalise(maps(pixels[shuffled], drawn)[:, order], module.Config.mean, module.Config.std)
    assert torch.equal(torch.cat([inputs for inputs, _ in varied]), by_hand)

    batches = task(maps).batches((pixels, labels), 2)  # any batch, in any order, and repeatedly
    assert all(torch.equal(batches[i][0], varied[i][0]) for i in (3, 1, 1))
    other = task(maps).batches((pixels, labels), 3)
    assert not torch.equal(other[0][0], varied[0][0])
    assert task(maps).evaluate((pixels, labels)) == task(None).evaluate((pixels, labels))
