"""In which form an answer goes out: the explicit `format`, else what Accept likes best (RFC 9110, 12.5.1)."""

from collections.abc import Mapping

JSON, PNG, NPY = "application/json", "image/png", "application/x-npy"
TYPES = {"json": JSON, "png": PNG, "npy": NPY}


class NothingAcceptable(ValueError):
    pass


def choose_type(offered: list[str], explicit: str | None, accept: str) -> str:
    """The best liked of the offered types; the first of them where the client has no preference."""
    if explicit is not None:
        return TYPES[explicit]
    liking = read_liking(accept) or {"*/*": 1.0}
    best = max(offered, key=lambda media_type: rate(media_type, liking))
    if not rate(best, liking):
        raise NothingAcceptable(f"the Accept header names nothing that is offered: {', '.join(offered)}")
    return best


def read_liking(accept: str) -> dict[str, float]:
    liking = {}
    for entry in accept.lower().split(","):
        media_range, *parameters = (part.strip() for part in entry.split(";"))
        weights = [value.strip() for name, _, value in (p.partition("=") for p in parameters) if name.strip() == "q"]
        if media_range:
            liking[media_range] = read_weight(weights[0]) if weights else 1.0
    return liking


def read_weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        return 0.0
    return weight if 0 <= weight <= 1 else 0.0


def rate(media_type: str, liking: Mapping[str, float]) -> float:
    """The most specific range that matches decides."""
    family = media_type.partition("/")[0]
    return next((liking[key] for key in (media_type, f"{family}/*", "*/*") if key in liking), 0.0)
