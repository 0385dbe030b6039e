"""Pictures of saliencies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

np: Any = pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
from saliency_reg.integrations.plot import draw_saliency  # noqa: E402

from .support import NAN, tick_labels  # noqa: E402


def panel(figure: Any, row: int, column: int, size: int) -> Any:
    """``[size, size, 3]``: a panel, in the pixels of the image; column 0 is the image itself."""
    axes = figure.axes[0]
    x, y = axes.get_xticks()[column], axes.get_yticks()[row]
    pixels = axes.images[0].get_array()
    top, left = round(y - (size - 1) / 2), round(x - (size - 1) / 2)
    return pixels[top : top + size, left : left + size].astype(int)


def hue(pixels: Any) -> Any:
    """Red minus blue: above 0 is orange, below 0 blue, 0 grey."""
    return pixels[..., 0] - pixels[..., 2]


def test_hot_corner_in_the_right_panel() -> None:
    maps = torch.zeros(3, 2, 4, 4)
    maps[1, 0, 0, 3] = 2.0  # task 1, image 0, upper right
    maps[2, 1, 3, 0] = 5.0  # task 2, image 1, lower left
    figure = draw_saliency(torch.full((2, 3, 16, 16), 0.5), maps, ["a", "b", "c"])
    for task in range(3):
        for image in range(2):
            colour = hue(panel(figure, image, task + 1, 16))
            if (task, image) == (1, 0):
                assert colour[:3, -3:].min() > 140
                assert abs(colour[8:, :8]).max() == 0
            elif (task, image) == (2, 1):
                assert colour[-3:, :3].min() > 140
                assert abs(colour[:8, 8:]).max() == 0
            else:
                assert abs(colour).max() == 0
    assert tick_labels(figure.axes[0].yaxis) == ["s = 2", "s = 5"]


def test_hot_corner_in_the_drawn_pixels() -> None:
    maps = torch.zeros(2, 1, 2, 2)
    maps[1, 0, 0, 0] = 1.0
    figure = draw_saliency(torch.full((1, 1, 8, 8), 0.5), maps)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba()).astype(int)
    (x,), (y,) = figure.axes[0].get_xticks()[2:], figure.axes[0].get_yticks()
    for side, expected in ((-3, True), (3, False)):
        across, up = figure.axes[0].transData.transform((x + side, y + side))
        assert bool(hue(pixels[len(pixels) - 1 - int(up), int(across)]) > 140) is expected


def test_scale_is_symmetric_and_shared_by_the_row() -> None:
    maps = torch.zeros(3, 2, 8, 8)
    maps[0], maps[1], maps[2] = 1.0, -1.0, -0.25
    maps[:, 1] *= 1e-3  # the second row has a scale of its own
    figure = draw_saliency(torch.full((2, 3, 8, 8), 0.5), maps)
    for row in range(2):
        plus, minus, little = (panel(figure, row, column, 8)[4, 4] for column in (1, 2, 3))
        assert hue(plus) > 150
        assert hue(minus) < -150
        assert -100 < hue(little) < -10
    assert (panel(figure, 0, 3, 8) == panel(figure, 1, 3, 8)).all()
    assert tick_labels(figure.axes[0].yaxis) == ["s = 1", "s = 0.001"]
    assert tick_labels(figure.axes[1].xaxis) == ["-s", "0", "s"]


def test_opposite_maps_are_equally_opaque() -> None:
    """What shows of the background is the same for a value and its negative."""
    maps = torch.tensor([0.5, -0.5, 1.0])[:, None, None, None].expand(3, 1, 4, 4)
    black, white = (draw_saliency(torch.full((1, 3, 4, 4), level), maps) for level in (0.0, 1.0))
    through = [panel(white, 0, column, 4) - panel(black, 0, column, 4) for column in (1, 2, 3)]
    assert abs(through[0] - through[1]).max() <= 1
    assert through[0].min() > through[2].max() + 50


def test_maps_without_negative_values_have_a_one_sided_scale() -> None:
    figure = draw_saliency(torch.rand(1, 3, 8, 8), torch.rand(2, 1, 3, 3))
    assert tick_labels(figure.axes[1].xaxis) == ["0", "s/2", "s"]
    assert figure.axes[1].get_xlim() == (0.0, 1.0)
    almost = torch.rand(2, 1, 3, 3) - 1e-9  # rounding
    assert draw_saliency(torch.rand(1, 3, 8, 8), almost).axes[1].get_xlim() == (0.0, 1.0)


def test_zero_maps_are_flat_and_marked() -> None:
    maps = torch.randn(2, 2, 4, 4)
    maps[0, 0] = maps[:, 1] = 0
    figure = draw_saliency(torch.rand(2, 3, 8, 8), maps)
    for row, column in ((0, 1), (1, 1), (1, 2)):
        assert abs(hue(panel(figure, row, column, 8))).max() == 0
    assert abs(hue(panel(figure, 0, 2, 8))).max() > 50
    assert tick_labels(figure.axes[0].yaxis)[1] == "all 0"
    assert [text.get_text() for text in figure.axes[0].texts] == ["0"] * 3


def test_rounding_noise_beside_a_real_map_is_flat() -> None:
    maps = torch.stack([torch.randn(1, 4, 4), 1e-7 * torch.randn(1, 4, 4)])
    figure = draw_saliency(torch.full((1, 3, 8, 8), 0.5), maps)
    assert abs(hue(panel(figure, 0, 2, 8))).max() == 0


def test_first_column_is_the_image() -> None:
    images = torch.rand(2, 3, 8, 8)
    expected = (255 * images).round().permute(0, 2, 3, 1).int().numpy()
    maps = torch.rand(1, 2, 4, 4)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    normalised = (images - mean[:, None, None]) / std[:, None, None]
    for figure in (
        draw_saliency(images, maps),
        draw_saliency((255 * images).round().byte(), maps),
        draw_saliency(normalised, maps, mean=mean, std=std.tolist()),
        draw_saliency((2 * images - 1).numpy(), maps.numpy(), mean=0.5, std=0.5),
        draw_saliency(images.tolist(), maps.tolist()),
        draw_saliency(list(images), [list(own) for own in maps]),
        draw_saliency(images.requires_grad_(), maps),
    ):
        for row in range(2):
            assert abs(panel(figure, row, 0, 8) - expected[row]).max() <= 1
    grey = draw_saliency(images[:, :1].detach(), maps)
    assert (panel(grey, 0, 0, 8) == expected[0, :, :, :1]).all()


def test_maps_are_resized_to_the_image() -> None:
    ramp = torch.linspace(0, 1, 4).expand(1, 1, 4, 4)
    colours = hue(panel(draw_saliency(torch.full((1, 3, 32, 32), 0.5), ramp), 0, 1, 32))
    assert (np.diff(colours[16]) >= 0).all()  # smooth, no steps of eight pixels
    assert len(set(colours[16].tolist())) > 15
    # A larger map is averaged, not sampled.
    checks = torch.ones(16, 16)
    checks[::2] = 0
    averaged = hue(panel(draw_saliency(torch.full((1, 3, 4, 4), 0.5), checks[None, None]), 0, 1, 4))
    assert averaged.max() - averaged.min() < 40
    assert averaged.min() > 20


def test_bfloat16_and_images_that_are_not_square() -> None:
    figure = draw_saliency(torch.rand(1, 3, 4, 12).bfloat16(), torch.randn(2, 1, 2, 6).bfloat16())
    assert figure.axes[0].images[0].get_array().shape[:2] == (4 + 2 * 2, 3 * 12 + 4 * 2)


def test_large_images_are_made_smaller() -> None:
    pixels = draw_saliency(torch.rand(1, 3, 600, 300), torch.rand(1, 1, 7, 7)).axes[0].images[0].get_array()
    assert pixels.shape[0] < 300


def test_labels_are_framed() -> None:
    figure = draw_saliency(
        torch.rand(2, 3, 8, 8), torch.rand(3, 2, 4, 4), labels=torch.tensor([[1.0, 0.0, NAN], [-1.0, 0.0, 1.0]])
    )
    frames = [patch.get_bbox() for patch in figure.axes[0].patches]
    across, down = figure.axes[0].get_xticks(), figure.axes[0].get_yticks()
    found = [
        (row, column)
        for frame in frames
        for row in range(2)
        for column in range(4)
        if frame.contains(across[column], down[row])
    ]
    assert found == [(0, 1), (1, 3)]
    for frame in frames:  # around the panel, not on it
        assert 8 < frame.width < 8 + 2 * 2
    assert "black frame" in figure.axes[1].get_xlabel()
    without = draw_saliency(torch.rand(2, 3, 8, 8), torch.rand(3, 2, 4, 4))
    assert len(without.axes[0].patches) == 0
    assert "black frame" not in without.axes[1].get_xlabel()
