import pytest

from app.negotiation import JSON, NPY, PNG, NothingAcceptable, choose_type

OFFERED = [JSON, PNG, NPY]


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("image/png", PNG),
        ("image/*", PNG),
        ("image/png;q=0.5, application/json;q=0.9", JSON),
        ("image/png;q=0.9, application/json;q=0.5", PNG),
        ("application/json;q=0, */*", PNG),
        ("text/html, application/x-npy;q=0.1", NPY),
        ("IMAGE/PNG", PNG),
        ("image/avif,image/webp,image/png,*/*;q=0.8", PNG),
        ("text/html,application/xhtml+xml,*/*;q=0.8", JSON),
    ],
)
def test_the_best_liked_type_is_chosen(accept, chosen):
    assert choose_type(OFFERED, None, accept) == chosen


def test_the_explicit_format_beats_accept():
    assert choose_type(OFFERED, "npy", "image/png") == NPY
    assert choose_type(OFFERED, "png", "text/html") == PNG


@pytest.mark.parametrize("accept", ["text/html", "image/gif, text/*", "*/*;q=0", "image/png;q=nonsense"])
def test_nothing_acceptable_is_said(accept):
    with pytest.raises(NothingAcceptable, match="application/json, image/png, application/x-npy"):
        choose_type(OFFERED, None, accept)
