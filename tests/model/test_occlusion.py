import numpy as np
import pytest

from model.occlusion import cut_groups, fall_of_logits, mask_groups


@pytest.mark.parametrize(("grid", "count"), [(10, 25), (10, 100), (7, 25)])
def test_groups_cover_the_grid_in_blocks(grid, count):
    groups = cut_groups(grid, count)
    assert groups.shape == (grid, grid)
    assert set(groups.ravel()) == set(range(count))
    for group in range(count):
        rows, columns = np.nonzero(groups == group)
        assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_each_mask_takes_away_its_group_and_nothing_else():
    groups = cut_groups(10, 25)
    keeps = mask_groups(groups)
    assert keeps.shape == (25, 100)
    assert (keeps.sum(axis=1) == 96).all() and (keeps.sum(axis=0) == 24).all()
    assert not keeps[7].reshape(10, 10)[groups == 7].any()


def test_a_class_falls_by_what_it_loses_with_each_group():
    groups = cut_groups(4, 4)
    whole = np.array([3.0, 1.0], np.float32)
    left = np.array([[3.0, 1.0], [1.0, 1.0], [3.0, 2.5], [3.0, 1.0]], np.float32)
    fall = fall_of_logits(whole, left, groups)
    assert fall.shape == (2, 4, 4)
    np.testing.assert_array_equal(fall[0], 2.0 * (groups == 1))
    np.testing.assert_array_equal(fall[1], -1.5 * (groups == 2))
