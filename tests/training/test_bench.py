from training.bench import Speeds, measure


def test_loop_and_bare_passes_are_both_measured(small_fit):
    speeds = measure(small_fit, steps=2)
    assert speeds.bare_images_per_s > 0 and speeds.loop_images_per_s > 0
    assert 0 < speeds.peak_memory_mib < 100_000


def test_the_share_is_what_the_loop_keeps_of_the_bare_speed():
    assert Speeds(bare_images_per_s=100, loop_images_per_s=85, peak_memory_mib=1).share == 0.85
