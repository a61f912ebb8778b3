"""The options of a request, read from its query string by the one model that describes them."""

import inspect
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, get_args

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

Options = TypeVar("Options", bound=BaseModel)

MOST_PARAMETERS = 32  # of a request: more than any route has


class OptionsRoute(APIRoute):
    """For handlers of a request and, where there are any, its `options`.

    FastAPI describes such a route, but its own way to read the options, made for dependencies of any kind, takes half
    as long as all that the handler does.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = self.endpoint
        options = inspect.signature(answer, eval_str=True).parameters.get("options")
        if options is None:
            return super().get_route_handler()
        model = get_args(options.annotation)[0]  # of Annotated[model, Query()]

        async def handle(request: Request) -> Response:
            response: Response = await answer(request, read_options(request, model))
            return response

        return handle


def read_options(request: Request, model: type[Options]) -> Options:
    given = Counter(name for name, _ in request.query_params.multi_items())
    if given.total() > MOST_PARAMETERS:  # each unknown one would be named in the answer
        told = {"type": "too_many", "msg": f"{given.total()} parameters came, at most {MOST_PARAMETERS} are read"}
        raise RequestValidationError([{**told, "loc": ("query", "*")}])
    if repeated := sorted(name for name, count in given.items() if count > 1):
        told = {"type": "repeated", "msg": "this parameter is given more than once; which one is meant?"}
        raise RequestValidationError([{**told, "loc": ("query", name)} for name in repeated])
    try:
        return model.model_validate(dict(request.query_params))
    except ValidationError as refused:
        errors = [{**error, "loc": ("query", *error["loc"])} for error in refused.errors(include_url=False)]
        raise RequestValidationError(errors) from None
