"""Errors as answers: a status, and a body in the form of OpenAI's."""

import re
from typing import Any

from starlette.responses import Response

from loramem import errors
from loramem.endpoint.protocol import dumps

STATUS: tuple[tuple[type[errors.LoramemError], int, str], ...] = (
    (errors.KeyNotFound, 404, "key_not_found"),
    (errors.RecordError, 400, "invalid_key"),
    (errors.ArgumentError, 400, "invalid_request"),
    (errors.StoreError, 503, "store_unavailable"),
    (errors.OutOfMemory, 503, "out_of_memory"),
    (errors.ServerError, 502, "upstream_failed"),
    (errors.RecallError, 500, "recall_failed"),
    (errors.IntegrityError, 500, "not_as_committed"),
    (errors.LoramemError, 500, "server_error"),
)
"""First match wins, so subclasses stand before their bases."""


def problem(error: errors.LoramemError) -> Response:
    """The response to an error of ours."""
    if isinstance(error, errors.RequestRefused):
        status, code, param = error.status, error.code, error.param
    else:
        status, code = next((status, code) for kind, status, code in STATUS if isinstance(error, kind))
        param = None
    more: dict[str, Any] = {}
    if isinstance(error, errors.KeyNotFound):
        more = {"close": list(error.close), "successor": error.successor}
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}.get(status, {})
    kind = "authentication_error" if status == 401 else "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": _line(error), "type": kind, "param": param, "code": code, **more}}
    return Response(dumps(body), status, headers, media_type="application/json")


def _line(error: errors.LoramemError) -> str:
    return re.sub(r"\s+", " ", str(error))
